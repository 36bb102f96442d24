// Package virtiotest is the other side of a virtio device for tests: a guest driver that
// works on guest memory as Linux's does, and the contract that every device has to meet.
package virtiotest

import (
	"encoding/binary"
	"testing"
	"time"

	"baton/devices/virtio"
	"baton/kvm/guestmem"
)

// Patience is how long a test waits for an event before it fails.
const Patience = 20 * time.Second

// HighBase is the guest-physical address of the upper region that Memory makes.
const HighBase = 4 << 30

const regionSize = 32 << 20

// Memory is guest RAM of two regions of 32 MiB: at 0 and at HighBase.
func Memory(t testing.TB) *guestmem.Memory {
	t.Helper()
	mem, err := guestmem.New([]guestmem.Range{{Base: 0, Size: regionSize}, {Base: HighBase, Size: regionSize}}, guestmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mem.Close() })
	return mem
}

// Driver drives one device without a transport.
type Driver struct {
	Mem      *guestmem.Memory
	Dev      virtio.Device
	Rings    []*Ring
	Failures chan error // what the device reported by Failed
	Changes  chan struct{}

	t        testing.TB
	features uint64
	queues   []*virtio.Queue // of all activations
	next     [2]uint64       // bump allocators of both regions
	turn     int
}

// NewDriver activates dev with the features, and all of its queues at their full size. The
// device is closed when the test ends. Without a device (nil) it is memory for NewRing.
func NewDriver(t testing.TB, dev virtio.Device, features uint64) *Driver {
	t.Helper()
	d := &Driver{Mem: Memory(t), Dev: dev, Failures: make(chan error, 100), Changes: make(chan struct{}, 100), t: t}
	t.Cleanup(func() { // before the memory goes
		if dev != nil {
			if err := dev.Close(); err != nil {
				t.Error("close:", err)
			}
		}
		for _, q := range d.queues {
			_ = q.Close()
		}
	})
	d.Activate(features)
	return d
}

// Activate lays out new rings and activates the device, which must be reset.
func (d *Driver) Activate(features uint64) {
	d.t.Helper()
	d.features = features
	d.next = [2]uint64{0x1000, 0}
	d.Rings = nil
	if d.Dev == nil {
		return
	}
	var queues []*virtio.Queue
	for i, size := range d.Dev.QueueSizes() {
		r := d.NewRing(i, size)
		d.Rings = append(d.Rings, r)
		queues = append(queues, r.Queue)
	}
	if err := d.Dev.Activate(virtio.Activation{
		Mem:           d.Mem,
		Features:      features,
		Queues:        queues,
		ConfigChanged: func() { d.Changes <- struct{}{} },
		Failed:        func(err error) { d.Failures <- err },
	}); err != nil {
		d.t.Fatal(err)
	}
}

// NewRing returns a started queue that no device serves yet.
func (d *Driver) NewRing(index int, size uint16) *Ring {
	d.t.Helper()
	q, err := virtio.NewQueue(uint16(index), size)
	if err != nil {
		d.t.Fatal(err)
	}
	d.queues = append(d.queues, q)
	r := &Ring{Queue: q, d: d, called: make(chan struct{}, 1), requests: make([]Request, size)}
	q.Desc, q.Avail, q.Used = d.Alloc(16*int(size)), d.Alloc(6+2*int(size)), d.Alloc(6+8*int(size))
	q.Enabled = true
	q.Interrupt = func() {
		select {
		case r.called <- struct{}{}:
		default:
		}
	}
	for i := range size {
		r.free = append(r.free, i)
	}
	if err := q.Start(d.Mem, d.features); err != nil {
		d.t.Fatal(err)
	}
	return r
}

// Alloc returns n zeroed bytes of guest memory aligned to 16, in either region by turns. It
// starts over when a region is used up.
func (d *Driver) Alloc(n int) uint64 {
	d.turn ^= 1
	if d.next[d.turn]+uint64(n) > regionSize {
		d.next[d.turn] = 1 << 20 // rings are below
	}
	gpa := d.next[d.turn] + uint64(d.turn)*HighBase
	d.next[d.turn] += uint64(n+15) &^ 15
	clear(d.Bytes(gpa, n))
	return gpa
}

// Bytes is a window of guest memory.
func (d *Driver) Bytes(gpa uint64, n int) []byte {
	b, err := d.Mem.Bytes(gpa, uint64(n))
	if err != nil {
		d.t.Helper()
		d.t.Fatal(err)
	}
	return b
}

// WaitFailure waits until the device asks for a reset.
func (d *Driver) WaitFailure() error {
	d.t.Helper()
	select {
	case err := <-d.Failures:
		return err
	case <-time.After(Patience):
		d.t.Fatal("the device did not ask for a reset")
		return nil
	}
}

