// Package vhost drives /dev/vhost-net, the kernel's own virtio-net device: a kernel thread
// per Net moves frames between a queue pair in guest memory and a TAP, woken by the guest
// and waking it through eventfds, with no VMM on the way.
//
//	guest ── kick eventfd (ioeventfd) ──> vhost worker ──> TAP queue
//	guest <── call eventfd (irqfd) ────── vhost worker <── TAP queue
//
// While stopped, frames for the guest wait in the TAP's own queue and the guest's kicks in
// their eventfd; a Start where Stop left off loses none.
package vhost

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"baton/kvm/guestmem"

	"golang.org/x/sys/unix"
)

const device = "/dev/vhost-net"

// Vring is one split virtqueue (VIRTIO 1.2, 2.7), set up by the guest.
type Vring struct {
	Size              uint16 // descriptors, a power of two up to 32768
	Base              uint16 // the free-running index of the next available entry to serve
	Desc, Avail, Used uint64 // guest-physical addresses of the three areas
	Kick              int    // eventfd by which the guest announces buffers
	Call              int    // eventfd by which the guest is interrupted
}

// Net serves one queue pair. Its methods may not be called at the same time.
type Net struct {
	fd       int
	features uint64
	log      *Log // nil: writes are not logged
	serving  *service
	errFD    int           // eventfd that the kernel signals for a ring it cannot read
	broken   *os.File      // errFD, whose method Fd would make it block
	watching chan struct{} // closed by the goroutine that reads it; nil: not serving
}

// Open opens /dev/vhost-net, a new instance each time.
func Open() (*Net, error) {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
		return NewNet(fd)
	case unix.ENOENT, unix.ENODEV, unix.ENXIO:
		err = fmt.Errorf("open %s: %w\nthe kernel's vhost-net is not there; try: modprobe vhost_net, or use vhost=off", device, err)
	case unix.EACCES, unix.EPERM:
		err = fmt.Errorf("open %s: %w\nrun as root or join its group (usually kvm), or use vhost=off", device, err)
	default:
		err = fmt.Errorf("open %s: %w", device, err)
	}
	return nil, err
}

// NewNet takes over an open descriptor of /dev/vhost-net that nobody has used before, also
// when it fails. The process becomes its owner: the addresses given to it are this one's.
func NewNet(fd int) (*Net, error) {
	n := &Net{fd: fd}
	err := withoutSignals(func() error { return ioctl[byte](fd, setOwner, nil) })
	if err == nil {
		err = ioctl(fd, getFeatures, &n.features)
	}
	if err == nil {
		n.errFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("set up vhost-net fd %d: %w", fd, err)
	}
	n.broken = os.NewFile(uintptr(n.errFD), "vhost-net errors")
	return n, nil
}

// withoutSignals calls f with all signals of the thread blocked. SET_OWNER starts the kernel
// thread, which fails, with ENOMEM, while a signal is pending for the caller: such as
// SIGURG, by which Go's scheduler interrupts goroutines.
func withoutSignals(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return err
	}
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }()
	return f()
}

// Features are the virtio feature bits that the kernel implements. Those of offloads are
// not among them, because the TAP does the work; only bits in this set may be given to
// Start.
func (n *Net) Features() uint64 { return n.features }

