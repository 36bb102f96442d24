// Package network shows virtio-net with a stock Linux in front of it, on vhost-net and on
// baton's own backend: frames of all sizes both ways, several queues, the control queue,
// and what is left of it on the host.
package network

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"baton/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	bootLimit   = 2 * time.Minute
	settleLimit = 20 * time.Second
	limit       = 90 * time.Second
)

// A nic is one of the guest's, and the host's end of it.
type nic struct {
	g     *harness.Guest
	tap   string
	mac   string
	qmp   string // the VMM's socket
	host  string // addresses of a network of their own
	guest string
	name  string // in the guest
}

// up gives the guest's end its address.
func (n *nic) up(t *testing.T) {
	t.Helper()
	n.name = strings.TrimSpace(n.g.Output(harness.Context(t, limit), "@addr", n.mac, n.guest+"/24"))
}

// TestTaps has two NICs in one guest, which differ in their backend.
func TestTaps(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	up := script(t, filepath.Join(dir, "up"), `
		case $1 in bat0) a=10.66.0.1;; bat1) a=10.66.1.1;; esac
		ip addr add $a/24 dev $1
		ip link set $1 up
		echo up $1 >>`+log)
	down := script(t, filepath.Join(dir, "down"), `echo down $(basename /sys/class/net/$1/tun_flags /tun_flags) $1 >>`+log)
	nics := map[string]*nic{
		"vhost=on":  {tap: "bat0", mac: "52:54:00:00:66:00", host: "10.66.0.1", guest: "10.66.0.2"},
		"vhost=off": {tap: "bat1", mac: "52:54:00:00:66:01", host: "10.66.1.1", guest: "10.66.1.2"},
	}
	sock, err := os.MkdirTemp("", "network") // short enough for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sock) })
	sock = filepath.Join(sock, "qmp")
	args := append(harness.Linux(t), "-m", "512M", "-smp", "4", "-qmp", "unix:"+sock+",server=on,wait=off")
	for _, vhost := range []string{"vhost=on", "vhost=off"} {
		n := nics[vhost]
		n.qmp = sock
		args = append(args,
			"-netdev", fmt.Sprintf("tap,id=%s,ifname=%[1]s,script=%s,downscript=%s,queues=4,%s", n.tap, up, down, vhost),
			"-device", fmt.Sprintf("virtio-net-pci,id=nic-%[1]s,netdev=%[1]s,mac=%[2]s,mq=on,speed=10000", n.tap, n.mac))
	}
	g := harness.Start(t, harness.GuestConfig{Args: args})
	g.Output(harness.Context(t, bootLimit), "true")
	for _, vhost := range []string{"vhost=on", "vhost=off"} {
		t.Run(vhost, func(t *testing.T) {
			n := nics[vhost]
			n.g = g.In(t)
			n.up(t)
			run := func(name string, f func(*nic, *testing.T)) {
				t.Run(name, func(t *testing.T) {
					view := *n
					view.g = g.In(t)
					f(&view, t)
				})
			}
			run("properties", (*nic).properties)
			run("ping", (*nic).ping)
			run("queues", (*nic).queues)
			run("TCP from the guest", func(n *nic, t *testing.T) { n.tcp(t, n.fromGuest) })
			run("TCP to the guest", func(n *nic, t *testing.T) { n.tcp(t, n.toGuest) })
			run("control queue", (*nic).control)
			run("link", (*nic).link)
			run("driver again", (*nic).again)
		})
	}
	if text := g.Output(harness.Context(t, limit), "@dmesg"); regexp.MustCompile(`virtio_net.*(?i:failed|error|timeout)`).MatchString(text) {
		t.Errorf("the driver complains:\n%s", text)
	}
	g.Output(harness.Context(t, limit), "@poweroff")
	if code := g.Wait(harness.Context(t, limit)); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, n := range nics {
		if _, err := netlink.LinkByName(n.tap); !errors.As(err, new(netlink.LinkNotFoundError)) {
			t.Errorf("%s was left behind (%v)", n.tap, err)
		}
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"up bat0", "up bat1", "down tun_flags bat0", "down tun_flags bat1"} {
		if strings.Count("\n"+string(text), "\n"+want+"\n") != 1 {
			t.Errorf("the scripts did not say %q once:\n%s", want, text)
		}
	}
}

