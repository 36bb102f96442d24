package pci

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"baton/devices"
)

// onRoot is a machine with n functions f1... on the root bus, each with a 32-bit BAR 1 of
// 64 KiB that reads as its number, placed at base(n), and memory space enabled.
func onRoot(t *testing.T, n int) (*machine, []*fakeFunction) {
	m := newMachine(t, testLayout)
	var fs []*fakeFunction
	for i := 1; i <= n; i++ {
		f := newFunction(t, fmt.Sprint("f", i), 0)
		f.setBAR(t, 1, BAR{Size: 64 * kib, Device: marker(i)})
		add(t, m.Root(), i, 0, f)
		fs = append(fs, f)
		m.write32(NewBDF(0, i, 0), RegBAR+4, uint32(base(i)))
		m.write16(NewBDF(0, i, 0), RegCommand, CommandMemory)
	}
	return m, fs
}

func base(i int) uint64 { return 0xc000_0000 + uint64(i)*mib }

func TestBARMoves(t *testing.T) {
	m, fs := onRoot(t, 1)
	a := NewBDF(0, 1, 0)
	bar := func(addr uint32) { t.Helper(); m.write32(a, RegBAR+4, addr) }
	check := func(what string, addr uint64, on bool) {
		t.Helper()
		want := map[string]devices.Range{}
		if on {
			want["f1 BAR 1"] = devices.Range{Base: addr, Size: 64 * kib}
		}
		if got := m.claims(); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: claims %v, want %v", what, got, want)
		}
		if got := fs[0].mapped; len(got) != len(want) || on && got[addr] != "f1 BAR 1" {
			t.Errorf("%s: mapped %v, want %v", what, got, want)
		}
		if on && m.at(addr+64*kib-1) != 1 {
			t.Errorf("%s: last byte reads %#x", what, m.at(addr+64*kib-1))
		}
	}
	check("start", base(1), true)
	bar(0xd000_0000)
	check("moved", 0xd000_0000, true)
	if m.at(base(1)) != 0xff {
		t.Error("still answers where it was")
	}
	bar(0xd000_8000)
	check("moved by less than its size is no move", 0xd000_0000, true)
	bar(0xffff_ffff)
	check("sizing with decode on", 0, false)
	bar(0xfebf_0000)
	check("last of the window", 0xfebf_0000, true)
	bar(0xfec0_0000)
	check("over the IOAPIC", 0, false)
	bar(0x0010_0000)
	check("over RAM", 0, false)
	bar(0)
	check("zero", 0, false)
	bar(0xb000_0000)
	check("over the ECAM", 0, false)
	bar(0xd000_0000)
	m.write16(a, RegCommand, CommandMaster)
	check("memory space off", 0, false)
	m.write16(a, RegCommand, CommandMemory)
	check("memory space on", 0xd000_0000, true)
	m.mmio.Write(m.ecam(a, RegCommand), []byte{0, 0, 0, 0, 0, 0, 0})
	check("odd write over the command", 0, false)
	if m.logs.Len() != 0 {
		t.Errorf("logged %s", m.logs)
	}
}

func TestBARConflicts(t *testing.T) {
	m, fs := onRoot(t, 2)
	a2 := NewBDF(0, 2, 0)
	for range 3 {
		m.write32(a2, RegBAR+4, uint32(base(1)))
		if m.at(base(1)) != 1 || m.at(base(2)) != 0xff || len(fs[1].mapped) != 0 {
			t.Fatalf("f2 over f1: f1's range reads %d, f2's old one %#x, f2 mapped %v", m.at(base(1)), m.at(base(2)), fs[1].mapped)
		}
		m.write32(a2, RegBAR+4, uint32(base(2)))
		if m.at(base(2)) != 2 {
			t.Fatal("f2 is not back")
		}
	}
	if n := strings.Count(m.logs.String(), "level=WARN"); n != 1 || !strings.Contains(m.logs.String(), "f2 BAR 1") || !strings.Contains(m.logs.String(), "f1 BAR 1") {
		t.Errorf("logged %d times, want once with both names: %s", n, m.logs)
	}

	// The one that lost gets its range when the other leaves: by a move, by its command
	// register, by removal.
	m.write32(a2, RegBAR+4, uint32(base(1)))
	m.write32(NewBDF(0, 1, 0), RegBAR+4, uint32(base(3)))
	if m.at(base(1)) != 2 || m.at(base(3)) != 1 {
		t.Error("after the winner has moved")
	}
	m.write32(NewBDF(0, 1, 0), RegBAR+4, uint32(base(1)))
	m.write16(a2, RegCommand, 0)
	if m.at(base(1)) != 1 {
		t.Error("after the winner was disabled")
	}
	m.write16(a2, RegCommand, CommandMemory)
	m.takeOff(fs[0])
	if m.at(base(1)) != 2 {
		t.Error("after the winner was removed")
	}
}

