package virtiotest

import (
	"encoding/binary"
	"log/slog"
	"sync"
	"testing"
	"time"

	"baton/devices"
	"baton/devices/pci"
	"baton/devices/virtio"
	"baton/kvm/guestmem"
	"baton/tests/devicetest"
)

// Function is a device behind virtio-pci, and the driver that reaches it through the BAR.
type Function struct {
	*virtio.PCI
	*Driver
	t       testing.TB
	mmio    *devices.Bus
	config  uint64
	bar     uint64
	vectors vectors
}

// The functions lie in a machine of their own, at 00:02.0.
const (
	ecam = 0xb000_0000
	slot = 2
)

// NewFunction puts a device that has not been used behind virtio-pci, with mem as guest
// memory. Its BAR and its vectors are set up as by the guest's PCI code.
func NewFunction(t testing.TB, dev virtio.Device, mem *guestmem.Memory) *Function {
	t.Helper()
	f := &Function{t: t, mmio: devices.NewBus(), Driver: &Driver{Mem: mem, Dev: dev, Failures: make(chan error, 100), Changes: make(chan struct{}, 100), t: t, next: [2]uint64{0x1000, 0}}}
	f.vectors = vectors{f: f}
	var err error
	f.PCI, err = virtio.NewPCI(dev, virtio.PCIOptions{
		ID: "test", Mem: mem, Vectors: &f.vectors, Doorbells: noDoorbells{}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.PCI.Close(); err != nil {
			t.Error("close:", err)
		}
	})
	rc := pci.NewRootComplex(f.mmio, pci.Layout{
		ECAM:   devices.Range{Base: ecam, Size: 1 << 20},
		MMIO32: devices.Range{Base: 0xc000_0000, Size: 0x1000_0000},
		MMIO64: devices.Range{Base: 1 << 36, Size: 1 << 34},
	}, nil)
	if err := f.mmio.Insert(devices.Range{Base: ecam, Size: 1 << 20}, "ecam", rc); err != nil {
		t.Fatal(err)
	}
	if err := rc.Root().Add(slot, 0, f.PCI); err != nil {
		t.Fatal(err)
	}
	if err := rc.Assign(); err != nil {
		t.Fatal(err)
	}
	f.config = ecam + uint64(pci.NewBDF(0, slot, 0))<<12
	f.bar = f.get(f.config+0x10, 4)&^0xf | f.get(f.config+0x14, 4)<<32
	return f
}

func (f *Function) get(addr uint64, n int) uint64 {
	var b [8]byte
	f.mmio.Read(addr, b[:n])
	return binary.LittleEndian.Uint64(b[:])
}

func (f *Function) put(addr uint64, n int, v uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	f.mmio.Write(addr, b[:n])
}

// Status is the register device_status.
func (f *Function) Status() uint8 { return uint8(f.get(f.bar+0x14, 1)) }

// Start is the driver's initialisation (VIRTIO 1.2, 3.1.1): all queues at their full size,
// queue i with vector i+1, vector 0 for the configuration.
func (f *Function) Start(features uint64) {
	f.t.Helper()
	f.put(f.config+4, 2, 6) // memory space, bus master
	for i := range uint64(len(f.vectors.all)) {
		entry := f.bar + 0x4000 + 16*i
		f.put(entry, 4, 0xfee00000)
		f.put(entry+8, 4, 0x40+i)
		f.put(entry+12, 4, 0)
	}
	for off := f.get(f.config+0x34, 1); off != 0; off = f.get(f.config+off+1, 1) {
		if f.get(f.config+off, 1) == 0x11 {
			f.put(f.config+off+2, 2, 0x8000) // MSI-X enable
		}
	}
	f.put(f.bar+0x14, 1, 1)
	f.put(f.bar+0x14, 1, 3)
	for i := range uint64(2) {
		f.put(f.bar+8, 4, i)
		f.put(f.bar+0xc, 4, features>>(32*i)&0xffffffff)
	}
	f.put(f.bar+0x14, 1, 11)
	f.put(f.bar+0x10, 2, 0)
	f.features, f.Rings = features, nil
	for i, size := range f.Dev.QueueSizes() {
		r := f.newRing(i, size)
		f.Rings = append(f.Rings, r)
		f.put(f.bar+0x16, 2, uint64(i))
		f.put(f.bar+0x1a, 2, uint64(i+1))
		for j, a := range []uint64{r.Queue.Desc, r.Queue.Avail, r.Queue.Used} {
			f.put(f.bar+0x20+8*uint64(j), 4, a&0xffffffff)
			f.put(f.bar+0x24+8*uint64(j), 4, a>>32)
		}
		f.put(f.bar+0x1c, 2, 1)
	}
	f.put(f.bar+0x14, 1, 15)
	if s := f.Status(); s != 15 {
		f.t.Fatalf("status %#x after DRIVER_OK", s)
	}
}

