// Package tap opens TAP interfaces, the host's end of a guest's network card.
//
//	guest ── virtqueues ── vhost-net or VMM ── queue fds ── TAP ── bridge, routes
//
// Every frame on a queue is preceded by the 12-byte virtio_net_hdr of VIRTIO 1.2, 5.1.6, so
// checksums and segmentation are left to whoever needs them done, if anyone. An existing
// (persistent) interface is attached to and outlives the TAP; one that Open created is
// removed by the kernel with its last queue.
package tap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// HeaderSize is the length in bytes of the virtio_net_hdr before each frame. It has
// num_buffers, as every header has under VIRTIO_F_VERSION_1; its byte order is little
// endian, the only one of an x86 host.
const HeaderSize = 12

// MaxQueues is the kernel's limit of queues per interface, MAX_TAP_QUEUES.
const MaxQueues = 256

const device = "/dev/net/tun"

// Offload says which frames the reader of the queues takes as they are: TUN_F_* of
// <linux/if_tun.h>. Everything but CSUM needs CSUM too.
type Offload uint

const (
	CSUM   Offload = unix.TUN_F_CSUM    // without checksum
	TSO4   Offload = unix.TUN_F_TSO4    // TCP over IPv4 longer than the MTU
	TSO6   Offload = unix.TUN_F_TSO6    // TCP over IPv6 longer than the MTU
	TSOECN Offload = unix.TUN_F_TSO_ECN // the TSO frames with ECN
	UFO    Offload = unix.TUN_F_UFO     // UDP to be fragmented
	USO4   Offload = unix.TUN_F_USO4    // UDP segments over IPv4 (Linux 6.2), only with USO6
	USO6   Offload = unix.TUN_F_USO6    // UDP segments over IPv6 (Linux 6.2), only with USO4
)

// Config says what to open.
type Config struct {
	// Name of the interface, at most 15 bytes. A new one may hold one %d, for which the
	// kernel takes the first free number; empty is "tap%d".
	Name string
	// Queues is the number of queues, 0 (meaning 1) to MaxQueues. More than one need an
	// interface with multi_queue.
	Queues int
	// FDs are queues that somebody else has opened with IFF_TAP, IFF_NO_PI and
	// IFF_VNET_HDR, one per queue; Name and Queues are then ignored. Open takes the
	// descriptors, also when it fails.
	FDs []int
}

// TAP is an open interface. Its methods may not be called at the same time as Close.
type TAP struct {
	name     string
	fds      []int
	detached []bool
	offloads Offload
}

