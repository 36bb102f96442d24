// Package journey moves a guest with a failover pair from one host to another, on baton or on
// QEMU, while a peer pings it and exchanges datagrams with it: for suites, bench and demo.
//
//	        ┌──────────────┐ peer: ping, datagrams, TCP
//	        └──────┬───────┘
//	───────────────┴───────┬──────────────────────────┬──────── wire
//	                 host 0│                    host 1│
//	             ┌─────── PF0 ──┐             ┌────── PF1 ──┐
//	            VF             br-0          VF            br-1
//	             └─ the guest ─ tap-0         └─ the guest ─ tap-1
//	                        └────── migrates ──────^
package journey

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/nettool"
	"baton/vmm/timeline"

	"github.com/vishvananda/netlink"
)

// Addresses of the guest and of the peer.
const (
	GuestMAC = "52:54:00:99:00:03"
	GuestIP  = "10.99.0.3"
	PeerIP   = "10.99.0.2"
	peerPort = 7001
	pings    = 5 * time.Millisecond
	late     = 100 // pings after the last step: what it has lost, or held, shows in them
)

// ManyDatagrams are more a second each way than a guest with an emulated CPU can send, or take with much else to do.
const ManyDatagrams = 2000

// UDPRate is how many datagrams a second go each way, unless a [Way] says otherwise.
func UDPRate() int {
	if harness.Emulated() {
		return 100
	}
	return ManyDatagrams
}

// World is two hosts and a peer, on one wire.
type World struct {
	T     testing.TB
	Peer  *harness.Peer
	Hosts [2]Host
	dir   string // for sockets: short
	n     int    // machines so far
	mac   string // of the guest

	echoes bool // the guest does, by TCP
}

// Host is what stands for a host.
type Host struct {
	PF          harness.PF
	VF          harness.VF
	TAP, Bridge string
}

// NewWorld makes it in the nested host, until the test ends.
func NewWorld(t testing.TB) *World {
	t.Helper()
	w := newWorld(t, GuestMAC)
	w.Peer = harness.NewPeer(t, PeerIP+"/24")
	pfs := harness.PFs(t)
	if len(pfs) < 2 {
		t.Fatalf("%d SR-IOV NICs, want two", len(pfs))
	}
	for i := range w.Hosts {
		h := &w.Hosts[i]
		h.PF, h.TAP, h.Bridge = pfs[i], fmt.Sprintf("tap-%d", i), fmt.Sprintf("br-%d", i)
		h.VF = h.PF.CreateVFs(t, 1)[0]
		harness.Tap(t, h.TAP, 1)
		harness.Bridge(t, h.Bridge, h.PF.Name, h.TAP)
	}
	return w
}

// NewNICWorld makes one in which the primary is a whole NIC, on the wire like all, which a
// machine on either host can have.
func NewNICWorld(t testing.TB) (w *World, primary string) {
	t.Helper()
	peer, nic := harness.NewNICPeer(t, PeerIP+"/24")
	link, err := netlink.LinkByName(nic.Name)
	if err != nil {
		t.Fatal(err)
	}
	w = newWorld(t, link.Attrs().HardwareAddr.String())
	w.Peer = peer
	harness.Up(t, peer.Uplink)
	for i := range w.Hosts {
		w.Hosts[i].TAP, w.Hosts[i].Bridge = fmt.Sprintf("tap-%d", i), "br-0"
		harness.Tap(t, w.Hosts[i].TAP, 1)
	}
	harness.Bridge(t, "br-0", peer.Uplink, w.Hosts[0].TAP, w.Hosts[1].TAP)
	return w, "vfio-pci,bind=auto,rombar=0,host=" + nic.PCI
}

func newWorld(t testing.TB, mac string) *World {
	t.Helper()
	dir, err := os.MkdirTemp("", "way")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	harness.Up(t, "lo")
	return &World{T: t, dir: dir, mac: mac}
}

