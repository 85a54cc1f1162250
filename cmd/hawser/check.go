package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/check"
	"hawser/internal/durable"
)

func (a *app) checkCommand() *cobra.Command {
	return group("check", "play the man in the middle against a device, the intruder against a broker",
		`check finds out what a device does when the broker is false, and what a broker does when
a client is hostile. It works against any MQTT client or broker over TLS, Hawser's or
not, on a desk and without the internet. Every certificate is made for the run: there is
no way to use it with the keys of a real fleet.

Each case ends in a verdict: pass, FAIL, warn, inconclusive (it never connected, or came
to no end) or n/a (the device does not do what the case needs). The exit code is 0 only
if there is no FAIL and nothing inconclusive.`,
		a.checkDevice(), a.checkBroker(), a.checkList(), a.checkExplain(), a.checkWorld())
}

// reports is where the outcome goes beside the terminal.
type reports struct {
	junit, html string
	image       string
}

func (r *reports) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&r.junit, "junit", "", "write JUnit XML to this file")
	cmd.Flags().StringVar(&r.html, "html", "", "write a page for people to this file")
	cmd.Flags().StringVar(&r.image, "firmware", "", "the firmware under test; its SHA-256 goes into the report")
}

// write writes the files that were asked for, and ends with the exit code.
func (r *reports) write(a *app, rep *check.Report) error {
	for path, to := range map[string]func(io.Writer) error{r.junit: rep.WriteJUnit, r.html: rep.WriteHTML} {
		if path == "" {
			continue
		}
		var b strings.Builder
		if err := to(&b); err != nil {
			return err
		}
		if err := durable.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			return err
		}
	}
	if a.json {
		if err := rep.WriteJSON(a.out); err != nil {
			return err
		}
	}
	if !rep.OK() {
		return exit(1)
	}
	return nil
}

// live prints each result as it comes.
func (a *app) live() func(done, all int, r *check.Result) {
	if a.json {
		p := &progress{app: a, live: terminal(a.err)}
		return func(done, all int, r *check.Result) {
			if p.live {
				p.show("%d of %d: %s %s", done, all, r.ID, r.Verdict)
			}
		}
	}
	colour := terminal(a.out)
	return func(done, all int, r *check.Result) {
		verdict := fmt.Sprintf("%-12s", r.Verdict)
		if colour {
			verdict = paint(r.Verdict, verdict)
		}
		a.say("%3d/%d  %-26s %s %s", done, all, r.ID, verdict, printable(r.Why))
	}
}

func paint(v check.Verdict, text string) string {
	codes := map[check.Verdict]string{check.Pass: "32", check.Fail: "1;31", check.Warn: "33", check.Inconclusive: "35", check.NotApplicable: "2"}
	return "\x1b[" + codes[v] + "m" + text + "\x1b[0m"
}

// conclude says what it came to.
func (a *app) conclude(rep *check.Report) {
	if a.json {
		return
	}
	n := rep.Counts()
	a.say("")
	a.say("check %s: %d pass, %d FAIL, %d warn, %d inconclusive, %d n/a in %.1f s", rep.Kind, n[check.Pass], n[check.Fail], n[check.Warn],
		n[check.Inconclusive], n[check.NotApplicable], rep.Ended.Sub(rep.Began).Seconds())
	for i := range rep.Results {
		if x := &rep.Results[i]; x.Verdict == check.Fail {
			a.say("  FAIL %s: %s: %s (%s)", x.ID, x.Does, printable(x.Why), x.Clause)
		}
	}
	if n[check.Fail] > 0 {
		a.say("hint: hawser check explain %s", firstFail(rep))
	}
}

func firstFail(rep *check.Report) string {
	for i := range rep.Results {
		if rep.Results[i].Verdict == check.Fail {
			return rep.Results[i].ID
		}
	}
	return ""
}

