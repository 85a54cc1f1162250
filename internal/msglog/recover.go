package msglog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sys/unix"
)

// recoverEvery is the pause between two attempts to bring the log back.
const recoverEvery = 500 * time.Millisecond

// recover runs while the log is unhealthy: it brings the store back, finds out
// whether frame f is there after all, and opens the intake again.
func (c *committer) recover(f *frame, cause error) {
	l := c.l
	l.cfg.Logger.Error("the log cannot write; nothing is acknowledged until it can", "log", l.cfg.where(), "error", cause)
	for {
		if l.isDead() || !c.sleep(recoverEvery) || l.in.closed() {
			return
		}
		c.repair(cause)
		err := c.resolve(f)
		if err == nil {
			break
		}
		if errors.Is(err, errForeign) || errors.Is(err, ErrDamaged) {
			l.setDead(err)
			return
		}
		cause = err
		l.setSick(err)
	}
	l.admit()
	l.cfg.Logger.Info("the log writes again", "log", l.cfg.where(), "frame", l.End().Frame())
}

// resolve settles the frame that failed: committed when it is stored, forgotten
// when it is not. Its owners were told that it failed and publish again.
func (c *committer) resolve(f *frame) error {
	there, err := c.l.lookFor(c.l.ctx, f)
	if err != nil {
		return err
	}
	if !there {
		if err := c.probe(); err != nil {
			return err
		}
		if c.l.cfg.NATSURL != "" {
			c.abandoned = f
		}
		return nil
	}
	for i := range c.recs {
		c.recs[i].Owner = nil
	}
	if err := c.writeQueues(f); err != nil {
		return err
	}
	c.finish(f)
	return nil
}

// probe writes a mark to find out whether the store takes writes again.
func (c *committer) probe() error { return c.l.writeMark(c.l.ctx) }

func (l *Log) isDead() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead != nil
}

// errWrite is what requests fail with that were under way when the embedded
// server could not write.
var errWrite = errors.New("the log store could not write")

// broken reports whether err means that the embedded server itself must be
// restarted. A timeout does not: the disk may be slow.
func broken(err error) bool {
	var api *apiError
	return errors.As(err, &api) && !wrongLastSeq(err) || errors.Is(err, nats.ErrNoResponders) ||
		errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrInvalidConnection) || errors.Is(err, errWrite)
}

// repair restarts the embedded server when err calls for it and there is room.
func (c *committer) repair(err error) {
	l := c.l
	if l.cfg.Dir == "" || !broken(err) && !l.store.sick.Load() {
		return
	}
	if free, err := freeBytes(l.cfg.Dir); err != nil || free < l.cfg.MinFree {
		l.cfg.Logger.Warn("no room to restart the log store", "log", l.cfg.Dir, "free", free, "need", l.cfg.MinFree, "error", err)
		return
	}
	l.stats.restarts.Add(1)
	l.store.close()
	l.store.sick.Store(false)
	if err := l.store.connect(); err != nil {
		l.store.sick.Store(true)
		l.cfg.Logger.Error("restart the log store", "log", l.cfg.Dir, "error", err)
		return
	}
	if err := l.afterRestart(l.ctx); err != nil {
		l.cfg.Logger.Error("the log store after its restart", "log", l.cfg.Dir, "error", err)
		if errors.Is(err, ErrDamaged) {
			l.setDead(err)
		}
	}
}

// repairIfAsked serves writers of the other streams that met a write error.
func (c *committer) repairIfAsked() {
	if c.l.stats.repairWanted.Swap(false) {
		c.repair(errWrite)
	}
}

// storeFailed is told of every failed write that is not a frame's. The
// committer restarts the store where that is called for.
func (l *Log) storeFailed(err error) {
	l.stats.failures.Add(1)
	gone := errors.Is(err, nats.ErrConnectionClosed) // the committer is at it, or meets it itself
	if l.cfg.Dir != "" && broken(err) && !gone {
		l.stats.repairWanted.Store(true)
		signal(l.in.ready)
	}
}

// afterRestart compares what is stored with what was acknowledged.
func (l *Log) afterRestart(ctx context.Context) error {
	_ = l.store.logger.takeDamage() // an index cut short by the full disk; the blocks are compared below
	known := l.State()
	known.Frame = 0
	infos, err := l.checkStreams(ctx, known)
	if err != nil {
		return err
	}
	if last := infos[0].State.LastSeq; last > known.Log.Last+1 {
		return fmt.Errorf("%w: stream %s in %s ends at frame %d, %d was the last written", ErrDamaged, l.names.log, l.cfg.Dir, last, known.Log.Last)
	}
	l.queues.setLast(infos[1].State.LastSeq)
	raise(&l.keep.wantHistory, infos[3].State.FirstSeq)
	return nil
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}
