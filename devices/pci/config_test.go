package pci

import (
	"bytes"
	"fmt"
	"testing"
)

func TestBDF(t *testing.T) {
	for _, c := range []struct {
		bus     uint8
		dev, fn int
		want    string
	}{
		{0, 0, 0, "0000:00:00.0"}, {0, 2, 0, "0000:00:02.0"}, {1, 10, 1, "0000:01:0a.1"}, {255, 31, 7, "0000:ff:1f.7"},
	} {
		b := NewBDF(c.bus, c.dev, c.fn)
		if b.String() != c.want || b.Bus() != c.bus || b.Device() != c.dev || b.Function() != c.fn {
			t.Errorf("%v: bus %d device %d function %d, want %s", b, b.Bus(), b.Device(), b.Function(), c.want)
		}
	}
}

func TestHeaderMasks(t *testing.T) {
	endpoint := func() *Config { return newFunction(t, "f", 0).c }
	bridge := func() *Config { return NewConfig(Header{Vendor: 1, Type: 1, Multifunction: true}) }
	for _, c := range []struct {
		name  string
		cfg   func() *Config
		off   int
		wrote uint32
		want  uint32
	}{
		{"vendor is read-only", endpoint, 0x00, ^uint32(0), 0x1041_1af4},
		{"command has no I/O space", endpoint, 0x04, 0x0000_ffff, 0x0010_0546},
		{"class is read-only", endpoint, 0x08, 0, 0x0200_0001},
		{"cache line yes, latency no", endpoint, 0x0c, ^uint32(0), 0x0000_00ff},
		{"BAR 0 sizes", endpoint, 0x10, ^uint32(0), 0xffff_f000},
		{"BAR 1 is absent", endpoint, 0x14, ^uint32(0), 0},
		{"no ROM", endpoint, 0x30, ^uint32(0), 0},
		{"subsystem", endpoint, 0x2c, 0, 0x1100_1af4},
		{"interrupt line", endpoint, 0x3c, ^uint32(0), 0x0000_00ff},
		{"multifunction bridge", bridge, 0x0c, 0, 0x0081_0000},
		{"bus numbers", bridge, 0x18, ^uint32(0), 0x00ff_ffff},
		{"no I/O window", bridge, 0x1c, 0x0000_ffff, 0},
		{"memory window", bridge, 0x20, ^uint32(0), 0xfff0_fff0},
		{"prefetchable window is 64-bit", bridge, 0x24, ^uint32(0), 0xfff1_fff1},
		{"prefetchable window is 64-bit when zero", bridge, 0x24, 0, 0x0001_0001},
		{"upper base", bridge, 0x28, ^uint32(0), ^uint32(0)},
		{"upper limit", bridge, 0x2c, ^uint32(0), ^uint32(0)},
		{"no I/O window above 64 KiB", bridge, 0x30, ^uint32(0), 0},
		{"bridge control", bridge, 0x3c, 0xffff_0000, 0x0043_0000},
	} {
		cfg := c.cfg()
		cfg.Write(uint64(c.off), le.AppendUint32(nil, c.wrote))
		if got := cfg.Uint32(c.off); got != c.want {
			t.Errorf("%s: register %#x is %#x after writing %#x, want %#x", c.name, c.off, got, c.wrote, c.want)
		}
	}
}

func TestWriteOneToClear(t *testing.T) {
	c := newFunction(t, "f", 0).c
	c.PutUint16(RegStatus, 0xf910)
	c.Write(RegStatus, []byte{0xff, 0x81}) // master data parity error, parity error
	if got := c.Uint16(RegStatus); got != 0x7810 {
		t.Errorf("status %#x, want 0x7810", got)
	}
	c.Write(RegStatus, []byte{0, 0})
	if got := c.Uint16(RegStatus); got != 0x7810 {
		t.Errorf("status %#x after writing zero, want it unchanged", got)
	}
}

func TestStraddle(t *testing.T) {
	c := newFunction(t, "f", 0).c
	for _, r := range []struct {
		off  uint64
		n    int
		want string
	}{
		{0, 1, "f4"}, {1, 2, "1a41"}, {2, 3, "411000"}, {0, 0, ""},
		{4094, 4, "0000ffff"}, {4095, 8, "00ffffffffffffff"}, {4096, 2, "ffff"}, {1 << 63, 1, "ff"}, {^uint64(0), 3, "ffffff"},
	} {
		p := bytes.Repeat([]byte{0x5a}, r.n)
		c.Read(r.off, p)
		if got := fmt.Sprintf("%x", p); got != r.want {
			t.Errorf("read %d at %#x: %s, want %s", r.n, r.off, got, r.want)
		}
		c.Write(r.off, p) // must not panic
	}
	// A write across the end of the command register changes both sides of it.
	c.Write(3, []byte{0xff, 0x02})
	c.Write(0x0b, []byte{0xff, 0x40, 0xff, 0xff, 0xff, 0xff})
	if got := c.Uint32(regCacheLine); c.Uint16(RegCommand)&CommandMemory == 0 || got != 0x40 {
		t.Errorf("command %#x, cache line register %#x", c.Uint16(RegCommand), got)
	}
}

