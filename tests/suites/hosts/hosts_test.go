// Package hosts moves a guest between two machines, each with a kernel, a KVM and NICs of its own. The
// test runs in both; they tell each other how far they are.
//
//	       host 0                                   host 1
//	peer ── e1000e ──────┐  wire
//	guest ┬ VF ── PF 0 ──┼───────────────────────── PF 0 ── VF ┬ guest
//	      └ tap0 ─ br0 ──┤                       ├─ br0 ─ tap0 ┘
//	10.98.0.1 ─── PF 1 ──┴───────────────────────┴─ PF 1 ── 10.98.0.2
//	              disk ═══════════ one ════════════ disk
package hosts

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	limit    = 3 * time.Minute
	guestMAC = "52:54:00:99:00:05"
	guestIP  = "10.99.0.5"
)

// side is this host's.
type side struct {
	*testing.T
	ctx  context.Context
	me   int // 0 or 1
	pf   harness.PF
	disk string
	talk net.Conn
	in   *bufio.Scanner
	n    int           // machines so far
	peer *harness.Peer // of host 0
}

// TestMove has a guest with a VF, virtio-net and a disk go to the other host and come back.
func TestMove(t *testing.T) {
	s := &side{T: t, ctx: harness.Context(t, 2*limit), disk: "/dev/vda"}
	switch os.Getenv(harness.EnvHost) {
	case "0":
	case "1":
		s.me = 1
	default:
		t.Fatal("this takes two nested hosts\ngo run ./tests/nested run -hosts 2 ./tests/suites/hosts")
	}
	s.run("modprobe", "virtio_blk")
	pfs := harness.PFs(t)
	s.pf = pfs[0]
	if s.me == 0 {
		s.peer = harness.NewPeer(t, "10.99.0.2/24") // before the VFs, one of which would take the name of its NIC
	}
	s.pf.CreateVFs(t, 1)
	harness.Tap(t, "tap0", 1)
	harness.Bridge(t, "br0", s.pf.Name, "tap0")
	harness.Up(t, pfs[1].Name)
	harness.Addr(t, pfs[1].Name, address(s.me)+"/24")
	s.meet()
	if s.me == 1 {
		s.second()
	} else {
		s.first()
	}
}

// first has the guest at first, and in the end.
func (s *side) first() {
	s.run("mkfs.ext4", "-q", s.disk, "48M") // the agent stamps what is behind it
	m := s.start(harness.Linux(s)...)
	m.Output(s.ctx, "@addr", "eth0", guestIP+"/24")
	m.Output(s.ctx, "@carrier", "eth2")
	m.Output(s.ctx, "@modprobe", "crc32c_generic")
	m.Output(s.ctx, "@modprobe", "ext4")
	m.Sh(s.ctx, "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && echo kept >/mnt/first && sync")
	m.Output(s.ctx, "@stamp", "8", "1")
	m.Output(s.ctx, "@blkstamp", "/dev/vda", "0.5")
	s.peer.Ping(s.ctx, guestIP)
	pings := s.peer.Pinger(guestIP, 20*time.Millisecond)
	s.hear("listening")
	s.leave(m)
	s.hear("it is here")
	s.peer.Ping(s.ctx, guestIP)
	m = s.start("-incoming", "tcp:"+address(0)+":4444")
	s.say("listening")
	s.here(m)
	s.hear("it has left")
	s.peer.Ping(s.ctx, guestIP)
	p := pings.Pings()
	pings.Stop()
	s.Logf("both ways: %v", p)
	if p.Lost > p.Sent/20 {
		s.Error("too many are lost")
	}
	if got := m.Sh(s.ctx, "echo 3 >/proc/sys/vm/drop_caches; cat /mnt/first /mnt/second; umount /mnt"); got != "kept\nhere" {
		s.Errorf("the files have %q", got)
	}
	if _, err := m.Run(s.ctx, "@poweroff"); err != nil {
		s.Log(err) // it may be off before it answers
	}
	m.Wait(s.ctx)
	s.run("e2fsck", "-f", "-n", s.disk)
}

// second has it meanwhile.
func (s *side) second() {
	m := s.start("-incoming", "tcp:"+address(1)+":4444")
	s.say("listening")
	s.here(m)
	m.Sh(s.ctx, "echo 3 >/proc/sys/vm/drop_caches; [ $(cat /mnt/first) = kept ]; echo here >/mnt/second; sync")
	s.say("it is here")
	s.hear("listening")
	s.leave(m)
	s.say("it has left")
}

func address(host int) string { return fmt.Sprintf("10.98.0.%d", 1+host) }

