package chipset

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"

	"baton/devices"
)

// lapics records the messages that arrive, and refuses them while refuse is set.
type lapics struct {
	got    []devices.MSI
	refuse bool
}

func (l *lapics) SignalMSI(m devices.MSI) error {
	if l.refuse {
		return errors.New("no such CPU")
	}
	l.got = append(l.got, m)
	return nil
}

type ioapic struct {
	*IOAPIC
	t   testing.TB
	cpu *lapics
}

func newIOAPIC(t *testing.T) *ioapic {
	cpu := &lapics{}
	return &ioapic{NewIOAPIC(cpu, 24), t, cpu}
}

func (a *ioapic) get(off uint64) uint32 {
	p := make([]byte, 4)
	a.Read(off, p)
	return binary.LittleEndian.Uint32(p)
}

func (a *ioapic) put(off uint64, v uint32) {
	a.Write(off, binary.LittleEndian.AppendUint32(nil, v))
}

func (a *ioapic) reg(i uint32) uint32 {
	a.put(ioapicSelect, i)
	return a.get(ioapicWindow)
}

func (a *ioapic) setReg(i, v uint32) {
	a.put(ioapicSelect, i)
	a.put(ioapicWindow, v)
}

// program writes an entry the way Linux does: the high half first.
func (a *ioapic) program(pin int, rte uint64) {
	a.setReg(uint32(ioapicRegTable+2*pin+1), uint32(rte>>32))
	a.setReg(uint32(ioapicRegTable+2*pin), uint32(rte))
}

func (a *ioapic) rte(pin int) uint64 {
	return uint64(a.reg(uint32(ioapicRegTable+2*pin))) | uint64(a.reg(uint32(ioapicRegTable+2*pin+1)))<<32
}

// want checks the vectors of the messages since the last call.
func (a *ioapic) want(what string, vectors ...uint8) {
	a.t.Helper()
	var got []uint8
	for _, m := range a.cpu.got {
		got = append(got, uint8(m.Data))
	}
	if !slices.Equal(got, vectors) {
		a.t.Errorf("%s: vectors %#x, want %#x", what, got, vectors)
	}
	a.cpu.got = nil
}

func TestIOAPICRegisters(t *testing.T) {
	a := newIOAPIC(t)
	for _, c := range []struct {
		name             string
		reg, write, want uint32
	}{
		{"ID", 0, 0xffffffff, 0x0f000000},
		{"version", 1, 0xffffffff, 0x00170020},
		{"arbitration is the ID", 2, 0, 0x0f000000},
		{"nothing", 3, 0, 0xffffffff},
		{"last entry, low", 0x3e, 0xffffffff, 0x0001afff},
		{"last entry, high", 0x3f, 0xffffffff, 0xff000000},
		{"after the last entry", 0x40, 0, 0xffffffff},
		{"last index", 0xff, 0, 0xffffffff},
	} {
		a.setReg(c.reg, c.write)
		if got := a.reg(c.reg); got != c.want {
			t.Errorf("%s: %#x, want %#x", c.name, got, c.want)
		}
	}
	if got := a.get(ioapicSelect); got != 0xff {
		t.Errorf("register select %#x", got)
	}
	a.Reset()
	for pin := range 24 {
		if got := a.rte(pin); got != rteMasked {
			t.Errorf("pin %d after reset: %#x", pin, got)
		}
	}
}

func TestIOAPICMessage(t *testing.T) {
	for _, c := range []struct {
		name string
		rte  uint64
		want devices.MSI
	}{
		{"fixed, physical, edge", 3<<56 | 0x31, devices.MSI{Addr: 0xfee03000, Data: 0x31}},
		{"fixed, logical, level", 0xff<<56 | rteLevel | 1<<11 | 0x41, devices.MSI{Addr: 0xfeeff004, Data: 0x8041}},
		{"lowest priority", 1<<56 | 1<<11 | 1<<8 | 0x51, devices.MSI{Addr: 0xfee01004, Data: 0x151}},
		{"NMI", 4 << 8, devices.MSI{Addr: 0xfee00000, Data: 0x400}},
		{"active low is no part of it", 1<<13 | 0x61, devices.MSI{Addr: 0xfee00000, Data: 0x61}},
	} {
		a := newIOAPIC(t)
		a.program(5, c.rte)
		a.Line(5).SetLevel(true)
		if len(a.cpu.got) != 1 || a.cpu.got[0] != c.want {
			t.Errorf("%s: %#x, want %#x", c.name, a.cpu.got, c.want)
		}
	}
}