func (a *app) checkDevice() *cobra.Command {
	o := check.DeviceOptions{}
	var profile, features string
	var w worldOptions
	var out reports
	cmd := &cobra.Command{
		Use:   "device [--exec COMMAND]",
		Short: "play a false broker, in many ways, against a device",
		Long: `device listens and plays brokers, honest and false, against a client. The client comes by
itself when it reconnects (--wait says how long that may take), is started once for each
attempt by --exec, or is made to reconnect by --reset.

In --exec, {host} {port} {cafile} {cert} {key} stand for where to connect and for the
files of a world made for the run. --world DIR keeps such a world, so that a device can
be given its roots once: see "hawser check world".

The honest cases come first. If the device does not pass them, the others are not judged.
A case FAILs whenever the client's certificate, its Finished or any byte of MQTT reached
somebody who must not get it.

--profile mcu (the default) wants TLS 1.3 with one suite, P-256 and EC certificates alone.
With --profile general what is legitimate for other clients (TLS 1.2, RSA, P-384, other
suites) is a warn.

What the device does (subscribe, qos1, stays) is found out by the honest cases, or is
declared by --features; cases that need what it does not do are n/a.

--field --upstream HOST:PORT is for a device that has its real roots and cannot get
others: its honest broker is the real one, to which TCP is relayed unchanged, and only
those cases are tried that need no signature by its roots ("check list" tells which). Make
the device's broker name lead to --listen. --cafile gives the twin its root's exact name
and key id; it holds certificates, never keys.`,
		Example: `  hawser check device --profile general --exec \
  'mosquitto_pub -h {host} -p {port} --cafile {cafile} --cert {cert} --key {key} -t t -m x'
  hawser check device --listen 0.0.0.0:8883 --world desk --domain mqtt.example.com \
    --reset 'uhubctl -a cycle -p 2' --html report.html
  hawser check device --field --upstream 192.0.2.7:8883 --domain mqtt.example.com \
    --listen 0.0.0.0:8883 --cafile ca.crt
  hawser check device --only X1,H1 --exec './client {port}' --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.Profile, err = profileArg(cmd, profile); err != nil {
				return err
			}
			if err := w.check(cmd, &o); err != nil {
				return err
			}
			if features != "" {
				o.Features = strings.Split(features, ",")
			}
			return a.runDevice(cmd.Context(), &o, &w, &out)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Exec, "exec", "", "command that starts the client once; see above for placeholders")
	f.StringVar(&o.Reset, "reset", "", "command that makes the device connect again")
	f.StringVar(&o.Listen, "listen", "127.0.0.1:8883", "where the device connects to, without --exec")
	f.StringVar(&profile, "profile", string(check.MCU), "what it is held against: mcu or general")
	w.flags(f)
	f.StringVar(&o.Host, "host", "", "what {host} stands for (default: the domain)")
	f.BoolVar(&o.NoClock, "no-clock", false, "the device has no clock: dates are a warn")
	f.StringVar(&features, "features", "", "what it does, of subscribe,qos1,stays (default: found out)")
	f.DurationVar(&o.Wait, "wait", 2*time.Minute, "how long the device may take to connect")
	f.DurationVar(&o.Step, "step", 5*time.Second, "how long one step of a connection may take")
	f.DurationVar(&o.Patience, "patience", 10*time.Second, "how long a silent broker is silent")
	f.IntVar(&o.Parallel, "parallel", 4, "cases at the same time, with --exec")
	f.StringSliceVar(&o.Only, "only", nil, "ids or groups of cases, separated by commas")
	out.flags(cmd)
	return a.withJSON(cmd)
}

func profileArg(cmd *cobra.Command, s string) (check.Profile, error) {
	switch p := check.Profile(s); p {
	case check.MCU, check.General:
		return p, nil
	}
	return "", usagef(cmd, "profile %q is not mcu or general", s)
}

func (a *app) checkBroker() *cobra.Command {
	var o check.BrokerOptions
	var who brokerPeople
	var profile string
	var out reports
	cmd := &cobra.Command{
		Use:   "broker HOST:PORT --device CERT,KEY --other CERT,KEY",
		Short: "play a hostile client, in many ways, against a broker",
		Long: `broker plays strangers, thieves and careless devices against a broker: who must not come
in, who says he is somebody else, who listens or speaks beyond his own topics, who costs
as much as he can. It needs the certificates and keys of two devices of that broker; the
second is the witness, and the healthy device that must notice nothing.

The broker sees hundreds of odd connections in a minute: do this to brokers that are
yours. --revoke-exec takes the first device's rights away in mid-test ({id} is its name),
as the last thing.

Certificates that must not be let in are forged, under a CA with the name and the key id
of the devices' own. --expired and --server-auth take one that this CA itself has signed:
with a broker that looks at the chain it alone shows whether dates and usage are looked at.
--topics says where a device may publish and subscribe: it holds {id} and ends with #.`,
		Example: `  hawser check broker localhost:8883 --device a/device.crt,a/device.key \
    --other b/device.crt,b/device.key --topics 'private/{id}/#'
  hawser check broker mqtt.example.com:8883 --device a.crt,a.key --other b.crt,b.key \
    --revoke-exec 'hawser device revoke {id} --reason check' --html report.html`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Target = args[0]
			var err error
			if o.Profile, err = profileArg(cmd, profile); err != nil {
				return err
			}
			if who.device == "" || who.other == "" {
				return usagef(cmd, "two devices are needed: --device CERT,KEY and --other CERT,KEY")
			}
			if err := o.Check(); err != nil {
				return usage(cmd, err)
			}
			if err := who.load(&o); err != nil {
				return err
			}
			return a.runBroker(cmd.Context(), &o, &out)
		},
	}
	f := cmd.Flags()
	f.StringVar(&who.device, "device", "", "certificate and key of the device that is hostile")
	f.StringVar(&who.other, "other", "", "certificate and key of the device that is its victim")
	f.StringVar(&who.revoked, "revoked", "", "certificate and key of a device that was revoked")
	f.StringVar(&who.service, "service", "", "certificate and key of a service that may read the devices, and nothing else")
	f.StringVar(&who.expired, "expired", "", "certificate and key of a device that has expired")
	f.StringVar(&who.server, "server-auth", "", "certificate and key under the devices' CA that is for servers alone")
	f.StringVar(&o.Revoke, "revoke-exec", "", "command that takes away the rights of {id}")
	f.StringVar(&o.Topics, "topics", "private/{id}/#", "where a device may publish and subscribe")
	f.StringVar(&o.Name, "sni", "", "server name to ask for (default: HOST)")
	f.StringVar(&profile, "profile", string(check.MCU), "what it is held against: mcu or general")
	f.DurationVar(&o.Step, "step", 5*time.Second, "how long one step may take")
	f.DurationVar(&o.Patience, "patience", 30*time.Second, "how long a connection that says nothing may stand")
	f.StringSliceVar(&o.Only, "only", nil, "ids or groups of cases, separated by commas")
	out.flags(cmd)
	return a.withJSON(cmd)
}

