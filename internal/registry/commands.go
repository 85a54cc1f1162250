package registry

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"hawser/internal/identity"
)

// maxEpoch is where the numbers made of epoch and counter would turn negative.
const maxEpoch = 1<<31 - 1

// QueueCommand draws the next command id of the device and inserts the command
// as queued. Device, Name, Args, CreatedBy and Expires of c are used. A device
// that may not connect is ErrState.
func (tx *Tx) QueueCommand(c Command) (cid uint64, err error) {
	var last, epoch int64
	var state DeviceState
	err = tx.row(`SELECT d.last_cid, d.state, m.epoch FROM devices d, meta m WHERE d.id = ?`,
		[]any{int64(c.Device)}, &last, &state, &epoch)
	if err != nil {
		return 0, fmt.Errorf("device %s: %w", c.Device, err)
	}
	if state != DeviceActive {
		return 0, fmt.Errorf("device %s: %w: it is %s", c.Device, ErrState, state)
	}
	cid = nextInEpoch(uint64(last), uint64(epoch))
	if err := tx.exec(`UPDATE devices SET last_cid = ? WHERE id = ?`, int64(cid), int64(c.Device)); err != nil {
		return 0, err
	}
	err = tx.exec(`INSERT INTO commands (device, cid, name, args, created_by, created, expires, state, delivered, finished, status, result)
		VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', 0, 0, 0, NULL)`,
		int64(c.Device), int64(cid), c.Name, c.Args, c.CreatedBy, ms(tx.now), ms(c.Expires))
	if err != nil {
		return 0, err
	}
	return cid, tx.audit(c.CreatedBy, "command.queue", c.Device.String(), detail{"cid": fmt.Sprint(cid), "name": c.Name})
}

// nextInEpoch is the number after last, or the first one of the epoch.
func nextInEpoch(last, epoch uint64) uint64 {
	if last>>32 < epoch {
		return epoch<<32 | 1
	}
	return last + 1
}

// CommandDelivered notes that the device has the message. It is ErrState unless
// the command is queued.
func (tx *Tx) CommandDelivered(ref CommandRef, at time.Time) error {
	n, err := tx.execN(`UPDATE commands SET state = 'delivered', delivered = ? WHERE device = ? AND cid = ? AND state = 'queued'`,
		ms(at), int64(ref.Device), int64(ref.CID))
	if err != nil {
		return err
	}
	if n == 0 {
		return tx.whyNot(ref)
	}
	return tx.audit("hawser", "command.delivered", ref.Device.String(), detail{"cid": fmt.Sprint(ref.CID)})
}

// FinishCommand ends a command. A pending one may end in any way, but only a
// queued one is cancelled. What the device says corrects what was assumed: an
// expired, cancelled or unknown one becomes answered or failed, an expired or
// cancelled one becomes unknown. Everything else is ErrState.
func (tx *Tx) FinishCommand(actor string, ref CommandRef, o Outcome) error {
	from, err := tx.commandState(ref)
	if err != nil {
		return err
	}
	if !commandMay(from, o.State) {
		return fmt.Errorf("command %s of %s: %w: it is %s", cidText(ref.CID), ref.Device, ErrState, from)
	}
	err = tx.exec(`UPDATE commands SET state = ?, status = ?, result = ?, finished = ? WHERE device = ? AND cid = ?`,
		string(o.State), o.Status, o.Result, ms(o.At), int64(ref.Device), int64(ref.CID))
	if err != nil {
		return err
	}
	switch {
	case o.State == CommandUnknown && o.Status != 0: // the device says so
		err = tx.noteIfRestored(Ahead{Device: ref.Device, Kind: AheadCommand, Detail: cidText(ref.CID), At: o.At})
	case o.State.Answered():
		err = tx.caughtUp(ref.Device, AheadCommand, "")
	}
	if err != nil {
		return err
	}
	return tx.audit(actor, "command."+string(o.State), ref.Device.String(),
		detail{"cid": fmt.Sprint(ref.CID), "from": string(from)})
}

func commandMay(from, to CommandState) bool {
	switch to {
	case CommandAnswered, CommandFailed:
		return !from.Answered()
	case CommandUnknown:
		return !from.Answered() && from != CommandUnknown
	case CommandExpired:
		return from.Pending()
	case CommandCancelled:
		return from == CommandQueued
	}
	return false
}

func (tx *Tx) commandState(ref CommandRef) (CommandState, error) {
	var s CommandState
	err := tx.row(`SELECT state FROM commands WHERE device = ? AND cid = ?`, []any{int64(ref.Device), int64(ref.CID)}, &s)
	if err != nil {
		return "", fmt.Errorf("command %s of %s: %w", cidText(ref.CID), ref.Device, err)
	}
	return s, nil
}

// whyNot says why a command was not changed: it is not there, or its state.
func (tx *Tx) whyNot(ref CommandRef) error {
	s, err := tx.commandState(ref)
	if err != nil {
		return err
	}
	return fmt.Errorf("command %s of %s: %w: it is %s", cidText(ref.CID), ref.Device, ErrState, s)
}

func cidText(cid uint64) string { return fmt.Sprint(cid) }

