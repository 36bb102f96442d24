package vfio

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"baton/devices"
	"baton/devices/pci"

	"golang.org/x/sys/unix"
)

func get(f *Function, off uint64, n int) []byte {
	p := make([]byte, n)
	f.c.Read(off, p)
	return p
}

func put16(f *Function, off int, v uint16) { f.c.Write(uint64(off), le.AppendUint16(nil, v)) }
func put32(f *Function, off int, v uint32) { f.c.Write(uint64(off), le.AppendUint32(nil, v)) }

func TestConfigSpace(t *testing.T) {
	h := newHW()
	f, _, _ := start(t, h)
	for _, c := range []struct {
		what string
		off  uint64
		want string
	}{
		{"vendor and device", 0, "8680ca10"},
		{"class and revision", 8, "01000002"},
		{"header type, not multifunction", 0x0e, "00"},
		{"subsystem", 0x2c, "86803ca0"},
		{"first capability", 0x34, "40"},
		{"INTx", 0x3d, "01"},
		{"no I/O BAR", 0x18, "00000000"},
		{"PM without PME, in D0, no soft reset", 0x40, "0170230708000000"},
		{"MSI-X as it is, but off", 0x70, "11a002000300000003200000"},
		{"PCI Express", 0xa0, "10500200c28c0010"},
		{"MSI", 0x50, "05908401"},
		{"vendor specific ends the chain", 0x90, "0900080102030405"},
		{"what is no capability", 0x9c, "00000000"},
		{"AER is hidden, the chain starts", 0x100, "00000114"},
		{"serial number, SR-IOV skipped", 0x140, "0300011aaabbccdd"},
		{"SR-IOV", 0x150, "00000000"},
		{"vendor specific", 0x1a0, "0b0001004200c10078563412"},
	} {
		if got := fmt.Sprintf("%x", get(f, c.off, len(c.want)/2)); got != c.want {
			t.Errorf("%s: %s, want %s", c.what, got, c.want)
		}
	}
	h.took()
	put32(f, 0x44, 0xffff_ffff)
	put32(f, 0xa8, 0xffff_ffff&^(pci.DevCtlFLR))
	put32(f, 0x1a4, 0)
	put32(f, 0x9c, 0xffff_ffff)
	for _, c := range []struct {
		what string
		off  uint64
		want string
	}{
		{"PM control", 0x44, "0b000000"}, {"device control", 0xa8, "1f780000"}, {"vendor specific length", 0x1a4, "00000000"},
		{"what is no capability", 0x9c, "00000000"},
	} {
		if got := fmt.Sprintf("%x", get(f, c.off, 4)); got != c.want {
			t.Errorf("%s after a write: %s, want %s", c.what, got, c.want)
		}
	}
	if got, want := h.took(), "[7:0x1a4=00000000]"; got != want {
		t.Errorf("the device was told %s, want %s", got, want)
	}
	f.c.Write(0x93, []byte{0xee}) // one byte of what is passed on
	if got, want := h.took(), "[7:0x93=ee]"; got != want {
		t.Errorf("the device was told %s, want %s", got, want)
	}
}