// Ring is the driver's side of a queue.
type Ring struct {
	*virtio.Queue

	d        *Driver
	called   chan struct{}
	limit    *time.Timer
	free     []uint16
	requests []Request // by head
	avail    uint16
	kicked   uint16 // avail at the last Kick
	used     uint16
	kick     func() // nil: signal the queue's Kick
}

// Request is a chain that the driver made.
type Request struct {
	Head uint16
	In   [][]byte // windows of the device-writable buffers
	in   []guestmem.Range
	ids  []uint16
}

// Desc writes descriptor i.
func (r *Ring) Desc(i int, addr uint64, size uint32, flags, next uint16) {
	PutDesc(r.d.Bytes(r.Queue.Desc+16*uint64(i), 16), addr, size, flags, next)
}

// PutDesc writes a descriptor to b.
func PutDesc(b []byte, addr uint64, size uint32, flags, next uint16) {
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], size)
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// Offer makes the chain at head available, without a kick.
func (r *Ring) Offer(head uint16) {
	b := r.d.Bytes(r.Queue.Avail+4+2*uint64(r.avail%r.Size), 2)
	binary.LittleEndian.PutUint16(b, head)
	r.avail++
	_ = r.d.Mem.Store16(r.Queue.Avail+2, r.avail)
}

// Add makes a request of readable buffers with the contents of out and writable ones of the
// sizes in, and offers it.
func (r *Ring) Add(out [][]byte, in ...int) Request {
	n := len(out) + len(in)
	if n > len(r.free) {
		r.d.t.Fatalf("queue %d: no %d descriptors left", r.Index, n)
	}
	req := Request{ids: append([]uint16(nil), r.free[:n]...)}
	r.free = r.free[n:]
	for i, id := range req.ids {
		size, flags, next := 0, uint16(0), uint16(0)
		if i+1 < n {
			flags, next = 1, req.ids[i+1]
		}
		if i < len(out) {
			size = len(out[i])
		} else {
			size, flags = in[i-len(out)], flags|2
		}
		gpa := r.d.Alloc(size)
		if i < len(out) {
			copy(r.d.Bytes(gpa, size), out[i])
		} else {
			req.In = append(req.In, r.d.Bytes(gpa, size))
			req.in = append(req.in, guestmem.Range{Base: gpa, Size: uint64(size)})
		}
		r.Desc(int(id), gpa, uint32(size), flags, next)
	}
	req.Head = req.ids[0]
	r.requests[req.Head] = req
	r.Offer(req.Head)
	return req
}

// Kick notifies the device, unless it does not want to know.
func (r *Ring) Kick() {
	old := r.kicked
	r.kicked = r.avail
	if r.d.features&virtio.FeatureEventIdx != 0 {
		event, _ := r.d.Mem.Load16(r.Queue.Used + 4 + 8*uint64(r.Size))
		if r.avail-event-1 >= r.avail-old {
			return
		}
	} else if flags, _ := r.d.Mem.Load16(r.Queue.Used); flags&1 != 0 {
		return
	}
	if r.kick != nil {
		r.kick()
		return
	}
	r.Queue.Kick.Signal()
}

// Poll returns the next used request, if there is one.
func (r *Ring) Poll() (req Request, written int, ok bool) {
	if idx, _ := r.d.Mem.Load16(r.Queue.Used + 2); idx == r.used {
		return Request{}, 0, false
	}
	b := r.d.Bytes(r.Queue.Used+4+8*uint64(r.used%r.Size), 8)
	r.used++
	req = r.requests[binary.LittleEndian.Uint32(b)]
	r.free = append(r.free, req.ids...)
	return req, int(binary.LittleEndian.Uint32(b[4:])), true
}

// Wait waits for the next used request as a driver does: it asks for an interrupt, looks
// once more and sleeps.
func (r *Ring) Wait() (Request, int) {
	for {
		if req, n, ok := r.Poll(); ok {
			return req, n
		}
		_ = r.d.Mem.Store16(r.Queue.Avail+4+2*uint64(r.Size), r.used)
		if req, n, ok := r.Poll(); ok {
			return req, n
		}
		if r.limit == nil {
			r.limit = time.NewTimer(Patience)
		}
		r.limit.Reset(Patience) // one timer, for tests that count allocations
		select {
		case <-r.called:
		case err := <-r.d.Failures:
			r.d.t.Fatalf("queue %d: %v", r.Index, err)
		case <-r.limit.C:
			r.d.t.Fatalf("queue %d: no interrupt", r.Index)
		}
	}
}

// Do adds one request, kicks and waits for it. It returns what the device wrote.
func (r *Ring) Do(out [][]byte, in ...int) []byte {
	r.Add(out, in...)
	r.Kick()
	req, n := r.Wait()
	return req.Written(n)
}

// Written is the first n bytes of In.
func (q Request) Written(n int) (b []byte) {
	for _, w := range q.In {
		k := min(n, len(w))
		b, n = append(b, w[:k]...), n-k
	}
	return b
}
