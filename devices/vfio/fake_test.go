package vfio

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"

	"baton/devices"
	"baton/devices/pci"
)

// fakeHW is a device whose regions are bytes.
type fakeHW struct {
	mu       sync.Mutex
	regions  [regionConfig + 1][]byte
	areas    [regionConfig + 1][]devices.Range
	active   map[uint32][]int32
	log      []string // writes to configuration space, resets
	noFresh  bool
	noINTx   bool
	unmasked chan uint32
	mapped   int
	closed   bool
	failMmap error
	failIRQs error
}

func (h *fakeHW) region(i int) (region, error) {
	return region{uint64(len(h.regions[i])), h.areas[i]}, nil
}

func (h *fakeHW) read(i int, off uint64, p []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r := h.regions[i]; off < uint64(len(r)) && copy(p, r[off:]) == len(p) {
		return nil
	}
	return errors.New("beyond the region")
}

func (h *fakeHW) write(i int, off uint64, p []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r := h.regions[i]; off+uint64(len(p)) > uint64(len(r)) {
		return errors.New("beyond the region")
	}
	copy(h.regions[i][off:], p)
	h.log = append(h.log, fmt.Sprintf("%d:%#x=%x", i, off, p))
	return nil
}

func (h *fakeHW) mmap(i int, part devices.Range) ([]byte, error) {
	if h.failMmap != nil {
		return nil, h.failMmap
	}
	h.mapped++
	return h.regions[i][part.Base:part.End()], nil
}

func (h *fakeHW) munmap([]byte) error { h.mapped--; return nil }

func (h *fakeHW) setIRQs(index uint32, fds []int32) error {
	if h.failIRQs != nil {
		return h.failIRQs
	}
	h.active[index] = fds
	return nil
}

func (h *fakeHW) Host() string { return vf }
func (h *fakeHW) irqs(index uint32) (int, error) {
	if index == irqINTX && h.regions[regionConfig][pci.RegInterrupt+1] != 0 && !h.noINTx {
		return 1, nil
	}
	return 0, nil
}

func (h *fakeHW) unmask(index uint32) error { h.unmasked <- index; return nil }

func (h *fakeHW) fresh() bool  { return !h.noFresh }
func (h *fakeHW) reset() error { h.log = append(h.log, "reset"); return nil }
func (h *fakeHW) Close() error { h.closed = true; return nil }

// took returns what was logged since the last call.
func (h *fakeHW) took() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := fmt.Sprint(h.log)
	h.log = nil
	return s
}

func (h *fakeHW) put16(off int, v uint16) { le.PutUint16(h.regions[regionConfig][off:], v) }
func (h *fakeHW) put32(off int, v uint32) { le.PutUint32(h.regions[regionConfig][off:], v) }

// newHW returns a device with a chain of capabilities that is out of order, MSI-X in BAR 3
// and a 64-bit BAR 0, an I/O BAR 2, and extended capabilities of every way.
func newHW() *fakeHW {
	h := &fakeHW{active: map[uint32][]int32{}, unmasked: make(chan uint32, 1)}
	h.regions[0], h.regions[2] = make([]byte, 0x4000), make([]byte, 32)
	h.regions[3], h.regions[regionConfig] = make([]byte, 0x4000), make([]byte, pci.ConfigSize)
	h.areas[0] = []devices.Range{{Size: 0x4000}}
	h.areas[3] = []devices.Range{{Size: 0x4000}}
	h.regions[regionROM] = make([]byte, 0xc00)
	copy(h.regions[regionROM], []byte{0x55, 0xaa, 6})
	h.put32(0, 0x10ca_8086)
	h.put32(pci.RegClass, 0x020000_01)
	h.put16(pci.RegStatus, pci.StatusCapList)
	h.put16(pci.RegHeaderType, 0x80)
	h.put32(pci.RegBAR, pci.BAR64|pci.BARPrefetch)
	h.put32(pci.RegBAR+8, barIO)
	h.put32(pci.RegSubsystem, 0xa03c_8086)
	h.regions[regionConfig][0x3d] = 1 // INTA
	h.put16(pci.RegCapPointer, 0x40)
	copy(h.regions[regionConfig][0x40:], []byte{capPM, 0x70, 0x23, 0xff, 0x0b, 0x81, 0, 0})
	copy(h.regions[regionConfig][0x70:], []byte{capMSIX, 0xa0, 2, 0x80, 3, 0, 0, 0, 3, 0x20, 0, 0})
	copy(h.regions[regionConfig][0xa0:], []byte{capPCIe, 0x50, 0x02, 0, 0xc2, 0x8c, 0, 0x10})
	copy(h.regions[regionConfig][0x50:], []byte{capMSI, 0x90, 0x84, 1}) // 4 vectors, 64 bits, masks
	copy(h.regions[regionConfig][0x90:], []byte{capVendor, 0x9c, 8, 1, 2, 3, 4, 5})
	copy(h.regions[regionConfig][0x9c:], []byte{0x14, 0, 0, 0}) // enhanced allocation
	h.put32(0x100, 0x1401_0001)                                 // AER
	h.put32(0x140, 0x1501_0003)                                 // serial number
	h.put32(0x144, 0xddcc_bbaa)
	h.put32(0x150, 0x1a01_0010) // SR-IOV
	h.put32(0x1a0, 0x0001_000b) // vendor specific, 12 bytes
	h.put32(0x1a4, 0x00c1_0042)
	h.put32(0x1a8, 0x1234_5678)
	return h
}