func TestCapabilityList(t *testing.T) {
	c := NewConfig(Header{Vendor: 1})
	if c.Uint16(RegStatus) != 0 || c.data[RegCapPointer] != 0 {
		t.Error("a capability list before the first capability")
	}
	var want []int
	want = append(want, c.AddCapability(9, []byte{1, 2, 3, 4, 5}, []byte{0, 0xf0}))
	want = append(want, c.AddCapability(9, nil, nil))
	want = append(want, c.AddCapability(0x11, make([]byte, 10), nil))
	var got []int
	for at := int(c.data[RegCapPointer]); at != 0; at = int(c.data[at+1]) {
		if at%4 != 0 {
			t.Errorf("capability at %#x is not aligned", at)
		}
		got = append(got, at)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || c.Uint16(RegStatus) != StatusCapList {
		t.Errorf("capabilities at %v, want %v; status %#x", got, want, c.Uint16(RegStatus))
	}
	c.Write(uint64(want[0]), bytes.Repeat([]byte{0xff}, 8))
	if !bytes.Equal(c.data[want[0]:want[0]+8], []byte{9, byte(want[1]), 1, 0xf2, 3, 4, 5, 0}) {
		t.Errorf("capability % x", c.data[want[0]:want[0]+8])
	}
	c.Reset()
	if c.data[want[0]+1] != byte(want[1]) || c.data[want[0]+3] != 2 {
		t.Errorf("capability % x after reset", c.data[want[0]:want[0]+8])
	}

	if first := c.AddExtCapability(0xd, 1, make([]byte, 6), nil); first != 0x100 || c.Uint32(0x100) != 0x0001_000d {
		t.Errorf("first extended capability at %#x: %#x", first, c.Uint32(0x100))
	}
	if second := c.AddExtCapability(0x10, 2, nil, nil); second != 0x10c || c.Uint32(0x100) != 0x10c1_000d || c.Uint32(0x10c) != 0x0002_0010 {
		t.Errorf("second extended capability at %#x: %#x, %#x", second, c.Uint32(0x100), c.Uint32(0x10c))
	}
}

func TestHooks(t *testing.T) {
	c := NewConfig(Header{})
	off := c.AddCapability(9, make([]byte, 6), nil)
	var calls string
	c.OnRead(off+4, 2, func() { calls += "r"; c.PutUint16(off+4, 0xbeef) })
	c.OnWrite(off+4, 2, func() { calls += "w"; c.PutUint16(off+2, 1) })
	for _, x := range []struct {
		at, n int
		read  string
		write string
	}{{off, 4, "", ""}, {off + 3, 2, "r", "w"}, {off + 4, 1, "r", "w"}, {off + 5, 8, "r", "w"}, {off + 6, 4, "", ""}, {0, 4096, "r", "w"}, {off + 4, 0, "", ""}} {
		calls = ""
		c.Read(uint64(x.at), make([]byte, x.n))
		read := calls
		calls = ""
		c.Write(uint64(x.at), make([]byte, x.n))
		if read != x.read || calls != x.write {
			t.Errorf("%d bytes at %#x: read hooks %q, write hooks %q; want %q, %q", x.n, x.at, read, calls, x.read, x.write)
		}
	}
	p := make([]byte, 2)
	c.PutUint16(off+4, 0)
	if c.Read(uint64(off+4), p); le.Uint16(p) != 0xbeef {
		t.Errorf("read %x, want what the hook has put there", p)
	}
}

func TestSetBARErrors(t *testing.T) {
	ok := BAR{Size: 4096, Device: marker(0)}
	wide := BAR{Size: 4096, Is64: true, Device: marker(0)}
	for _, x := range []struct {
		name string
		typ  uint8
		i    int
		b    BAR
		want string
	}{
		{"negative", 0, -1, ok, "BARs 0 to 5"}, {"beyond", 0, 6, ok, "BARs 0 to 5"}, {"64-bit in the last", 0, 5, wide, "BARs 0 to 5"},
		{"bridge", 1, 2, ok, "BARs 0 to 1"}, {"odd size", 0, 0, BAR{Size: 4095, Device: marker(0)}, "power of two"},
		{"small", 0, 0, BAR{Size: 8, Device: marker(0)}, "power of two"}, {"zero", 0, 0, BAR{Device: marker(0)}, "power of two"},
		{"4 GiB in 32 bits", 0, 0, BAR{Size: 4 * gib, Device: marker(0)}, "power of two"},
		{"taken", 0, 2, ok, "in use"}, {"upper half", 0, 3, ok, "in use"}, {"overlaps upwards", 0, 1, wide, "in use"},
		{"no device", 0, 0, BAR{Size: 4096}, "no device"},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := NewConfig(Header{ID: "f", Type: x.typ})
			if x.typ == 0 {
				if err := c.SetBAR(2, wide); err != nil {
					t.Fatal(err)
				}
			}
			wantError(t, c.SetBAR(x.i, x.b), "of f: ", x.want)
		})
	}
}

