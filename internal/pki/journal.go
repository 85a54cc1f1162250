package pki

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"hawser/internal/durable"
)

// Entry is one line of issued.journal: a certificate that a CA signed, or the
// line that begins the journal.
type Entry struct {
	Number  uint64 `json:"n"`    // 1 and up, without a gap
	Prev    string `json:"prev"` // SHA-256 of the line before, newline excluded; 64 zeros in line 1
	Time    string `json:"time"` // RFC 3339 UTC
	What    string `json:"what"` // "begin" or "issue"
	Fleet   string `json:"fleet,omitempty"`
	Kind    string `json:"kind,omitempty"`    // device, service, broker or station
	Subject string `json:"subject,omitempty"` // id, name or domain
	Class   string `json:"class,omitempty"`
	Block   string `json:"block,omitempty"`   // station: the block of ids that was signed with it
	CA      string `json:"ca,omitempty"`      // common name of the CA
	Key     string `json:"key,omitempty"`     // KeyFingerprint, hex
	Cert    string `json:"cert,omitempty"`    // Fingerprint, hex
	Request string `json:"request,omitempty"` // SHA-256 of the request file, hex
	Vouched string `json:"vouched,omitempty"` // who answers for it: "operator", "typed" or "journal"
}

const (
	whatBegin = "begin"
	whatIssue = "issue"
	maxLine   = 4096 // bytes of one entry
)

// ErrJournal reports a journal whose chain does not hold.
var ErrJournal = errors.New("the journal is damaged or was changed")

// ErrBound reports a device id or key that already belongs to another.
var ErrBound = errors.New("id and key belong together for life")

// Journal is the record of one CA directory: append-only, each line holding the
// hash of the one before, on disk before the certificate it names leaves the CA.
// One process holds it at a time; it is not safe for concurrent use.
type Journal struct {
	lock    *durable.FileLock
	f       *os.File
	fleet   [16]byte
	n       uint64
	head    [32]byte          // hash of the last line
	keyOf   map[string]string // device id -> key fingerprint
	holder  map[string]string // key fingerprint -> device id
	stopped error             // a write that failed: what is on disk is unknown until the next open
}

// CreateJournal makes the journal of a new CA directory.
func CreateJournal(path string, fleet [16]byte, now time.Time) error {
	line, err := encodeEntry(Entry{Number: 1, Prev: hex.EncodeToString(make([]byte, 32)), Time: rfc3339(now),
		What: whatBegin, Fleet: hex.EncodeToString(fleet[:])})
	if err != nil {
		return err
	}
	return durable.CreateFile(path, line, 0o600)
}

// OpenJournal locks the journal, checks its whole chain and opens it for
// appending. A last line without its newline is cut off: the certificate that it
// would have recorded never left the CA. Errors: durable.ErrLocked, ErrJournal,
// fs.ErrNotExist; a journal is never made anew.
func OpenJournal(path string) (*Journal, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	lock, err := durable.Lock(path)
	if err != nil {
		return nil, err
	}
	j := &Journal{lock: lock, keyOf: map[string]string{}, holder: map[string]string{}}
	if err := j.load(path); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), lock.Close())
	}
	return j, nil
}

func (j *Journal) load(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	whole := bytes.LastIndexByte(text, '\n') + 1
	for line := range bytes.Lines(text[:whole]) {
		if err := j.replay(bytes.TrimSuffix(line, []byte("\n"))); err != nil {
			return fmt.Errorf("line %d: %w", j.n+1, err)
		}
	}
	if j.n == 0 {
		return fmt.Errorf("%w: it has no first line", ErrJournal)
	}
	if j.f, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0); err != nil {
		return err
	}
	if whole < len(text) {
		if err := errors.Join(j.f.Truncate(int64(whole)), j.f.Sync()); err != nil {
			return errors.Join(err, j.f.Close())
		}
	}
	return nil
}