func TestBARs(t *testing.T) {
	h := newHW()
	f, m, rc := start(t, h)
	where := func() string {
		var s []string
		for _, r := range m.slots {
			s = append(s, r)
		}
		slices.Sort(s)
		return strings.Join(s, " ")
	}
	if where() != "" {
		t.Errorf("mapped before the guest enables memory: %s", where())
	}
	put16(f, pci.RegCommand, pci.CommandMemory)
	bar0 := uint64(f.c.Uint32(pci.RegBAR)&^15) | uint64(f.c.Uint32(pci.RegBAR+4))<<32
	bar3 := uint64(f.c.Uint32(pci.RegBAR+12) &^ 15)
	// The pages of the table, 0, and of the pending bits, 2, are left out.
	want := []string{fmt.Sprintf("%#x+0x4000", bar0), fmt.Sprintf("%#x+0x1000", bar3+0x1000), fmt.Sprintf("%#x+0x1000", bar3+0x3000)}
	slices.Sort(want)
	if got := where(); got != strings.Join(want, " ") {
		t.Errorf("slots %s, want %s", got, want)
	}
	put32(f, pci.RegBAR, uint32(bar0+0x4000)) // a move
	if got := where(); !strings.Contains(got, fmt.Sprintf("%#x+0x4000", bar0+0x4000)) || len(m.slots) != 3 {
		t.Errorf("slots after a move: %s", got)
	}
	// What is not mapped goes through the VMM.
	le.PutUint32(h.regions[3][0x2800:], 0x600d)
	p := make([]byte, 4)
	f.bars[3].Read(0x2800, p)
	if le.Uint32(p) != 0x600d {
		t.Errorf("beside the pending bits: %x", p)
	}
	f.bars[3].Write(0x2804, []byte{1, 2, 3, 4})
	f.bars[3].Write(0, []byte{0, 0, 0xe0, 0xfe})
	f.bars[3].Read(0, p)
	if !bytes.Equal(p, []byte{0, 0, 0xe0, 0xfe}) || !bytes.Equal(h.regions[3][:4], make([]byte, 4)) || h.regions[3][0x2804] != 1 {
		t.Errorf("MSI-X table: %x, the device's %x", p, h.regions[3][:4])
	}
	f.bars[3].Read(1<<40, p)
	if !bytes.Equal(p, []byte{255, 255, 255, 255}) {
		t.Errorf("beyond the BAR: %x", p)
	}
	if err := rc.Reset(); err != nil || where() != "" {
		t.Errorf("slots after a reset: %s (%v)", where(), err)
	}
	put16(f, pci.RegCommand, pci.CommandMemory)
	if err := f.Close(); err != nil || where() != "" || h.mapped != 0 || !h.closed {
		t.Errorf("after the end: slots %s, %d mappings (%v)", where(), h.mapped, err)
	}
	for i, v := range m.vectors {
		if !v.closed {
			t.Errorf("vector %d stays", i)
		}
	}
}

func TestWithout(t *testing.T) {
	r := func(base, size uint64) devices.Range { return devices.Range{Base: base, Size: size} }
	for _, c := range []struct {
		area  devices.Range
		size  uint64
		holes []devices.Range
		want  string
	}{
		{r(0, 0x4000), 0x4000, nil, "[0x0-0x3fff]"},
		{r(0, 0x4000), 0x2000, nil, "[0x0-0x1fff]"},
		{r(0, 64), 64, nil, "[]"},
		{r(0x800, 0x1900), 0x4000, nil, "[0x1000-0x1fff]"},
		{r(0x5000, 0x1000), 0x4000, nil, "[]"},
		{r(0x1000, ^uint64(0)), 0x4000, nil, "[0x1000-0x3fff]"},
		{r(0, 0x4000), 0x4000, []devices.Range{r(0x1800, 0x10)}, "[0x0-0xfff 0x2000-0x3fff]"},
		{r(0, 0x4000), 0x4000, []devices.Range{r(0x2ff8, 0x10), r(0, 8)}, "[0x1000-0x1fff]"},
		{r(0, 0x4000), 0x4000, []devices.Range{r(0, 0x4000)}, "[]"},
		{r(0, 0x6000), 0x6000, []devices.Range{r(0x4000, 8), r(0x4010, 0x1000), r(0x1000, 8)}, "[0x0-0xfff 0x2000-0x3fff]"},
	} {
		if got := fmt.Sprint(without(c.area, c.size, c.holes)); got != c.want {
			t.Errorf("%v in %#x without %v: %s, want %s", c.area, c.size, c.holes, got, c.want)
		}
	}
}

