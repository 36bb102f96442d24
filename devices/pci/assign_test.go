package pci

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"baton/devices"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// sample is the tree of a typical command line: three root ports in one slot, one by
// itself, devices behind two of them and on the root bus.
func sample(t testing.TB) *machine {
	m := newMachine(t, testLayout)
	m.addPort(t, 0xa, 0, RootPortConfig{ID: "root0", Multifunction: true, Chassis: 0})
	root1 := m.addPort(t, 0xa, 1, RootPortConfig{ID: "root1", Chassis: 1, Port: 0x11})
	m.addPort(t, 0xa, 2, RootPortConfig{ID: "root2", Chassis: 2})
	root3 := m.addPort(t, -1, -1, RootPortConfig{ID: "root3", Chassis: 3, Slot: 40})
	add(t, m.Root(), -1, -1, newFunction(t, "blk0", 16*kib))
	add(t, root1.Secondary(), -1, -1, newFunction(t, "net1", 64*mib))
	multi := newFunctionHeader(t, Header{ID: "multi", Multifunction: true}, 16*kib)
	multi.setBAR(t, 1, BAR{Size: 4 * mib, Device: marker(9)})
	add(t, root3.Secondary(), 0, 0, multi)
	add(t, root3.Secondary(), 0, 7, newFunction(t, "multi7", mib))
	m.assign(t)
	return m
}

// tree is what a guest finds by reading the ECAM, as text.
func tree(m *machine) string {
	var s strings.Builder
	for buses := []uint8{0}; len(buses) > 0; buses = buses[1:] {
		for devfn := range 256 {
			a := BDF(buses[0])<<8 | BDF(devfn)
			id := m.read32(a, 0)
			if id == ^uint32(0) {
				continue
			}
			describe(&s, m, a, id)
			if m.read32(a, regCacheLine)>>16&0x7f == 1 {
				buses = append(buses, uint8(m.read32(a, RegPrimary)>>8))
			}
		}
	}
	return s.String()
}

func describe(s *strings.Builder, m *machine, a BDF, id uint32) {
	header := m.read32(a, regCacheLine) >> 16 & 0xff
	fmt.Fprintf(s, "%v %04x:%04x class %06x header %02x command %04x status %04x\n", a, id&0xffff, id>>16,
		m.read32(a, RegClass)>>8, header, m.read16(a, RegCommand), m.read16(a, RegStatus))
	bars := 6
	if header&0x7f == 1 {
		bars = 2
		n := m.read32(a, RegPrimary)
		fmt.Fprintf(s, "    bus primary %02x secondary %02x subordinate %02x\n", n&0xff, n>>8&0xff, n>>16&0xff)
		mem, pref := windowsSeen(m, a)
		fmt.Fprintf(s, "    memory %v, prefetchable %v\n", mem, pref)
	}
	for _, b := range barsSeen(m, a, bars) {
		fmt.Fprintf(s, "    BAR %d %v flags %x\n", b.i, b.Range, b.flags)
	}
	if m.read16(a, RegStatus)&StatusCapList == 0 {
		return
	}
	for at := int(m.read32(a, RegCapPointer) & 0xff); at != 0; at = int(m.read32(a, at) >> 8 & 0xff) {
		switch c := m.read32(a, at); c & 0xff {
		case CapPCIe:
			fmt.Fprintf(s, "    [%02x] express %04x dev %08x link %08x/%04x slot %08x/%04x/%04x\n", at, c>>16, m.read32(a, at+4),
				m.read32(a, at+0xc), m.read16(a, at+0x12), m.read32(a, at+0x14), m.read16(a, at+0x18), m.read16(a, at+0x1a))
		case CapMSIX:
			fmt.Fprintf(s, "    [%02x] msi-x %04x table %08x pba %08x\n", at, c>>16, m.read32(a, at+4), m.read32(a, at+8))
		default:
			fmt.Fprintf(s, "    [%02x] capability %02x %04x %08x\n", at, c&0xff, c>>16, m.read32(a, at+4))
		}
	}
	for at := 0x100; at != 0 && m.read32(a, at) != 0; at = int(m.read32(a, at) >> 20) {
		fmt.Fprintf(s, "    [%03x] extended capability %08x %08x\n", at, m.read32(a, at), m.read32(a, at+4))
	}
}

