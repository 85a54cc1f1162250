package bench

import (
	"context"
	"fmt"
	"time"

	"hawser/internal/mqtt"
)

// perSession is how many messages wait for each session that comes back.
const perSession = 3

// sessions measures what persistent sessions with queued messages cost when they
// come back all at once: their storm, less a storm of as many plain connects.
func (r *runner) sessions(ctx context.Context) error {
	f, err := r.fleet(ctx, "sessions", r.Known)
	if err != nil {
		return err
	}
	servers, err := r.servers(ctx, f, true)
	if err != nil {
		return err
	}
	extra := newFigures(servers)
	for i, s := range servers {
		v, err := r.comeBack(ctx, s)
		if err != nil {
			stopAll(servers)
			return fmt.Errorf("%s: %w", s.name, err)
		}
		extra[i] = append(extra[i], v)
	}
	r.report.add(fmt.Sprintf("CPU of a session coming back to 3 messages, %d known", r.Known), "µs", extra.medians(), atMost(250))
	return stopAll(servers)
}

func (r *runner) comeBack(ctx context.Context, s *server) (float64, error) {
	home, others := s.fleet.devices[:r.Returning], s.fleet.devices[r.Returning:2*r.Returning]
	list, err := r.storm(s, home, func(d *device) session {
		return session{v: mqtt.V5, expiry: 3600, filter: "private/" + d.name + "/d/#"}
	})
	if err != nil {
		return 0, err
	}
	leaveAll(list)
	if err := r.queue(s, home); err != nil {
		return 0, err
	}
	if err := settle(s.pid(), 30*time.Second); err != nil {
		return 0, err
	}
	r.startProfile(ctx, s, "plain")
	plain, _, err := cpuOf(s, func() (int, error) {
		list, err = r.storm(s, others, func(*device) session { return session{v: mqtt.V5, clean: true} })
		return len(others), err
	})
	if err != nil {
		return 0, err
	}
	leaveAll(list)
	if err := settle(s.pid(), 15*time.Second); err != nil {
		return 0, err
	}
	r.startProfile(ctx, s, "back")
	back, _, err := cpuOf(s, func() (int, error) {
		list, err = r.storm(s, home, func(*device) session { return session{v: mqtt.V5, expiry: 3600, present: true, waiting: perSession} })
		return len(home), err
	})
	r.startProfile(ctx, s, "off")
	leaveAll(list)
	return back - plain, err
}

// queue has the service publish perSession messages to each device.
func (r *runner) queue(s *server, devices []device) error {
	c, err := s.fleet.connect(s.addr, &s.fleet.service, session{v: mqtt.V311, clean: true})
	if err != nil {
		return err
	}
	defer c.leave()
	open := 0
	for range perSession {
		for i := range devices {
			c.extend()
			c.prepare("private/"+devices[i].name+"/d/app/x", 1, r.Payload)
			if err := c.publish(); err != nil {
				return err
			}
			if open++; open < 50 {
				continue
			}
			n, err := c.acks()
			if err != nil {
				return err
			}
			open -= n
		}
	}
	for open > 0 {
		n, err := c.acks()
		if err != nil {
			return err
		}
		open -= n
	}
	return nil
}

// receive takes n QoS 1 messages and acknowledges them.
func (c *client) receive(n int) error {
	for range n {
		h, body, err := c.next()
		if err != nil {
			return err
		}
		if h.Type != mqtt.PUBLISH {
			return fmt.Errorf("%v instead of a queued message", h.Type)
		}
		var p mqtt.Publish
		if err := p.DecodeAtClient(c.v, h.Flags, body); err != nil {
			return err
		}
		ack := mqtt.Ack{Type: mqtt.PUBACK, PacketID: p.PacketID}
		if _, err := c.conn.Write(ack.Append(nil, c.v)); err != nil {
			return err
		}
	}
	return nil
}