// takeOff takes a function off the root bus.
func (m *machine) takeOff(f Function) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.root.remove(f)
}

func TestTwoBARsSwapInOneWrite(t *testing.T) {
	m := newMachine(t, testLayout)
	f := newFunctionHeader(t, Header{ID: "f"}, 0)
	f.setBAR(t, 2, BAR{Size: 64 * kib, Device: marker(2)})
	f.setBAR(t, 3, BAR{Size: 64 * kib, Device: marker(3)})
	add(t, m.Root(), 1, 0, f)
	a := NewBDF(0, 1, 0)
	put := func(x, y uint64) {
		m.mmio.Write(m.ecam(a, RegBAR+8), le.AppendUint32(le.AppendUint32(nil, uint32(x)), uint32(y)))
	}
	put(base(1), base(2))
	m.write16(a, RegCommand, CommandMemory)
	put(base(2), base(1))
	if m.at(base(2)) != 2 || m.at(base(1)) != 3 || m.logs.Len() != 0 {
		t.Errorf("claims %v, logged %s", m.claims(), m.logs)
	}
}

func TestBridgeWindows(t *testing.T) {
	m := newMachine(t, testLayout)
	p := m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
	f := newFunction(t, "f", mib)
	add(t, p.Secondary(), 0, 0, f)
	m.assign(t)
	pa, fa := NewBDF(0, 1, 0), NewBDF(1, 0, 0)
	m.write16(fa, RegCommand, CommandMemory)
	start := m.claims()
	if len(start) != 3 {
		t.Fatalf("claims %v", start)
	}
	mem, _ := p.c.Windows()
	for _, x := range []struct {
		addr uint64
		on   bool
	}{{mem.Base - 4*kib, false}, {mem.Base, true}, {mem.End() - 4*kib, true}, {mem.End(), false}} {
		m.write32(fa, RegBAR, uint32(x.addr))
		if _, on := m.claims()["f BAR 0"]; on != x.on {
			t.Errorf("BAR 0 at %#x mapped %v, want %v; the window is %v", x.addr, on, x.on, mem)
		}
	}
	m.write32(fa, RegBAR, uint32(start["f BAR 0"].Base))
	for _, x := range []struct {
		what      string
		off       int
		v         uint32
		mem, pref bool // f BAR 0, f BAR 4 are mapped
	}{
		{"memory window closed", regMemBase, 0x0000_fff0, false, true},
		{"memory window elsewhere", regMemBase, 0xd000_d000, false, true},
		{"prefetchable window closed", regPrefBase, 0x0000_fff0, true, false},
		{"prefetchable base raised", regPrefBase + 4, 0xff, true, false},
		{"prefetchable limit raised", regPrefBase + 8, 0xff, true, true},
		{"memory space of the port off", RegCommand, 0, false, false},
		{"everything through the memory window", regMemBase, 0xfff0_0000, true, true},
	} {
		was := m.read32(pa, x.off)
		m.write32(pa, x.off, x.v)
		got := m.claims()
		_, mem := got["f BAR 0"]
		_, pref := got["f BAR 4"]
		delete(got, "root1 BAR 0")
		if mem != x.mem || pref != x.pref || len(f.mapped) != len(got) {
			t.Errorf("%s: claims %v, mapped %v", x.what, got, f.mapped)
		}
		m.write32(pa, x.off, was)
		if got := m.claims(); fmt.Sprint(got) != fmt.Sprint(start) {
			t.Errorf("%s and back: claims %v, want %v", x.what, got, start)
		}
	}
}