// replay checks one line against the chain and takes it in.
func (j *Journal) replay(line []byte) error {
	var e Entry
	if err := decodeJSON(line, &e); err != nil {
		return fmt.Errorf("%w: %v", ErrJournal, err)
	}
	if e.Number != j.n+1 || e.Prev != hex.EncodeToString(j.head[:]) || (e.What == whatBegin) != (j.n == 0) {
		return fmt.Errorf("%w: it does not continue the line before", ErrJournal)
	}
	if j.n == 0 {
		if !isHex(e.Fleet, 32) {
			return fmt.Errorf("%w: no fleet id", ErrJournal)
		}
		if _, err := hex.Decode(j.fleet[:], []byte(e.Fleet)); err != nil {
			return fmt.Errorf("%w: no fleet id", ErrJournal)
		}
	}
	if err := j.CheckBound(e.Kind, e.Subject, e.Key); err != nil {
		return fmt.Errorf("%w: %v", ErrJournal, err)
	}
	j.take(e, line)
	return nil
}

func (j *Journal) take(e Entry, line []byte) {
	j.n, j.head = e.Number, sha256.Sum256(line)
	if e.Kind == KindDevice {
		j.keyOf[e.Subject], j.holder[e.Key] = e.Key, e.Subject
	}
}

// Fleet is the id of the fleet whose CA this is.
func (j *Journal) Fleet() [16]byte { return j.fleet }

// Len is the number of lines.
func (j *Journal) Len() uint64 { return j.n }

// CheckBound refuses (ErrBound) a device id that was certified with another key,
// or a key that was certified for another id. key is a KeyFingerprint in hex.
func (j *Journal) CheckBound(kind, subject, key string) error {
	if kind != KindDevice {
		return nil
	}
	if k, ok := j.keyOf[subject]; ok && k != key {
		return fmt.Errorf("%w: %s was certified with another key", ErrBound, subject)
	}
	if id, ok := j.holder[key]; ok && id != subject {
		return fmt.Errorf("%w: this key was certified for %s", ErrBound, id)
	}
	return nil
}

// Certified reports whether this CA has certified a device under id.
func (j *Journal) Certified(id string) bool { return j.keyOf[id] != "" }

// Vouches reports whether this id and key were certified together before.
func (j *Journal) Vouches(kind, subject, key string) bool {
	return kind == KindDevice && key != "" && j.keyOf[subject] == key
}

// Append records the issuing of certificates, all with one write; Number, Prev and
// What are filled in. When it returns nil the lines are on disk. When one is refused
// none is written. After a failed write the journal refuses all further appends
// until it is opened again.
func (j *Journal) Append(entries ...Entry) error {
	if j.stopped != nil {
		return fmt.Errorf("the journal had a write error before: %w", j.stopped)
	}
	lines, err := j.chain(entries)
	if err != nil {
		return err
	}
	if _, err = j.f.Write(bytes.Join(lines, nil)); err == nil {
		err = j.f.Sync()
	}
	if err != nil {
		j.stopped = err
		return fmt.Errorf("write journal: %w", err)
	}
	for i, line := range lines {
		j.take(entries[i], line[:len(line)-1])
	}
	return nil
}

// chain fills entries in as the next ones and gives their lines.
func (j *Journal) chain(entries []Entry) ([][]byte, error) {
	lines := make([][]byte, len(entries))
	keyOf, holder := map[string]string{}, map[string]string{} // of this call alone
	head := j.head
	for i := range entries {
		e := &entries[i]
		e.Number, e.Prev, e.What = j.n+1+uint64(i), hex.EncodeToString(head[:]), whatIssue
		if err := j.CheckBound(e.Kind, e.Subject, e.Key); err != nil {
			return nil, err
		}
		if e.Kind == KindDevice {
			if k, ok := keyOf[e.Subject]; ok && k != e.Key {
				return nil, fmt.Errorf("%w: %s comes with two keys", ErrBound, e.Subject)
			}
			if id, ok := holder[e.Key]; ok && id != e.Subject {
				return nil, fmt.Errorf("%w: one key comes for %s and %s", ErrBound, id, e.Subject)
			}
			keyOf[e.Subject], holder[e.Key] = e.Key, e.Subject
		}
		line, err := encodeEntry(*e)
		if err != nil {
			return nil, err
		}
		lines[i], head = line, sha256.Sum256(line[:len(line)-1])
	}
	return lines, nil
}

// Close gives the journal up.
func (j *Journal) Close() error { return errors.Join(j.f.Close(), j.lock.Close()) }

func encodeEntry(e Entry) ([]byte, error) {
	b, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode journal entry: %w", err)
	}
	if len(b) >= maxLine {
		return nil, fmt.Errorf("journal entry of %d bytes is larger than %d", len(b), maxLine)
	}
	return append(b, '\n'), nil
}