// Start serves rings, receive and transmit queue, with the negotiated features from guest
// memory mem and the TAP queue tap, whose frames have the virtio_net_hdr before them. It
// fails, and serves nothing, for a ring that is not inside guest memory. What the driver
// puts into a ring is looked at later: failed is called, once, when it makes no sense.
func (n *Net) Start(mem *guestmem.Memory, features uint64, rings [2]Vring, tap int, failed func(error)) error {
	table, err := newMemTable(mem)
	if err == nil {
		err = ioctl(n.fd, setMemTable, table)
	}
	if err != nil {
		return fmt.Errorf("start vhost-net: share guest memory: %w", err)
	}
	// Only the regions of a memory table may be logged, so it comes first.
	if err := n.setFeatures(features); err != nil {
		return fmt.Errorf("start vhost-net: %w", err)
	}
	for i, r := range rings {
		if err := n.setRing(mem, uint32(i), r); err != nil {
			return fmt.Errorf("start vhost-net: ring %d: %w", i, err)
		}
	}
	for i := range rings {
		if err := ioctl(n.fd, netSetBackend, &vringFile{uint32(i), int32(tap)}); err != nil {
			n.detach()
			return fmt.Errorf("start vhost-net: attach ring %d to the TAP: %w", i, err)
		}
	}
	n.serving = &service{mem, features, rings}
	n.watch(failed)
	return nil
}

// service is what Start was given.
type service struct {
	mem      *guestmem.Memory
	features uint64
	rings    [2]Vring
}

// SetLog has all that the kernel writes to guest memory logged, in addition to what was given
// to an earlier call being forgotten; nil ends it. It may come at any time, while frames flow,
// too: what is written after it has returned is in the log.
func (n *Net) SetLog(log *Log) error {
	old := n.log
	n.log = log
	if err := n.applyLog(); err != nil {
		n.log = old
		return fmt.Errorf("log the writes of vhost-net: %w", err)
	}
	return nil
}

// applyLog tells the kernel of the log: where it is before it is used, and of the rings' own
// area besides the frames.
func (n *Net) applyLog() error {
	if n.serving == nil {
		return nil
	}
	if err := n.setFeatures(n.serving.features); err != nil {
		return err
	}
	for i, r := range n.serving.rings {
		addr, err := n.ringAddr(n.serving.mem, uint32(i), r)
		if err == nil {
			err = ioctl(n.fd, setVringAddr, &addr)
		}
		if err != nil {
			return fmt.Errorf("ring %d: %w", i, err)
		}
	}
	return nil
}

// setFeatures sets features and where the log is.
func (n *Net) setFeatures(features uint64) error {
	if n.log != nil {
		base := n.log.address()
		if err := ioctl(n.fd, setLogBase, &base); err != nil {
			return fmt.Errorf("set the log: %w", err)
		}
		features |= featureLogAll
	}
	if err := ioctl(n.fd, setFeatures, &features); err != nil {
		return fmt.Errorf("set features %#x: %w", features, err)
	}
	return nil
}

// watch reports the first error of the worker, which goes on as if nothing had happened.
func (n *Net) watch(failed func(error)) {
	done := make(chan struct{})
	n.watching = done
	_ = n.broken.SetReadDeadline(time.Time{})
	go func() {
		defer close(done)
		var count [8]byte
		if _, err := n.broken.Read(count[:]); err == nil {
			failed(errors.New("vhost-net: the driver has broken a ring"))
		}
	}()
}

func (n *Net) setRing(mem *guestmem.Memory, i uint32, r Vring) error {
	addr, err := n.ringAddr(mem, i, r)
	if err != nil {
		return err
	}
	if err := ioctl(n.fd, setVringNum, &vringState{i, uint32(r.Size)}); err != nil {
		return fmt.Errorf("size %d: %w", r.Size, err)
	}
	if err := ioctl(n.fd, setVringBase, &vringState{i, uint32(r.Base)}); err != nil {
		return fmt.Errorf("base %d: %w", r.Base, err)
	}
	if err := ioctl(n.fd, setVringAddr, &addr); err != nil {
		return fmt.Errorf("addresses %#x, %#x, %#x: %w", r.Desc, r.Avail, r.Used, err)
	}
	if err := ioctl(n.fd, setVringKick, &vringFile{i, int32(r.Kick)}); err != nil {
		return fmt.Errorf("kick fd %d: %w", r.Kick, err)
	}
	if err := ioctl(n.fd, setVringCall, &vringFile{i, int32(r.Call)}); err != nil {
		return fmt.Errorf("call fd %d: %w", r.Call, err)
	}
	if err := ioctl(n.fd, setVringErr, &vringFile{i, int32(n.errFD)}); err != nil {
		return fmt.Errorf("error fd: %w", err)
	}
	return nil
}