type fakeVector struct {
	fd     int
	msg    devices.MSI
	masked bool
	waits  bool
	closed bool
	raised int
}

func (v *fakeVector) Set(m devices.MSI, masked bool) error { v.msg, v.masked = m, masked; return nil }
func (v *fakeVector) Pending() bool                        { return v.waits }
func (v *fakeVector) EventFD() int                         { return v.fd }
func (v *fakeVector) Signal()                              { v.raised++ }
func (v *fakeVector) Close() error                         { v.closed = true; return nil }

// fakeMachine is the rest of the machine.
type fakeMachine struct {
	vectors []*fakeVector
	limit   int // of vectors, 0: none
	slots   map[uint32]string
	next    uint32
	line    *fakeLine // nil: none
	log     bytes.Buffer
}

type fakeLine struct {
	m         *fakeMachine
	slot, pin int
	ended     func()
	levels    chan bool
}

func (l *fakeLine) SetLevel(high bool) { l.levels <- high }
func (l *fakeLine) Close()             { l.m.line = nil }

func (m *fakeMachine) INTx(slot, pin int, ended func()) Line {
	m.line = &fakeLine{m, slot, pin, ended, make(chan bool, 1)}
	return m.line
}

func (m *fakeMachine) NewVector() (devices.Vector, error) {
	if m.limit != 0 && len(m.vectors) == m.limit {
		return nil, errors.New("out of vectors")
	}
	v := &fakeVector{fd: 100 + len(m.vectors), masked: true}
	m.vectors = append(m.vectors, v)
	return v, nil
}

func (m *fakeMachine) Map(gpa uint64, host []byte) (uint32, error) {
	m.next++
	m.slots[m.next] = fmt.Sprintf("%#x+%#x", gpa, len(host))
	return m.next, nil
}

func (m *fakeMachine) Unmap(slot uint32) error {
	if m.slots[slot] == "" {
		return errors.New("no such slot")
	}
	delete(m.slots, slot)
	return nil
}

func newMachine() *fakeMachine { return &fakeMachine{slots: map[uint32]string{}} }

func (m *fakeMachine) options() Options {
	return Options{ID: "dev", Slots: m, Vectors: m, INTx: m.INTx, ROM: true, Log: slog.New(slog.NewTextHandler(&m.log, nil))}
}

// start makes a function behind a root port, with its resources assigned.
func start(t *testing.T, h *fakeHW) (*Function, *fakeMachine, *pci.RootComplex) {
	t.Helper()
	m := newMachine()
	f, err := newFunction(h, m.options())
	if err != nil {
		t.Fatal(err)
	}
	rc := pci.NewRootComplex(devices.NewBus(), pci.Layout{
		ECAM:   devices.Range{Base: 0xb000_0000, Size: 256 << 20},
		MMIO32: devices.Range{Base: 0xc000_0000, Size: 0x1000_0000},
		MMIO64: devices.Range{Base: 1 << 32, Size: 1 << 36},
	}, nil)
	port, err := pci.NewRootPort(pci.RootPortConfig{ID: "r", Chassis: 1, Vectors: newMachine()})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(rc.Root().Add(-1, -1, port), port.Secondary().Add(-1, -1, f), rc.Assign()); err != nil {
		t.Fatal(err)
	}
	return f, m, rc
}
