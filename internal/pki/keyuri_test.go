package pki

import (
	"strings"
	"testing"
)

const goodToken = "pkcs11:token=safe;object=root?module-path=/usr/lib/softhsm/libsofthsm2.so"

func TestParseKeyURI(t *testing.T) {
	for uri, want := range map[string]KeyURI{
		"file:ca-a/root.key": {Path: "ca-a/root.key"},
		"file:/a b?c":        {Path: "/a b?c"},
		goodToken:            {Module: "/usr/lib/softhsm/libsofthsm2.so", Token: "safe", Object: "root"},
		"pkcs11:serial=0f%3b;id=%01%ff;type=private?module-path=/m%20n&pin-source=file:/run/pin": {Module: "/m n", Serial: "0f;", ID: "\x01\xff", PINSource: "/run/pin"},
	} {
		got, err := ParseKeyURI(uri)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", uri, got, err)
		}
		if again, err := ParseKeyURI(got.String()); err != nil || again != got {
			t.Errorf("%s: %s is read as %+v, %v", uri, got, again, err)
		}
	}
	for uri, want := range map[string]string{
		"":                                    "not a file: or pkcs11: URI",
		"root.key":                            "not a file: or pkcs11: URI",
		"file:":                               "not a file: or pkcs11: URI",
		"file:a\nb":                           "not one line",
		"pkcs11:":                             "which token?",
		"pkcs11:?":                            "which token?",
		goodToken + "\x00":                    "not one line",
		goodToken + "&x=1":                    `"x" is none of`,
		goodToken + "&token=a":                `"token" is none of`,
		goodToken + "&module-path=/b":         "twice",
		goodToken + "&pin-source=file:pin":    "absolute path",
		goodToken + "&pin-source=%7c/bin/pin": "absolute path",
		"pkcs11:token=a;serial=b;object=c?module-path=/m":     "one too many",
		"pkcs11:token=a?module-path=/m":                       "which key",
		"pkcs11:token=a;object=b":                             "driver is missing",
		"pkcs11:token=a;object=b?module-path=libsofthsm2.so":  "absolute path",
		"pkcs11:token=a;object=b;slot-id=1?module-path=/m":    `"slot-id" is none of`,
		"pkcs11:token=a;object=b;type=cert?module-path=/m":    "not a private key",
		"pkcs11:token=%zz;object=b?module-path=/m":            "badly escaped",
		"pkcs11:token=;object=b?module-path=/m":               "empty",
		"pkcs11:token;object=b?module-path=/m":                "is none of",
		"pkcs11:token=a;" + strings.Repeat("a", 11<<10):       "longer than",
		"pkcs11:token=" + strings.Repeat("a", 33) + ";id=%01": "driver",
	} {
		if _, err := ParseKeyURI(uri); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80q: %v", uri, err)
		}
	}
}

// A PIN in a URI would be an argument: it is refused, and the refusal does not show it.
func TestPINInTheURI(t *testing.T) {
	for _, uri := range []string{goodToken + "&pin-value=1234", "pkcs11:token=a;pin-value=1234;object=b?module-path=/m"} {
		if _, err := ParseKeyURI(uri); err == nil || !strings.Contains(err.Error(), "pin-value is refused") || strings.Contains(err.Error(), "1234") {
			t.Error(err)
		}
	}
}

func FuzzParseKeyURI(f *testing.F) {
	for _, s := range []string{"file:a", goodToken, goodToken + "&pin-source=file:/p", "pkcs11:serial=1;id=%01%02;type=private?module-path=/m"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseKeyURI(s)
		if err != nil {
			return
		}
		if again, err := ParseKeyURI(u.String()); err != nil || again != u {
			t.Errorf("%q: %+v is written %q and read as %+v, %v", s, u, u, again, err)
		}
	})
}