func (s *side) run(argv ...string) {
	s.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		s.Fatalf("%q: %v\n%s", argv, err, out)
	}
}

// meet connects the two.
func (s *side) meet() {
	s.Helper()
	var err error
	if s.me == 1 {
		var l net.Listener
		if l, err = net.Listen("tcp", address(1)+":9"); err == nil {
			s.Cleanup(func() { l.Close() })
			s.talk, err = l.Accept()
		}
	} else {
		retry := time.NewTicker(200 * time.Millisecond)
		defer retry.Stop()
		for s.talk, err = net.Dial("tcp", address(1)+":9"); err != nil && s.ctx.Err() == nil; s.talk, err = net.Dial("tcp", address(1)+":9") {
			<-retry.C
		}
	}
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { s.talk.Close() })
	deadline, _ := s.ctx.Deadline()
	_ = s.talk.SetDeadline(deadline)
	s.in = bufio.NewScanner(s.talk)
}

func (s *side) say(words string) {
	s.Helper()
	if _, err := fmt.Fprintln(s.talk, words); err != nil {
		s.Fatal(err)
	}
}

func (s *side) hear(want string) {
	s.Helper()
	if !s.in.Scan() || s.in.Text() != want {
		s.Fatalf("the other host says %q, %v; want %q", s.in.Text(), s.in.Err(), want)
	}
}

// machine is a baton here.
type machine struct {
	*harness.Guest
	qmp *harness.QMP
}

func (s *side) start(boot ...string) *machine {
	s.Helper()
	s.n++
	dir, err := os.MkdirTemp("", "hosts") // short enough for a socket's name
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { os.RemoveAll(dir) })
	qmp := filepath.Join(dir, "qmp")
	m := &machine{Guest: harness.Start(s, harness.GuestConfig{Name: fmt.Sprintf("host-%d-%d", s.me, s.n), Args: append(boot,
		"-m", "192", "-nodefaults", "-qmp", "unix:"+qmp+",server=on,wait=off",
		"-device", "pcie-root-port,id=rp0,chassis=1", "-device", "pcie-root-port,id=rp1,chassis=2", "-device", "pcie-root-port,id=rp2,chassis=3",
		"-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=on", "-device", "virtio-net-pci,id=net0,netdev=n0,bus=rp0,failover=on,mac="+guestMAC,
		"-device", "vfio-pci,id=vf0,bus=rp1,bind=auto,failover_pair_id=net0,pool="+s.pf.Name,
		"-drive", "file="+s.disk+",format=raw,if=none,id=d0", "-device", "virtio-blk-pci,id=disk0,drive=d0,bus=rp2")})}
	m.qmp = harness.DialQMP(s, s.ctx, qmp)
	m.qmp.Do("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "events", "state": true}}})
	m.qmp.Do("migrate-set-parameters", map[string]any{"stall-timeout": 60000}) // an emulated host stands still now and then
	return m
}

// leave moves the guest to the other host.
func (s *side) leave(m *machine) {
	s.Helper()
	m.qmp.Do("migrate", map[string]any{"uri": "tcp:" + address(1-s.me) + ":4444"})
	s.completed(m)
	var q struct {
		TotalTime int64 `json:"total-time"`
		Downtime  int64
		Parts     map[string]int64 `json:"x-downtime"`
	}
	_ = json.Unmarshal(m.qmp.Do("query-migrate", nil), &q)
	s.Logf("host %d to %d: %d ms, stopped for %d ms %v", s.me, 1-s.me, q.TotalTime, q.Downtime, q.Parts)
	m.qmp.Do("quit", nil)
	m.Wait(s.ctx)
}

// completed waits for the end of the migration, to here or from here.
func (s *side) completed(m *machine) {
	s.Helper()
	var e struct{ Status string }
	for e.Status != "completed" {
		if err := json.Unmarshal(m.qmp.WaitEvent("MIGRATION").Data, &e); err != nil || e.Status == "failed" {
			s.Fatalf("the migration %s: %s", e.Status, m.qmp.Do("query-migrate", nil))
		}
	}
}

// here waits for the guest, which then has its memory, its disk and a VF of this host.
func (s *side) here(m *machine) {
	s.Helper()
	s.completed(m)
	if _, err := m.Run(harness.Context(s, time.Minute), "@carrier", "eth2"); err != nil {
		s.Fatalf("%v\n%s\n%s", err, m.qmp.Do("query-failover", nil), m.qmp.Do("human-monitor-command", map[string]any{"command-line": "info registers"}))
	}
	s.Logf("on host %d: %s", s.me, strings.TrimSpace(m.Output(s.ctx, "@stamp-check")))
}
