package pci

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"baton/devices"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// testLayout is that of the machine.
var testLayout = Layout{
	ECAM:   devices.Range{Base: 0xb000_0000, Size: 256 * mib},
	MMIO32: devices.Range{Base: 0xc000_0000, Size: 0x3ec0_0000},
	MMIO64: devices.Range{Base: 4 * gib, Size: 64 * gib},
}

// fakeVector records what it was told.
type fakeVector struct {
	mu      sync.Mutex
	msg     devices.MSI
	masked  bool
	sets    int
	waiting bool
	raised  int
	closed  bool
	fail    error
}

func (v *fakeVector) Set(m devices.MSI, masked bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.msg, v.masked = m, masked
	v.sets++
	if !masked && v.waiting {
		v.waiting = false
		v.raised++
	}
	return v.fail
}

func (v *fakeVector) Signal() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.masked {
		v.waiting = true
	} else {
		v.raised++
	}
}

func (v *fakeVector) Pending() bool { v.mu.Lock(); defer v.mu.Unlock(); return v.waiting }
func (v *fakeVector) EventFD() int  { return -1 }
func (v *fakeVector) Close() error  { v.closed = true; return nil }

// fakeSource hands out at most limit vectors (0: any number).
type fakeSource struct {
	limit   int
	vectors []*fakeVector
}

var errNoVectors = errors.New("out of vectors")

func (s *fakeSource) NewVector() (devices.Vector, error) {
	if s.limit != 0 && len(s.vectors) == s.limit {
		return nil, errNoVectors
	}
	v := &fakeVector{masked: true}
	s.vectors = append(s.vectors, v)
	return v, nil
}

// fakeFunction is an endpoint whose BARs answer with its marker.
type fakeFunction struct {
	c      *Config
	msix   *MSIX
	mu     sync.Mutex
	resets int
	mapped map[uint64]string // what BAR.Mapped said is mapped where
}

func (f *fakeFunction) Config() *Config { return f.c }
func (f *fakeFunction) Reset()          { f.mu.Lock(); f.resets++; f.mu.Unlock() }
func (f *fakeFunction) Close() error    { return f.msix.Close() }

type marker byte

func (m marker) Read(_ uint64, p []byte) {
	for i := range p {
		p[i] = byte(m)
	}
}
func (marker) Write(uint64, []byte) {}

// newFunction returns an endpoint with a 32-bit BAR 0 of 4 KiB for MSI-X with three
// vectors, and as BAR 4 a 64-bit prefetchable one of the given size, if not 0.
func newFunction(t testing.TB, id string, size uint64) *fakeFunction {
	t.Helper()
	return newFunctionHeader(t, Header{ID: id}, size)
}

func newFunctionHeader(t testing.TB, h Header, size uint64) *fakeFunction {
	t.Helper()
	h.Vendor, h.Device, h.Class, h.Revision, h.SubVendor, h.SubDevice = 0x1af4, 0x1041, 0x020000, 1, 0x1af4, 0x1100
	f := &fakeFunction{c: NewConfig(h), mapped: make(map[uint64]string)}
	f.c.AddPCIeCapability(TypeEndpoint)
	var err error
	if f.msix, err = AddMSIX(f.c, 0, 0, 2*kib, 3, &fakeSource{}); err != nil {
		t.Fatal(err)
	}
	f.setBAR(t, 0, BAR{Size: 4 * kib, Device: f.msix})
	if size != 0 {
		f.setBAR(t, 4, BAR{Size: size, Is64: true, Prefetchable: true, Device: marker(0x44)})
	}
	return f
}

// setBAR defines a BAR whose mapping is kept in f.mapped.
func (f *fakeFunction) setBAR(t testing.TB, i int, b BAR) {
	t.Helper()
	name := fmt.Sprintf("%s BAR %d", f.c.ID(), i)
	b.Mapped = func(base uint64, on bool) {
		f.mu.Lock()
		defer f.mu.Unlock()
		switch was := f.mapped[base]; {
		case on && was == "":
			f.mapped[base] = name
		case !on && was == name:
			delete(f.mapped, base)
		default:
			t.Errorf("Mapped(%#x, %v) for %s while %q is there", base, on, name, was)
		}
	}
	if err := f.c.SetBAR(i, b); err != nil {
		t.Fatal(err)
	}
}

// machine is a root complex on a memory bus, seen from the guest.
type machine struct {
	*RootComplex
	mmio *devices.Bus
	logs *strings.Builder
}

func newMachine(t testing.TB, l Layout) *machine {
	t.Helper()
	logs := new(strings.Builder)
	mmio := devices.NewBus()
	rc := NewRootComplex(mmio, l, slog.New(slog.NewTextHandler(io.Writer(logs), nil)))
	if err := mmio.Insert(l.ECAM, "ECAM", rc); err != nil {
		t.Fatal(err)
	}
	return &machine{rc, mmio, logs}
}

// add adds f to b and fails the test if that is not possible.
func add(t testing.TB, b *Bus, slot, fn int, f Function) {
	t.Helper()
	if err := b.Add(slot, fn, f); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) addPort(t testing.TB, slot, fn int, cfg RootPortConfig) *RootPort {
	t.Helper()
	cfg.Vectors = &fakeSource{}
	p, err := NewRootPort(cfg)
	if err != nil {
		t.Fatal(err)
	}
	add(t, m.Root(), slot, fn, p)
	return p
}

func (m *machine) assign(t testing.TB) {
	t.Helper()
	if err := m.Assign(); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) ecam(a BDF, off int) uint64 {
	return m.layout.ECAM.Base + uint64(a)*4096 + uint64(off)
}

func (m *machine) read32(a BDF, off int) uint32 {
	var p [4]byte
	m.mmio.Read(m.ecam(a, off), p[:])
	return le.Uint32(p[:])
}

func (m *machine) read16(a BDF, off int) uint16 { return uint16(m.read32(a, off&^3) >> (off & 2 * 8)) }

func (m *machine) write32(a BDF, off int, v uint32) {
	m.mmio.Write(m.ecam(a, off), le.AppendUint32(nil, v))
}

func (m *machine) write16(a BDF, off int, v uint16) {
	m.mmio.Write(m.ecam(a, off), le.AppendUint16(nil, v))
}

// at reads a byte of memory.
func (m *machine) at(addr uint64) byte {
	var p [1]byte
	m.mmio.Read(addr, p[:])
	return p[0]
}

// claims are the BARs on the memory bus.
func (m *machine) claims() map[string]devices.Range {
	all := make(map[string]devices.Range)
	m.mmio.Walk(func(r devices.Range, name string) {
		if name != "ECAM" {
			all[name] = r
		}
	})
	return all
}

// wantError fails unless err is one and contains all of the words.
func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}