// newRing lays out a ring that the transport is told of.
func (f *Function) newRing(i int, size uint16) *Ring {
	q := &virtio.Queue{Index: uint16(i), Size: size}
	r := &Ring{Queue: q, d: f.Driver, called: make(chan struct{}, 1), requests: make([]Request, size)}
	r.kick = func() { f.put(f.bar+0x3000+4*uint64(i), 2, uint64(i)) }
	q.Desc, q.Avail, q.Used = f.Alloc(16*int(size)), f.Alloc(6+2*int(size)), f.Alloc(6+8*int(size))
	for i := range size {
		r.free = append(r.free, i)
	}
	return r
}

// WaitConfig waits for the interrupt that says that the configuration space has changed.
func (f *Function) WaitConfig() {
	f.t.Helper()
	select {
	case <-f.Changes:
	case <-time.After(Patience):
		f.t.Fatal("no configuration interrupt")
	}
}

// Migrate moves the guest to a function with another device, which has been made with the
// same configuration, and memory of its own. The driver goes on there.
func (f *Function) Migrate(dev virtio.Device) *Function {
	f.t.Helper()
	fatal := func(err error) {
		f.t.Helper()
		if err != nil {
			f.t.Fatal(err)
		}
	}
	fatal(f.Quiesce())
	data, err := f.SaveState()
	fatal(err)
	to := NewFunction(f.t, dev, Memory(f.t))
	for i, r := range f.Mem.Regions() {
		copy(to.Mem.Regions()[i].Host, r.Host)
	}
	to.next, to.turn, to.features = f.next, f.turn, f.features
	for i, r := range f.Rings {
		n := to.newRing(i, r.Size)
		n.Queue.Desc, n.Queue.Avail, n.Queue.Used = r.Queue.Desc, r.Queue.Avail, r.Queue.Used
		n.free, n.avail, n.kicked, n.used = r.free, r.avail, r.kicked, r.used
		for i, req := range r.requests {
			req.In = nil
			for _, s := range req.in {
				req.In = append(req.In, to.Bytes(s.Base, int(s.Size)))
			}
			n.requests[i] = req
		}
		to.Rings = append(to.Rings, n)
	}
	to.next, to.turn = f.next, f.turn
	fatal(to.Quiesce())
	fatal(to.LoadState(to.StateInfo().Version, data))
	to.bar = to.get(to.config+0x10, 4)&^0xf | to.get(to.config+0x14, 4)<<32
	fatal(to.Unquiesce())
	return to
}

// State checks the saved state of a device behind its transport. Make returns a new device
// each time; use, which may be nil, has a driver change what there is to change.
func State(t *testing.T, make func(testing.TB) virtio.Device, use func(testing.TB, *Function)) {
	t.Helper()
	devicetest.State(t,
		func(t testing.TB) devices.Stater { return NewFunction(t, make(t), Memory(t)) },
		func(t testing.TB, d devices.Stater) {
			f := d.(*Function)
			f.Start(f.Dev.Features())
			if use != nil {
				use(t, f)
			}
		})
}

// noDoorbells has the transport take every kick itself.
type noDoorbells struct{}

func (noDoorbells) AddDoorbell(uint64, int, int) error    { return nil }
func (noDoorbells) RemoveDoorbell(uint64, int, int) error { return nil }

// vectors hands out vectors that wake the rings of a Function.
type vectors struct {
	f   *Function
	all []*vector
}

// vector is an eventfd, as backends in the kernel signal one, and who waits for it.
type vector struct {
	event *devices.EventFD
	fire  func()
	done  chan struct{}

	mu      sync.Mutex
	masked  bool
	pending bool
	closed  bool
}

func (s *vectors) NewVector() (devices.Vector, error) {
	e, err := devices.NewEventFD()
	if err != nil {
		return nil, err
	}
	i := len(s.all) - 1 // of the ring; vector 0 is the configuration's
	v := &vector{event: e, masked: true, done: make(chan struct{})}
	v.fire = func() {
		ch := s.f.Changes
		if i >= 0 && i < len(s.f.Rings) {
			ch = s.f.Rings[i].called
		}
		select {
		case ch <- struct{}{}:
		default:
		}
	}
	s.all = append(s.all, v)
	go v.wait()
	return v, nil
}

func (v *vector) wait() {
	defer close(v.done)
	for v.event.Wait() == nil {
		v.mu.Lock()
		closed, masked := v.closed, v.masked
		v.pending = v.pending || masked
		v.mu.Unlock()
		if closed {
			return
		}
		if !masked {
			v.fire()
		}
	}
}

// Set implements [devices.Vector].
func (v *vector) Set(_ devices.MSI, masked bool) error {
	v.mu.Lock()
	due := v.pending && !masked
	v.masked, v.pending = masked, v.pending && masked
	v.mu.Unlock()
	if due {
		v.fire()
	}
	return nil
}

// Pending implements [devices.Vector].
func (v *vector) Pending() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.masked && (v.pending || v.event.Pending())
}

// EventFD implements [devices.Vector].
func (v *vector) EventFD() int { return v.event.FD() }

// Signal implements [devices.Vector].
func (v *vector) Signal() { v.event.Signal() }

// Close implements [devices.Vector].
func (v *vector) Close() error {
	v.mu.Lock()
	v.closed = true
	v.mu.Unlock()
	v.event.Signal()
	<-v.done
	return v.event.Close()
}
