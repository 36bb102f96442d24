package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// A Peer is the rest of the world as the guest sees it: an endpoint in a network namespace
// of its own, at the other end of the wire.
type Peer struct {
	Uplink string // the interface of the host under test that the wire leads to

	t  testing.TB
	ns netns.NsHandle
}

// peerNamespace is visible to `ip netns`, for people who look into a suite that runs.
const peerNamespace = "peer"

// NewPeer makes the peer and gives its interface the address, unless that is "". In the
// nested host its interface is the e1000e on the NICs' wire, and Uplink the first SR-IOV
// NIC; on another host it is a veth pair.
func NewPeer(t testing.TB, cidr string) *Peer {
	t.Helper()
	if !Nested() {
		return NewVethPeer(t, cidr)
	}
	return newPeer(t, driverLink(t, "e1000e"), PFs(t)[0].Name, cidr)
}

// NewVethPeer makes a peer on a veth pair: no NIC's speed or driver is in the way.
func NewVethPeer(t testing.TB, cidr string) *Peer {
	t.Helper()
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "peer-up"}, PeerName: "peer0"}
	must(t, "veth", netlink.LinkAdd(v))
	undo(t, "veth", func() error { return netlink.LinkDel(v) })
	Up(t, "peer-up")
	return newPeer(t, "peer0", "peer-up", cidr)
}

// NewNICPeer makes a peer on the second SR-IOV NIC, and returns the e1000e for a guest.
func NewNICPeer(t testing.TB, cidr string) (peer *Peer, nic PF) {
	t.Helper()
	pfs := PFs(t)
	if !Nested() || len(pfs) < 2 {
		t.Skip("needs the nested host's NICs")
	}
	nic.Name = driverLink(t, "e1000e")
	dev, err := filepath.EvalSymlinks("/sys/class/net/" + nic.Name + "/device")
	must(t, "e1000e", err)
	nic.PCI = filepath.Base(dev)
	// The e1000e, when it comes back to its driver, takes the first name that is free.
	const name = "peer-nic"
	if pfs[1].Name != name {
		l := link(t, pfs[1].Name)
		must(t, "rename "+pfs[1].Name, netlink.LinkSetDown(l))
		must(t, "rename "+pfs[1].Name, netlink.LinkSetName(l, name))
	}
	return newPeer(t, name, pfs[0].Name, cidr), nic
}

func newPeer(t testing.TB, name, uplink, cidr string) *Peer {
	t.Helper()
	home, err := netns.Get()
	must(t, "network namespace", err)
	p := &Peer{Uplink: uplink, t: t}
	p.ns, err = newNamespace(peerNamespace, home)
	must(t, "network namespace "+peerNamespace, err)
	undo(t, "network namespace", func() error {
		p.ns.Close()
		home.Close()
		return netns.DeleteNamed(peerNamespace)
	})
	must(t, "move "+name, netlink.LinkSetNsFd(link(t, name), int(p.ns)))
	undo(t, "move "+name, func() error {
		return p.Do(func() error {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			return netlink.LinkSetNsFd(l, int(home))
		})
	})
	must(t, "peer", p.Do(func() error {
		for _, n := range []string{"lo", name} {
			l, err := netlink.LinkByName(n)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(l); err != nil {
				return err
			}
		}
		if cidr == "" {
			return nil
		}
		return addAddr(name, cidr)
	}))
	return p
}

// newNamespace makes a named network namespace without leaving home.
func newNamespace(name string, home netns.NsHandle) (ns netns.NsHandle, err error) {
	err = onThread(home, func() error {
		ns, err = netns.NewNamed(name)
		return err
	})
	return ns, err
}

// onThread runs f on a thread that may change its network namespace, and takes the thread
// back to home after that. A thread that cannot go back ends with its goroutine.
func onThread(home netns.NsHandle, f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := f()
		back := netns.Set(home)
		if back == nil {
			runtime.UnlockOSThread()
		}
		result <- errors.Join(err, back)
	}()
	return <-result
}

// Do runs f in the peer's namespace. f must start no goroutine that uses the network; a
// socket belongs to the namespace that it was opened in.
func (p *Peer) Do(f func() error) error {
	home, err := netns.Get()
	if err != nil {
		return err
	}
	defer home.Close()
	return onThread(home, func() error {
		if err := netns.Set(p.ns); err != nil {
			return fmt.Errorf("enter namespace %s: %w", peerNamespace, err)
		}
		return f()
	})
}

// Start starts a command in the peer's namespace; the caller waits for it.
func (p *Peer) Start(cmd *exec.Cmd) error {
	return p.Do(cmd.Start)
}

// Run runs a command in the peer's namespace and returns what it printed.
func (p *Peer) Run(ctx context.Context, argv ...string) (string, error) {
	var out strings.Builder
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := p.Start(cmd); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("peer: %v: %w\n%s", argv, err, out.String())
	}
	return out.String(), nil
}

// Ping returns when addr has answered; if it does not before ctx ends, the test ends.
func (p *Peer) Ping(ctx context.Context, addr string) {
	p.t.Helper()
	// ping sends until one answer came; ctx is the deadline.
	_, err := p.Run(ctx, "ping", "-n", "-c", "1", "-w", "3600", "-i", "0.2", addr)
	must(p.t, "ping "+addr, err)
}

// driverLink returns the name of the one interface that the driver serves.
func driverLink(t testing.TB, driver string) string {
	t.Helper()
	var names []string
	links, _ := filepath.Glob("/sys/class/net/*/device/driver")
	for _, l := range links {
		if target, err := os.Readlink(l); err == nil && filepath.Base(target) == driver {
			names = append(names, filepath.Base(filepath.Dir(filepath.Dir(l))))
		}
	}
	if len(names) != 1 {
		t.Fatalf("interfaces of driver %s: %q, want one", driver, names)
	}
	return names[0]
}