// brokerPeople are the certificates that were given, each as CERT,KEY or "".
type brokerPeople struct{ device, other, revoked, service, expired, server string }

func (w *brokerPeople) load(o *check.BrokerOptions) (err error) {
	for _, p := range []struct {
		flag, pair string
		to         **check.Credentials
	}{{"device", w.device, &o.Device}, {"other", w.other, &o.Other}, {"revoked", w.revoked, &o.Revoked}, {"service", w.service, &o.Service},
		{"expired", w.expired, &o.Expired}, {"server-auth", w.server, &o.Server}} {
		if p.pair == "" {
			continue
		}
		if *p.to, err = check.LoadCredentials(p.pair); err != nil {
			return fmt.Errorf("--%s: %w\nhint: --%s CERT,KEY names two PEM files", p.flag, err, p.flag)
		}
	}
	if o.Device.Name == o.Other.Name {
		return fmt.Errorf("--device and --other are both %s, and the check needs two devices\nhint: hawser device add", o.Device.Name)
	}
	return nil
}

func (a *app) runBroker(ctx context.Context, o *check.BrokerOptions, out *reports) error {
	o.Told = a.live()
	if terminal(a.err) { // some cases wait for the broker's patience
		p, told := &progress{app: a, live: true}, o.Told
		o.Begun = func(c *check.Case) { p.show("trying %s: %s", c.ID, c.Does) }
		o.Told = func(done, all int, r *check.Result) {
			p.show("")
			told(done, all, r)
		}
	}
	rep, err := check.Broker(ctx, *o)
	if rep != nil && ctx.Err() != nil {
		a.conclude(rep)
		return errors.New("interrupted: the other cases were not tried, and no report was written")
	}
	if err != nil {
		return err
	}
	if err := rep.AddImage(out.image); err != nil {
		return err
	}
	a.conclude(rep)
	return out.write(a, rep)
}

