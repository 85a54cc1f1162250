package check

import (
	"context"
	"fmt"
	"os/exec"
	"testing"
	"time"
)

func mosquitto(t *testing.T, more string) DeviceOptions {
	t.Helper()
	if _, err := exec.LookPath("mosquitto_pub"); err != nil {
		t.Skip("mosquitto_pub is not installed: the honest client is not shown")
	}
	w, err := NewWorld("localhost")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir() + "/world"
	if err := w.Save(dir); err != nil {
		t.Fatal(err)
	}
	return DeviceOptions{World: w, Dir: dir, Host: "localhost", Profile: General, Wait: 10 * time.Second, Step: 4 * time.Second, Patience: 2 * time.Second, Parallel: 8,
		Exec: "exec mosquitto_pub -h {host} -p {port} --cafile {cafile} --cert {cert} --key {key} -t t -m x" + more}
}

func TestMosquittoPub(t *testing.T) {
	o := mosquitto(t, "")
	r, err := Device(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range r.Results {
		rec := "-"
		if x.Recovers != nil {
			rec = fmt.Sprint(*x.Recovers)
		}
		t.Logf("%-24s %-12s %-6s %4d ms %s | %s %s | %s", x.ID, x.Verdict, rec, x.Took.Milliseconds(), x.Why, x.Evidence.Farthest, x.Evidence.Ended, x.Evidence.Output)
	}
	t.Logf("%v in %v", r.Counts(), r.Ended.Sub(r.Began))
}
