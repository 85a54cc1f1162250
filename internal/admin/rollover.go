package admin

import (
	"context"
	"net/url"
	"time"

	"hawser/internal/identity"
)

// What says what a rollover moves.
type What struct {
	Generation bool `json:"generation"` // to the next device CA
	Roots      bool `json:"roots"`      // to the next anchor set
}

// Rollover is a move of the fleet and how far it has come. What stays has the number 0.
type Rollover struct {
	No             int64            `json:"no,string"` // 0: it has not started
	FromGeneration uint32           `json:"from_generation,omitempty"`
	ToGeneration   uint32           `json:"to_generation,omitempty"`
	FromAnchors    uint64           `json:"from_anchors,string,omitempty"`
	ToAnchors      uint64           `json:"to_anchors,string,omitempty"`
	State          string           `json:"state"` // none, planned, signing, signed, moving, retired, aborted
	Started        time.Time        `json:"started,omitzero"`
	Moving         time.Time        `json:"moving,omitzero"`
	Ended          time.Time        `json:"ended,omitzero"`
	By             string           `json:"by,omitempty"`
	OldestAnchors  uint64           `json:"oldest_anchors,string"` // lowest set that a device uses
	Devices        int              `json:"devices"`
	Unsigned       int              `json:"unsigned"` // without a certificate of the new generation
	Counts         map[string]int   `json:"counts"`   // old, offered, installed, proven, failed, absent
	Unproven       []RolloverDevice `json:"unproven"` // not more than were asked for
}

// Open reports whether the rollover is under way.
func (r *Rollover) Open() bool {
	return r.No != 0 && r.State != "retired" && r.State != "aborted"
}

// RolloverDevice is a device that has not arrived.
type RolloverDevice struct {
	ID       identity.ID `json:"id"`
	State    string      `json:"state"`
	Reason   string      `json:"reason,omitempty"`
	LastSeen time.Time   `json:"last_seen,omitzero"`
	Anchors  uint64      `json:"anchors,string"` // the set it uses, as far as is known
}

// RolloverPlan is what a rollover would do.
type RolloverPlan struct {
	Rollover
	Online  int     `json:"online"`          // devices connected now
	Signing float64 `json:"signing_seconds"` // expected
	Move    float64 `json:"moving_seconds"`  // expected, for the devices that are connected
}

// Unsigned is a device that waits for a certificate of the new generation.
type Unsigned struct {
	ID          identity.ID `json:"id"`
	CSR         Hex         `json:"csr"`                   // DER
	Certificate Hex         `json:"certificate,omitempty"` // of an older generation, DER
}

// Resigned is the safe's answer for one device: a certificate, or why there is none.
type Resigned struct {
	ID          identity.ID `json:"id"`
	Certificate Hex         `json:"certificate,omitempty"` // DER
	Refused     string      `json:"refused,omitempty"`
}

// Taken tells what became of a part of a rollover's certificates.
type Taken struct {
	Added   int `json:"added"`
	Known   int `json:"known"` // were here before, or their device may not connect any more
	Refused int `json:"refused"`
}

func whatQuery(w What) url.Values {
	q := query{}
	q.flag("generation", w.Generation)
	q.flag("roots", w.Roots)
	return url.Values(q)
}

// Rollover tells how far the last rollover has come, with up to names of the devices that
// have not arrived.
func (c *Client) Rollover(ctx context.Context, names int) (Rollover, error) {
	return c.RolloverIn(ctx, names, "")
}

// RolloverIn is Rollover with the names of the devices in one state alone.
func (c *Client) RolloverIn(ctx context.Context, names int, state string) (r Rollover, err error) {
	q := query{}
	q.number("names", uint64(names))
	q.set("state", state)
	return r, c.call(ctx, "GET", "rollover", url.Values(q), nil, &r)
}

// PlanRollover tells what a rollover would do.
func (c *Client) PlanRollover(ctx context.Context, w What) (p RolloverPlan, err error) {
	return p, c.call(ctx, "GET", "rollover/plan", whatQuery(w), nil, &p)
}

// StartRollover begins a rollover, or gives the open one of the same kind.
func (c *Client) StartRollover(ctx context.Context, w What) (r Rollover, err error) {
	return r, c.call(ctx, "POST", "rollover/start", nil, w, &r)
}

// Unsigned lists devices above after that wait for a certificate, by id.
func (c *Client) Unsigned(ctx context.Context, after identity.ID, limit int) (list []Unsigned, err error) {
	q := query{}
	q.id("after", after)
	q.number("limit", uint64(limit))
	return list, c.call(ctx, "GET", "rollover/unsigned", url.Values(q), nil, &list)
}

// RolloverCA brings the device CA of the new generation.
func (c *Client) RolloverCA(ctx context.Context, der []byte) error {
	return c.call(ctx, "POST", "rollover/ca", nil, struct {
		Certificate Hex `json:"certificate"`
	}{der}, nil)
}

// RolloverCertificates brings the safe's answers, at most 1,000: all or none of them.
func (c *Client) RolloverCertificates(ctx context.Context, list []Resigned) (t Taken, err error) {
	return t, c.call(ctx, "POST", "rollover/certificates", nil, list, &t)
}

// RolloverAnchors brings the next anchor set.
func (c *Client) RolloverAnchors(ctx context.Context, cose []byte) error {
	return c.call(ctx, "POST", "rollover/anchors", nil, struct {
		Anchors Hex `json:"anchors"`
	}{cose}, nil)
}

// RolloverLeaves brings broker certificates whose keys wait on the server.
func (c *Client) RolloverLeaves(ctx context.Context, ders [][]byte) error {
	list := []Hex{}
	for _, d := range ders {
		list = append(list, d)
	}
	return c.call(ctx, "POST", "rollover/leaves", nil, struct {
		Certificates []Hex `json:"certificates"`
	}{list}, nil)
}

// MoveRollover lets the devices begin to move.
func (c *Client) MoveRollover(ctx context.Context) (r Rollover, err error) {
	return r, c.call(ctx, "POST", "rollover/move", nil, struct{}{}, &r)
}

// RetireRollover shuts the old generation out. Devices in waive may be unproven.
func (c *Client) RetireRollover(ctx context.Context, waive []identity.ID) (r Rollover, err error) {
	return r, c.call(ctx, "POST", "rollover/retire", nil, struct {
		Waive []identity.ID `json:"waive"`
	}{waive}, &r)
}

// AbortRollover ends the rollover the other way.
func (c *Client) AbortRollover(ctx context.Context) (r Rollover, err error) {
	return r, c.call(ctx, "POST", "rollover/abort", nil, struct{}{}, &r)
}
