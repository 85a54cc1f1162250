package server

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"hawser/internal/admin"
	"hawser/internal/command"
	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/registry"
)

// maxWait bounds how long one call waits for the outcome of a command.
const maxWait = time.Hour

func commandOf(c registry.Command) admin.Command {
	out := admin.Command{Device: c.Device, CID: c.CID, Name: c.Name, State: string(c.State), By: c.CreatedBy,
		Created: admin.UTC(c.Created), Expires: admin.UTC(c.Expires), Delivered: admin.UTC(c.Delivered), Finished: admin.UTC(c.Finished)}
	if c.Args != nil {
		out.Args = message.Value(c.Args).JSON()
	}
	if c.Result != nil {
		out.Result = message.Value(c.Result).JSON()
	}
	if c.State.Answered() || c.State == registry.CommandUnknown {
		out.Status = message.Status(c.Status).String()
	}
	return out
}

func (b *backend) commands(r *http.Request) (any, error) {
	p := params{r: r}
	f := registry.CommandFilter{Device: p.id("device"), State: registry.CommandState(p.text("state")),
		After: registry.CommandRef{Device: p.id("after_device"), CID: p.number("after_cid")}, Limit: p.limit()}
	if p.err != nil {
		return nil, p.err
	}
	f.Limit = min(f.Limit, maxPage)
	list, err := b.reg.Commands(r.Context(), f)
	out := make([]admin.Command, 0, len(list))
	for _, c := range list {
		out = append(out, commandOf(c))
	}
	return out, err
}

// freshEpoch makes sure that ids given out are new. A running server has made
// sure at its start.
func (b *backend) freshEpoch(ctx context.Context) error {
	if b.srv != nil {
		return nil
	}
	l, err := b.openLog(ctx)
	if err != nil {
		return err
	}
	return staleEpoch(ctx, b.reg, l)
}

func (b *backend) send(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	var in admin.NewCommand
	if err := read(r, &in); err != nil {
		return nil, err
	}
	var args message.Value
	if in.Args != nil {
		if args, err = message.ValueFromJSON(in.Args); err != nil {
			return nil, err
		}
	}
	if err := b.freshEpoch(r.Context()); err != nil {
		return nil, err
	}
	cid, err := b.queue(r, id, in.Name, args, in.Expires)
	if err != nil {
		return nil, err
	}
	return b.commandState(r.Context(), registry.CommandRef{Device: id, CID: cid})
}

// queue writes a command down. Without a server it waits for the next start.
func (b *backend) queue(r *http.Request, id identity.ID, name string, args message.Value, expires time.Time) (uint64, error) {
	if b.srv != nil {
		return b.srv.cmds.Queue(r.Context(), actorOf(r), id, name, args, expires)
	}
	// A service that does not run sends nothing: it only writes down.
	idle, err := command.New(r.Context(), b.reg, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		return 0, err
	}
	return idle.Queue(r.Context(), actorOf(r), id, name, args, expires)
}

func (b *backend) commandState(ctx context.Context, ref registry.CommandRef) (any, error) {
	c, err := b.reg.Command(ctx, ref)
	if err != nil {
		return nil, err
	}
	return commandOf(c), nil
}

func pathCommand(r *http.Request) (ref registry.CommandRef, err error) {
	if ref.Device, err = pathID(r); err != nil {
		return ref, err
	}
	if ref.CID, err = strconv.ParseUint(r.PathValue("cid"), 10, 64); err != nil {
		return ref, admin.Errorf(admin.Invalid, "%q is not a command id", r.PathValue("cid"))
	}
	return ref, nil
}

func (b *backend) command(r *http.Request) (any, error) {
	ref, err := pathCommand(r)
	if err != nil {
		return nil, err
	}
	p := params{r: r}
	wait := min(p.duration("wait"), maxWait)
	if p.err != nil {
		return nil, p.err
	}
	if wait == 0 {
		return b.commandState(r.Context(), ref)
	}
	if err := b.needServer("waiting for an answer"); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), wait)
	defer cancel()
	c, err := b.srv.cmds.Wait(ctx, ref.Device, ref.CID)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return nil, err
	}
	return commandOf(c), nil
}

func (b *backend) cancel(r *http.Request) (any, error) {
	ref, err := pathCommand(r)
	if err != nil {
		return nil, err
	}
	if b.srv != nil {
		err = b.srv.cmds.Cancel(r.Context(), actorOf(r), ref.Device, ref.CID)
	} else {
		err = b.update(r, func(tx *registry.Tx, actor string) error {
			return tx.FinishCommand(actor, ref, registry.Outcome{State: registry.CommandCancelled, At: time.Now()})
		})
	}
	if err != nil {
		return nil, err
	}
	return b.commandState(r.Context(), ref)
}

func (b *backend) configOf(r *http.Request, id identity.ID) (admin.Config, error) {
	c, err := b.reg.DeviceConfig(r.Context(), id)
	if err != nil {
		return admin.Config{}, err
	}
	out := admin.Config{Device: id, Version: c.Version, At: admin.UTC(c.At), AppliedVersion: c.AppliedVersion,
		AppliedText: c.AppliedText, AppliedAt: admin.UTC(c.AppliedAt)}
	if c.Version != 0 {
		out.Document = message.Value(c.Document).JSON()
	}
	if c.AppliedVersion != 0 {
		out.AppliedStatus = message.ConfigStatus(c.AppliedStatus).String()
	}
	return out, nil
}

func (b *backend) config(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	if _, err := b.reg.Device(r.Context(), id); err != nil {
		return nil, err
	}
	return b.configOf(r, id)
}

func (b *backend) setConfig(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	var in struct {
		Document json.RawMessage `json:"document"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	document, err := message.ValueFromJSON(in.Document)
	if err != nil {
		return nil, err
	}
	if err := b.freshEpoch(r.Context()); err != nil {
		return nil, err
	}
	err = b.update(r, func(tx *registry.Tx, actor string) error {
		_, err := tx.SetConfig(actor, id, document)
		return err
	})
	if err != nil {
		return nil, err
	}
	return b.configOf(r, id)
}