func TestMSIX(t *testing.T) {
	h := newHW()
	f, m, _ := start(t, h)
	entry := []byte{0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0, 0, 0, 0, 0, 0, 0}
	for i := 0; i < 16; i += 4 {
		f.bars[3].Write(uint64(16+i), entry[i:i+4]) // vector 1
	}
	if len(h.active) != 0 {
		t.Errorf("interrupts before MSI-X is on: %v", h.active)
	}
	put16(f, 0x72, 0x8000)
	if got := fmt.Sprint(h.active[irqMSIX]); got != "[100 101 102]" {
		t.Errorf("eventfds %s", got)
	}
	if v := m.vectors[1]; v.masked || v.msg != (devices.MSI{Addr: 0xfee00000, Data: 0x41}) || !m.vectors[0].masked {
		t.Errorf("vector 1: %+v", v)
	}
	if f.Kick(); m.vectors[0].raised != 0 || m.vectors[1].raised != 1 {
		t.Errorf("kicked: %+v, %+v", m.vectors[0], m.vectors[1])
	}
	m.vectors[2].waits = true
	p := make([]byte, 8)
	if f.bars[3].Read(0x2000, p); p[0] != 4 {
		t.Errorf("pending bits %x", p)
	}
	put16(f, 0x72, 0)
	if h.active[irqMSIX] != nil || !m.vectors[1].masked {
		t.Errorf("MSI-X is off, but: %v, %+v", h.active, m.vectors[1])
	}
}

func TestMSI(t *testing.T) {
	h := newHW()
	f, m, _ := start(t, h)
	msi := m.vectors[3:] // after MSI-X's
	if len(msi) != 4 {
		t.Fatalf("%d vectors", len(msi))
	}
	put32(f, 0x54, 0xfee0_1003) // the low bits are reserved
	put32(f, 0x58, 1)
	put16(f, 0x5c, 0x4006)
	put32(f, 0x60, 1) // mask vector 0
	put16(f, 0x52, msiEnable|1<<4)
	if got := fmt.Sprint(h.active[irqMSI]); got != "[103 104]" {
		t.Errorf("eventfds %s", got)
	}
	if !msi[0].masked || msi[1].masked || !msi[2].masked || msi[1].msg != (devices.MSI{Addr: 0x1_fee0_1000, Data: 0x4007}) {
		t.Errorf("vectors %+v %+v %+v", msi[0], msi[1], msi[2])
	}
	msi[0].waits = true
	if got := get(f, 0x64, 4); got[0] != 1 {
		t.Errorf("pending bits %x", got)
	}
	put32(f, 0x60, 0)
	if msi[0].masked || msi[0].msg.Data != 0x4006 {
		t.Errorf("vector 0 %+v", msi[0])
	}
	put16(f, 0x52, msiEnable|7<<4) // more than there are
	put16(f, 0x52, 0)
	if h.active[irqMSI] != nil || !msi[1].masked {
		t.Errorf("MSI is off, but: %v, %+v", h.active, msi[1])
	}
	put16(f, 0x52, msiEnable)
	f.Reset()
	f.c.Reset()
	if h.active[irqMSI] != nil || !msi[0].masked {
		t.Errorf("after a reset: %v, %+v", h.active, msi[0])
	}
}

func TestCommandAndReset(t *testing.T) {
	h := newHW()
	f, _, rc := start(t, h)
	if got, want := h.took(), "[7:0x4=0200]"; got != want {
		t.Errorf("at the start the device was told %s, want %s", got, want)
	}
	if err := rc.Reset(); err != nil || strings.Contains(h.took(), "reset") {
		t.Errorf("the kernel has reset the device: once is enough (%v)", err)
	}
	put16(f, pci.RegCommand, pci.CommandMemory|pci.CommandMaster)
	if got, want := h.took(), "[7:0x4=0600]"; got != want {
		t.Errorf("the device was told %s, want %s", got, want)
	}
	put16(f, 0x72, 0x8000)
	put16(f, 0xa8, pci.DevCtlFLR)
	if got, want := h.took(), "[7:0x4=0200 reset 7:0x4=0200]"; got != want {
		t.Errorf("FLR: the device was told %s, want %s", got, want)
	}
	if h.active[irqMSIX] != nil || f.c.Uint16(pci.RegCommand) != 0 || f.c.Uint16(0xa8)&pci.DevCtlFLR != 0 {
		t.Errorf("after FLR: %v, command %#x", h.active, f.c.Uint16(pci.RegCommand))
	}
	put16(f, pci.RegCommand, pci.CommandMemory|pci.CommandMaster)
	put16(f, 0x72, 0x8000)
	h.took()
	f.Stop()
	if got, want := h.took(), "[7:0x4=0200]"; got != want || h.active[irqMSIX] != nil {
		t.Errorf("stopped: the device was told %s, want %s; interrupts %v", got, want, h.active)
	}
	f.Reset()
	if got, want := h.took(), "[7:0x4=0200 reset 7:0x4=0200]"; got != want {
		t.Errorf("reset after that: the device was told %s, want %s", got, want)
	}
}