// Open attaches to the interface or creates it, with all queues enabled and no offloads.
// Errors tell a missing driver, missing rights, a name that belongs to something else, a
// busy interface and a mismatch of single and multi-queue apart.
func Open(c Config) (*TAP, error) {
	t := &TAP{name: c.Name}
	err := t.open(c)
	if err == nil {
		err = t.setup()
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (t *TAP) open(c Config) error {
	if len(c.FDs) > 0 {
		for _, fd := range c.FDs {
			t.add(fd, false)
		}
		return t.adopt()
	}
	queues := max(c.Queues, 1)
	if t.name == "" {
		t.name = "tap%d"
	}
	if len(t.name) >= unix.IFNAMSIZ {
		return fmt.Errorf("open TAP %s: a name has at most %d bytes", t.name, unix.IFNAMSIZ-1)
	}
	if queues > MaxQueues {
		return fmt.Errorf("open TAP %s: %d queues; the kernel has at most %d", t.name, queues, MaxQueues)
	}
	exists, err := inspect(t.name, queues)
	if err != nil {
		return err
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	for range queues {
		if err := t.openQueue(flags, exists); err != nil {
			return err
		}
	}
	return nil
}

// openQueue attaches one more queue. The first one turns a pattern into the name.
func (t *TAP) openQueue(flags uint16, exists bool) error {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch err {
	case nil:
	case unix.ENOENT, unix.ENODEV, unix.ENXIO:
		return fmt.Errorf("open %s: %w\nthe kernel's TUN/TAP driver is not there; try: modprobe tun", device, err)
	case unix.EACCES, unix.EPERM:
		return fmt.Errorf("open %s: %w\nrun as root, or give this user access: chmod 0666 %s", device, err, device)
	default:
		return fmt.Errorf("open %s: %w", device, err)
	}
	t.add(fd, false)
	ifr, err := unix.NewIfreq(t.name)
	if err != nil {
		return fmt.Errorf("open TAP %s: %w", t.name, err)
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("open TAP %s: %w%s", t.name, err, attachHint(t.name, err, exists, flags))
	}
	t.name = ifr.Name()
	return nil
}

func attachHint(name string, err error, exists bool, flags uint16) string {
	mode := "mode tap"
	if flags&unix.IFF_MULTI_QUEUE != 0 {
		mode += " multi_queue"
	}
	switch {
	case errors.Is(err, unix.EPERM) && exists:
		return "\nit belongs to another user; run as root, or create it for this one"
	case errors.Is(err, unix.EPERM):
		return fmt.Sprintf("\nit does not exist, and creating one takes CAP_NET_ADMIN; as root: ip tuntap add dev %s %s user USER",
			strings.ReplaceAll(name, "%d", "0"), mode)
	case errors.Is(err, unix.EINVAL) && !exists:
		return "\nis this the name of an interface? it may hold neither / nor : nor blanks"
	case errors.Is(err, unix.EBUSY):
		return "\nanother program has it open, perhaps another VM; use a TAP of its own for each"
	}
	return ""
}

// inspect looks at an interface before it is touched: to attach to a multi-queue TAP that
// another VM uses would succeed and steal its frames, and EINVAL alone does not say what
// the kernel dislikes. Where the kernel does not tell, TUNSETIFF is left to decide.
func inspect(name string, queues int) (exists bool, err error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return false, nil
	}
	tun, ok := link.(*netlink.Tuntap)
	if !ok || tun.Mode != netlink.TUNTAP_MODE_TAP {
		return true, fmt.Errorf("open TAP %s: an interface of this name exists (%s) and is no TAP\ntake another name", name, link.Type())
	}
	multi := tun.Flags&netlink.TUNTAP_MULTI_QUEUE != 0
	switch {
	case tun.Queues+tun.DisabledQueues > 0:
		err = unix.EBUSY
		return true, fmt.Errorf("open TAP %s: %w%s", name, err, attachHint(name, err, true, 0))
	case queues > 1 && !multi:
		return true, fmt.Errorf("open TAP %s: it has a single queue and %d are asked for\n"+
			"ask for one, or create it anew: ip tuntap add dev %s mode tap multi_queue", name, queues, name)
	case queues == 1 && multi:
		return true, fmt.Errorf("open TAP %s: it is multi-queue and one queue is asked for\n"+
			"ask for two queues or more, or create it without multi_queue", name)
	}
	return true, nil
}

// adopt checks queues that were opened elsewhere.
func (t *TAP) adopt() error {
	for i, fd := range t.fds {
		ifr, err := unix.NewIfreq("")
		if err == nil {
			err = unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr)
		}
		if err != nil {
			return fmt.Errorf("use fd %d as TAP: %w\nit must be a queue of a TAP or macvtap interface", fd, err)
		}
		const want = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
		if flags := ifr.Uint16(); flags&want != want {
			return fmt.Errorf("use fd %d as TAP: its flags are %#x\nopen it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR (%#x)", fd, flags, want)
		}
		if i > 0 && ifr.Name() != t.name {
			return fmt.Errorf("use fd %d as TAP: a queue of %s, but fd %d is one of %s", fd, ifr.Name(), t.fds[0], t.name)
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return fmt.Errorf("use fd %d as TAP: %w", fd, err)
		}
		unix.CloseOnExec(fd)
		t.name = ifr.Name()
		t.detached[i] = ifr.Uint16()&unix.IFF_DETACH_QUEUE != 0
	}
	return nil
}

func (t *TAP) add(fd int, detached bool) {
	t.fds = append(t.fds, fd)
	t.detached = append(t.detached, detached)
}

// setup brings the interface into a known state, and learns what it can do.
func (t *TAP) setup() error {
	if err := unix.IoctlSetPointerInt(t.fds[0], unix.TUNSETVNETHDRSZ, HeaderSize); err != nil {
		return fmt.Errorf("set header size of TAP %s: %w", t.name, err)
	}
	for _, set := range []Offload{CSUM, CSUM | TSO4, CSUM | TSO6, CSUM | TSO4 | TSO6 | TSOECN, CSUM | UFO, CSUM | USO4 | USO6} {
		if t.SetOffload(set) == nil {
			t.offloads |= set
		}
	}
	return t.SetOffload(0)
}

// Name is the interface's name.
func (t *TAP) Name() string { return t.name }

// Queues is how many queues are open.
func (t *TAP) Queues() int { return len(t.fds) }

// FD is the descriptor of a queue, non-blocking; the TAP owns it.
func (t *TAP) FD(queue int) int { return t.fds[queue] }

// Offloads is what SetOffload accepts on this kernel.
func (t *TAP) Offloads() Offload { return t.offloads }

// SetOffload says which frames may come out of the queues unfinished. What goes in may
// always be. It fails with EINVAL for a bit beyond Offloads.
func (t *TAP) SetOffload(o Offload) error {
	if err := unix.IoctlSetInt(t.fds[0], unix.TUNSETOFFLOAD, int(o)); err != nil {
		return fmt.Errorf("set offloads %#x of TAP %s: %w", o, t.name, err)
	}
	return nil
}

// SetQueues enables the first n queues, 1 to Queues, and disables the others: the kernel
// then spreads frames over the n.
func (t *TAP) SetQueues(n int) error {
	for i, fd := range t.fds {
		detach := i >= n
		if t.detached[i] == detach {
			continue
		}
		ifr, err := unix.NewIfreq("")
		if err == nil {
			ifr.SetUint16(unix.IFF_ATTACH_QUEUE)
			if detach {
				ifr.SetUint16(unix.IFF_DETACH_QUEUE)
			}
			err = unix.IoctlIfreq(fd, unix.TUNSETQUEUE, ifr)
		}
		if err != nil {
			return fmt.Errorf("enable %d of %d queues of TAP %s: %w", n, len(t.fds), t.name, err)
		}
		t.detached[i] = detach
	}
	return nil
}

// Take returns the frames that wait in a queue, each with its header, at most so many bytes of
// them. The rest, up to as many as a queue holds by default many times over, so that a flood
// cannot hold it, are thrown away and counted.
func (t *TAP) Take(queue, limit int) (frames [][]byte, dropped int) {
	buf := make([]byte, HeaderSize+1<<16)
	for range 8192 {
		n, err := unix.Read(t.fds[queue], buf)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return frames, dropped
		case n > limit:
			dropped++
		default:
			limit -= n
			frames = append(frames, append([]byte(nil), buf[:n]...))
		}
	}
	return frames, dropped
}

