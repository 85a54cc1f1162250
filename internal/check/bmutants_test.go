package check

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// brokerTrial says that a case turns a broken broker red, and how.
type brokerTrial struct {
	id    string
	fault fault
	red   Verdict
}

// brokerTrials gives for each case the brokers that it must find out.
func brokerTrials() []brokerTrial {
	return []brokerTrial{
		{"B0.honest", refusesAll, Fail}, {"B0.v5", refusesV5, Fail}, {"B0.narrower", refusesPart, Fail}, {"B0.session", forgetsFlight, Fail},
		{"B0.will", losesWills, Fail},

		{"B1.no-certificate", noCertificate, Fail}, {"B1.other-ca", anyCA, Fail}, {"B1.other-ca", neverRefuses, Inconclusive}, {"B1.twin-ca", issuerByName, Fail}, {"B1.expired", noDates, Fail},
		{"B1.server-auth", noUsage, Fail}, {"B1.p384", skipsP384, Fail}, {"B1.rsa", skipsRSA, Fail}, {"B1.self-signed", trustsSelf, Fail},
		{"B1.revoked", noRevocation, Fail},

		{"B2.wrong-key", noVerify, Fail}, {"B2.verify-omitted", unsigned, Fail}, {"B2.verify-server", anyRole, Fail},
		{"B2.verify-replayed", anyTranscript, Fail}, {"B2.verify-zero", zeroSignature, Fail}, {"B2.finished", anyFinished, Fail},
		{"B2.finished-omitted", neverFinished, Fail},

		{"B3.aes256", takesAES256, Fail}, {"B3.draft-version", takesAnyVersion, Fail}, {"B3.other-suites", takesAnySuite, Fail},
		{"B3.tls12", takesTLS12, Fail}, {"B3.tls12", neverRefuses, Inconclusive}, {"B3.tls11", takesTLS11, Fail}, {"B3.tls10", takesTLS10, Fail},

		{"B4.other", trustsID, Fail}, {"B4.plus", patternID, Fail}, {"B4.hash", patternID, Fail}, {"B4.dots", subjectID, Fail},
		{"B4.slash", takesAnyID, Warn}, {"B4.lower", takesCase, Warn}, {"B4.longer", takesPrefix, Warn}, {"B4.long", takesAnyID, Warn},
		{"B4.nul", "takes a client id with a NUL", Fail}, {"B4.nul", diesOfMalformed, Fail},
		{"B4.not-utf8", "takes a client id that is not UTF-8", Fail},
		{"B4.empty", takesEmptyID, Warn}, {"B4.takeover", takesOver, Fail}, {"B4.takeover", trustsID, Fail},

		{"B5.all", grantsHash, Fail}, {"B5.all", grantsSilently, Warn}, {"B5.levels", forgetsPlus, Fail}, {"B5.own-below-plus", forgetsPlus, Warn},
		{"B5.everybody", forgetsPlus, Fail}, {"B5.other", prefixAlone, Fail}, {"B5.other", grantsAll, Fail}, {"B5.system", opensSystem, Fail},
		{"B5.system", grantsSystem, Warn}, {"B5.share-all", forgetsShare, Fail}, {"B5.share-other", forgetsShare, Fail},
		{"B5.share-everybody", forgetsShare, Fail}, {"B5.share-own", sharesAll, Fail},

		{"B6.hash-inside", "takes a filter with # inside", Fail}, {"B6.plus-inside", "takes a filter with + inside a level", Fail},
		{"B6.empty", "takes an empty filter", Fail}, {"B6.share-empty", "takes a shared subscription without a group", Fail},
		{"B6.share-no-filter", "takes a shared subscription without a filter", Fail}, {"B6.nul", "takes a filter with a NUL", Fail}, {"B6.nul", diesOfMalformed, Fail},
		{"B6.not-utf8", "takes a filter that is not UTF-8", Fail},

		{"B7.qos0", writesQoS0, Fail}, {"B7.qos1", writesQoS1, Fail}, {"B7.qos1", writesAll, Fail}, {"B7.qos2", writesQoS2, Fail}, {"B7.v5", writesV5, Fail},
		{"B7.retained", writesRetained, Fail}, {"B7.alias", takesAlias, Fail}, {"B7.wildcard", "takes a topic with wildcards", Fail},
		{"B7.system", writesSystem, Fail},

		{"B8.will", anyWill, Fail}, {"B8.will-retained", anyWillRetained, Fail}, {"B8.will-v5", anyWillV5, Fail},

		{"B11.command", serviceWrites, Fail}, {"B11.command-v5", serviceWritesV5, Fail}, {"B11.will", serviceWills, Fail}, {"B11.device-id", serviceTakes, Fail},

		{"B9.partial-connect", waitsForConnect, Warn}, {"B9.partial-connect", oneLock, Fail}, {"B9.slow-connect", renewsTime, Warn},
		{"B9.huge-length", trustsLengths, Warn}, {"B9.length5", "takes a length of five bytes", Warn},
		{"B9.length5", diesOfMalformed, Fail}, {"B9.publish-first", "takes a PUBLISH before CONNECT", Warn}, {"B9.publish-first", diesOfMalformed, Fail},
		{"B9.second-connect", "takes a second CONNECT", Fail}, {"B9.protocol-name", "takes another protocol", Fail},
		{"B9.reserved-flag", "takes the reserved flag of CONNECT", Fail}, {"B9.will-qos3", "takes a Will of QoS 3", Fail},
		{"B9.will-flags", "takes Will flags without a Will", Fail}, {"B9.password-alone", "takes a password without a user name", Fail},
		{"B9.type-0", "passes over packets of type 0", Warn}, {"B9.type-0", diesOfMalformed, Fail}, {"B9.qos3", "takes QoS 3", Warn},
		{"B9.qos3", diesOfMalformed, Fail}, {"B9.subscribe-flags", "takes reserved flags of SUBSCRIBE", Fail},
		{"B9.topic-longer", "passes over a topic longer than its packet", Warn}, {"B9.topic-longer", diesOfMalformed, Fail},
		{"B9.not-utf8", "takes a topic that is not UTF-8", Fail}, {"B9.nul", "takes a topic with a NUL", Fail},

		{"B9.slashes", diesOfSlashes, Fail}, {"B9.qos2-flood", keepsQoS2, Fail}, {"B9.subscribe-flood", diesOfFilters, Fail},
		{"B9.slow-loris", silentPlaces, Fail}, {"B9.slow-loris", oneHandshake, Fail},
		{"B9.handshake-flood", halfPlaces, Fail}, {"B9.handshake-flood", oneHandshake, Fail}, {"B9.handshake-bytes", endless, Warn},
		{"B9.key-update-flood", diesOfUpdates, Fail}, {"B9.empty-records", diesOfEmpty, Fail}, {"B9.ccs-flood", diesOfCCS, Fail},
		{"B9.small-records", diesOfSmall, Fail}, {"B9.garbage", waitsOnNoise, Warn}, {"B9.garbage", diesOfNoise, Fail},

		{"B10.connected", keepsOpen, Fail}, {"B10.again", readmits, Fail}, {"B10.will", keepsWill, Fail}, {"B10.retained", keepsRetained, Fail},
		{"B10.queued", keepsQueued, Fail}, {"B10.in-flight", keepsFlight, Fail},
	}
}