// TestINTx: it is on while the function is, and neither kind of MSI; the guest's end of an
// interrupt has the host look again.
func TestINTx(t *testing.T) {
	h := newHW()
	f, m, _ := start(t, h)
	on := func() bool { return len(h.active[irqINTX]) == 1 && m.line != nil }
	if on() {
		t.Error("on before the guest turns the function on")
	}
	put16(f, pci.RegCommand, pci.CommandMemory)
	if !on() || m.line.slot != 1 || m.line.pin != 1 {
		t.Fatalf("off, or in the wrong place: %+v", m.line)
	}
	for range 2 {
		must(t, fire(h.active[irqINTX][0]))
		if !<-m.line.levels {
			t.Error("not raised")
		}
		m.line.ended()
		if got := <-h.unmasked; got != irqINTX {
			t.Errorf("index %d unmasked", got)
		}
	}
	for _, c := range []struct {
		what    string
		off, on func()
	}{
		{"INTx disable", func() { put16(f, pci.RegCommand, pci.CommandMemory|commandINTxOff) }, func() { put16(f, pci.RegCommand, pci.CommandMemory) }},
		{"MSI-X", func() { put16(f, 0x72, 0x8000) }, func() { put16(f, 0x72, 0) }},
		{"MSI", func() { put16(f, 0x52, msiEnable) }, func() { put16(f, 0x52, 0) }},
		{"function off", func() { put16(f, pci.RegCommand, 0) }, func() { put16(f, pci.RegCommand, pci.CommandMaster) }},
		{"reset", func() { f.Reset(); f.c.Reset() }, func() { put16(f, pci.RegCommand, pci.CommandMaster) }},
	} {
		c.off()
		if on() {
			t.Errorf("%s, yet it is on", c.what)
		}
		c.on()
		if !on() {
			t.Errorf("after %s it is off", c.what)
		}
	}
	must(t, f.Close())
	if on() || len(m.log.String()) != 0 {
		t.Errorf("on at the end; %s", m.log.String())
	}
}

// fire is the host's interrupt.
func fire(fd int32) error {
	_, err := unix.Write(int(fd), []byte{1, 0, 0, 0, 0, 0, 0, 0})
	return err
}

// TestINTxFails: the host may have no interrupt for it.
func TestINTxFails(t *testing.T) {
	h := newHW()
	f, m, _ := start(t, h)
	h.failIRQs = errors.New("busy")
	put16(f, pci.RegCommand, pci.CommandMemory)
	if m.line != nil || !strings.Contains(m.log.String(), "turn INTx on: busy") {
		t.Errorf("line %v; %s", m.line, m.log.String())
	}
	h.failIRQs = nil
	must(t, f.Close())
}