// Send puts a frame, which is complete and without header, on the first queue as if the guest
// had sent it.
func (t *TAP) Send(frame []byte) error {
	if _, err := unix.Writev(t.fds[0], [][]byte{make([]byte, HeaderSize), frame}); err != nil {
		return fmt.Errorf("send to TAP %s: %w", t.name, err)
	}
	return nil
}

// SetUp brings the interface up, which an up-script does otherwise, unless it is: that takes no
// privilege.
func (t *TAP) SetUp() error {
	link, err := netlink.LinkByName(t.name)
	if err == nil && link.Attrs().Flags&net.FlagUp == 0 {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set up of TAP %s: %w", t.name, err)
	}
	return nil
}

// Close gives up all queues. The interface goes with them unless it is persistent.
func (t *TAP) Close() error {
	var errs []error
	for _, fd := range t.fds {
		errs = append(errs, unix.Close(fd))
	}
	t.fds, t.detached = nil, nil
	return errors.Join(errs...)
}

// RARP is the frame of a RARP request (RFC 903) of a host for its own address, which bridges learn from and nobody
// answers. It is as long as the shortest Ethernet frame, without checksum.
func RARP(mac [6]byte) []byte {
	f := make([]byte, 0, 60)
	f = append(f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	f = append(f, mac[:]...)
	for _, v := range []uint16{0x8035 /* RARP */, 1 /* Ethernet */, 0x0800 /* IPv4 */, 6<<8 | 4 /* lengths */, 3 /* request reverse */} {
		f = binary.BigEndian.AppendUint16(f, v)
	}
	f = append(f, mac[:]...)
	f = append(f, 0, 0, 0, 0)
	f = append(f, mac[:]...)
	return f[:cap(f)]
}
