package virtio_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"baton/devices"
	"baton/devices/pci"
	"baton/devices/virtio"
	"baton/kvm/guestmem"
	"baton/tests/virtiotest"
)

// The machine around the function under test.
const (
	ecam       = 0xb0000000
	capPCIe    = 0x10
	capMSIX    = 0x11
	capVendor  = 0x09
	notifyBase = 0x3000
)

// guest is a driver that reaches the device through configuration space and BAR only.
type guest struct {
	t     testing.TB
	mmio  *devices.Bus
	mem   *guestmem.Memory
	dev   *model
	pci   *virtio.PCI
	cfg   uint64 // address of its configuration space
	bar   uint64
	vecs  *vectors
	bells *doorbells
	log   *bytes.Buffer
}

// model is a device that records what it is told and returns each chain at once.
type model struct {
	features uint64
	sizes    []uint16

	mu       sync.Mutex
	config   [64]byte
	a        *virtio.Activation
	workers  []*virtio.Worker
	resets   int
	fail     error
	noWorker bool
	closed   bool
}

func (m *model) Type() uint32         { return virtio.TypeBlock }
func (m *model) Features() uint64     { return m.features }
func (m *model) QueueSizes() []uint16 { return m.sizes }
func (m *model) ReadConfig(off uint64, p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	virtio.CopyConfig(p, m.config[:], off)
}
func (m *model) Activate(a virtio.Activation) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.a = &a
	if m.fail != nil {
		return m.fail
	}
	for _, q := range a.Queues {
		if q.Enabled && !m.noWorker {
			m.workers = append(m.workers, q.Go(a.Failed, func(w *virtio.Worker) {
				for c := w.Next(); c != nil; c = w.Next() {
					q.Push(c, 0)
				}
			}))
		}
	}
	return nil
}
func (m *model) Reset() {
	for _, w := range m.workers {
		w.Stop()
	}
	m.workers, m.a = nil, nil
	m.resets++
}
func (m *model) Pause() {
	for _, w := range m.workers {
		w.Stop()
	}
	m.workers = nil
}
func (m *model) Resume(a virtio.Activation) error { return m.Activate(a) }
func (m *model) SaveState() ([]byte, error)       { return devices.EncodeState(m.config) }
func (m *model) LoadState(info devices.StateInfo, version uint16, data []byte) error {
	return devices.DecodeState(info, version, data, &m.config, nil)
}
func (m *model) Close() error { m.Reset(); m.closed = true; return nil }

type vectors struct {
	all []*vector
	max int
}

type vector struct {
	mu      sync.Mutex
	msg     devices.MSI
	masked  bool
	pending bool
	fired   chan devices.MSI
	closed  bool
}

func (v *vectors) NewVector() (devices.Vector, error) {
	if v.max > 0 && len(v.all) >= v.max {
		return nil, errors.New("no interrupt routes left")
	}
	n := &vector{masked: true, fired: make(chan devices.MSI, 1000)}
	v.all = append(v.all, n)
	return n, nil
}
func (v *vector) Set(m devices.MSI, masked bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.msg, v.masked = m, masked
	if !masked && v.pending {
		v.pending = false
		v.fired <- m
	}
	return nil
}
func (v *vector) Pending() bool { v.mu.Lock(); defer v.mu.Unlock(); return v.pending }
func (v *vector) EventFD() int  { return -1 }
func (v *vector) Signal() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.masked {
		v.pending = true
	} else {
		v.fired <- v.msg
	}
}
func (v *vector) Close() error { v.closed = true; return nil }

type doorbells struct {
	mu    sync.Mutex
	fds   map[uint64]int
	limit int
}

func (d *doorbells) AddDoorbell(addr uint64, size, fd int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if size != 0 || len(d.fds) >= d.limit {
		return fmt.Errorf("doorbell %#x: no space", addr)
	}
	if _, ok := d.fds[addr]; ok {
		return fmt.Errorf("doorbell %#x: exists", addr)
	}
	d.fds[addr] = fd
	return nil
}
func (d *doorbells) RemoveDoorbell(addr uint64, size, fd int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fds[addr] != fd {
		return fmt.Errorf("doorbell %#x: not there", addr)
	}
	delete(d.fds, addr)
	return nil
}
func (d *doorbells) addrs() (a []uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for addr := range d.fds {
		a = append(a, addr)
	}
	slices.Sort(a)
	return a
}