// Way is how a guest travels.
type Way struct {
	Name   string
	VMM    string // "" is baton
	Unplug string // baton's failover-unplug=; "": its default
	Script bool   // QEMU: somebody takes the MAC from the VF at UNPLUG_PRIMARY
	Memory int    // MiB, 0: 256
	CPUs   int    // 0: 1
	// Kernel is harness.Linux unless set.
	Kernel func(t testing.TB, words ...string) []string
	// Primary on each host, what -device takes; "" is the VF. None is "none".
	Primary [2]string
	Steer   string   // baton's steer=; "": its default; else somebody has given the VFs their MAC, as for QEMU
	Args    []string // further ones
	Driver  string   // of the primary, that a guest has to load; "": it does so by itself
	Quiet   bool     // no load
	// Datagrams a second each way; 0: UDPRate.
	Datagrams int
}

// QEMU says whether it is.
func (w Way) qemu() bool { return w.VMM != "" }

// Machine is a VMM on one of the hosts.
type Machine struct {
	*harness.Guest
	QMP  *harness.QMP
	Log  *Recorder
	Host int
	URI  string // where it waits for a guest, if it does
}

// Start starts one. Ctx is for all that is said to it later.
func (w *World) Start(ctx context.Context, way Way, host int, incoming bool) *Machine {
	w.T.Helper()
	uri := ""
	if incoming {
		uri = fmt.Sprintf("unix:%s.mig", filepath.Join(w.dir, fmt.Sprint(w.n+1)))
	}
	return w.start(ctx, way, host, uri)
}

