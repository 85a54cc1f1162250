package e2e

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"hawser/internal/check"
)

// testsThatExist gives the names of all tests and benchmarks of this repository.
func testsThatExist(t *testing.T) map[string]bool {
	t.Helper()
	out, err := exec.Command("grep", "-rhoE", "--include=*_test.go", "^func (Test|Benchmark)[A-Za-z0-9_]+", "../..").Output()
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		there[strings.TrimPrefix(strings.TrimSpace(line), "func ")] = true
	}
	return there
}

// TestQuestionsNameRealTests: each answer of docs/questions.md names a clause, or says that
// there is none, and a test that exists or what is not measured; each case and each page
// that it links to is there.
func TestQuestionsNameRealTests(t *testing.T) {
	text, err := os.ReadFile("../../docs/questions.md")
	if err != nil {
		t.Fatal(err)
	}
	there := testsThatExist(t)
	cases := map[string]bool{}
	for _, c := range check.DeviceCases() {
		cases[c.ID], cases[c.Group()] = true, true
	}
	for _, c := range check.FieldCases() {
		cases[c.ID] = true
	}
	test, kase := regexp.MustCompile("`((?:Test|Benchmark)[A-Za-z0-9_]+)`"), regexp.MustCompile("`([A-Z][0-9]+(?:\\.[a-z0-9-]+)?)`")
	clause := regexp.MustCompile(`RFC \d{4}|draft-ietf|ETSI EN 303 645|CRA annex`)
	answers := strings.Split(string(text), "\n## ")[1:]
	if len(answers) < 14 {
		t.Fatalf("%d answers", len(answers))
	}
	for _, a := range answers {
		title, body, _ := strings.Cut(a, "\n")
		if !clause.MatchString(body) {
			t.Errorf("%s: no clause", title)
		}
		if !test.MatchString(body) {
			t.Errorf("%s: no test", title)
		}
		for _, m := range test.FindAllStringSubmatch(body, -1) {
			if !there[m[1]] {
				t.Errorf("%s: %s does not exist", title, m[1])
			}
		}
		for _, m := range kase.FindAllStringSubmatch(body, -1) {
			if !cases[m[1]] {
				t.Errorf("%s: there is no case %s", title, m[1])
			}
		}
		for _, m := range regexp.MustCompile(`\]\(([^):#]+)\)`).FindAllStringSubmatch(body, -1) {
			if _, err := os.Stat(filepath.Join("../../docs", m[1])); err != nil {
				t.Errorf("%s: %v", title, err)
			}
		}
	}
}

// TestCheckResultsAreExplained: what FAILs in the tables of docs/check-results.md is spoken
// of below them, and every case named there exists.
func TestCheckResultsAreExplained(t *testing.T) {
	text, err := os.ReadFile("../../docs/check-results.md")
	if err != nil {
		t.Fatal(err)
	}
	tables, explained, ok := strings.Cut(string(text), "<!-- /results -->")
	if !ok {
		t.Fatal("the page has no results")
	}
	there := map[string]bool{}
	for _, c := range check.DeviceCases() {
		there[c.ID] = true
	}
	rows := regexp.MustCompile(`(?m)^\| ([A-Z][0-9]+\.[a-z0-9-]+) \|(.*)$`).FindAllStringSubmatch(tables, -1)
	for _, row := range rows {
		if !there[row[1]] {
			t.Errorf("there is no case %s", row[1])
		}
		if strings.Contains(row[2], "FAIL") && !strings.Contains(explained, "`"+row[1]+"`") {
			t.Errorf("%s is not explained", row[1])
		}
	}
	for _, m := range regexp.MustCompile("`([A-Z][0-9]+\\.[a-z0-9-]+)`").FindAllStringSubmatch(explained, -1) {
		if !there[m[1]] {
			t.Errorf("there is no case %s", m[1])
		}
	}
	if len(rows) < 10 {
		t.Errorf("%d rows", len(rows))
	}
}

// TestOneCurveOfManyNames: openssl lists P-256 as prime256v1, takes secp256r1 and P-256
// for the same, and the keys are what Hawser takes.
func TestOneCurveOfManyNames(t *testing.T) {
	needTools(t, "openssl")
	list := run(t, "openssl", "ecparam", "-list_curves").stdout
	if !strings.Contains(list, "prime256v1") || strings.Contains(list, "secp256r1") {
		t.Errorf("openssl lists:\n%s", list)
	}
	var first []byte
	for _, name := range []string{"prime256v1", "secp256r1", "P-256"} {
		r := run(t, "openssl", "ecparam", "-name", name, "-genkey", "-noout")
		block, _ := pem.Decode([]byte(r.stdout))
		if block == nil {
			t.Fatalf("%s: %s", name, r.stderr)
		}
		key, err := x509.ParseECPrivateKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		head := spki[:26] // up to the point: the algorithm and the curve
		if first == nil {
			first = head
		}
		if !bytes.Equal(head, first) || !bytes.Contains(head, []byte{0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}) {
			t.Errorf("%s: % x", name, head)
		}
	}
}