// atOnce is how many brokers are tried at the same time: most of them are waited for.
const atOnce = 12

// TestBrokerMutants: every case turns at least one broken broker red, and a correct
// broker passes every case.
func TestBrokerMutants(t *testing.T) {
	t.Parallel()
	r := newRealm(t)
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() { correctBroker(t, r) })
	found := map[string]bool{}
	slots := make(chan struct{}, atOnce)
	for _, x := range brokerTrials() {
		found[x.id] = true
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			tryBroker(t, r, x)
		})
	}
	for _, c := range BrokerCases() {
		if !found[c.ID] {
			t.Errorf("%s turns no broker red: a case that cannot fail shows nothing", c.ID)
		}
	}
}

func tryBroker(t *testing.T, r *realm, x brokerTrial) {
	o, stop := r.start(t, x.fault)
	defer stop()
	o.Only = []string{x.id}
	rep, err := Broker(context.Background(), o)
	if err != nil {
		t.Errorf("%s: %v", x.id, err)
		return
	}
	for i := range rep.Results {
		if res := &rep.Results[i]; res.ID == x.id {
			if res.Verdict != x.red {
				t.Errorf("%s with a broker that %s: %s (%s), not %s", x.id, x.fault, res.Verdict, res.Why, x.red)
			}
			return
		}
	}
	t.Errorf("%s with a broker that %s: the case was not reached: %+v", x.id, x.fault, rep.Results)
}

