package check

import (
	"testing"

	"hawser/internal/pki"
)

// TestNamesOfCredentials: a name that a shell or a topic would read as more than a name is
// refused before anything is done with it.
func TestNamesOfCredentials(t *testing.T) {
	t.Parallel()
	ca, err := newAuthority("Somebody's device CA")
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, good := range map[string]bool{
		"ABCD1234": true, "sensor-7.lab": true, "": false, "-rf": false, "a;reboot": false, "$(id)": false, "a b": false, "a/#": false, "+": false, "a\nb": false, "\u00e9": false,
	} {
		if _, err := forgeUnder(ca, name, key, nil); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
}