// script writes a program. Its text fails as a whole.
func script(t *testing.T, name, text string) string {
	t.Helper()
	if err := os.WriteFile(name, []byte("#!/bin/sh -e\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

func (n *nic) properties(t *testing.T) {
	got := n.g.Sh(harness.Context(t, limit), "cd /sys/class/net/"+n.name+"; cat address mtu speed carrier; ls queues | wc -l")
	if want := strings.Join([]string{n.mac, "1500", "10000", "1", "8"}, "\n"); got != want {
		t.Errorf("MAC, MTU, speed, carrier, queues: %q, want %q", got, want)
	}
	tap, ok := link(t, n.tap).(*netlink.Tuntap)
	if !ok || tap.Queues != 4 || tap.DisabledQueues != 0 {
		t.Errorf("the TAP has %d queues, and %d that are not in use; want 4 and 0", tap.Queues, tap.DisabledQueues)
	}
}

func link(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// ping sends small packets, and such that come in fragments, both ways.
func (n *nic) ping(t *testing.T) {
	t.Helper()
	ctx := harness.Context(t, limit)
	var r struct{ Sent, Received int }
	if err := json.Unmarshal([]byte(n.g.Output(ctx, "@ping", n.host, "10", "50")), &r); err != nil || r.Received != 10 {
		t.Errorf("ping from the guest: %+v (%v)", r, err)
	}
	for _, size := range []string{"0", "1", "1472", "1473", "20001"} {
		n.g.Sh(ctx, "ping -c 1 -W 20 -s "+size+" "+n.host)
		n.pingGuest(t, ctx, size)
	}
}

func (n *nic) pingGuest(t *testing.T, ctx context.Context, size string) {
	t.Helper()
	if out, err := exec.CommandContext(ctx, "ping", "-n", "-c", "1", "-W", "20", "-s", size, n.guest).CombinedOutput(); err != nil {
		t.Errorf("ping of %s bytes to the guest: %v\n%s", size, err, out)
	}
}

// queues checks that what a CPU sends comes back to it: the TAP answers a flow by the
// queue that it came from, and each CPU has its own.
func (n *nic) queues(t *testing.T) {
	ctx := harness.Context(t, limit)
	before := n.interrupts(t, ctx)
	n.g.Sh(ctx, "for c in 0 1 2 3; do taskset -c $c ping -c 3 -i 0.1 -W 20 "+n.host+"; done")
	after := n.interrupts(t, ctx)
	for q := range 4 {
		if name := fmt.Sprintf("input.%d", q); after[name] <= before[name] {
			t.Errorf("no interrupt of %s; before %v, after %v", name, before, after)
		}
	}
}

// interrupts counts those of each queue.
func (n *nic) interrupts(t *testing.T, ctx context.Context) map[string]int {
	t.Helper()
	dev := n.device(ctx)
	counts := map[string]int{}
	for line := range strings.Lines(n.g.Output(ctx, "@cat", "/proc/interrupts")) {
		f := strings.Fields(line)
		name, ok := strings.CutPrefix(f[len(f)-1], dev+"-")
		for i := 1; ok && i <= 4; i++ {
			v, _ := strconv.Atoi(f[i])
			counts[name] += v
		}
	}
	return counts
}

// device is the name of the virtio device, such as virtio1.
func (n *nic) device(ctx context.Context) string {
	return filepath.Base(n.g.Sh(ctx, "readlink -f /sys/class/net/"+n.name+"/device"))
}

const tcpBytes = 24 << 20

// tcp checks that a stream arrives as it was sent, and that it passes in frames which are
// longer than the link's: the sender leaves the segmentation to the other side.
func (n *nic) tcp(t *testing.T, stream func(*testing.T, context.Context) (sent, received string)) {
	before := *link(t, n.tap).Attrs().Statistics
	sent, received := stream(t, harness.Context(t, limit))
	if sent != received {
		t.Errorf("%s was sent, %s received", sent, received)
	}
	s := *link(t, n.tap).Attrs().Statistics
	bytes, packets := s.RxBytes-before.RxBytes, s.RxPackets-before.RxPackets
	if to := s.TxBytes - before.TxBytes; to > bytes {
		bytes, packets = to, s.TxPackets-before.TxPackets
	}
	if bytes < tcpBytes || bytes/packets < 3000 {
		t.Errorf("%d bytes in %d frames: %d bytes each", bytes, packets, bytes/packets)
	}
}

func (n *nic) fromGuest(t *testing.T, ctx context.Context) (sent, received string) {
	l, err := net.Listen("tcp", n.host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	got := make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			got <- err.Error()
			return
		}
		defer conn.Close()
		got <- sum(conn)
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	sent = n.g.Sh(ctx, fmt.Sprintf("head -c %d /dev/urandom >/tmp/noise; nc %s %s </tmp/noise; sha256sum </tmp/noise | cut -d' ' -f1; rm /tmp/noise", tcpBytes, n.host, port))
	return sent, <-got
}

func (n *nic) toGuest(t *testing.T, ctx context.Context) (sent, received string) {
	const port = "5001"
	got := make(chan string, 1)
	go func() {
		r, err := n.g.Run(ctx, "sh", "-c", "nc -l -p "+port+" </dev/null | sha256sum | cut -d' ' -f1")
		if err != nil {
			got <- err.Error()
		}
		got <- strings.TrimSpace(r.Stdout)
	}()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", n.guest+":"+port)
	for errors.Is(err, unix.ECONNREFUSED) && ctx.Err() == nil { // nobody listens yet
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", n.guest+":"+port)
	}
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, tcpBytes)
	rand.NewChaCha8([32]byte{}).Read(noise)
	_, err = conn.Write(noise)
	if err := errors.Join(err, conn.Close()); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(noise)), <-got
}

// sum reads to the end.
func sum(r io.Reader) string {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// rxFilter is what of query-rx-filter is looked at.
type rxFilter struct {
	Promiscuous bool
	Multicast   string
	MAC         string   `json:"main-mac"`
	VLANs       []int    `json:"vlan-table"`
	Groups      []string `json:"multicast-table"`
}

// filter returns what the device was told to receive.
func (n *nic) filter(t *testing.T, q *harness.QMP) rxFilter {
	t.Helper()
	var list []rxFilter
	if err := json.Unmarshal(q.Do("query-rx-filter", map[string]string{"name": "nic-" + n.tap}), &list); err != nil || len(list) != 1 {
		t.Fatalf("query-rx-filter: %+v (%v)", list, err)
	}
	return list[0]
}

// control goes through what the driver says by its control queue, and looks at what the
// device makes of it.
func (n *nic) control(t *testing.T) {
	ctx := harness.Context(t, limit)
	q := harness.DialQMP(t, ctx, n.qmp)
	n.g.Output(ctx, "@modprobe", "8021q")
	for _, step := range []struct {
		command string
		want    func(rxFilter) bool
	}{
		{"true", func(f rxFilter) bool {
			return !f.Promiscuous && f.MAC == n.mac && f.Multicast == "normal" && slices.Contains(f.Groups, "01:00:5e:00:00:01")
		}},
		{"ifconfig %s promisc", func(f rxFilter) bool { return f.Promiscuous }},
		{"ifconfig %s -promisc", func(f rxFilter) bool { return !f.Promiscuous }},
		{"ifconfig %s allmulti", func(f rxFilter) bool { return f.Multicast == "all" }},
		{"ifconfig %s -allmulti", func(f rxFilter) bool { return f.Multicast == "normal" }},
		{"ip link add link %s name v type vlan id 4000", func(f rxFilter) bool { return slices.Contains(f.VLANs, 4000) }},
		{"ip link del v", func(f rxFilter) bool { return !slices.Contains(f.VLANs, 4000) }},
	} {
		n.g.Sh(ctx, strings.ReplaceAll(step.command, "%s", n.name))
		// The driver works on it after the command has ended.
		f, given := n.filter(t, q), harness.Context(t, settleLimit)
		for ; !step.want(f) && given.Err() == nil; f = n.filter(t, q) {
			n.g.Output(ctx, "true") // the guest gets on
		}
		if !step.want(f) {
			t.Errorf("after %s: %+v", step.command, f)
		}
	}

	const mac = "52:54:00:00:66:77"
	n.g.Sh(ctx, "ip link set "+n.name+" address "+mac)
	n.forget(t)
	n.pingGuest(t, ctx, "56")
	found := false
	neighbours, err := netlink.NeighList(link(t, n.tap).Attrs().Index, netlink.FAMILY_V4)
	for _, e := range neighbours {
		found = found || e.HardwareAddr.String() == mac
	}
	if f := n.filter(t, q); err != nil || !found || f.MAC != mac {
		t.Errorf("no neighbour %s: %v (%v), or another filter: %+v", mac, neighbours, err, f)
	}
	n.g.Sh(ctx, "ip link set "+n.name+" address "+n.mac)
	n.forget(t)

	vlan := &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: "vlan", ParentIndex: link(t, n.tap).Attrs().Index}, VlanId: 4000}
	if err := netlink.LinkAdd(vlan); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(vlan) })
	harness.Addr(t, "vlan", "10.67.0.1/24")
	harness.Up(t, "vlan")
	n.g.Sh(ctx, "ip link add link "+n.name+" name v type vlan id 4000; ip addr add 10.67.0.2/24 dev v; ip link set v up; ping -c 1 -W 20 -s 1472 10.67.0.1; ip link del v")
	n.g.Sh(ctx, "ping -c 1 -W 20 "+n.host)
}

// forget has the host ask for the guest's MAC again.
func (n *nic) forget(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("ip", "neigh", "flush", "dev", n.tap).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// link pulls the cable and puts it back.
func (n *nic) link(t *testing.T) {
	ctx := harness.Context(t, limit)
	q := harness.DialQMP(t, ctx, n.qmp)
	for _, up := range []bool{false, true} {
		q.Do("set_link", map[string]any{"name": n.tap, "up": up})
		carrier := map[bool]string{false: "0", true: "1"}[up]
		n.g.Sh(ctx, "until [ $(cat /sys/class/net/"+n.name+"/carrier) = "+carrier+" ]; do :; done")
	}
	n.g.Sh(ctx, "ping -c 1 -W 20 "+n.host)
	n.pingGuest(t, ctx, "56")
}

// again takes the driver off and on: a reset leaves nothing behind.
func (n *nic) again(t *testing.T) {
	ctx := harness.Context(t, limit)
	dev := n.device(ctx)
	n.g.Sh(ctx, "cd /sys/bus/virtio/drivers/virtio_net; echo "+dev+" >unbind; echo "+dev+" >bind")
	n.up(t)
	n.ping(t)
	n.queues(t)
}