type seen struct {
	devices.Range
	i     int
	flags uint32
}

// barsSeen sizes the BARs as a guest does, by writing ones.
func barsSeen(m *machine, a BDF, n int) (all []seen) {
	command := m.read16(a, RegCommand)
	m.write16(a, RegCommand, command&^CommandMemory)
	defer m.write16(a, RegCommand, command)
	for i := 0; i < n; i++ {
		b := seen{i: i}
		word := func(off int) (value, mask uint64) {
			was := m.read32(a, off)
			m.write32(a, off, ^uint32(0))
			mask = uint64(m.read32(a, off))
			m.write32(a, off, was)
			return uint64(was), mask
		}
		v, mask := word(RegBAR + 4*i)
		if mask == 0 {
			continue
		}
		b.flags = uint32(v & 0xf)
		mask |= 0xffff_ffff << 32
		if b.flags&BAR64 != 0 {
			i++
			hv, hm := word(RegBAR + 4*i)
			v, mask = v|hv<<32, mask&0xffff_ffff|hm<<32
		}
		b.Range = devices.Range{Base: v &^ 0xf, Size: -(mask &^ 0xf)}
		all = append(all, b)
	}
	return all
}

func windowsSeen(m *machine, a BDF) (mem, pref devices.Range) {
	w := func(base, limit uint64) devices.Range {
		if limit |= 0xf_ffff; limit > base {
			return devices.Range{Base: base, Size: limit - base + 1}
		}
		return devices.Range{Size: 1} // closed
	}
	r, p := uint64(m.read32(a, regMemBase)), uint64(m.read32(a, regPrefBase))
	return w(r&0xfff0<<16, r&0xfff0_0000), w(uint64(m.read32(a, regPrefBase+4))<<32|p&0xfff0<<16, uint64(m.read32(a, regPrefBase+8))<<32|p&0xfff0_0000)
}

func TestGoldenTree(t *testing.T) {
	got, name := tree(sample(t)), filepath.Join("testdata", "tree.golden")
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the tree is not that of %s (run with -update if that is meant):\n%s", name, got)
	}
}