func correctBroker(t *testing.T, r *realm) {
	o, stop := r.start(t, "")
	defer stop()
	rep, err := Broker(context.Background(), o)
	if err != nil {
		t.Error(err)
		return
	}
	for i := range rep.Results {
		if x := &rep.Results[i]; x.Verdict != Pass {
			t.Errorf("%s with a correct broker: %s: %s (%s)", x.ID, x.Verdict, x.Why, x.EvidenceText())
		}
	}
	if len(rep.Results) < 45 {
		t.Errorf("%d cases, which are too few", len(rep.Results))
	}
	t.Logf("a correct broker: %v in %v", rep.Counts(), rep.Ended.Sub(rep.Began))
}

// TestBrokerMatrix runs every case against every broken broker, which takes a minute or
// two: the cases that are alone in finding one of them out must be many.
func TestBrokerMatrix(t *testing.T) {
	if os.Getenv("HAWSER_CHECK_MATRIX") == "" {
		t.Skip("every case against every broken broker takes minutes: HAWSER_CHECK_MATRIX=1")
	}
	r := newRealm(t)
	faults := map[fault]bool{}
	for _, x := range brokerTrials() {
		faults[x.fault] = true
	}
	var mu sync.Mutex
	var all sync.WaitGroup
	alone := map[string]bool{}
	slots := make(chan struct{}, atOnce)
	for f := range faults {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			found, ok := findersOf(t, r, f)
			mu.Lock()
			defer mu.Unlock()
			if len(found) == 1 {
				alone[found[0]] = true
			}
			if ok {
				t.Errorf("no case finds out a broker that %s", f)
			}
			t.Logf("a broker that %s: %s", f, strings.Join(found, " "))
		})
	}
	all.Wait()
	if t.Logf("%d cases are alone in finding out a broker", len(alone)); len(alone) < 45 {
		t.Errorf("%d cases are alone in finding out a broker", len(alone))
	}
}

// findersOf gives the cases that a broken broker FAILs, or is warned by. clean says that
// nobody would see anything in the report.
func findersOf(t *testing.T, r *realm, f fault) (found []string, clean bool) {
	o, stop := r.start(t, f)
	defer stop()
	rep, err := Broker(context.Background(), o)
	if err != nil {
		t.Error(err)
		return nil, false
	}
	for i := range rep.Results {
		if x := &rep.Results[i]; x.Verdict == Fail || x.Verdict == Warn {
			found = append(found, x.ID)
		}
	}
	return found, rep.OK() && len(found) == 0
}

// TestBrokerTable holds the table in the docs to what TestBrokerMutants shows.
func TestBrokerTable(t *testing.T) {
	path := filepath.Join("..", "..", "docs", "check-broker-table.md")
	want := brokerTable()
	if os.Getenv("UPDATE_TABLES") != "" {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("docs/check-broker-table.md is stale\nhint: UPDATE_TABLES=1 go test ./internal/check -run TestBrokerTable")
	}
}

func brokerTable() []byte {
	red := map[string][]string{}
	faults := map[fault]bool{}
	for _, x := range brokerTrials() {
		red[x.id] = append(red[x.id], fmt.Sprintf("%s: %s", x.fault, x.red))
		faults[x.fault] = true
	}
	var b bytes.Buffer
	cases := BrokerCases()
	fmt.Fprintf(&b, "# Which broken broker each case of `hawser check broker` finds out\n\n"+
		"Each of the %d cases passes with a correct broker and is red with each broken broker beside it, of which\n"+
		"there are %d: a broker that does everything right but the one thing that is named. TestBrokerMutants in\n"+
		"internal/check shows it; this table is written by TestBrokerTable, which fails when it is stale.\n"+
		"TestBrokerMatrix (with HAWSER_CHECK_MATRIX=1) runs every case against every broken broker, and holds that\n"+
		"at least 45 cases are alone in finding one of them out.\n\n"+
		"| case | what is tried | red with a broker that |\n|---|---|---|\n", len(cases), len(faults))
	for _, c := range cases {
		cells := strings.NewReplacer("|", "\\|", "\x00", "NUL")
		fmt.Fprintf(&b, "| %s | %s | %s |\n", c.ID, cells.Replace(c.Does), cells.Replace(strings.Join(red[c.ID], "; ")))
	}
	return b.Bytes()
}
