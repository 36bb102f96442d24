// Package migrate shows a stock Linux that moves between two batons while it works: on the
// network, on its disk and in its memory.
//
//	netns peer            netns src                      netns dst
//	┌──────────────┐      ┌──────────────────────┐      ┌──────────────────────┐
//	│ ping         │      │ baton: the guest ────┼─move─┼─> baton -incoming    │
//	│ TCP          │      │          br0         │      │          br0         │
//	└──────┬───────┘      └───────────┬──────────┘      └───────────┬──────────┘
//	       └──────────────────────── wire ──────────────────────────┘
package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"baton/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	bootLimit = 2 * time.Minute
	limit     = 90 * time.Second
	lifeLimit = time.Hour // of a machine
	mib       = 1 << 20

	wire      = "wire"
	peerCIDR  = "10.78.0.1/24"
	guestCIDR = "10.78.0.2/24"
	guestIP   = "10.78.0.2"
	guestMAC  = "52:54:00:00:78:02"
)

// world is two hosts, what they share, and the rest of the world.
type world struct {
	t     *testing.T
	peer  *harness.Peer
	hosts [2]*harness.Host
	disk  string
	dir   string // for sockets: short
	n     int    // machines so far

	stopped   time.Duration // by all moves
	monotonic int64         // what the guest's clock has said
}

// uri is where a guest comes to a host by TCP.
func (w *world) uri(host int) string { return fmt.Sprintf("tcp:10.78.0.%d:4444", 11+host) }

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, peer: harness.NewVethPeer(t, peerCIDR), disk: filepath.Join(t.TempDir(), "disk")}
	harness.Bridge(t, wire, w.peer.Uplink)
	for i, name := range []string{"src", "dst"} {
		w.hosts[i] = harness.NewHost(t, name, wire, fmt.Sprintf("10.78.0.%d/24", 11+i))
	}
	if err := os.WriteFile(w.disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(w.disk, 64*mib); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", w.disk, "48M") // the agent stamps what is behind it
	dir, err := os.MkdirTemp("", "mig")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w.dir = dir
	return w
}

func run(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", argv, err, out)
	}
}

// machine is a baton on one of the hosts.
type machine struct {
	*harness.Guest
	qmp    *harness.QMP
	socket string
}

// lends are what the hosts have for their guests: one has vhost-net and KVM's dirty log, the other
// a TAP in baton and KVM's dirty rings.
var lends = [2]struct {
	vhost string
	accel []string
}{{vhost: "on"}, {"off", []string{"-accel", "kvm,dirty-ring-size=4096"}}}

