package steer

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"baton/devices/tap"
	"baton/tests/taptest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var mac = net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}

// bridge makes a bridge with a TAP and, as its uplink, one end of a veth pair.
func bridge(t *testing.T) {
	t.Helper()
	taptest.Netns(t)
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	links := []netlink.Link{br,
		&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap0"}, Mode: netlink.TUNTAP_MODE_TAP},
		&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pf0"}, PeerName: "wire0"},
		&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pf1"}, PeerName: "wire1"},
	}
	for _, l := range links {
		if err := netlink.LinkAdd(l); err != nil {
			t.Skipf("add %s: %v", l.Attrs().Name, err)
		}
	}
	for _, name := range []string{"br0", "tap0", "pf0", "wire0", "pf1", "wire1"} {
		l, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetUp(l)
		}
		if err == nil && (name == "tap0" || name == "pf0") {
			err = netlink.LinkSetMaster(l, br)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// What is sent before the kernel has seen the carriers is lost.
	for _, name := range []string{"pf0", "pf1"} {
		for up := false; !up && t.Context().Err() == nil; {
			l, err := netlink.LinkByName(name)
			if err != nil {
				t.Fatal(err)
			}
			up = l.Attrs().OperState == netlink.OperUp
		}
	}
}

// where lists what the bridge and the interfaces know of the MAC.
func where(t *testing.T) string {
	t.Helper()
	var list []string
	for _, name := range []string{"tap0", "pf0", "pf1"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		entries, err := netlink.NeighList(l.Attrs().Index, unix.AF_BRIDGE)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if bytes.Equal(e.HardwareAddr, mac) {
				kind := "entry"
				if e.MasterIndex == 0 {
					kind = "filter"
				}
				list = append(list, name+" "+kind)
			}
		}
	}
	return strings.Join(list, ", ")
}

func TestSteps(t *testing.T) {
	bridge(t)
	for _, step := range []struct {
		step Step
		pf   string
		want string
	}{
		{Standby, "", "tap0 entry"},
		{Both, "", "tap0 entry"},
		{Primary, "", ""}, // wherever the bridge learns that it is
		{Both, "", "tap0 entry"},
		{Standby, "", "tap0 entry"},
		{Gone, "", ""},
		{Gone, "", ""},
	} {
		if err := New(Config{MAC: mac, TAP: "tap0"}).Do(t.Context(), step.step, VF{PF: step.pf}); err != nil {
			t.Fatal(err)
		}
		if got := where(t); got != step.want {
			t.Fatalf("%s: %q, want %q", step.step, got, step.want)
		}
	}
}

// The filter of a PF, which need not be in the bridge, comes and goes.
func TestFilter(t *testing.T) {
	bridge(t)
	s := New(Config{MAC: mac, TAP: "tap0"})
	for _, c := range []struct{ pf, want string }{
		{"pf0", "pf0 filter"}, {"pf0", "pf0 filter"}, {"pf1", "pf1 filter"}, {"", ""},
	} {
		if err := s.filter(c.pf); err != nil {
			t.Fatal(err)
		}
		if got := where(t); got != c.want {
			t.Fatalf("%s: %q, want %q", c.pf, got, c.want)
		}
	}
	for _, port := range []string{"tap0", "pf0", "pf1", ""} {
		if err := s.entry(port); err != nil {
			t.Fatal(err)
		}
		want := map[string]string{"tap0": "tap0 entry", "pf0": "pf0 entry"}[port]
		if got := where(t); got != want {
			t.Fatalf("entry %s: %q, want %q", port, got, want)
		}
	}
}

// A PF that refuses does not keep the bridge from forwarding.
func TestRefused(t *testing.T) {
	bridge(t)
	s := New(Config{MAC: mac, TAP: "tap0"})
	err := s.Do(t.Context(), Standby, VF{PF: "pf0", Index: 3})
	if err == nil || !strings.Contains(err.Error(), "steer 52:54:00:01:02:03 to standby: give VF 3 of pf0 the MAC 00:00:00:00:00:00: ") {
		t.Error(err)
	}
	if got := where(t); got != "tap0 entry, pf0 filter" {
		t.Error(got)
	}
	if err := s.Do(t.Context(), Both, VF{PF: "nosuch"}); err == nil {
		t.Error("a PF that there is not")
	}
}

