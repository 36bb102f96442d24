package chipset

import (
	"encoding/binary"
	"slices"
	"sync"

	"baton/devices"
)

// IOAPICSize is the size of the IOAPIC's window, in bytes.
const IOAPICSize = 0x1000

// Registers, 82093AA data sheet 3.1 and 3.2; version 0x20 and its EOI register are the
// ICH's (ICH9 data sheet, 13.5).
const (
	ioapicSelect = 0x00
	ioapicWindow = 0x10
	ioapicEOI    = 0x40

	ioapicRegID      = 0x00
	ioapicRegVersion = 0x01
	ioapicRegArb     = 0x02
	ioapicRegTable   = 0x10 // two registers a pin

	ioapicVersion = 0x20
	ioapicIDMask  = 0x0f << 24
)

// A redirection table entry, 82093AA data sheet 3.2.4.
const (
	rteVector    = 0xff
	rteRemoteIRR = 1 << 14
	rteLevel     = 1 << 15
	rteMasked    = 1 << 16
	// Delivery status and remote IRR are read-only.
	rteWritable = 0xff<<56 | rteMasked | rteLevel | 1<<13 | 0xfff
)

// IOAPIC is the interrupt controller for wired interrupts, in userspace, as KVM's split
// irqchip wants it. It turns each interrupt into an MSI. A level-triggered pin waits, with
// remote IRR set, for the EOI that KVM reports (KVM_EXIT_IOAPIC_EOI); KVM reports those of
// the vectors that it finds level-triggered in its routes, hence the route hook.
//
// Lines say active or not, so a pin's polarity does not matter here.
type IOAPIC struct {
	out devices.MSISink

	mu       sync.Mutex
	onRoute  func(pin int, m devices.MSI, masked bool)
	id       uint32
	selected byte
	pins     []pin
}

type pin struct {
	rte    uint64
	active int // how many of its lines are high; they are OR-ed
	shared []*ResampleLine
}

type line struct {
	ioapic *IOAPIC
	pin    int
	high   bool
}

// NewIOAPIC returns an IOAPIC with the given number of pins (1 to 240), all masked.
func NewIOAPIC(out devices.MSISink, pins int) *IOAPIC {
	a := &IOAPIC{out: out, onRoute: func(int, devices.MSI, bool) {}, pins: make([]pin, pins)}
	a.Reset()
	return a
}

// OnRoute sets the function that hears of every change of a pin's message or mask, before
// an interrupt can use it. It is called with the IOAPIC locked and must not call it.
func (a *IOAPIC) OnRoute(f func(pin int, m devices.MSI, masked bool)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.onRoute = f
}

// Line returns a new line to the pin. Lines to one pin are OR-ed.
func (a *IOAPIC) Line(pin int) devices.Line { return &line{ioapic: a, pin: pin} }

// ResampleLine is a line whose level is not known all the time, but only looked at: by the
// interrupt of a host's device, which stays quiet until it is told to look again.
type ResampleLine struct {
	line
	ended func()
}

// ResampleLine returns a new line to the pin. Each EOI lowers it and then calls ended, on the
// vCPU's thread and without locks, which sees to it that the line is raised again if need be.
func (a *IOAPIC) ResampleLine(pin int, ended func()) *ResampleLine {
	l := &ResampleLine{line{ioapic: a, pin: pin}, ended}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pins[pin].shared = append(a.pins[pin].shared, l)
	return l
}

// Close lowers the line and takes it off the pin.
func (l *ResampleLine) Close() {
	l.SetLevel(false)
	a := l.ioapic
	a.mu.Lock()
	defer a.mu.Unlock()
	p := &a.pins[l.pin]
	p.shared = slices.DeleteFunc(p.shared, func(o *ResampleLine) bool { return o == l })
}

// Reset masks all pins. Lines keep their level.
func (a *IOAPIC) Reset() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.id, a.selected = 0, 0
	for i := range a.pins {
		a.setRTE(i, rteMasked)
	}
}

// EOI ends the level-triggered interrupts with this vector; those whose line is still high
// come again.
func (a *IOAPIC) EOI(vector uint8) {
	for _, l := range a.endOfInterrupt(vector) {
		l.ended()
	}
}