func TestIOAPICEdge(t *testing.T) {
	a := newIOAPIC(t)
	line := a.Line(4)
	line.SetLevel(true)
	a.want("masked")
	a.program(4, 0x30)
	a.want("an edge while masked is lost")
	line.SetLevel(true)
	a.want("no edge")
	line.SetLevel(false)
	line.SetLevel(true)
	a.want("edge", 0x30)
	a.EOI(0x30)
	a.want("EOI of an edge")
	a.program(4, 0x31)
	a.want("reprogrammed while high")
}

func TestIOAPICLevel(t *testing.T) {
	a := newIOAPIC(t)
	line := a.Line(10)
	a.program(10, rteLevel|0x40)
	line.SetLevel(true)
	a.want("raised", 0x40)
	if a.rte(10)&rteRemoteIRR == 0 {
		t.Error("remote IRR is not set")
	}
	line.SetLevel(false)
	line.SetLevel(true)
	a.want("in service")
	a.EOI(0x41)
	a.want("another's EOI")
	a.EOI(0x40)
	a.want("EOI while high", 0x40)
	line.SetLevel(false)
	a.EOI(0x40)
	a.want("EOI while low")
	if a.rte(10)&rteRemoteIRR != 0 {
		t.Error("remote IRR is still set")
	}

	a.program(10, rteMasked|rteLevel|0x40)
	line.SetLevel(true)
	a.want("masked")
	a.program(10, rteLevel|0x40)
	a.want("the level outlasts the mask", 0x40)
	a.program(10, rteMasked|rteLevel|0x40)
	a.EOI(0x40)
	a.want("EOI while masked")
	a.program(10, rteLevel|0x40)
	a.want("unmasked", 0x40)

	a.put(ioapicEOI, 0x40)
	a.want("EOI register", 0x40)

	// Linux' way to end an interrupt where there is no EOI register.
	a.program(10, rteMasked|0x40)
	if a.rte(10)&rteRemoteIRR != 0 {
		t.Error("an edge-triggered pin has remote IRR")
	}
	a.program(10, rteLevel|0x40)
	a.want("back to level", 0x40)

	a.setReg(ioapicRegTable+20, uint32(rteRemoteIRR)) // read-only
	a.program(10, rteMasked|rteLevel|rteRemoteIRR)
	if a.rte(10)&rteRemoteIRR != 0 {
		t.Error("the guest has set remote IRR")
	}
}

// What nobody received gets no EOI either: it must not wait for one.
func TestIOAPICUndelivered(t *testing.T) {
	a := newIOAPIC(t)
	a.cpu.refuse = true
	a.program(3, rteLevel|0x77)
	a.Line(3).SetLevel(true)
	a.cpu.refuse = false
	a.program(3, 1<<56|rteLevel|0x77)
	a.want("sent to a CPU that is there", 0x77)
}

func TestIOAPICSharedPin(t *testing.T) {
	a := newIOAPIC(t)
	one, two := a.Line(7), a.Line(7)
	a.program(7, rteLevel|0x50)
	one.SetLevel(true)
	two.SetLevel(true)
	a.want("raised by two", 0x50)
	one.SetLevel(false)
	a.EOI(0x50)
	a.want("one still needs service", 0x50)
	two.SetLevel(false)
	a.EOI(0x50)
	a.want("none does")
}

func TestIOAPICRouteHook(t *testing.T) {
	a := newIOAPIC(t)
	var log []string
	a.OnRoute(func(pin int, m devices.MSI, masked bool) {
		log = append(log, fmt.Sprintf("%d %#x %#x %v, %d sent", pin, m.Addr, m.Data, masked, len(a.cpu.got)))
	})
	a.Line(2).SetLevel(true)
	a.program(2, 1<<56|rteLevel|0x20)
	a.program(2, 1<<56|rteLevel|0x20) // no change
	a.EOI(0x20)                       // remote IRR is not part of the route
	a.Reset()
	a.Reset()
	want := []string{
		"2 0xfee01000 0x0 true, 0 sent",
		"2 0xfee01000 0x8020 false, 0 sent", // before the interrupt that waits
		"2 0xfee00000 0x0 true, 2 sent",
	}
	if !slices.Equal(log, want) {
		t.Errorf("got %q\nwant %q", log, want)
	}
}