func TestBusNumbers(t *testing.T) {
	m := newMachine(t, testLayout)
	m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
	p2 := m.addPort(t, 2, 0, RootPortConfig{ID: "root2"})
	add(t, p2.Secondary(), 0, 0, newFunction(t, "f", 0))
	vendor := func(bus uint8) uint32 { return m.read32(NewBDF(bus, 0, 0), 0) }
	if vendor(1) != ^uint32(0) || vendor(0) != 0x0008_1b36 {
		t.Errorf("before numbers are assigned: %#x, %#x", vendor(1), vendor(0))
	}
	m.assign(t)
	if vendor(2) != 0x1041_1af4 || vendor(1) != ^uint32(0) || m.read32(NewBDF(2, 1, 0), 0) != ^uint32(0) {
		t.Error("after numbers are assigned")
	}
	m.write32(NewBDF(0, 2, 0), RegPrimary, 0x00_7f_7f_00)
	if vendor(0x7f) != 0x1041_1af4 || vendor(2) != ^uint32(0) {
		t.Error("after the number was changed")
	}
	m.write32(NewBDF(0, 1, 0), RegPrimary, 0x00_7f_7f_00) // now the first port's, which is empty
	if vendor(0x7f) != ^uint32(0) {
		t.Error("two ports with one number")
	}
	var walk []string
	m.Walk(func(a BDF, f Function) { walk = append(walk, a.String()+" "+f.Config().ID()) })
	if got := strings.Join(walk, ", "); got != "0000:00:00.0 host-bridge, 0000:00:01.0 root1, 0000:00:02.0 root2, 0000:7f:00.0 f" {
		t.Errorf("walk: %s", got)
	}
	p := make([]byte, 3)
	for _, off := range []uint64{256 * mib, 1 << 40, ^uint64(0)} {
		m.Read(off, p)
		m.Write(off, p)
		if p[0] != 0xff || p[2] != 0xff {
			t.Errorf("ECAM at %#x reads % x", off, p)
		}
	}
}

func TestReset(t *testing.T) {
	m := newMachine(t, testLayout)
	p := m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
	f := newFunction(t, "f", mib)
	add(t, p.Secondary(), 0, 0, f)
	m.assign(t)
	want := tree(m)
	m.write16(NewBDF(1, 0, 0), RegCommand, CommandMemory|CommandMaster)
	m.write32(NewBDF(1, 0, 0), RegBAR+16, 0xd000_0000)
	m.write16(NewBDF(1, 0, 0), f.msix.off+msixControl, msixEnable)
	m.write32(NewBDF(0, 1, 0), RegPrimary, 0x00_09_09_00)
	m.write32(NewBDF(0, 1, 0), regMemBase, 0)
	if tree(m) == want {
		t.Fatal("nothing changed")
	}
	if err := m.Reset(); err != nil {
		t.Fatal(err)
	}
	if got := tree(m); got != want || f.resets != 1 || f.msix.Enabled() || len(f.mapped) != 0 {
		t.Errorf("%d resets, MSI-X %v, mapped %v\n%s\nwant\n%s", f.resets, f.msix.Enabled(), f.mapped, got, want)
	}
}

// Several vCPUs and the machine at the same time: for the race detector, and for deadlocks.
func TestConcurrentAccess(t *testing.T) {
	m := newMachine(t, testLayout)
	p := m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
	f := newFunction(t, "f", mib)
	add(t, p.Secondary(), 0, 0, f)
	other := newFunction(t, "g", 0)
	m.assign(t)
	fa, pa := NewBDF(1, 0, 0), NewBDF(0, 1, 0)
	mem, pref, high := m.read32(fa, RegBAR), m.read32(fa, RegBAR+16), m.read32(fa, RegBAR+20)
	var wg sync.WaitGroup
	for _, work := range []func(i int){
		func(i int) { m.write16(fa, RegCommand, uint16(i&1)<<1) },
		func(i int) { m.write32(fa, RegBAR, mem+uint32(i%3)*4096) },
		func(i int) { m.write16(pa, RegCommand, uint16(i&1)<<1) },
		func(i int) { m.write16(fa, f.c.pcie+pcieDevCtl, DevCtlFLR) },
		func(i int) {
			m.write16(fa, f.msix.off+msixControl, uint16(i)<<14)
			m.mmio.Write(uint64(mem)+12, make([]byte, 4))
		},
		func(i int) { f.msix.Signal(i % 3); f.c.PutUint16(RegStatus, 0x10); m.read32(fa, RegStatus) },
		func(i int) { m.write16(pa, regBridgeCtl, uint16(i&1)<<6) },
		func(i int) {
			if err := m.Root().Add(9, 0, other); err != nil {
				t.Error(err)
			}
			m.takeOff(other)
		},
	} {
		wg.Go(func() {
			for i := range 200 {
				work(i)
			}
		})
	}
	wg.Wait()
	m.write16(pa, regBridgeCtl, 0)
	m.write16(pa, RegCommand, CommandMemory)
	m.write32(fa, RegBAR, mem)
	m.write32(fa, RegBAR+16, pref)
	m.write32(fa, RegBAR+20, high)
	m.write16(fa, RegCommand, CommandMemory)
	if got := m.claims(); len(got) != 3 || len(f.mapped) != 2 {
		t.Errorf("claims %v, mapped %v", got, f.mapped)
	}
}
