package harness

import (
	"bytes"
	"os"
	"os/exec"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// A Host is a network namespace that stands for another host, in which a VMM runs: with a
// bridge of its own, HostBridge, between a TAP, HostTap, and the wire.
//
//	netns NAME                             the host under test
//	┌──────────────────────────────┐  veth ┌──────────────────────┐
//	│ Guest ── tap0 ── br0 ── eth0 ├───────┤ NAME-up, on a bridge │
//	└──────────────────────────────┘       └──────────────────────┘
type Host struct {
	Name string

	t  testing.TB
	ns netns.NsHandle
}

// Interfaces of every Host.
const (
	HostBridge = "br0"
	HostTap    = "tap0"
)

// NewHost makes the namespace with everything in it, up, and its end of the wire a port of
// the given bridge. Its own bridge has the address cidr.
func NewHost(t testing.TB, name, bridge, cidr string) *Host {
	t.Helper()
	home, err := netns.Get()
	must(t, "network namespace", err)
	h := &Host{Name: name, t: t}
	h.ns, err = newNamespace(name, home)
	must(t, "network namespace "+name, err)
	undo(t, "network namespace "+name, func() error {
		h.ns.Close()
		home.Close()
		return netns.DeleteNamed(name)
	})
	up := name + "-up"
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: up}, PeerName: name + "-in"}
	must(t, "veth", netlink.LinkAdd(v))
	undo(t, "veth", func() error { return netlink.LinkDel(v) })
	AddPort(t, bridge, up)
	must(t, "move "+v.PeerName, netlink.LinkSetNsFd(link(t, v.PeerName), int(h.ns)))
	for _, argv := range [][]string{
		{"link", "set", "lo", "up"},
		{"link", "set", v.PeerName, "name", "eth0"},
		{"link", "add", HostBridge, "type", "bridge", "mcast_snooping", "0"},
		{"tuntap", "add", "dev", HostTap, "mode", "tap", "vnet_hdr"},
		{"link", "set", HostTap, "master", HostBridge},
		{"link", "set", "eth0", "master", HostBridge},
		{"link", "set", HostTap, "up"},
		{"link", "set", "eth0", "up"},
		{"link", "set", HostBridge, "up"},
		{"address", "add", cidr, "dev", HostBridge},
	} {
		h.IP(argv...)
	}
	return h
}

// IP runs ip(8) in the namespace; if it fails the test ends.
func (h *Host) IP(argv ...string) {
	h.t.Helper()
	out, err := exec.Command("ip", append([]string{"-n", h.Name}, argv...)...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("ip -n %s %q: %v\n%s", h.Name, argv, err, out)
	}
}

// Emulated says whether the host under test has no processor of its own.
func Emulated() bool {
	b, _ := os.ReadFile("/proc/cpuinfo")
	return bytes.Contains(b, []byte("QEMU TCG CPU"))
}
