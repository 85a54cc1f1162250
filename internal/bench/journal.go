package bench

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"hawser/internal/durable"
	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// blockSize is how many ids a station may have in one block.
const blockSize = 5000

// journal imports what a flashing bench has made, with the product's own command, on the
// files of a fleet that no server runs on.
func (r *runner) journal(ctx context.Context) error {
	if r.Hawser == "" {
		r.say("journal: left out, it needs the product (--hawser)")
		return nil
	}
	f, err := r.fleet(ctx, "journal", 10)
	if err != nil {
		return err
	}
	units := r.Known / 10
	r.say("journal: %d units", units)
	path := filepath.Join(f.dir, "line1.journal")
	if err := r.makeJournal(ctx, f, path, units); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, r.Hawser, "factory", "import", path, "--dir", f.dir)
	cmd.Stderr = r.Log
	start := time.Now()
	peak, err := runPeak(cmd)
	if err != nil {
		return fmt.Errorf("factory import: %w", err)
	}
	took := time.Since(start).Seconds()
	r.report.add(fmt.Sprintf("journal: import of %d units, per second, durable", units), "1/s", []float64{float64(units) / took}, atLeast(2000))
	r.report.add("journal: peak memory of that process", "MiB", []float64{peak / (1 << 20)}, nil)
	return nil
}

// makeJournal registers a station and writes the journal of n units, which no unit ever was.
func (r *runner) makeJournal(ctx context.Context, f *fleetFiles, path string, n int) error {
	key, err := pki.GenerateKey()
	if err != nil {
		return err
	}
	csr, err := requestOf(key)
	if err != nil {
		return err
	}
	if err := durable.CreateFile(path+".csr", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}), 0o644); err != nil {
		return err
	}
	var j *factory.Journal
	var ca *pki.Issuer // the station under its first certificate, which is that of the journal
	for made := 0; made < n; made += blockSize {
		b, err := r.reserve(ctx, f, path, made, min(blockSize, n-made))
		if err != nil {
			return err
		}
		if j == nil {
			if err := factory.CreateJournal(path, key, b.Fleet, b.StationCert, time.Now()); err != nil {
				return err
			}
			if j, err = factory.OpenJournal(path, key); err != nil {
				return err
			}
			defer j.Close()
			if ca, err = pki.NewIssuer(b.StationCert, key, pki.StationCA); err != nil {
				return err
			}
		}
		if err := fillBlock(j, b, ca); err != nil {
			return err
		}
	}
	return nil
}

func (r *runner) reserve(ctx context.Context, f *fleetFiles, path string, at, count int) (*factory.Block, error) {
	out := fmt.Sprintf("%s.%d.block", path, at)
	cmd := exec.CommandContext(ctx, r.Hawser, "factory", "reserve", "--dir", f.dir, "--station", "line1", "--station-csr", path+".csr",
		"--count", fmt.Sprint(count), "--out", out)
	cmd.Stderr = r.Log
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("factory reserve: %w", err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	return factory.OpenBlock(text)
}

// fillBlock records a unit for each id of b.
func fillBlock(j *factory.Journal, b *factory.Block, ca *pki.Issuer) error {
	if err := j.AppendBlock(b.ID, time.Now()); err != nil {
		return err
	}
	for _, id := range b.IDs {
		u, err := unitOf(ca, b, id)
		if err != nil {
			return err
		}
		if err := j.AppendUnit(u, time.Now()); err != nil {
			return err
		}
	}
	return nil
}

func unitOf(ca *pki.Issuer, b *factory.Block, id identity.ID) (factory.NewUnit, error) {
	u := factory.NewUnit{ID: id, Block: b.ID, Class: "sensor-a", Hardware: 3, How: factory.ByProbe}
	key, err := pki.GenerateKey()
	if err != nil {
		return u, err
	}
	if u.CSR, err = requestOf(key); err != nil {
		return u, err
	}
	u.Cert, err = pki.IssueDeviceLeaf(ca, id, &key.PublicKey, time.Now())
	return u, err
}

func requestOf(key *ecdsa.PrivateKey) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}