func TestBARSizing64(t *testing.T) {
	c := newFunction(t, "f", 8*gib).c
	c.Write(RegBAR+16, bytes.Repeat([]byte{0xff}, 8))
	if lo, hi := c.Uint32(RegBAR+16), c.Uint32(RegBAR+20); lo != 0xc || hi != 0xffff_fffe {
		t.Errorf("sizing reads %#x %#x, want 8 GiB, 64-bit, prefetchable", hi, lo)
	}
}

func TestFunctionLevelReset(t *testing.T) {
	m := newMachine(t, testLayout)
	f := newFunction(t, "f", 0)
	add(t, m.Root(), 2, 0, f)
	m.assign(t)
	a := NewBDF(0, 2, 0)
	ctl := f.c.pcie + pcieDevCtl
	m.write16(a, RegCommand, CommandMemory)
	m.write16(a, ctl, devCtlInitial|0xf)
	if f.resets != 0 || len(m.claims()) != 1 {
		t.Fatalf("%d resets, claims %v before the FLR", f.resets, m.claims())
	}
	m.write16(a, ctl, devCtlInitial|DevCtlFLR)
	if f.resets != 1 {
		t.Errorf("%d resets, want 1", f.resets)
	}
	if got := m.read16(a, ctl); got != devCtlInitial {
		t.Errorf("device control %#x after reset, want %#x", got, devCtlInitial)
	}
	if got := m.read32(a, RegBAR); got != 0 || len(m.claims()) != 0 || len(f.mapped) != 0 {
		t.Errorf("BAR 0 %#x, claims %v, mapped %v after reset", got, m.claims(), f.mapped)
	}
	if m.read32(a, f.c.pcie+pcieDevCap)&DevCapFLR == 0 {
		t.Error("no FLR in the device capabilities")
	}
}

// TestFixedCapabilities: a function that copies another one keeps its layout, and answers
// parts of it itself.
func TestFixedCapabilities(t *testing.T) {
	c := NewConfig(Header{Vendor: 1})
	c.PlaceNext(0xa0)
	c.AddCapability(9, []byte{1, 2}, nil)
	c.PlaceNext(0x40)
	c.AddPCIeRegisters(make([]byte, 0x12), nil) // version 0: too short for the second link registers
	c.AddExtCapability(0, 1, nil, nil)
	c.PlaceNext(0x200)
	c.AddExtCapability(3, 1, make([]byte, 8), nil)
	if c.data[RegCapPointer] != 0xa0 || c.data[0xa1] != 0x40 || c.data[0x41] != 0 || c.Uint32(0x100) != 0x2001_0000 {
		t.Errorf("chain %#x, %#x, %#x; %#x", c.data[RegCapPointer], c.data[0xa1], c.data[0x41], c.Uint32(0x100))
	}
	c.integrate()
	if c.Uint16(0x42) != 0x90 || c.Uint32(0x40+pcieLinkCap2) != 0 {
		t.Errorf("flags %#x, behind the capability %#x", c.Uint16(0x42), c.Uint32(0x40+pcieLinkCap2))
	}
	var r recorder
	c.Back(0x204, 4, &r)
	p := make([]byte, 8)
	c.Read(0x202, p)
	c.Write(0x206, []byte{1, 2, 3})
	c.Write(0x203, []byte{9})
	if want := "[0x204+4 0x206=0102]"; fmt.Sprint(r) != want || !bytes.Equal(p, []byte{1, 0, 0x77, 0x77, 0x77, 0x77, 0, 0}) {
		t.Errorf("accesses %v, want %s; read %x", r, want, p)
	}
}

// recorder is a device that notes what it is asked.
type recorder []string

func (r *recorder) Read(off uint64, p []byte) {
	*r = append(*r, fmt.Sprintf("%#x+%d", off, len(p)))
	copy(p, bytes.Repeat([]byte{0x77}, len(p)))
}

func (r *recorder) Write(off uint64, p []byte) { *r = append(*r, fmt.Sprintf("%#x=%x", off, p)) }