// listed is a case as it is listed.
type listed struct {
	Against string `json:"against"`
	ID      string `json:"id"`
	Does    string `json:"does"`
	Expect  string `json:"expect"`
	Clause  string `json:"clause"`
	Needs   string `json:"needs,omitempty"`
	Field   string `json:"field,omitempty"` // for a device in the field: yes, or only there
}

// inField says in words whether a case is tried on a device that keeps its real roots.
func (c *listed) inField() string {
	switch {
	case c.Against != "device":
		return ""
	case c.Field == "":
		return "no: it needs a certificate that the device's roots have signed"
	case c.Field == "only":
		return "only there (--field)"
	}
	return "yes (--field)"
}

func listedCases() (list []listed) {
	desk := map[string]bool{}
	for _, c := range check.DeviceCases() {
		field := ""
		if desk[c.ID] = true; check.InField(c.ID) {
			field = "yes"
		}
		list = append(list, listed{"device", c.ID, c.Does, c.Expect, c.Clause, c.Needs, field})
	}
	for _, c := range check.FieldCases() {
		if !desk[c.ID] {
			list = append(list, listed{"device", c.ID, c.Does, c.Expect, c.Clause, c.Needs, "only"})
		}
	}
	for _, c := range check.BrokerCases() {
		list = append(list, listed{"broker", c.ID, c.Does, c.Expect, c.Clause, c.Needs, ""})
	}
	return list
}

func (a *app) checkList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list the cases",
		Long: `list names every case of "check device" and "check broker" with what is done. FIELD says
which are also tried with --field, on a device that keeps its real roots: "yes", or "only"
there. See "hawser check explain" for what a correct peer does, and why.`,
		Example: `  hawser check list
  hawser check list --json`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			list := listedCases()
			return emitAll(a, list, func() {
				var rows [][]string
				for _, c := range list {
					rows = append(rows, []string{c.Against, c.ID, c.Field, c.Does})
				}
				a.table([]string{"AGAINST", "ID", "FIELD", "DOES"}, rows)
			})
		},
	}
	return a.withJSON(cmd)
}

func (a *app) checkExplain() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain ID",
		Short: "say what a case does, what is expected, and why",
		Long: `explain is the manual of one case, or of a group of them ("X1"): what is done, what a
correct peer does, what the case needs of it, and the clause or the CVE behind it.`,
		Example: `  hawser check explain X4.common-name
  hawser check explain M6`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var ids []string
			for _, c := range listedCases() {
				ids = append(ids, c.ID)
			}
			return ids, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var found []listed
			for _, c := range listedCases() {
				if g, _, _ := strings.Cut(c.ID, "."); strings.EqualFold(c.ID, args[0]) || strings.EqualFold(g, args[0]) {
					found = append(found, c)
				}
			}
			if len(found) == 0 {
				return fmt.Errorf("there is no case %q\nhint: hawser check list", args[0])
			}
			return emitAll(a, found, func() {
				for i, c := range found {
					if i > 0 {
						a.say("")
					}
					a.fields("id", c.ID, "against", "a "+c.Against, "does", c.Does, "expected", c.Expect, "needs", c.Needs, "in the field", c.inField(), "from", c.Clause)
				}
			})
		},
	}
	return a.withJSON(cmd)
}