func TestROM(t *testing.T) {
	h := newHW()
	f, _, rc := start(t, h)
	h.put32(0, 0) // it is not looked at before the guest does
	at := f.c.Uint32(0x30)
	if at == 0 || at&(pci.MinROM-1) != 0 {
		t.Fatalf("at %#x", at)
	}
	put16(f, pci.RegCommand, pci.CommandMemory)
	mapped := func() (yes bool) {
		rc.Walk(func(_ pci.BDF, fn pci.Function) {
			for _, r := range fn.Config().Regions() {
				yes = yes || r.Index == 6 && r.Mapped && r.Size == 0x1000
			}
		})
		return yes
	}
	if mapped() {
		t.Error("mapped before it is enabled")
	}
	put32(f, 0x30, at|1)
	if !mapped() {
		t.Error("not mapped")
	}
	r := rom{hw: h, size: 0xc00}
	p := make([]byte, 4)
	r.Write(0, p)
	for off, want := range map[uint64]string{0: "55aa0600", 0xbfe: "0000ffff", 0xc00: "ffffffff", 1 << 40: "ffffffff"} {
		if r.Read(off, p); fmt.Sprintf("%x", p) != want {
			t.Errorf("at %#x: %x, want %s", off, p, want)
		}
	}
}

// TestLegacyIO: a function with memory and I/O BARs is shown without the latter, and somebody is told.
func TestLegacyIO(t *testing.T) {
	h := newHW()
	h.regions[regionConfig][0xa2] |= pcieTypeLegacy << 4
	f, m, _ := start(t, h)
	if !strings.Contains(m.log.String(), "I/O BAR not shown") || f.c.Uint32(pci.RegBAR+8) != 0 {
		t.Errorf("log %q, BAR %#x", m.log.String(), f.c.Uint32(pci.RegBAR+8))
	}
}

func TestRefused(t *testing.T) {
	for _, c := range []struct {
		want string
		do   func(h *fakeHW, m *fakeMachine)
	}{
		{"cannot be read", func(h *fakeHW, _ *fakeMachine) { h.put32(0, 0xffff_ffff) }},
		{"cannot be read", func(h *fakeHW, _ *fakeMachine) { h.regions[regionConfig] = h.regions[regionConfig][:32] }},
		{"header type is 1", func(h *fakeHW, _ *fakeMachine) { h.put16(pci.RegHeaderType, 1) }},
		{"capability list: broken at 0x40", func(h *fakeHW, _ *fakeMachine) { h.regions[regionConfig][0x9d] = 0x40 }},
		{"capability list: broken at 0x3c", func(h *fakeHW, _ *fakeMachine) { h.put16(pci.RegCapPointer, 0x3c) }},
		{"capability list: broken at 0x140", func(h *fakeHW, _ *fakeMachine) { h.put32(0x1a0, 0x1401_000b) }},
		{"neither MSI-X nor MSI, nor an INTx", func(h *fakeHW, _ *fakeMachine) { h.put16(pci.RegStatus, 0); h.noINTx = true }},
		{"registers are I/O ports (BAR 2)", func(h *fakeHW, _ *fakeMachine) {
			h.regions[0], h.regions[3] = nil, nil
			h.regions[regionConfig][0xa2] |= pcieTypeLegacy << 4
		}},
		{"option ROM has 33554432 bytes", func(h *fakeHW, _ *fakeMachine) { h.regions[regionROM] = make([]byte, 32<<20) }},
		{"in BAR 4, pending bits in BAR 3", func(h *fakeHW, _ *fakeMachine) { h.put32(0x74, 4) }},
		{"BAR 2, which it does not have", func(h *fakeHW, _ *fakeMachine) { h.put32(0x74, 2); h.put32(0x78, 0x2002) }},
		{"beyond BAR 3", func(h *fakeHW, _ *fakeMachine) { h.put32(0x78, 0x4003) }},
		{"overlap", func(h *fakeHW, _ *fakeMachine) { h.put32(0x78, 0x0003) }},
		{"not a power of two", func(h *fakeHW, _ *fakeMachine) { h.regions[3] = make([]byte, 0x3000) }},
		{"out of vectors", func(_ *fakeHW, m *fakeMachine) { m.limit = 2 }},
		{"out of vectors", func(_ *fakeHW, m *fakeMachine) { m.limit = 5 }},
		{"map 0x0-0x3fff of BAR 0: no", func(h *fakeHW, _ *fakeMachine) { h.failMmap = errors.New("no") }},
		{"MSI capability at 0x50", func(h *fakeHW, _ *fakeMachine) { h.regions[regionConfig][0x52] |= msiMaximum }},
	} {
		h, m := newHW(), newMachine()
		c.do(h, m)
		_, err := newFunction(h, m.options())
		if err == nil || !strings.HasPrefix(err.Error(), "device dev: ") || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v, want %q", err, c.want)
		}
		if !h.closed || h.mapped != 0 || slices.ContainsFunc(m.vectors, func(v *fakeVector) bool { return !v.closed }) {
			t.Errorf("%s: something stays open", c.want)
		}
	}
}

