package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"

	"github.com/vishvananda/netlink"
)

// link returns a network interface by name; if it is not there the test ends.
func link(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, "interface "+name, err)
	return l
}

// Up sets an interface up, and down again at the end if it was down.
func Up(t testing.TB, name string) {
	t.Helper()
	l := link(t, name)
	if l.Attrs().Flags&net.FlagUp != 0 {
		return
	}
	must(t, "up "+name, netlink.LinkSetUp(l))
	undo(t, "up "+name, func() error { return netlink.LinkSetDown(l) })
}

// WaitCarrier returns when the interface has a carrier; else the test ends.
func WaitCarrier(t testing.TB, ctx context.Context, name string) {
	t.Helper()
	must(t, "carrier of "+name, waitLink(ctx, name, func(l netlink.Link) bool {
		return l.Attrs().OperState == netlink.OperUp
	}))
}

// waitLink returns when the interface is as ok wants it.
func waitLink(ctx context.Context, name string, ok func(netlink.Link) bool) error {
	updates, done := make(chan netlink.LinkUpdate), make(chan struct{})
	defer close(done)
	// The list of what is there comes first, so nothing is missed.
	err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{ListExisting: true})
	if err != nil {
		return err
	}
	for {
		select {
		case u, open := <-updates:
			if !open {
				return errors.New("netlink: subscription ended")
			}
			if u.Link.Attrs().Name == name && ok(u.Link) {
				go func() { // the subscription ends only when somebody reads
					for range updates {
					}
				}()
				return nil
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Bridge makes a bridge with the given ports, all up, that forwards at once and neither
// snoops multicast nor speaks the spanning tree protocol.
func Bridge(t testing.TB, name string, ports ...string) {
	t.Helper()
	snoop := false
	b := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}, MulticastSnooping: &snoop}
	must(t, "bridge "+name, netlink.LinkAdd(b))
	undo(t, "bridge "+name, func() error { return netlink.LinkDel(b) })
	must(t, "bridge "+name, netlink.LinkSetUp(b))
	for _, p := range ports {
		AddPort(t, name, p)
	}
}

// AddPort makes an interface a port of the bridge and sets it up.
func AddPort(t testing.TB, bridge, port string) {
	t.Helper()
	p := link(t, port)
	must(t, "port "+port, netlink.LinkSetMaster(p, link(t, bridge)))
	t.Cleanup(func() { netlink.LinkSetNoMaster(p) }) // it may be gone: a TAP's owner removed it
	Up(t, port)
}

// Tap makes a persistent TAP for a VMM to attach to, with that many queues, and sets it up.
func Tap(t testing.TB, name string, queues int) {
	t.Helper()
	tap := &netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: name},
		Mode:      netlink.TUNTAP_MODE_TAP,
		Flags:     netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR,
		Queues:    max(queues, 1),
	}
	if queues > 1 {
		tap.Flags |= netlink.TUNTAP_MULTI_QUEUE
	}
	must(t, "tap "+name, netlink.LinkAdd(tap))
	for _, f := range tap.Fds {
		f.Close() // the VMM opens its own
	}
	undo(t, "tap "+name, func() error { return netlink.LinkDel(link(t, name)) })
	must(t, "tap "+name, netlink.LinkSetUp(link(t, name)))
}

// Addr gives an interface an address such as 10.0.0.1/24 or fd00::1/64, usable at once.
func Addr(t testing.TB, name, cidr string) {
	t.Helper()
	must(t, fmt.Sprintf("address %s on %s", cidr, name), addAddr(name, cidr))
	undo(t, "address "+cidr, func() error {
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		return netlink.AddrDel(link(t, name), a)
	})
}

func addAddr(name, cidr string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	a.Flags = ifaNoDAD // duplicate address detection takes a second
	return netlink.AddrAdd(l, a)
}

// ifaNoDAD is IFA_F_NODAD of linux/if_addr.h.
const ifaNoDAD = 0x02