// endOfInterrupt returns the lines that it has lowered.
func (a *IOAPIC) endOfInterrupt(vector uint8) (lowered []*ResampleLine) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range a.pins {
		p := &a.pins[i]
		if p.rte&rteRemoteIRR == 0 || uint8(p.rte&rteVector) != vector {
			continue
		}
		p.rte &^= rteRemoteIRR
		for _, l := range p.shared {
			if l.high {
				l.high = false
				p.active--
				lowered = append(lowered, l)
			}
		}
		a.serve(p)
	}
	return lowered
}

// SetLevel implements devices.Line. An edge on a masked pin is lost (82093AA data sheet,
// 3.2.4, Interrupt Mask), a level is not.
func (l *line) SetLevel(high bool) {
	a := l.ioapic
	a.mu.Lock()
	defer a.mu.Unlock()
	if l.high == high {
		return
	}
	l.high = high
	p := &a.pins[l.pin]
	if !high {
		p.active--
		return
	}
	p.active++
	switch {
	case p.rte&rteLevel != 0:
		a.serve(p)
	case p.active == 1 && p.rte&rteMasked == 0:
		_ = a.out.SignalMSI(message(p.rte)) // fails when the guest named no CPU
	}
}

// serve delivers a level-triggered interrupt if one is due.
func (a *IOAPIC) serve(p *pin) {
	if p.active == 0 || p.rte&rteLevel == 0 || p.rte&(rteMasked|rteRemoteIRR) != 0 {
		return
	}
	if a.out.SignalMSI(message(p.rte)) == nil { // what reached no CPU gets no EOI
		p.rte |= rteRemoteIRR
	}
}

// setRTE writes an entry. An entry that becomes edge triggered forgets its remote IRR,
// which is how a guest clears it without an EOI.
func (a *IOAPIC) setRTE(i int, rte uint64) {
	p := &a.pins[i]
	old := p.rte
	if rte &= rteWritable; rte&rteLevel != 0 {
		rte |= old & rteRemoteIRR
	}
	p.rte = rte
	if (old^rte)&rteWritable != 0 {
		a.onRoute(i, message(rte), rte&rteMasked != 0)
	}
	a.serve(p)
}

// message is the MSI of an entry: Intel SDM vol. 3, 11.11. Delivery mode, destination mode
// and trigger mode are the same bits in other places.
func message(rte uint64) devices.MSI {
	return devices.MSI{
		Addr: 0xfee00000 | rte>>56<<12 | rte>>11&1<<2,
		Data: uint32(rte&0x7ff | rte&rteLevel),
	}
}

// Read implements devices.BusDevice. Registers are 32 bits wide; other accesses read as
// all ones.
func (a *IOAPIC) Read(off uint64, p []byte) {
	devices.AllOnes(p)
	if len(p) != 4 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch off {
	case ioapicSelect:
		binary.LittleEndian.PutUint32(p, uint32(a.selected))
	case ioapicWindow:
		binary.LittleEndian.PutUint32(p, a.register())
	}
}

func (a *IOAPIC) register() uint32 {
	switch i := int(a.selected); {
	case i == ioapicRegID, i == ioapicRegArb:
		return a.id
	case i == ioapicRegVersion:
		return ioapicVersion | uint32(len(a.pins)-1)<<16
	case i >= ioapicRegTable && i < ioapicRegTable+2*len(a.pins):
		i -= ioapicRegTable
		return uint32(a.pins[i/2].rte >> (i % 2 * 32))
	}
	return 0xffffffff
}

// Write implements devices.BusDevice. The register select is a byte, so any width will do
// for it; accesses to the others that are not 32 bits wide are dropped.
func (a *IOAPIC) Write(off uint64, p []byte) {
	switch {
	case off == ioapicSelect && len(p) > 0:
		a.mu.Lock()
		a.selected = p[0]
		a.mu.Unlock()
	case off == ioapicWindow && len(p) == 4:
		a.setRegister(binary.LittleEndian.Uint32(p))
	case off == ioapicEOI && len(p) == 4:
		a.EOI(p[0])
	}
}

func (a *IOAPIC) setRegister(v uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := int(a.selected)
	if i == ioapicRegID {
		a.id = v & ioapicIDMask
	}
	if i -= ioapicRegTable; i < 0 || i >= 2*len(a.pins) {
		return
	}
	rte, shift := a.pins[i/2].rte, i%2*32
	a.setRTE(i/2, rte&^(0xffffffff<<shift)|uint64(v)<<shift)
}