// Stop ends the service and returns where each ring stands: the Base of a later Start.
// When it returns, the kernel touches guest memory no more, and failed is not called.
func (n *Net) Stop() (base [2]uint16, err error) {
	n.detach()
	for i := range base {
		s := vringState{index: uint32(i)}
		if e := ioctl(n.fd, getVringBase, &s); e != nil {
			err = fmt.Errorf("stop vhost-net: read the position of ring %d: %w", i, e)
		}
		base[i] = uint16(s.num)
	}
	return base, err
}

// StopRing ends the service of one ring, 0 or 1, of a device that serves both, and returns
// where it stands. The other one goes on.
func (n *Net) StopRing(i int) (base uint16, err error) {
	err = ioctl(n.fd, netSetBackend, &vringFile{uint32(i), -1})
	s := vringState{index: uint32(i)}
	if err == nil {
		err = ioctl(n.fd, getVringBase, &s)
	}
	if err != nil {
		return 0, fmt.Errorf("stop ring %d of vhost-net: %w", i, err)
	}
	return uint16(s.num), nil
}

// StartRing continues what StopRing has ended, from base on.
func (n *Net) StartRing(i int, base uint16, tap int) error {
	err := ioctl(n.fd, setVringBase, &vringState{uint32(i), uint32(base)})
	if err == nil {
		err = ioctl(n.fd, netSetBackend, &vringFile{uint32(i), int32(tap)})
	}
	if err != nil {
		return fmt.Errorf("continue ring %d of vhost-net: %w", i, err)
	}
	return nil
}

// detach takes the TAP away, which waits for the worker. It fails only for a ring that the
// worker does not serve.
func (n *Net) detach() {
	n.serving = nil
	for i := range uint32(2) {
		_ = ioctl(n.fd, netSetBackend, &vringFile{i, -1})
	}
	if n.watching != nil {
		_ = n.broken.SetReadDeadline(time.Unix(1, 0)) // long past
		<-n.watching
		n.watching = nil
	}
}

// Close ends the service, if any, and the kernel thread.
func (n *Net) Close() error {
	n.detach()
	return errors.Join(n.broken.Close(), unix.Close(n.fd))
}

// ringAddr translates a ring's addresses. The sizes are those of VIRTIO 1.2, 2.7.
func (n *Net) ringAddr(mem *guestmem.Memory, i uint32, r Vring) (addr vringAddr, err error) {
	size := uint64(r.Size)
	addr.index = i
	if n.log != nil {
		addr.flags, addr.log = vringLog, r.Used
	}
	if addr.desc, err = mem.HostAddr(r.Desc, 16*size); err != nil {
		return addr, fmt.Errorf("descriptor table: %w", err)
	}
	if addr.avail, err = mem.HostAddr(r.Avail, 6+2*size); err != nil {
		return addr, fmt.Errorf("available ring: %w", err)
	}
	if addr.used, err = mem.HostAddr(r.Used, 6+8*size); err != nil {
		return addr, fmt.Errorf("used ring: %w", err)
	}
	return addr, nil
}

// newMemTable describes all of guest memory.
func newMemTable(mem *guestmem.Memory) (*memTable, error) {
	t := new(memTable)
	for i, r := range mem.Regions() {
		if i == maxRegions {
			return nil, fmt.Errorf("%d regions of guest memory; vhost takes %d", len(mem.Regions()), maxRegions)
		}
		host, err := mem.HostAddr(r.GPA, r.Size)
		if err != nil {
			return nil, err
		}
		t.regions[i] = memRegion{gpa: r.GPA, size: r.Size, host: host}
		t.n++
	}
	return t, nil
}