// TestWarnsOnce: a guest must not fill the host's log.
func TestWarnsOnce(t *testing.T) {
	h := newHW()
	f, m, _ := start(t, h)
	h.failIRQs = errors.New("the host is out of vectors")
	for range 10 {
		put16(f, 0x72, 0x8000)
		put16(f, 0x72, 0)
	}
	if n := strings.Count(m.log.String(), "\n"); n != 1 || !strings.Contains(m.log.String(), "out of vectors") {
		t.Errorf("%d lines:\n%s", n, m.log.String())
	}
}

func TestSparseAreas(t *testing.T) {
	caps := make([]byte, 96)
	le.PutUint16(caps, 3) // another capability
	le.PutUint32(caps[4:], 32+8)
	le.PutUint16(caps[8:], capSparse)
	le.PutUint32(caps[16:], 2)
	for i, v := range []uint64{0, 0x1000, 0x3000, 0x2000} {
		le.PutUint64(caps[24+8*i:], v)
	}
	for _, c := range []struct {
		off  uint32
		want string
	}{
		{32, "[0x0-0xfff 0x3000-0x4fff] true"}, {40, "[0x0-0xfff 0x3000-0x4fff] true"},
		{0, "[] false"}, {31, "[] false"}, {32 + 81, "[] false"}, {^uint32(0), "[] false"},
	} {
		areas, ok := sparseAreas(caps, c.off)
		if got := fmt.Sprint(areas, ok); got != c.want {
			t.Errorf("at %d: %s, want %s", c.off, got, c.want)
		}
	}
	le.PutUint32(caps[4:], 32) // a circle
	if _, ok := sparseAreas(caps, 32); ok {
		t.Error("found something in a circle")
	}
	le.PutUint32(caps[16:], 1000) // more than there is room for
	if areas, _ := sparseAreas(caps, 40); len(areas) != 4 {
		t.Errorf("%d areas", len(areas))
	}
}

// FuzzConfigSpace has a device say anything, and a guest write anything anywhere.
func FuzzConfigSpace(f *testing.F) {
	f.Add(newHW().regions[regionConfig][:0x200], []byte{4, 0, 6, 0, 0x72, 0, 0x80, 0, 0x52, 0, 0x11, 0})
	f.Fuzz(func(t *testing.T, space, writes []byte) {
		h, m := newHW(), newMachine()
		copy(h.regions[regionConfig], space)
		fn, err := newFunction(h, m.options())
		if err != nil {
			if !h.closed || h.mapped != 0 {
				t.Errorf("left open after %v", err)
			}
			return
		}
		header := get(fn, 0, 4)
		for len(writes) >= 4 {
			off := uint64(le.Uint16(writes))
			fn.c.Write(off, writes[2:4])
			get(fn, off&^7, 8)
			writes = writes[4:]
		}
		if !bytes.Equal(header, get(fn, 0, 4)) {
			t.Error("the guest changed the vendor or device")
		}
		fn.Reset()
		fn.c.Reset()
		if err := fn.Close(); err != nil || h.mapped != 0 || len(m.slots) != 0 {
			t.Errorf("close: %v, %d mappings, %d slots", err, h.mapped, len(m.slots))
		}
	})
}