func newGuest(t testing.TB, dev *model) *guest {
	t.Helper()
	g := &guest{
		t: t, mmio: devices.NewBus(), mem: virtiotest.Memory(t), dev: dev,
		vecs: &vectors{}, bells: &doorbells{fds: map[uint64]int{}, limit: 100}, log: new(bytes.Buffer),
	}
	var err error
	g.pci, err = virtio.NewPCI(dev, virtio.PCIOptions{
		ID: "disk0", Mem: g.mem, Vectors: g.vecs, Doorbells: g.bells, Log: slog.New(slog.NewTextHandler(g.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.pci.Close(); err != nil {
			t.Error(err)
		}
		for i, v := range g.vecs.all {
			if !v.closed {
				t.Errorf("vector %d is not closed", i)
			}
		}
		if !dev.closed || len(g.bells.fds) != 0 {
			t.Errorf("device closed %v, doorbells left %v", dev.closed, g.bells.fds)
		}
	})
	rc := pci.NewRootComplex(g.mmio, pci.Layout{
		ECAM:   devices.Range{Base: ecam, Size: 1 << 20},
		MMIO32: devices.Range{Base: 0xc0000000, Size: 0x10000000},
		MMIO64: devices.Range{Base: 1 << 36, Size: 1 << 34},
	}, slog.New(slog.DiscardHandler))
	if err := g.mmio.Insert(devices.Range{Base: ecam, Size: 1 << 20}, "ecam", rc); err != nil {
		t.Fatal(err)
	}
	if err := rc.Root().Add(3, 0, g.pci); err != nil {
		t.Fatal(err)
	}
	if err := rc.Assign(); err != nil {
		t.Fatal(err)
	}
	g.cfg = ecam + uint64(pci.NewBDF(0, 3, 0))<<12
	g.write(g.cfg+4, 2, 6) // memory space, bus master
	g.bar = g.read(g.cfg+0x10, 4)&^0xf | g.read(g.cfg+0x14, 4)<<32
	return g
}

func (g *guest) read(addr uint64, n int) uint64 {
	var b [8]byte
	g.mmio.Read(addr, b[:n])
	return binary.LittleEndian.Uint64(b[:])
}

func (g *guest) write(addr uint64, n int, v uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	g.mmio.Write(addr, b[:n])
}

// Registers of the common configuration, at the start of the BAR.
func (g *guest) status() uint64     { return g.read(g.bar+0x14, 1) }
func (g *guest) setStatus(v uint64) { g.write(g.bar+0x14, 1, v) }

func (g *guest) negotiate(features uint64) (ok bool) {
	g.setStatus(1)
	g.setStatus(1 | 2)
	for i := range uint64(2) {
		g.write(g.bar+8, 4, i)
		g.write(g.bar+0xc, 4, features>>(32*i)&0xffffffff)
	}
	g.setStatus(1 | 2 | 8)
	return g.status()&8 != 0
}

// setQueue sets queue i up at addr with the vector.
func (g *guest) setQueue(i, size, vector int, addr uint64) {
	g.write(g.bar+0x16, 2, uint64(i))
	g.write(g.bar+0x18, 2, uint64(size))
	g.write(g.bar+0x1a, 2, uint64(vector))
	for j, a := range []uint64{addr, addr + 0x1000, addr + 0x2000} {
		g.write(g.bar+0x20+8*uint64(j), 4, a&0xffffffff)
		g.write(g.bar+0x24+8*uint64(j), 4, a>>32)
	}
	g.write(g.bar+0x1c, 2, 1)
}

// enableMSIX unmasks all vectors, vector i with data i.
func (g *guest) enableMSIX() {
	for i := range uint64(len(g.vecs.all)) {
		e := g.bar + 0x4000 + 16*i
		g.write(e, 4, 0xfee00000)
		g.write(e+8, 4, 0x40+i)
		g.write(e+12, 4, 0)
	}
	off := g.capability(capMSIX)
	g.write(g.cfg+off+2, 2, 0x8000)
}

func (g *guest) capabilities() (caps [][2]uint64) { // offset, id
	for off := g.read(g.cfg+0x34, 1); off != 0; off = g.read(g.cfg+off+1, 1) {
		caps = append(caps, [2]uint64{off, g.read(g.cfg+off, 1)})
	}
	return caps
}

func (g *guest) capability(id uint64) uint64 {
	for _, c := range g.capabilities() {
		if c[1] == id {
			return c[0]
		}
	}
	g.t.Fatalf("no capability %#x", id)
	return 0
}

// offer makes one descriptor available on the queue at addr.
func (g *guest) offer(addr uint64, n uint16) {
	b, err := g.mem.Bytes(addr, 16)
	if err != nil {
		g.t.Fatal(err)
	}
	virtiotest.PutDesc(b, 0x800000, 64, 0, 0)
	_ = g.mem.Store16(addr+0x1000+2, n)
}

func (g *guest) waitVector(i int) devices.MSI {
	g.t.Helper()
	select {
	case m := <-g.vecs.all[i].fired:
		return m
	case <-time.After(virtiotest.Patience):
		g.t.Fatalf("vector %d did not fire; log: %s", i, g.log)
		return devices.MSI{}
	}
}

func newModel() *model {
	return &model{features: virtio.CoreFeatures | 0x25, sizes: []uint16{256, 64}}
}

func TestPCIIdentity(t *testing.T) {
	g := newGuest(t, newModel())
	for _, r := range []struct {
		off  uint64
		n    int
		want uint64
	}{{0, 4, 0x1042_1af4}, {8, 4, 0x01000001}, {0x2c, 4, 0x1100_1af4}, {0x0e, 1, 0}} {
		if got := g.read(g.cfg+r.off, r.n); got != r.want {
			t.Errorf("configuration %#x: %#x, want %#x", r.off, got, r.want)
		}
	}
	size := uint64(0x8000)
	want := map[uint64][3]uint64{ // by type: BAR, offset, length
		1: {0, 0, 0x38},
		2: {0, notifyBase, 8},
		3: {0, 0x1000, 1},
		4: {0, 0x2000, 0x1000},
		5: {0, 0, 0},
	}
	var ids []uint64
	for _, c := range g.capabilities() {
		ids = append(ids, c[1])
		if c[1] != capVendor {
			continue
		}
		a := g.cfg + c[0]
		typ := g.read(a+3, 1)
		got := [3]uint64{g.read(a+4, 1), g.read(a+8, 4), g.read(a+12, 4)}
		if got != want[typ] {
			t.Errorf("structure %d: %#x, want %#x", typ, got, want[typ])
		}
		wantLen := uint64(16)
		if typ == 2 || typ == 5 {
			wantLen = 20
		}
		if n := g.read(a+2, 1); n != wantLen || got[1]+got[2] > size {
			t.Errorf("structure %d: cap_len %d", typ, n)
		}
		if typ == 2 && g.read(a+16, 4) != 4 {
			t.Errorf("notify_off_multiplier %d", g.read(a+16, 4))
		}
		delete(want, typ)
	}
	if len(want) != 0 || !slices.Contains(ids, capPCIe) || !slices.Contains(ids, capMSIX) {
		t.Errorf("capabilities %#x, structures missing: %v", ids, want)
	}
	if g.bar < 1<<36 {
		t.Errorf("BAR at %#x, not in the 64-bit window", g.bar)
	}
}

// TestPCIDriver goes through the initialisation of 3.1.1 and 4.1.5, exchanges buffers and
// resets, several times.
func TestPCIDriver(t *testing.T) {
	g := newGuest(t, newModel())
	for round := range 3 {
		if g.status() != 0 || g.dev.a != nil {
			t.Fatalf("round %d: status %#x", round, g.status())
		}
		g.write(g.bar, 4, 0)
		low := g.read(g.bar+4, 4)
		g.write(g.bar, 4, 1)
		if f := low | g.read(g.bar+4, 4)<<32; f != g.dev.features {
			t.Fatalf("offered features %#x", f)
		}
		g.write(g.bar, 4, 2)
		if f := g.read(g.bar+4, 4); f != 0 {
			t.Errorf("features beyond 64: %#x", f)
		}
		if !g.negotiate(virtio.CoreFeatures | 1) {
			t.Fatal("FEATURES_OK refused")
		}
		if n := g.read(g.bar+0x12, 2); n != 2 {
			t.Errorf("%d queues", n)
		}
		g.enableMSIX()
		g.write(g.bar+0x10, 2, 0)
		g.setQueue(0, 128, 1, 0x10000)
		g.setQueue(1, 64, 2, virtiotest.HighBase)
		if g.dev.a != nil || len(g.bells.addrs()) != 0 {
			t.Error("active before DRIVER_OK")
		}
		g.setStatus(15)
		if g.status() != 15 || g.dev.a == nil {
			t.Fatalf("status %#x after DRIVER_OK; log: %s", g.status(), g.log)
		}
		a := *g.dev.a
		if a.Features != virtio.CoreFeatures|1 || a.Mem != g.mem || len(a.Queues) != 2 {
			t.Errorf("activation %+v", a)
		}
		if q := a.Queues[1]; q.Size != 64 || q.Desc != virtiotest.HighBase || q.Avail != q.Desc+0x1000 || q.Used != q.Desc+0x2000 {
			t.Errorf("queue 1: %+v", q)
		}
		if a.Queues[0].Call != devices.Vector(g.vecs.all[1]) {
			t.Error("queue 0 has not got vector 1")
		}
		if want := []uint64{g.bar + notifyBase, g.bar + notifyBase + 4}; !slices.Equal(g.bells.addrs(), want) {
			t.Errorf("doorbells at %#x, want %#x", g.bells.addrs(), want)
		}
		g.offer(0x10000, 1)
		g.write(g.bar+notifyBase, 2, 0) // what the kernel would do with a doorbell
		if m := g.waitVector(1); m.Data != 0x41 {
			t.Errorf("message %+v", m)
		}
		g.offer(virtiotest.HighBase, 1)
		g.write(g.bar+notifyBase+4, 2, 1)
		g.waitVector(2)
		gen := g.read(g.bar+0x15, 1)
		a.ConfigChanged()
		g.waitVector(0)
		if g.read(g.bar+0x15, 1) == gen {
			t.Error("the generation did not change")
		}
		if g.read(g.bar+0x1000, 1) != 0 {
			t.Error("ISR bits though MSI-X is on")
		}
		// The rings of an active device are fixed.
		g.write(g.bar+0x16, 2, 0)
		g.write(g.bar+0x18, 2, 16)
		g.write(g.bar+0x20, 4, 0x5000)
		g.write(g.bar+0x1c, 2, 0)
		if q := a.Queues[0]; q.Size != 128 || q.Desc != 0x10000 || !q.Enabled {
			t.Errorf("changed while active: %+v", q)
		}
		g.setStatus(0)
		if g.status() != 0 || g.dev.a != nil || len(g.bells.addrs()) != 0 {
			t.Errorf("after reset: status %#x, doorbells %v", g.status(), g.bells.addrs())
		}
		g.write(g.bar+0x16, 2, 0)
		if s, v, e := g.read(g.bar+0x18, 2), g.read(g.bar+0x1a, 2), g.read(g.bar+0x1c, 2); s != 256 || v != 0xffff || e != 0 {
			t.Errorf("queue 0 after reset: size %d, vector %#x, enabled %d", s, v, e)
		}
		g.setStatus(0)
		for _, addr := range []uint64{0x10000, virtiotest.HighBase} {
			for _, o := range []uint64{0x1000, 0x2000} {
				_, _ = g.mem.WriteAt(make([]byte, 4), int64(addr+o))
			}
		}
	}
}

func TestPCIFeatures(t *testing.T) {
	for _, tt := range []struct {
		features uint64
		ok       bool
	}{
		{virtio.FeatureVersion1, true},
		{virtio.CoreFeatures | 0x25, true},
		{virtio.FeatureEventIdx, false}, // a legacy driver
		{0, false},
		{virtio.FeatureVersion1 | 2, false},
		{virtio.FeatureVersion1 | 1<<63, false},
	} {
		g := newGuest(t, newModel())
		if ok := g.negotiate(tt.features); ok != tt.ok {
			t.Errorf("%#x: FEATURES_OK %v", tt.features, ok)
		}
		if !tt.ok {
			g.setStatus(15)
			if g.dev.a != nil || g.status()&0x40 == 0 {
				t.Errorf("%#x: status %#x, active %v", tt.features, g.status(), g.dev.a != nil)
			}
			continue
		}
		g.write(g.bar+0xc, 4, 0) // too late
		g.setStatus(15)
		if g.dev.a == nil || g.dev.a.Features != tt.features {
			t.Errorf("%#x: %+v", tt.features, g.dev.a)
		}
	}
}

func TestPCIQueueRegisters(t *testing.T) {
	g := newGuest(t, newModel())
	set := func(off, v, want uint64) {
		t.Helper()
		g.write(g.bar+off, 2, v)
		if got := g.read(g.bar+off, 2); got != want {
			t.Errorf("register %#x reads %#x after %#x, want %#x", off, got, v, want)
		}
	}
	g.write(g.bar+0x16, 2, 1)
	set(0x18, 32, 32)
	set(0x18, 33, 32)
	set(0x18, 0, 32)
	set(0x18, 128, 32) // more than its maximum
	set(0x1a, 2, 2)
	set(0x1a, 3, 0xffff) // there are vectors 0 to 2
	set(0x10, 0, 0)
	set(0x10, 0xfffe, 0xffff)
	set(0x1c, 2, 0)
	set(0x1e, 7, 1)   // queue_notify_off is read-only
	set(0x12, 9, 2)   // so is num_queues
	set(0x16, 77, 77) // no such queue:
	set(0x18, 8, 0)   // it has no size
	set(0x1a, 1, 0xffff)
	set(0x1c, 1, 0)
	for off := uint64(0x20); off < 0x38; off += 4 {
		g.write(g.bar+off, 4, 0x11)
		if v := g.read(g.bar+off, 4); v != 0 {
			t.Errorf("register %#x of no queue reads %#x", off, v)
		}
	}
	g.write(g.bar+0x16, 2, 0)
	for off := uint64(0x20); off < 0x38; off += 4 {
		g.write(g.bar+off, 4, 0x01020304*(off+1))
	}
	for off := uint64(0x20); off < 0x38; off += 4 {
		if v := g.read(g.bar+off, 4); v != 0x01020304*(off+1)&0xffffffff {
			t.Errorf("register %#x reads %#x", off, v)
		}
	}
}

// TestPCIFailures: whatever goes wrong ends in DEVICE_NEEDS_RESET, and a reset cures it.
func TestPCIFailures(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		prepare    func(g *guest)
		act        func(g *guest)
	}{
		{"queue outside of RAM", "outside of RAM", func(g *guest) { g.setQueue(0, 8, 1, 0xc0000000) }, nil},
		{"misaligned", "not aligned", func(g *guest) { g.setQueue(0, 8, 1, 0x10008) }, nil},
		{"device refuses", "no backend", func(g *guest) { g.dev.fail = errors.New("no backend") }, nil},
		{"malformed ring", "jumps by 500", func(g *guest) { g.setQueue(0, 8, 1, 0x10000) }, func(g *guest) {
			_ = g.mem.Store16(0x11002, 500)
			g.write(g.bar+notifyBase, 2, 0)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGuest(t, newModel())
			g.enableMSIX()
			g.negotiate(virtio.CoreFeatures)
			g.write(g.bar+0x10, 2, 0)
			tt.prepare(g)
			g.setStatus(15)
			if tt.act != nil {
				tt.act(g)
			}
			g.waitVector(0)
			if g.status() != 15|0x40 {
				t.Errorf("status %#x", g.status())
			}
			if !strings.Contains(g.log.String(), tt.want) || !strings.Contains(g.log.String(), "disk0") {
				t.Errorf("log %q, want %q", g.log, tt.want)
			}
			g.setStatus(15) // does not make it better
			if g.status() != 15|0x40 {
				t.Errorf("status %#x after another DRIVER_OK", g.status())
			}
			g.dev.fail = nil
			g.setStatus(0)
			_ = g.mem.Store16(0x11002, 0)
			g.negotiate(virtio.CoreFeatures)
			g.setQueue(0, 8, 1, 0x10000)
			g.setStatus(15)
			if g.status() != 15 {
				t.Errorf("status %#x after the reset", g.status())
			}
		})
	}
}

func TestPCIWithoutMSIX(t *testing.T) {
	g := newGuest(t, newModel())
	g.negotiate(virtio.FeatureVersion1)
	g.dev.noWorker = true
	g.setQueue(0, 8, 0xffff, 0x10000)
	g.setStatus(15)
	if g.dev.a.Queues[0].Call != nil {
		t.Error("a vector that the driver did not give")
	}
	g.dev.a.Queues[0].Interrupt()
	g.dev.a.ConfigChanged()
	if v := g.read(g.bar+0x1000, 2); v != 0xffff {
		t.Errorf("ISR read in two bytes: %#x", v)
	}
	if v := g.read(g.bar+0x1000, 1); v != 3 {
		t.Errorf("ISR %#x, want 3", v)
	}
	if v := g.read(g.bar+0x1000, 1); v != 0 {
		t.Errorf("ISR %#x after it was read", v)
	}
}

func TestPCIDoorbellsFollowTheBAR(t *testing.T) {
	g := newGuest(t, newModel())
	g.negotiate(virtio.FeatureVersion1)
	g.setQueue(1, 8, 1, 0x10000)
	g.setStatus(15)
	at := func(want ...uint64) {
		t.Helper()
		if got := g.bells.addrs(); !slices.Equal(got, want) {
			t.Errorf("doorbells at %#x, want %#x", got, want)
		}
	}
	at(g.bar + notifyBase + 4)
	g.write(g.cfg+4, 2, 4) // memory space off
	at()
	g.write(g.cfg+0x10, 4, 0xc0000000)
	g.write(g.cfg+0x14, 4, 0)
	g.write(g.cfg+4, 2, 6)
	at(0xc0000000 + notifyBase + 4)
	g.bar = 0xc0000000
	g.write(g.cfg+0x14, 4, 0x10) // moves at once
	at(0x10_c0000000 + notifyBase + 4)
	g.bar = 0x10_c0000000
	if g.status() != 15 {
		t.Errorf("status %#x at the new place", g.status())
	}
	g.setStatus(0)
	at()

	g.bells.limit = 0 // the kernel has no more
	g.negotiate(virtio.FeatureVersion1)
	g.setQueue(0, 8, 1, 0x10000)
	g.enableMSIX()
	g.setStatus(15)
	g.offer(0x10000, 1)
	g.write(g.bar+notifyBase, 2, 0)
	g.waitVector(1)
}

func TestPCIFunctionLevelReset(t *testing.T) {
	g := newGuest(t, newModel())
	g.negotiate(virtio.FeatureVersion1)
	g.setQueue(0, 8, 1, 0x10000)
	g.setStatus(15)
	ctl := g.cfg + g.capability(capPCIe) + 8
	g.write(ctl, 2, g.read(ctl, 2)|0x8000)
	if g.dev.a != nil || len(g.bells.addrs()) != 0 || g.read(g.cfg+4, 2)&2 != 0 {
		t.Errorf("after FLR: %+v, doorbells %v", g.dev.a, g.bells.addrs())
	}
}

// TestPCIConfigAccess uses the BAR through configuration space: 4.1.4.9.
func TestPCIConfigAccess(t *testing.T) {
	g := newGuest(t, newModel())
	var off uint64
	for _, c := range g.capabilities() {
		if c[1] == capVendor && g.read(g.cfg+c[0]+3, 1) == 5 {
			off = g.cfg + c[0]
		}
	}
	at := func(bar, offset, length uint64) {
		g.write(off+4, 1, bar)
		g.write(off+8, 4, offset)
		g.write(off+12, 4, length)
	}
	g.write(g.cfg+4, 2, 0) // does not need memory space
	at(0, 0x14, 1)
	g.write(off+16, 1, 3)
	if v := g.pci.Config().Uint32(int(off + 16 - g.cfg)); v&0xff != 3 {
		t.Errorf("data %#x", v)
	}
	if v := g.read(off+16, 1); v != 3 {
		t.Errorf("status %#x", v)
	}
	binary.LittleEndian.PutUint32(g.dev.config[4:], 0xcafe0001)
	at(0, 0x2004, 4)
	g.write(off+16, 4, 0) // is not the driver's to write
	if v := g.read(off+16, 4); v != 0xcafe0001 {
		t.Errorf("device configuration %#x", v)
	}
	for _, bad := range [][3]uint64{{1, 0, 1}, {0, 2, 4}, {0, 0, 3}, {0, 0, 0}, {0, 0x8000, 4}, {0, 0xfffffffc, 4}, {0, 0, 8}} {
		at(bad[0], bad[1], bad[2])
		g.write(off+16, 4, 0)
		_ = g.read(off+16, 4)
	}
	if g.status() != 0xff { // memory space is off
		t.Errorf("status %#x", g.status())
	}
	g.write(g.cfg+4, 2, 2)
	if g.status() != 3 {
		t.Errorf("status %#x: a bad access went through", g.status())
	}
}

// TestPCIOddAccess touches every register in every width that it does not have.
func TestPCIOddAccess(t *testing.T) {
	g := newGuest(t, newModel())
	widths := map[uint64]int{0x14: 1, 0x15: 1}
	for off := uint64(0); off < 0x10; off += 4 {
		widths[off] = 4
	}
	for off := uint64(0x10); off < 0x20; off += 2 {
		if off != 0x14 {
			widths[off] = 2
		}
	}
	for off := uint64(0x20); off < 0x38; off += 4 {
		widths[off] = 4
	}
	all := func() (b []byte) {
		for off := uint64(0); off < 0x38; off++ {
			if n := widths[off]; n != 0 {
				b = append(b, bytes.Repeat([]byte{0}, n)...)
				g.mmio.Read(g.bar+off, b[len(b)-n:])
			}
		}
		return b
	}
	before := all()
	for off := uint64(0); off < 0x60; off++ {
		for n := range 17 {
			if widths[off] == n {
				continue
			}
			p := bytes.Repeat([]byte{1}, n)
			g.mmio.Write(g.bar+off, p)
			g.mmio.Read(g.bar+off, p)
			if !bytes.Equal(p, bytes.Repeat([]byte{0xff}, n)) {
				t.Errorf("%d bytes at %#x: % x", n, off, p)
			}
		}
	}
	if after := all(); !bytes.Equal(before, after) {
		t.Errorf("registers changed:\n% x\n% x", before, after)
	}
	for _, off := range []uint64{0xffe, 0x1001, 0x2ffd, 0x3001, 0x3008, 0x3fff, 0x402f, 0x7ffc} {
		for _, n := range []int{1, 2, 3, 4, 7, 8} {
			p := make([]byte, n)
			g.mmio.Write(g.bar+off, p)
			g.mmio.Read(g.bar+off, p)
		}
	}
}

func TestPCIOutOfVectors(t *testing.T) {
	dev := newModel()
	v := &vectors{max: 2}
	p, err := virtio.NewPCI(dev, virtio.PCIOptions{ID: "disk0", Vectors: v})
	if err == nil || p != nil || !strings.Contains(err.Error(), "disk0") || !strings.Contains(err.Error(), "no interrupt routes left") {
		t.Errorf("%v, %v", p, err)
	}
	for i, v := range v.all {
		if !v.closed {
			t.Errorf("vector %d is not closed", i)
		}
	}
	if dev.closed {
		t.Error("the device was closed, but it is still the caller's")
	}
}

// FuzzPCI takes bytes as accesses of a guest to the BAR and the configuration space.
func FuzzPCI(f *testing.F) {
	f.Add([]byte{0x14, 0, 1, 15, 0x14, 0, 1, 0})
	f.Add([]byte{0x0c, 0, 4, 0x25, 0x08, 0, 4, 1, 0x0c, 0, 4, 1, 0x14, 0, 1, 8, 0x1c, 0, 2, 1, 0x14, 0, 1, 15, 0, 0x30, 2, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		g := newGuest(t, newModel())
		for ; len(ops) >= 4; ops = ops[4:] {
			off, n := uint64(ops[0])|uint64(ops[1]&0x7f)<<8, int(ops[2]&31)
			base := g.bar
			if ops[1]&0x80 != 0 {
				base, off = g.cfg, off&0xfff
			}
			p := bytes.Repeat([]byte{ops[3]}, n)
			if ops[2]&0x20 == 0 && n > 0 {
				clear(p[1:])
			}
			if ops[2]&0x80 == 0 {
				g.mmio.Write(base+off, p)
			} else {
				g.mmio.Read(base+off, p)
			}
		}
		g.pci.Reset()
		g.pci.Reset()
		g.pci.Config().Reset()
		g.write(g.cfg+4, 2, 2)
		g.bar = g.read(g.cfg+0x10, 4)&^0xf | g.read(g.cfg+0x14, 4)<<32
		if g.dev.a != nil {
			t.Fatal("active after a reset")
		}
	})
}