// lspci decodes the same registers by its own understanding of the specifications.
func TestLspci(t *testing.T) {
	lspci, err := exec.LookPath("lspci")
	if err != nil {
		t.Skip("no lspci here (package pciutils)")
	}
	m := sample(t)
	var dump strings.Builder
	m.Walk(func(a BDF, f Function) {
		fmt.Fprintf(&dump, "%v x\n", a)
		for off := 0; off < ConfigSize; off += 16 {
			p := make([]byte, 16)
			f.Config().Read(uint64(off), p)
			fmt.Fprintf(&dump, "%02x: % x\n", off, p)
		}
		dump.WriteString("\n")
	})
	file := filepath.Join(t.TempDir(), "dump")
	if err := os.WriteFile(file, []byte(dump.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	out := func(args ...string) string {
		b, err := exec.Command(lspci, append([]string{"-F", file, "-n"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("lspci: %v\n%s", err, b)
		}
		return string(b)
	}
	if got := out("-t"); got != `-[0000:00]-+-00.0
           +-01.0-[01]--+-00.0
           |            \-00.7
           +-02.0
           +-0a.0-[02]--
           +-0a.1-[03]----00.0
           \-0a.2-[04]--
` {
		t.Errorf("lspci -t:\n%s", got)
	}
	verbose := out("-vvv", "-s", "0a.1") + out("-vvv", "-s", "03:00.0") + out("-vvv", "-s", "02.0")
	for _, want := range []string{
		"Express (v2) Root Port (Slot+)", "Express (v2) Endpoint", "Express (v2) Root Complex Integrated Endpoint",
		"AttnBtn- PwrCtrl- MRL- AttnInd- PwrInd+ HotPlug+ Surprise+",
		"Slot #1, PowerLimit 0W; Interlock- NoCompl+", "PresDet+", "Speed 32GT/s, Width x16", "ASPM not supported", "FLReset+",
		"MSI-X: Enable- Count=3", "MSI-X: Enable- Count=1", "Subsystem: 1b36:0000", "Access Control Services", "DLActive+",
	} {
		if !strings.Contains(verbose, want) {
			t.Errorf("lspci -vvv does not say %q", want)
		}
	}
	for _, bad := range []string{"<?>", "!!!", "unknown", "downgraded", "broken", "invalid", "chain looped"} {
		if strings.Contains(verbose, bad) {
			t.Errorf("lspci -vvv says %q", bad)
		}
	}
	if t.Failed() {
		t.Log(verbose)
	}
}

// checkAssigned looks at a tree as a guest would and complains about what a guest's
// kernel would complain about.
func checkAssigned(t *testing.T, m *machine) {
	t.Helper()
	type placed struct {
		devices.Range
		what string
	}
	var root []placed
	check := func(what string, r devices.Range, in []devices.Range, among []placed) {
		if r.Base == 0 || r.Base%r.Size != 0 {
			t.Errorf("%s at %v is not aligned", what, r)
		}
		ok := false
		for _, w := range in {
			ok = ok || within(r, w)
		}
		if !ok {
			t.Errorf("%s at %v is outside %v", what, r, in)
		}
		for _, o := range among {
			if o.Overlaps(r) {
				t.Errorf("%s at %v overlaps %s at %v", what, r, o.what, o.Range)
			}
		}
	}
	mmio := []devices.Range{m.layout.MMIO32, m.layout.MMIO64}
	m.Walk(func(a BDF, f Function) {
		p, isPort := f.(*RootPort)
		n := 6
		if isPort {
			n = 2
			if m.read16(a, RegCommand) != CommandMemory|CommandMaster {
				t.Errorf("%v is not enabled", a)
			}
			mem, pref := windowsSeen(m, a)
			var inside []placed
			for _, w := range []devices.Range{mem, pref} {
				if w.Size == 1 {
					continue
				}
				if !within(w, mmio[0]) && !within(w, mmio[1]) {
					t.Errorf("window of %v at %v is outside", a, w)
				}
				root = append(root, placed{w, a.String()})
			}
			for _, fn := range p.Secondary().functions() {
				c := NewBDF(uint8(m.read32(a, RegPrimary)>>8), 0, fn.Config().at.Load().devfn)
				for _, b := range barsSeen(m, c, 6) {
					in := []devices.Range{mem}
					if b.flags&(BAR64|BARPrefetch) == BAR64|BARPrefetch {
						in = append(in, pref)
					}
					check(fmt.Sprintf("%v BAR %d", c, b.i), b.Range, in, inside)
					inside = append(inside, placed{b.Range, c.String()})
				}
			}
		} else if a.Bus() == 0 && m.read16(a, RegCommand) != 0 {
			t.Errorf("%v is enabled", a)
		}
		if a.Bus() == 0 {
			for _, b := range barsSeen(m, a, n) {
				in := mmio
				if b.flags&BAR64 == 0 {
					in = mmio[:1]
				}
				check(fmt.Sprintf("%v BAR %d", a, b.i), b.Range, in, root)
				root = append(root, placed{b.Range, a.String()})
			}
		}
	})
	for i, x := range root {
		for _, y := range root[:i] {
			if x.Overlaps(y.Range) {
				t.Errorf("%v of %s overlaps %v of %s", x.Range, x.what, y.Range, y.what)
			}
		}
	}
}

func TestAssign(t *testing.T) {
	t.Run("sample", func(t *testing.T) { checkAssigned(t, sample(t)) })
	t.Run("again while in use", func(t *testing.T) {
		m := sample(t)
		want := tree(m)
		m.write16(NewBDF(3, 0, 0), RegCommand, CommandMemory)
		m.assign(t)
		if got := tree(m); got != want {
			t.Errorf("assigned differently the second time:\n%s\nfirst:\n%s", got, want)
		}
	})
	t.Run("many ports", func(t *testing.T) {
		m := newMachine(t, testLayout)
		for i := range 8 * 30 {
			p := m.addPort(t, 1+i/8, i%8, RootPortConfig{ID: fmt.Sprint("root", i), Multifunction: true})
			add(t, p.Secondary(), 0, 0, newFunction(t, fmt.Sprint("f", i), uint64(16*kib)<<(i%13)))
		}
		m.assign(t)
		checkAssigned(t, m)
		if _, pref := windowsSeen(m, NewBDF(0, 1, 0)); pref.Size != 32*mib {
			t.Errorf("window of %v, want room for hot-plug", pref)
		}
	})
	t.Run("without a 64-bit window", func(t *testing.T) {
		l := testLayout
		l.MMIO64 = devices.Range{}
		m := newMachine(t, l)
		p := m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
		add(t, p.Secondary(), 0, 0, newFunction(t, "f", 8*mib))
		add(t, m.Root(), 2, 0, newFunction(t, "g", 8*mib))
		m.assign(t)
		checkAssigned(t, m)
	})
	t.Run("too small for the reserve", func(t *testing.T) {
		l := testLayout
		l.MMIO64.Size, l.MMIO32.Size = 16*mib, 3*mib
		m := newMachine(t, l)
		add(t, m.addPort(t, 1, 0, RootPortConfig{ID: "root1"}).Secondary(), 0, 0, newFunction(t, "f", 8*mib))
		add(t, m.addPort(t, 2, 0, RootPortConfig{ID: "root2"}).Secondary(), 0, 0, newFunction(t, "g", 8*mib))
		m.assign(t)
		checkAssigned(t, m)
	})
}

func TestAssignErrors(t *testing.T) {
	l := testLayout
	l.MMIO64.Size, l.MMIO32.Size = 64*mib, 8*mib
	m := newMachine(t, l)
	p := m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
	add(t, p.Secondary(), 0, 0, newFunction(t, "big", 128*mib))
	low := newFunction(t, "low", 16*kib)
	low.setBAR(t, 1, BAR{Size: 16 * mib, Device: marker(1)})
	add(t, m.Root(), 2, 0, low)
	add(t, m.Root(), 3, 2, newFunction(t, "lost", 0))
	m.write32(NewBDF(0, 2, 0), RegBAR+4, 0xd000_0000)
	err := m.Assign()
	wantError(t, err, "the 64-bit window of 64 MiB has no room for the window of root1 with big BAR 4 (131072 KiB)",
		"the 32-bit window of 8 MiB has no room for low BAR 1 (16384 KiB)", "lost is in slot 3 of bus pcie.0, which has no function 0\n")
	// What fits is placed all the same, what does not is nowhere.
	if a, b := m.read32(NewBDF(0, 2, 0), RegBAR), m.read32(NewBDF(0, 2, 0), RegBAR+4); a == 0 || b != 0 {
		t.Errorf("BAR 0 of low at %#x, BAR 1 at %#x", a, b)
	}

	l = testLayout
	l.ECAM.Size = 2 * mib
	m = newMachine(t, l)
	m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
	m.assign(t)
	m.addPort(t, 2, 0, RootPortConfig{ID: "root2"})
	wantError(t, m.Assign(), "2 root ports, but only 1 buses")
}