func TestIOAPICOddAccesses(t *testing.T) {
	a := newIOAPIC(t)
	a.Write(ioapicSelect, []byte{0x10}) // a byte is enough to select
	if got := a.get(ioapicSelect); got != 0x10 {
		t.Errorf("selected %#x", got)
	}
	for _, n := range []int{0, 1, 2, 3, 5, 8, 64} {
		p := make([]byte, n)
		a.Write(ioapicWindow, p)
		a.Write(ioapicEOI, p)
		a.Read(ioapicWindow, p)
		for _, v := range p {
			if v != 0xff {
				t.Errorf("read of %d bytes: % x", n, p)
				break
			}
		}
	}
	if got := a.get(ioapicWindow); got != rteMasked {
		t.Errorf("odd writes changed the entry to %#x", got)
	}
	for _, off := range []uint64{1, 4, 0x14, 0x44, 0xffc, 0xffff, 1 << 40} {
		if a.put(off, 0); a.get(off) != 0xffffffff {
			t.Errorf("there is a register at %#x", off)
		}
	}
}

// FuzzIOAPIC lets a hostile guest and busy lines at the IOAPIC. Each four bytes are a
// step. Interrupts may come only from pins that are programmed for them.
func FuzzIOAPIC(f *testing.F) {
	f.Add([]byte{0, 0x10, 0, 0x80, 1, 0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0})
	f.Add([]byte{0, 0x12, 0x40, 0, 1, 1, 1, 0, 3, 0x40, 0, 0})
	f.Fuzz(func(t *testing.T, steps []byte) {
		a := newIOAPIC(t)
		var lines []devices.Line
		for pin := range 24 {
			lines = append(lines, a.Line(pin))
		}
		for ; len(steps) >= 4; steps = steps[4:] {
			s := steps[:4]
			before := len(a.cpu.got)
			switch s[0] % 4 {
			case 0:
				a.setReg(uint32(s[1]), uint32(s[2])|uint32(s[3])<<8)
			case 1:
				lines[int(s[1])%len(lines)].SetLevel(s[2]&1 != 0)
			case 2:
				a.EOI(s[1])
			case 3:
				a.Write(uint64(s[1])|uint64(s[2])<<8, make([]byte, s[3]%16))
				a.Read(uint64(s[1])|uint64(s[2])<<8, make([]byte, s[3]%16))
			}
			for _, m := range a.cpu.got[before:] {
				if !slices.ContainsFunc(a.pins, func(p pin) bool { return message(p.rte) == m && p.rte&rteMasked == 0 && p.active > 0 }) {
					t.Fatalf("message %#x from no pin", m)
				}
			}
			for i, p := range a.pins {
				due := p.active > 0 && p.rte&rteLevel != 0 && p.rte&rteMasked == 0
				if due && p.rte&rteRemoteIRR == 0 {
					t.Fatalf("pin %d waits and nothing will serve it: %#x", i, p.rte)
				}
			}
		}
	})
}

// A line that is sampled: the EOI lowers it, and the device raises it again if it has reason to.
func TestIOAPICResample(t *testing.T) {
	a := newIOAPIC(t)
	ended := 0
	line := a.ResampleLine(17, func() { ended++; a.want("before the device has looked") })
	other := a.Line(17)
	a.program(17, rteLevel|0x51)
	line.SetLevel(true)
	a.want("raised", 0x51)
	a.EOI(0x51)
	a.want("EOI")
	if ended != 1 {
		t.Errorf("told %d times", ended)
	}
	line.SetLevel(true)
	a.want("raised again", 0x51)
	other.SetLevel(true)
	line.Close()
	a.EOI(0x51)
	a.want("the other one is still high", 0x51)
	if ended != 1 {
		t.Error("told after it was closed")
	}
	other.SetLevel(false)
	a.EOI(0x51)
	a.want("all is quiet")
}