func TestScript(t *testing.T) {
	dir := t.TempDir()
	script, out := filepath.Join(dir, "steer"), filepath.Join(dir, "out")
	text := fmt.Sprintf("#!/bin/sh\necho $BATON_STEP $BATON_MAC $BATON_TAP $BATON_PF $BATON_VF >> %s\n[ $1 != mac ]\n", out)
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	s := New(Config{MAC: mac, TAP: "tap0", Script: script})
	if err := s.Do(t.Context(), Standby, VF{PF: "pf0", Index: 3}); err != nil {
		t.Error(err)
	}
	if err := s.Do(t.Context(), Primary, VF{}); err != nil {
		t.Error(err)
	}
	if err := s.Do(t.Context(), GiveMAC, VF{}); err == nil {
		t.Error("a script that fails")
	}
	got, _ := os.ReadFile(out)
	if want := "standby 52:54:00:01:02:03 tap0 pf0 3\nprimary 52:54:00:01:02:03 tap0\nmac 52:54:00:01:02:03 tap0\n"; string(got) != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestOff(t *testing.T) {
	if err := New(Config{Off: true}).Do(t.Context(), Both, VF{PF: "nosuch"}); err != nil {
		t.Error(err)
	}
}

// A TAP has room for what comes while the guest stands still; one that has more keeps it.
func TestRoom(t *testing.T) {
	bridge(t)
	length := func() int {
		l, err := netlink.LinkByName("tap0")
		if err != nil {
			t.Fatal(err)
		}
		return l.Attrs().TxQLen
	}
	was := length()
	if err := New(Config{Off: true, TAP: "tap0"}).Room(9000); err != nil || length() != was {
		t.Error(err, length(), was)
	}
	s := New(Config{MAC: mac, TAP: "tap0"})
	for _, frames := range []int{5000, 4000} {
		if err := s.Room(frames); err != nil || length() != 5000 {
			t.Error(err, length())
		}
	}
	if err := New(Config{MAC: mac, TAP: "nosuch"}).Room(5000); err == nil || !strings.Contains(err.Error(), "nosuch") {
		t.Error(err)
	}
}

// The wire of a PF that is not the bridge's learns where the MAC is now.
func TestAnnounce(t *testing.T) {
	bridge(t)
	wire := taptest.NewSocket(t, "wire1", 0x8035, false)
	_ = New(Config{MAC: mac, TAP: "tap0"}).Do(t.Context(), Primary, VF{PF: "pf1"}) // it has no VF whose MAC could be set
	if got := wire.Recv(); !bytes.Equal(got, tap.RARP([6]byte(mac))) {
		t.Errorf("received % x", got)
	}
}

func TestSend(t *testing.T) {
	bridge(t)
	s := New(Config{MAC: mac, TAP: "tap0"})
	if got := s.Uplink(); got != "pf0" {
		t.Fatalf("uplink %q", got)
	}
	wire := taptest.NewSocket(t, "wire0", taptest.EtherType, false)
	frame := taptest.Frame(7, 80)
	sent, err := Send("pf0", [][]byte{append(make([]byte, tap.HeaderSize), frame...), {1, 2, 3}})
	if sent != 1 || err != nil {
		t.Fatal(sent, err)
	}
	if got := wire.Recv(); !bytes.Equal(got, frame) {
		t.Errorf("received % x", got)
	}
	if _, err := Send("nosuch", [][]byte{frame}); err == nil {
		t.Error("no error")
	}
}

// A large segment counts as all that it becomes, and is followed by as much time.
func TestSendPaced(t *testing.T) {
	bridge(t)
	plain := append(make([]byte, tap.HeaderSize), taptest.Frame(7, 80)...)
	large := append(make([]byte, tap.HeaderSize), make([]byte, 45*1448)...)
	large[1], large[4], large[5] = 1, 0xa8, 5 // VIRTIO_NET_HDR_GSO_TCPV4, 1448
	if one, many := segments(plain), segments(large); one != 1 || many != 45 {
		t.Errorf("%d and %d segments", one, many)
	}
	var frames [][]byte
	for range 2*paceFrames + 1 {
		frames = append(frames, plain)
	}
	asked := 0
	start := time.Now()
	sent, err := SendPaced("pf0", frames, func() bool { asked++; return true })
	if took := time.Since(start); sent != len(frames) || err != nil || asked != 2 || took < 2*paceTime {
		t.Errorf("%d frames, %v, asked %d times, %v", sent, err, asked, took)
	}
	if sent, err = SendPaced("pf0", frames, func() bool { return false }); sent != paceFrames || err != nil {
		t.Errorf("%d frames before it was broken off, %v", sent, err)
	}
}