// start starts one to which a guest comes from uri, unless that is "".
func (w *World) start(ctx context.Context, way Way, host int, uri string) *Machine {
	w.T.Helper()
	w.n++
	h := w.Hosts[host]
	base := filepath.Join(w.dir, fmt.Sprint(w.n))
	m := &Machine{Host: host, URI: uri}
	kernel := way.Kernel
	if kernel == nil {
		kernel = harness.Linux
	}
	args := append(kernel(w.T), "-m", fmt.Sprint(max(way.Memory, 256)-0), "-smp", fmt.Sprint(max(way.CPUs, 1)), "-nodefaults",
		"-qmp", "unix:"+base+".qmp,server=on,wait=off", "-qmp", "unix:"+base+".log,server=on,wait=off",
		"-device", "pcie-root-port,id=root1,chassis=1", "-device", "pcie-root-port,id=root2,chassis=2",
		"-netdev", "tap,id=hostnet1,ifname="+h.TAP+",script=no,downscript=no,vhost=on",
		"-device", "virtio-net-pci,netdev=hostnet1,id=net1,mac="+w.mac+",bus=root2,failover=on")
	if way.Memory != 0 {
		args[slices.Index(args, "-m")+1] = fmt.Sprint(way.Memory)
	}
	if way.Steer != "" {
		args[len(args)-1] += ",steer=" + way.Steer
		h.VF.SetMAC(w.T, GuestMAC)
	}
	primary := way.Primary[host]
	switch {
	case primary == "none":
		primary = ""
	case primary != "":
	case way.qemu():
		h.VF.SetMAC(w.T, GuestMAC)
		h.VF.BindVFIO(w.T)
		primary = "vfio-pci,rombar=0,host=" + h.VF.PCI
	default:
		primary = "vfio-pci,bind=auto,pool=" + h.PF.Name
	}
	if primary != "" && way.Unplug != "" {
		primary += ",failover-unplug=" + way.Unplug
		if way.Unplug == "cooperative" { // as patient as QEMU is, which waits for ever
			primary += ",failover-unplug-timeout=60000"
		}
	}
	if primary != "" {
		args = append(args, "-device", primary+",id=hostdev0,bus=root1,failover_pair_id=net1")
	}
	if way.qemu() {
		args = append(args, "-machine", "q35", "-enable-kvm", "-cpu", "host", "-display", "none")
	}
	if uri != "" {
		args = append(args, "-incoming", "defer")
	}
	m.Guest = harness.Start(w.T, harness.GuestConfig{VMM: way.VMM, Args: append(args, way.Args...), Name: fmt.Sprintf("%s-%d", strings.ReplaceAll(way.Name, " ", "-"), w.n)})
	m.QMP = harness.DialQMP(w.T, ctx, base+".qmp")
	m.Log = record(w.T, base+".log")
	if !way.qemu() {
		w.T.Cleanup(func() {
			if w.T.Failed() {
				m.Autopsy(base + ".qmp")
			}
		})
	}
	m.QMP.Do("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "events", "state": true}}})
	if uri != "" {
		m.QMP.Do("migrate-incoming", map[string]any{"uri": uri})
	}
	return m
}

// Restore starts one in which a guest goes on that was saved at uri.
func (w *World) Restore(ctx context.Context, way Way, host int, uri string) *Machine {
	w.T.Helper()
	m := w.start(ctx, way, host, uri)
	if err := m.Log.Wait(ctx, "RESUME", ""); err != nil {
		w.T.Fatal(err)
	}
	return m
}

// Boot starts a machine on host 0 and waits until its guest has its primary, if it is to have
// one, and answers.
func (w *World) Boot(ctx context.Context, way Way) *Machine {
	w.T.Helper()
	m := w.Start(ctx, way, 0, false)
	m.Output(ctx, "@addr", "eth0", GuestIP+"/24")
	if way.Driver != "" {
		m.Output(ctx, "@modprobe", way.Driver)
	}
	if way.Primary[0] != "none" {
		m.WaitPrimary(ctx)
	}
	w.Peer.Ping(ctx, GuestIP)
	return m
}

// WaitPrimary waits until the guest's net_failover has a primary with a carrier.
func (m *Machine) WaitPrimary(ctx context.Context) {
	m.Output(ctx, "@carrier", "eth2")
}

// Trip is what became of one.
type Trip struct {
	Way            string
	Source, Target []timeline.Event
	Phases         []timeline.Phase
	Plugged        float64 // seconds from the resume to the primary's carrier; 0: it has none
	Status         string  // of the source
	Pings          harness.Pings
	PingSeries     []timeline.Point // round trips in ms
	In, Out        nettool.DatagramResult
	Rate           []timeline.Point // datagrams from the guest, a second
	TCP            harness.EchoResult
	Query          json.RawMessage // the source's query-migrate
	Guest          string          // what the guest's kernel has thrown away
	TAPs           uint64          // frames for which these had no room
}

// Phase is the length of a phase in seconds, -1 if it did not take place.
func (t *Trip) Phase(name string) float64 {
	for _, p := range t.Phases {
		if p.Name == name {
			return p.To - p.From
		}
	}
	return -1
}

// Load starts what the peer and the guest do meanwhile, with so many datagrams a second each way.
func (w *World) Load(ctx context.Context, m *Machine, rate int) *Load {
	w.T.Helper()
	l := &Load{w: w, pinger: w.Peer.Pinger(GuestIP, pings)}
	local, guest := fmt.Sprintf("%s:%d", PeerIP, peerPort), fmt.Sprintf("%s:%d", GuestIP, peerPort)
	m.Output(ctx, "@udp", guest, local, fmt.Sprint(rate)) // first: it may still send those of the last trip
	if err := w.Peer.Do(func() (err error) {
		l.udp, err = nettool.StartDatagrams(local, guest, rate)
		return err
	}); err != nil {
		w.T.Fatal(err)
	}
	if err := l.udp.Wait(ctx); err != nil {
		w.T.Fatal(err)
	}
	if !w.echoes {
		m.Output(ctx, "@tcp-echo", GuestIP+":7002")
		w.echoes = true
	}
	var err error
	if l.tcp, err = w.Peer.Echo(GuestIP + ":7002"); err != nil {
		w.T.Fatal(err)
	}
	return l
}

// Load is what is going on.
type Load struct {
	w      *World
	pinger *harness.Pinger
	udp    *nettool.Datagrams
	tcp    *harness.Echo
}

// Stop ends it; m is where the guest is.
func (l *Load) Stop(ctx context.Context, m *Machine, t *Trip) {
	t.Pings = l.pinger.Pings()
	for _, p := range l.pinger.Series() {
		t.PingSeries = append(t.PingSeries, timeline.Point{Time: p.At, Value: p.Millis})
	}
	l.pinger.Stop()
	if err := json.Unmarshal([]byte(m.Output(ctx, "@udp-check")), &t.In); err != nil {
		l.w.T.Error(err)
	}
	t.Out = l.udp.Stop()
	t.TCP = l.tcp.Stop()
	for at, rate := range l.udp.Rate() {
		t.Rate = append(t.Rate, timeline.Point{Time: at, Value: rate})
	}
}

// guestDrops shows the frames that the guest's kernel has thrown away because of its pair: those
// for a primary whose carrier has just come, before there is a queue for them (tx_dropped), and,
// since it started, those that came by the standby while it had a primary (rx_nohandler).
const guestDrops = "cd /sys/class/net; for f in eth2/statistics/tx_dropped eth1/statistics/rx_nohandler; do [ ! -e $f ] || echo $f $(cat $f); done"

// tapDrops is how many frames the TAPs have had no room for.
func (w *World) tapDrops() (n uint64) {
	for _, h := range w.Hosts {
		if l, err := netlink.LinkByName(h.TAP); err == nil {
			n += l.Attrs().Statistics.TxDropped
		}
	}
	return n
}

// Travel moves the guest of from to to, which waits for it, and waits until it has its primary
// there. A migration that does not complete is no error.
func (w *World) Travel(ctx context.Context, way Way, from, to *Machine) *Trip {
	w.T.Helper()
	t := &Trip{Way: way.Name}
	full := w.tapDrops()
	var load *Load
	if !way.Quiet {
		load = w.Load(ctx, from, cmp.Or(way.Datagrams, UDPRate()))
	}
	if way.Script {
		go func() {
			if from.Log.Wait(ctx, "UNPLUG_PRIMARY", "") == nil {
				if pf, err := netlink.LinkByName(w.Hosts[from.Host].PF.Name); err == nil {
					_ = netlink.LinkSetVfHardwareAddr(pf, 0, make(net.HardwareAddr, 6))
				}
			}
		}()
	}
	seen := len(from.Log.Events())
	from.QMP.Do("migrate", map[string]any{"uri": to.URI})
	t.Status = from.Log.WaitStatusAfter(ctx, seen, "completed", "failed", "cancelled")
	t.Query = from.QMP.Do("query-migrate", nil)
	here := from
	if t.Status == "completed" {
		here = to
		resumed, err := to.Log.WaitAfter(ctx, 0, "RESUME", "")
		if err != nil {
			w.T.Fatal(err)
		}
		if way.Primary[to.Host] != "none" {
			to.WaitPrimary(ctx)
			t.Plugged = float64(time.Now().UnixMicro())/1e6 - resumed.Time
		}
	}
	w.Peer.Ping(ctx, GuestIP)
	if load != nil {
		if err := load.pinger.Wait(ctx, late); err != nil {
			w.T.Fatal(err)
		}
		load.Stop(ctx, here, t)
	}
	t.Guest = strings.Join(strings.Fields(here.Sh(ctx, guestDrops)), " ")
	t.TAPs = w.tapDrops() - full
	t.Source, t.Target = from.Log.Events(), to.Log.Events()
	t.Phases = timeline.Phases(t.Source, t.Target)
	return t
}

// String is the trip in some lines.
func (t *Trip) String() string {
	var phases []string
	begin := 0.0
	for i, p := range t.Phases {
		if i == 0 {
			begin = p.From
		}
		phases = append(phases, fmt.Sprintf("%s %.0f ms at %.2f s", p.Name, 1000*(p.To-p.From), p.From-begin))
	}
	for _, e := range slices.Concat(t.Source, t.Target) {
		if e.Name == "FAILOVER_SWITCHED" && e.Time > begin {
			phases = append(phases, fmt.Sprintf("%v to the %v at %.2f s: %.0f ms, %v held, %v dropped", e.Data["point"], e.Data["to"], e.Time-begin, number(e.Data["outage-us"])/1000, e.Data["held"], e.Data["dropped"]))
		}
	}
	return fmt.Sprintf("%s: %s; %s; primary after %.0f ms;\nping %v%s;\nto the guest %+v; from the guest %+v; TCP %+v; dropped by the TAPs: %d, by the guest: %s",
		t.Way, t.Status, strings.Join(phases, ", "), 1000*t.Plugged, t.Pings, t.lost(begin), t.In, t.Out, t.TCP, t.TAPs, t.Guest)
}

func number(v any) float64 { f, _ := v.(float64); return f }

// lost says when the longest outages were, and which pings were lost, in seconds after begin.
func (t *Trip) lost(begin float64) string {
	var b strings.Builder
	for _, o := range t.Pings.Outages[:min(len(t.Pings.Outages), 3)] {
		fmt.Fprintf(&b, ", %v at %.2f s", o.Duration().Round(time.Millisecond), float64(o.From.UnixMicro())/1e6-begin)
	}
	for i := 0; i < min(t.Pings.Sent, len(t.PingSeries)); { // the others are under way
		n := i
		for n < len(t.PingSeries) && math.IsNaN(t.PingSeries[n].Value) {
			n++
		}
		if n > i {
			fmt.Fprintf(&b, ", %d lost at %.2f s", n-i, t.PingSeries[i].Time-begin)
		}
		i = n + 1
	}
	return b.String()
}

// Recorder records all events of a QMP monitor.
type Recorder struct {
	mu     sync.Mutex
	events []timeline.Event
	more   chan struct{}
	err    error
}

func record(t testing.TB, path string) *Recorder {
	t.Helper()
	r := &Recorder{more: make(chan struct{})}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := conn.Write([]byte(`{"execute":"qmp_capabilities"}` + "\n")); err != nil {
		t.Fatal(err)
	}
	go func() {
		in := json.NewDecoder(conn)
		for {
			var line json.RawMessage
			err := in.Decode(&line)
			r.mu.Lock()
			if err != nil {
				r.err = err
			} else if events, perr := timeline.ReadEvents(strings.NewReader(strings.ReplaceAll(string(line), "\n", " "))); perr == nil {
				r.events = append(r.events, events...)
			}
			close(r.more)
			r.more = make(chan struct{})
			r.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return r
}

// Events are those until now.
func (r *Recorder) Events() []timeline.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

// Wait waits for an event of that name, past or future, whose status or state is value, if that
// is not "".
func (r *Recorder) Wait(ctx context.Context, name, value string) error {
	_, err := r.WaitAfter(ctx, 0, name, value)
	return err
}

// WaitAfter is Wait among the events that follow the first so many, and returns the event.
func (r *Recorder) WaitAfter(ctx context.Context, seen int, name, value string) (found timeline.Event, err error) {
	err = r.find(ctx, seen, func(e timeline.Event) bool {
		found = e
		return e.Name == name && (value == "" || e.Data["status"] == value || e.Data["state"] == value)
	})
	return found, err
}

// WaitStatusAfter waits for the first of these states of a migration among the events that
// follow the first so many. It is "" if ctx ends before.
func (r *Recorder) WaitStatusAfter(ctx context.Context, seen int, values ...string) (status string) {
	err := r.find(ctx, seen, func(e timeline.Event) bool {
		status, _ = e.Data["status"].(string)
		return e.Name == "MIGRATION" && slices.Contains(values, status)
	})
	if err != nil {
		return ""
	}
	return status
}

// Count is how many events of that name there were.
func (r *Recorder) Count(name string) (n int) {
	for _, e := range r.Events() {
		if e.Name == name {
			n++
		}
	}
	return n
}

func (r *Recorder) find(ctx context.Context, seen int, is func(timeline.Event) bool) error {
	for {
		r.mu.Lock()
		more, err := r.more, r.err
		i := slices.IndexFunc(r.events[min(seen, len(r.events)):], is)
		r.mu.Unlock()
		switch {
		case i >= 0:
			return nil
		case err != nil:
			return err
		}
		select {
		case <-more:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