// start starts one. Besides its boot, only what the host lends is different from the other's.
func (w *world) start(host int, boot ...string) *machine {
	w.t.Helper()
	w.n++
	m := &machine{socket: filepath.Join(w.dir, fmt.Sprint("qmp", w.n))}
	m.Guest = harness.Start(w.t, harness.GuestConfig{Name: fmt.Sprintf("%d-%s", w.n, w.hosts[host].Name), Host: w.hosts[host], Args: append(append(boot, lends[host].accel...),
		"-m", "256", "-smp", "2", "-nodefaults", "-qmp", "unix:"+m.socket+",server=on,wait=off",
		"-device", "pcie-root-port,id=rp0,chassis=1", "-device", "pcie-root-port,id=rp1,chassis=2", "-device", "pcie-root-port,id=rp2,chassis=3",
		"-netdev", "tap,id=n0,ifname="+harness.HostTap+",script=no,downscript=no,vhost="+lends[host].vhost, "-device", "virtio-net-pci,id=net0,netdev=n0,bus=rp0,mac="+guestMAC,
		"-drive", "file="+w.disk+",format=raw,if=none,id=d0", "-device", "virtio-blk-pci,id=disk0,drive=d0,bus=rp1,serial=SHARED",
		"-device", "virtio-rng-pci,bus=rp2")})
	m.qmp = harness.DialQMP(w.t, harness.Context(w.t, lifeLimit), m.socket)
	w.t.Cleanup(func() {
		if w.t.Failed() {
			m.inspect(w.t)
		}
	})
	m.qmp.Do("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "events", "state": true}}})
	// The nested host stands still for seconds when the machine below has other things to do.
	m.qmp.Do("migrate-set-parameters", map[string]any{"stall-timeout": 60000})
	return m
}

// inspect tells where a guest is that does not answer, at two moments, and whether it goes on after
// that: its vCPUs are stopped for it, and started again.
func (m *machine) inspect(t *testing.T) {
	for _, command := range []string{"info registers", "info irq", "info status", "info registers"} {
		out, err := m.qmp.Execute("human-monitor-command", map[string]any{"command-line": command})
		if err != nil {
			return // it has ended
		}
		t.Logf("%s: %s: %s", m.Name(), command, strings.ReplaceAll(string(out), `\r\n`, "\n"))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := m.Run(ctx, "@clock")
	t.Logf("%s answers: %v", m.Name(), err)
}

// boot starts the guest on the first host, with its network and its disk.
func (w *world) boot() *machine {
	w.t.Helper()
	m := w.start(0, harness.Linux(w.t)...)
	ctx := harness.Context(w.t, bootLimit)
	m.Output(ctx, "@addr", guestMAC, guestCIDR)
	m.Output(ctx, "@modprobe", "crc32c_generic")
	m.Output(ctx, "@modprobe", "ext4")
	m.Sh(ctx, "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && echo kept > /mnt/file && sync")
	w.peer.Ping(ctx, guestIP)
	return m
}

// load has the guest work: rates in MiB/s.
func (w *world) load(m *machine, ramMiB int, ram, disk string) {
	w.t.Helper()
	ctx := harness.Context(w.t, limit)
	m.Output(ctx, "@stamp", fmt.Sprint(ramMiB), ram)
	m.Output(ctx, "@blkstamp", "/dev/vda", disk)
	m.Output(ctx, "@tcp-stamp", guestIP+":5001")
}

// check wants all that the guest has and does to be right.
func (w *world) check(m *machine) (c stamps) {
	w.t.Helper()
	ctx := harness.Context(w.t, limit)
	if err := json.Unmarshal([]byte(m.Output(ctx, "@stamp-check")), &c); err != nil {
		w.t.Fatal(err)
	}
	if got := m.Sh(ctx, "cat /mnt/file"); got != "kept" {
		w.t.Errorf("the file has %q", got)
	}
	w.peer.Ping(ctx, guestIP)
	return c
}

type stamps struct {
	Pages, Writes, Blocks uint64
	DiskWrites            uint64 `json:"disk_writes"`
	TCPBytes              uint64 `json:"tcp_bytes"`
}

// fsck wants the disk to be whole. Its guest has unmounted it, or is gone.
func (w *world) fsck() {
	w.t.Helper()
	run(w.t, "e2fsck", "-f", "-n", w.disk)
}

// fsckKilled repairs what a guest has left that was killed: its journal is played back, and
// that is all there is to do.
func (w *world) fsckKilled() {
	w.t.Helper()
	out, err := exec.Command("e2fsck", "-p", w.disk).CombinedOutput()
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() > 1 { // 1: errors were corrected
		w.t.Errorf("e2fsck: %v\n%s", err, out)
	}
	w.fsck()
}

// migration is query-migrate.
type migration struct {
	Status    string
	Error     string `json:"error-desc"`
	TotalTime int64  `json:"total-time"`
	Downtime  int64
	RAM       struct {
		Transferred int64
		DirtySyncs  int64 `json:"dirty-sync-count"`
	}
	Parts map[string]int64 `json:"x-downtime"`
}

func (m *machine) migration(t *testing.T) (r migration) {
	t.Helper()
	if err := json.Unmarshal(m.qmp.Do("query-migrate", nil), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// next waits for the next status of the migration.
func (m *machine) next(t *testing.T) string {
	t.Helper()
	var data struct{ Status string }
	if err := json.Unmarshal(m.qmp.WaitEvent("MIGRATION").Data, &data); err != nil {
		t.Fatal(err)
	}
	return data.Status
}

// wait waits for a status of the migration; another final one ends the test.
func (m *machine) wait(t *testing.T, status string) {
	t.Helper()
	for {
		switch got := m.next(t); got {
		case status:
			return
		case "completed", "failed", "cancelled":
			t.Fatalf("migration %s, want %s: %+v", got, status, m.migration(t))
		}
	}
}

// move moves the guest to a new machine on the other host.
func (w *world) move(from *machine, host int, uri string) *machine {
	w.t.Helper()
	to := w.start(host, "-incoming", uri)
	late := time.AfterFunc(3*limit, func() { // what they are at is in their logs then
		for _, m := range []*machine{from, to} {
			_ = syscall.Kill(m.PID(), syscall.SIGQUIT)
		}
	})
	defer late.Stop()
	from.qmp.Do("migrate", map[string]any{"uri": uri})
	from.wait(w.t, "completed")
	to.wait(w.t, "completed")
	r := from.migration(w.t)
	w.stopped += time.Duration(r.Downtime) * time.Millisecond
	w.t.Logf("%s to %s: %d ms, downtime %d ms %v, %d KiB, %d rounds", from.Name(), to.Name(), r.TotalTime, r.Downtime, r.Parts, r.RAM.Transferred>>10, r.RAM.DirtySyncs)
	if got := string(from.qmp.Do("query-status", nil)); !strings.Contains(got, "postmigrate") {
		w.t.Errorf("source: %s", got)
	}
	from.qmp.Do("quit", nil)
	if code := from.Wait(harness.Context(w.t, limit)); code != 0 {
		w.t.Errorf("source: exit code %d", code)
	}
	return to
}

// end turns the guest off and looks at what it leaves.
func (w *world) end(m *machine) {
	w.t.Helper()
	ctx := harness.Context(w.t, limit)
	m.Sh(ctx, "umount /mnt")
	if _, err := m.Run(ctx, "@poweroff"); err != nil {
		w.t.Log(err) // it may be off before it answers
	}
	if code := m.Wait(ctx); code != 0 {
		w.t.Errorf("exit code %d", code)
	}
	w.fsck()
}

// A guest moves there and back, over each transport and several times, while it works.
func TestMigrate(t *testing.T) {
	w := newWorld(t)
	m := w.boot()
	w.load(m, 16, "2", "0.5")
	stop := w.stream(mib / 2)
	pings := w.peer.Pinger(guestIP, 20*time.Millisecond)
	m = w.move(m, 1, w.uri(1))
	w.check(m)
	m = w.move(m, 0, "unix:"+w.dir+"/m")
	w.check(m)
	pings.Stop()
	t.Logf("ping: %v", pings.Pings())
	m = w.again(m)
	c, sent := w.check(m), stop()
	t.Logf("%+v, %d bytes sent", c, sent)
	if c.TCPBytes == 0 || c.DiskWrites == 0 || c.Writes == 0 {
		t.Error("it has not worked")
	}
	m = w.snapshot(m)
	w.end(m)
}

// snapshot saves the guest in a file and goes on from there.
func (w *world) snapshot(m *machine) *machine {
	file := filepath.Join(w.t.TempDir(), "snapshot")
	m.qmp.Do("migrate", map[string]any{"uri": "file:" + file})
	m.wait(w.t, "completed")
	if info, err := os.Stat(file); err != nil {
		w.t.Fatal(err)
	} else {
		w.t.Logf("snapshot: %d KiB", info.Size()>>10)
	}
	m.qmp.Do("quit", nil)
	m.Wait(harness.Context(w.t, limit))
	m = w.start(1, "-incoming", "file:"+file)
	m.WaitEvent(harness.Context(w.t, limit), "RESUME")
	w.check(m)
	return m
}

// stream sends TCP to the guest, checked there, until the function that it returns is called,
// which says how much it was.
func (w *world) stream(rate float64) func() (sent int64) {
	stop, result := make(chan struct{}), make(chan int64)
	var conn *stampedConn
	if err := w.peer.Do(func() (err error) { conn, err = dialStamped(guestIP + ":5001"); return err }); err != nil {
		w.t.Fatal(err)
	}
	go func() { result <- conn.send(rate, stop) }()
	return func() int64 { close(stop); return <-result }
}