// ExpireCommands ends pending commands whose time is up at now, at most 1,000 of
// them, and names them.
func (tx *Tx) ExpireCommands(now time.Time) ([]CommandRef, error) {
	refs, err := tx.commandRefs(`SELECT device, cid FROM commands
		WHERE expires > 0 AND expires <= ? AND state IN ('queued','delivered') ORDER BY expires LIMIT 1000`, ms(now))
	if err != nil {
		return nil, err
	}
	for _, ref := range refs {
		if err := tx.FinishCommand("hawser", ref, Outcome{State: CommandExpired, At: now}); err != nil {
			return nil, err
		}
	}
	return refs, nil
}

// endCommands ends the pending commands of a device that is barred for good: what
// it has not acknowledged is cancelled, of the rest nobody will hear.
func (tx *Tx) endCommands(actor string, id identity.ID) error {
	for from, to := range map[CommandState]CommandState{CommandQueued: CommandCancelled, CommandDelivered: CommandUnknown} {
		refs, err := tx.commandRefs(`SELECT device, cid FROM commands WHERE state = ? AND device = ? ORDER BY cid`, string(from), int64(id))
		if err != nil {
			return err
		}
		for _, ref := range refs {
			if err := tx.FinishCommand(actor, ref, Outcome{State: to, At: tx.now}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (tx *Tx) commandRefs(query string, args ...any) ([]CommandRef, error) {
	s, err := tx.w.stmt(query)
	if err != nil {
		return nil, err
	}
	rows, err := s.Query(args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var refs []CommandRef
	for rows.Next() {
		var device, cid int64
		if err := rows.Scan(&device, &cid); err != nil {
			return nil, err
		}
		refs = append(refs, CommandRef{identity.ID(device), uint64(cid)})
	}
	return refs, rows.Err()
}

// NextExpiry is when the next pending command expires; zero = none does.
func (r *Registry) NextExpiry(ctx context.Context) (time.Time, error) {
	var at sql.NullInt64
	err := r.read.QueryRowContext(ctx, `SELECT MIN(expires) FROM commands
		WHERE expires > 0 AND state IN ('queued','delivered')`).Scan(&at)
	return fromMS(at.Int64), err
}

const commandColumns = `device, cid, name, args, created_by, created, expires, state, delivered, finished, status, result`

// Command reads one command.
func (r *Registry) Command(ctx context.Context, ref CommandRef) (Command, error) {
	list, err := r.commands(ctx, `SELECT `+commandColumns+` FROM commands WHERE device = ? AND cid = ?`,
		int64(ref.Device), int64(ref.CID))
	if err == nil && len(list) == 0 {
		err = fmt.Errorf("command %s of %s: %w", cidText(ref.CID), ref.Device, ErrNotFound)
	}
	if err != nil {
		return Command{}, err
	}
	return list[0], nil
}

// PendingCommands lists up to limit queued and delivered commands of a device
// above after, in the order of their cids.
func (r *Registry) PendingCommands(ctx context.Context, id identity.ID, after uint64, limit int) ([]Command, error) {
	return r.commands(ctx, `SELECT `+commandColumns+` FROM commands
		WHERE device = ? AND cid > ? AND state IN ('queued','delivered') ORDER BY cid LIMIT ?`,
		int64(id), int64(after), limitOr(limit))
}

// PendingDevices calls fn for each device with a queued or delivered command, in
// the order of the ids.
func (r *Registry) PendingDevices(ctx context.Context, fn func(identity.ID)) error {
	rows, err := r.read.QueryContext(ctx, `SELECT DISTINCT device FROM commands WHERE state IN ('queued','delivered') ORDER BY device`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			return err
		}
		fn(identity.ID(id))
	}
	return rows.Err()
}

// CommandFilter selects commands.
type CommandFilter struct {
	Device identity.ID  // 0 = all
	State  CommandState // empty = any
	After  CommandRef   // those that come later in the order
	Limit  int          // 0 = 100
}

// Commands lists commands by device, then cid.
func (r *Registry) Commands(ctx context.Context, f CommandFilter) ([]Command, error) {
	q := `SELECT ` + commandColumns + ` FROM commands WHERE (device, cid) > (?, ?)`
	args := []any{int64(f.After.Device), int64(f.After.CID)}
	if f.Device != 0 {
		q += ` AND device = ?`
		args = append(args, int64(f.Device))
	}
	if f.State != "" {
		q += ` AND state = ?`
		args = append(args, string(f.State))
	}
	return r.commands(ctx, q+` ORDER BY device, cid LIMIT ?`, append(args, limitOr(f.Limit))...)
}

func (r *Registry) commands(ctx context.Context, query string, args ...any) ([]Command, error) {
	rows, err := r.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Command
	for rows.Next() {
		var c Command
		var device, cid, created, expires, delivered, finished int64
		err := rows.Scan(&device, &cid, &c.Name, &c.Args, &c.CreatedBy, &created, &expires,
			&c.State, &delivered, &finished, &c.Status, &c.Result)
		if err != nil {
			return nil, err
		}
		c.Device, c.CID = identity.ID(device), uint64(cid)
		c.Created, c.Expires = fromMS(created), fromMS(expires)
		c.Delivered, c.Finished = fromMS(delivered), fromMS(finished)
		list = append(list, c)
	}
	return list, rows.Err()
}
