package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// call is one system call as strace wrote it down: where it began and where it ended.
type call struct {
	name, fd, args, result string
	begun, done            int // line numbers; done is 0 while it has not ended
}

var (
	traced  = regexp.MustCompile(`^(\d+) +(\w+)\((\d+<.*?>)(?:, |\)| <)(.*)$`)
	resumed = regexp.MustCompile(`^(\d+) +<\.\.\. (\w+) resumed>(.*)$`)
)

// calls reads the output of strace -f -yy.
func calls(text string) (list []*call) {
	open := map[string]*call{} // by thread
	for i, line := range strings.Split(text, "\n") {
		if m := resumed.FindStringSubmatch(line); m != nil {
			if c := open[m[1]]; c != nil {
				c.done, c.result = i+1, resultOf(m[3])
				delete(open, m[1])
			}
			continue
		}
		m := traced.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		c := &call{name: m[2], fd: m[3], args: m[4], begun: i + 1}
		list = append(list, c)
		if strings.Contains(line, "<unfinished ...>") {
			open[m[1]] = c
			continue
		}
		c.done, c.result = i+1, resultOf(line)
	}
	return list
}

func resultOf(line string) string { return strings.TrimSpace(line[strings.LastIndex(line, "=")+1:]) }

// TestFsyncBeforePuback: what the kernel saw of the real server. The frame with the
// payload is written to a block file of the log, that file is synced, and only after the
// sync has ended begins the write of the PUBACK to the client's socket.
func TestFsyncBeforePuback(t *testing.T) {
	needTools(t, "strace")
	const publishes = 30
	for _, qos := range []byte{1, 2} {
		t.Run(fmt.Sprintf("QoS %d", qos), func(t *testing.T) {
			f := newFleet(t)
			dir := f.device("ABCD1234")
			trace := filepath.Join(t.TempDir(), "trace")
			s := f.serve("strace", "-D", "-f", "-qq", "-yy", "-s", "8192", "-e", "trace=write,writev,pwrite64,pwritev,sendto,sendmsg,fsync,fdatasync", "-o", trace)
			c := mustDial(t, s, dir, "ABCD1234")
			peer := c.conn.LocalAddr().String()
			for i := range publishes {
				if err := publishFully(c, qos, uint16(i+1), marker(i)); err != nil {
					t.Fatal(err)
				}
			}
			s.stop()
			text, err := os.ReadFile(trace)
			if err != nil {
				t.Fatal(err)
			}
			list := calls(string(text))
			for i := range publishes {
				if err := syncedFirst(list, marker(i), peer); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// marker is a payload that strace shows as it is.
func marker(i int) string { return fmt.Sprintf("<payload %03d>", i) }

// publishFully publishes and waits for PUBACK or PUBREC, then at QoS 2 for PUBCOMP.
func publishFully(c *client, qos byte, id uint16, payload string) error {
	if qos == 1 {
		return c.publishWait("private/ABCD1234/u/t", payload, id)
	}
	if err := c.publish("private/ABCD1234/u/t", payload, 2, id, false); err != nil {
		return err
	}
	if _, err := c.next(); err != nil {
		return err
	}
	if err := c.release(id); err != nil {
		return err
	}
	_, err := c.next()
	return err
}

// syncedFirst finds the write of the payload to the log, then the first write to the
// client that begins after it: between the two the same file must have been synced.
func syncedFirst(list []*call, payload, peer string) error {
	var write *call
	var answer *call
	for _, c := range list {
		switch {
		case write == nil && strings.Contains(c.fd, "_LOG/msgs/") && strings.Contains(c.args, payload):
			write = c
		case write != nil && c.begun > write.begun && strings.Contains(c.fd, "TCP:[") && strings.Contains(c.fd, "->"+peer+"]"):
			answer = c
		}
		if answer != nil {
			break
		}
	}
	if write == nil || write.done == 0 || answer == nil {
		return fmt.Errorf("%s: write %+v, answer %+v", payload, write, answer)
	}
	for _, c := range list {
		sync := c.name == "fsync" || c.name == "fdatasync"
		if sync && c.fd == write.fd && c.result == "0" && c.begun > write.done && c.done != 0 && c.done < answer.begun {
			return nil
		}
	}
	return fmt.Errorf("%s: written by line %d, answered at line %d, and not synced in between", payload, write.done, answer.begun)
}
