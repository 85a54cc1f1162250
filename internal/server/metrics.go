package server

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// scrapeFor bounds the reading of registry and log for one scrape.
const scrapeFor = 5 * time.Second

// metricsHandler serves /metrics, /healthz (the process answers) and /readyz (it
// can do its work).
func (s *Server) metricsHandler() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collector{s}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		reasons := s.notReady(r.Context())
		if len(reasons) == 0 {
			fmt.Fprintln(w, "ready")
			return
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, strings.Join(reasons, "\n"))
	})
	return mux
}

// collector reads all figures where they are kept, at each scrape.
type collector struct{ s *Server }

// Describe implements prometheus.Collector: which metrics there are is said by
// Collect alone.
func (collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeFor)
	defer cancel()
	m := metrics{ch}
	m.info("hawser_build_info", "version of hawser", "version", c.s.cfg.Version)
	c.broker(m)
	c.log(ctx, m)
	c.registry(ctx, m)
	for domain, end := range c.s.leaves.expiries() {
		m.labelled("hawser_broker_certificate_expiry_seconds", "seconds until the certificate of a domain ends", time.Until(end).Seconds(), "domain", domain)
	}
}

func (c collector) broker(m metrics) {
	b, st := c.s.br, c.s.br.Stats()
	m.gauge("hawser_connections", "clients connected", float64(st.Connections.Load()))
	m.gauge("hawser_devices_online", "devices connected", float64(len(b.OnlineDevices())))
	for _, v := range []struct {
		name, help string
		n          uint64
	}{
		{"hawser_connects_total", "connections admitted", uint64(st.Connects.Load())},
		{"hawser_connections_rejected_total", "connections turned away before they were admitted", st.Rejected.Load()},
		{"hawser_takeovers_total", "connections ended by another one of the same client", uint64(st.Takeovers.Load())},
		{"hawser_messages_received_total", "messages that clients published", st.Received.Load()},
		{"hawser_messages_acknowledged_total", "messages on disk that were acknowledged to their publisher", st.Acknowledged.Load()},
		{"hawser_messages_delivered_total", "messages sent to subscribers", st.Delivered.Load()},
		{"hawser_messages_refused_total", "publishes and subscriptions that the authorizer refused", st.Refused.Load()},
		{"hawser_messages_dropped_total", "messages not delivered or not queued at a limit", st.Dropped.Load()},
		{"hawser_messages_too_large_total", "messages larger than their subscriber takes", st.TooLarge.Load()},
		{"hawser_messages_unavailable_total", "messages not acknowledged because the log could not write", st.Unavailable.Load()},
		{"hawser_throttled_total", "times that a publisher was read from more slowly", st.Throttled.Load()},
		{"hawser_wills_total", "last wills published", st.Wills.Load()},
		{"hawser_sessions_overtaken_total", "sessions that retention has overtaken", st.Lost.Load()},
		{"hawser_store_errors_total", "changes of sessions that the registry could not write", st.StoreErrors.Load()},
	} {
		m.counter(v.name, v.help, float64(v.n))
	}
}

func (c collector) log(ctx context.Context, m metrics) {
	v := c.s.mlog.Stats(ctx)
	m.counter("hawser_log_frames_total", "frames committed", float64(v.Frames))
	m.counter("hawser_log_records_total", "records committed", float64(v.Records))
	m.counter("hawser_log_written_bytes_total", "bytes of frames committed", float64(v.Bytes))
	m.counter("hawser_log_failures_total", "attempts to write that failed", float64(v.Failures))
	m.counter("hawser_log_refused_total", "records refused because the log could not write", float64(v.Refused))
	m.counter("hawser_log_restarts_total", "restarts of the embedded log store", float64(v.Restarts))
	m.counter("hawser_log_overtaken_total", "times that retention passed a cursor", float64(v.Overtaken))
	m.counter("hawser_log_store_warnings_total", "warnings of the log store", float64(v.StoreWarnings))
	m.summary("hawser_log_commit_seconds", "time to commit a frame, synced", v.Frames, v.CommitTime.Seconds())
	m.gauge("hawser_log_commit_max_seconds", "the longest commit of a frame", v.CommitMax.Seconds())
	m.gauge("hawser_log_bytes", "size of the log", float64(v.LogBytes))
	m.gauge("hawser_log_history_bytes", "size of the histories", float64(v.HistoryBytes))
	m.gauge("hawser_log_retained", "retained messages stored", float64(v.Retained))
	m.gauge("hawser_queue_depth", "messages that wait for devices", float64(v.Queued))
	m.gauge("hawser_log_healthy", "1 while the log takes records", boolean(c.s.mlog.Healthy() == nil))
	if !v.Oldest.IsZero() {
		m.gauge("hawser_log_oldest_seconds", "age of the oldest frame", time.Since(v.Oldest).Seconds())
	}
	if st, err := c.s.reg.LogState(ctx); err == nil {
		lag := int64(c.s.mlog.End()>>16) - int64(st.Checkpoint>>16)
		m.gauge("hawser_log_checkpoint_lag_frames", "frames that a restart would read again", float64(max(0, lag)))
	}
}

func (c collector) registry(ctx context.Context, m metrics) {
	counts, err := c.s.reg.DeviceCounts(ctx)
	m.gauge("hawser_registry_healthy", "1 while the registry can be read", boolean(err == nil))
	for state, n := range counts {
		m.labelled("hawser_devices", "devices known, by state", float64(n), "state", string(state))
	}
	m.counter("hawser_clones_total", "times that the boots of a device proved two holders of its identity", float64(c.s.up.clones.Load()))
	if n, err := c.s.reg.CloneCount(ctx); err == nil {
		m.gauge("hawser_devices_cloned", "devices of which two were seen, and that nobody has released yet", float64(n))
	}
	ending, err := c.s.reg.ExpiringCertificates(ctx, time.Now().Add(expiresSoon), maxExpiring)
	if err != nil {
		return
	}
	m.gauge("hawser_client_certificates_ending", "client certificates that end within 30 days, at most 100", float64(len(ending)))
	if len(ending) > 0 {
		m.gauge("hawser_client_certificate_expiry_seconds", "seconds until the next client certificate ends", time.Until(ending[0].NotAfter).Seconds())
	}
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// metrics makes figures into metrics.
type metrics struct{ ch chan<- prometheus.Metric }

func (m metrics) counter(name, help string, v float64) {
	m.ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, nil, nil), prometheus.CounterValue, v)
}

func (m metrics) gauge(name, help string, v float64) {
	m.ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, nil, nil), prometheus.GaugeValue, v)
}

func (m metrics) labelled(name, help string, v float64, label, value string) {
	m.ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, []string{label}, nil), prometheus.GaugeValue, v, value)
}

func (m metrics) info(name, help, label, value string) { m.labelled(name, help, 1, label, value) }

func (m metrics) summary(name, help string, count uint64, sum float64) {
	m.ch <- prometheus.MustNewConstSummary(prometheus.NewDesc(name, help, nil, nil), count, sum, nil)
}
