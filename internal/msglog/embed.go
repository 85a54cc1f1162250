package msglog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

const storeStartTimeout = 60 * time.Second

// startEmbedded runs a server on dir without any listening port. With sync every
// write is fsynced before it is acknowledged (SyncAlways).
func startEmbedded(dir string, sync bool, logger *natsLogger) (*server.Server, error) {
	ns, err := server.NewServer(&server.Options{
		ServerName: "hawser", DontListen: true, NoSigs: true, NoLog: true,
		JetStream: true, StoreDir: dir, SyncAlways: sync, SyncInterval: 2 * time.Minute,
		JetStreamMaxMemory: 8 << 20, JetStreamMaxStore: 1 << 60,
		NoSystemAccount: true, DisableJetStreamBanner: true, MaxPayload: 1 << 20,
	})
	if err != nil {
		return nil, fmt.Errorf("start the log store in %s: %w", dir, err)
	}
	ns.SetLoggerV2(logger, false, false, false)
	ns.Start()
	if !ns.ReadyForConnections(storeStartTimeout) || !ns.JetStreamEnabled() {
		cause := logger.lastError()
		stopEmbedded(ns)
		return nil, fmt.Errorf("the log store in %s does not start: %s", dir, cause)
	}
	return ns, nil
}

func stopEmbedded(ns *server.Server) {
	if ns != nil {
		ns.Shutdown()
		ns.WaitForShutdown()
	}
}

func dialEmbedded(p pipe, opts ...nats.Option) (*nats.Conn, error) {
	opts = append(opts, nats.Name("hawser"), nats.InProcessServer(p), nats.NoReconnect())
	return nats.Connect("", opts...)
}

// pipe gives connections inside this process; wrap, if any, is put around them.
type pipe struct {
	ns   *server.Server
	wrap func(net.Conn) net.Conn
}

// InProcessConn implements nats.InProcessConnProvider.
func (p pipe) InProcessConn() (net.Conn, error) {
	c, err := p.ns.InProcessConn()
	if err == nil && p.wrap != nil {
		c = p.wrap(c)
	}
	return c, err
}

// streamDir is where the embedded server keeps a stream.
func streamDir(dir, stream string) string {
	return filepath.Join(dir, server.JetStreamStoreDir, "$G", "streams", stream)
}

// checkDirs refuses a store whose parts are missing, before the server is
// started: it would make them anew.
func checkDirs(dir string, streams []string) error {
	for _, s := range streams {
		d := streamDir(dir, s)
		for _, f := range []string{d, filepath.Join(d, "meta.inf"), filepath.Join(d, "meta.sum"), filepath.Join(d, "msgs")} {
			if _, err := os.Stat(f); err != nil {
				return fmt.Errorf("%w: %s is missing from the log in %s", ErrDamaged, f, dir)
			}
		}
	}
	return nil
}

// natsLogger hands what the server says to slog and keeps what it says about
// damaged storage.
type natsLogger struct {
	log          *slog.Logger
	onWriteError func() // nil: nobody wants to know

	mu       sync.Mutex
	damage   []string // guarded by mu
	warnings uint64   // guarded by mu; about storage, harmless or not
	last     string   // guarded by mu; the last error
}

// Sentences of the file store that follow a kill or a power cut and mean no
// loss: it reads its blocks again. What it finds there is checked by us.
var harmless = []string{
	"Stream state outdated",
	"Recovering stream state from index errored: prior state file",
	"took ", // slow operations
}

func storageDamage(line string) (about, damage bool) {
	about = strings.HasPrefix(line, "Filestore") || strings.Contains(line, "recreating stream") ||
		strings.Contains(line, "corrupt") || strings.Contains(line, "restoring partial batch") ||
		strings.Contains(line, "checksum") || strings.Contains(line, "metafile")
	if !about {
		return false, false
	}
	for _, h := range harmless {
		if strings.Contains(line, h) {
			return true, false
		}
	}
	return true, true
}

func (n *natsLogger) note(line string) {
	about, damage := storageDamage(line)
	n.mu.Lock()
	defer n.mu.Unlock()
	if about {
		n.warnings++
	}
	if damage && len(n.damage) < 16 {
		n.damage = append(n.damage, line)
	}
}

// takeDamage gives what was said about damage since the last call.
func (n *natsLogger) takeDamage() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.damage) == 0 {
		return nil
	}
	err := errors.New(strings.Join(n.damage, "; "))
	n.damage = nil
	return err
}

func (n *natsLogger) lastError() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.last == "" {
		return "no reason given"
	}
	return n.last
}

func (n *natsLogger) warningCount() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.warnings
}

func (n *natsLogger) Noticef(f string, v ...any) { n.log.Debug("log store: " + fmt.Sprintf(f, v...)) }
func (n *natsLogger) Debugf(string, ...any)      {}
func (n *natsLogger) Tracef(string, ...any)      {}

func (n *natsLogger) Warnf(f string, v ...any) {
	line := fmt.Sprintf(f, v...)
	level := slog.LevelWarn
	if about, damage := storageDamage(line); about && !damage {
		level = slog.LevelInfo
	}
	n.note(line)
	n.log.Log(context.Background(), level, "log store: "+line)
}

func (n *natsLogger) Errorf(f string, v ...any) {
	line := fmt.Sprintf(f, v...)
	n.note(line)
	n.mu.Lock()
	n.last = line
	n.mu.Unlock()
	n.log.Error("log store: " + line)
	if n.onWriteError != nil && writeFailed(line) {
		n.onWriteError()
	}
}

func writeFailed(line string) bool {
	return strings.Contains(line, "rite error") || strings.Contains(line, "failed to store") ||
		strings.Contains(line, "out of resources") || strings.Contains(line, "will be DISABLED")
}

func (n *natsLogger) Fatalf(f string, v ...any) { n.Errorf(f, v...) }
