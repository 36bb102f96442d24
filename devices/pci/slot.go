package pci

import (
	"fmt"
	"sync"
)

// UnplugMode is how a function leaves its slot.
type UnplugMode int

// Ways to unplug.
const (
	// Cooperative asks the guest, which lets go of the function while it still works.
	Cooperative UnplugMode = iota
	// Surprise takes the function away and tells the guest afterwards.
	Surprise
)

func (m UnplugMode) String() string { return [...]string{"cooperative", "surprise"}[m] }

// SlotState is where a slot stands between its guest and its function.
type SlotState uint8

// States of a slot.
const (
	SlotEmpty     SlotState = iota
	SlotPlugging            // the function is on the bus; the guest has not taken it yet
	SlotPresent             // the guest has it
	SlotRequested           // the guest is to let go of it, and has not begun
	SlotBusy                // the guest has begun
	SlotDraining            // it is off the bus; a vCPU or the guest's driver may not know yet
)

var slotStates = [...]string{"empty", "plugging", "present", "requested", "busy", "draining"}

func (s SlotState) String() string { return slotStates[s] }

// SlotHost is what the slots of root ports need of the machine. The methods are called with no
// lock held, on vCPUs' threads too, and must not wait for a vCPU.
type SlotHost interface {
	// SlotEvent tells the guest, by ACPI, that a slot's event waits in the [SlotBlock].
	SlotEvent()
	// Drain has done called once no vCPU is in an access that began before this call.
	Drain(done func())
	// Ejected says that f has left: it is off its bus, was stopped or reset, and no vCPU can reach it. It
	// is not closed, which is up to the machine now.
	Ejected(s *Slot, f Function)
	// Refused says that a request came to nothing and the function stays.
	Refused(s *Slot, why string)
	// Changed says that the slot has come to another state.
	Changed(s *Slot, state SlotState)
}

// noHost is for ports whose slots nobody watches.
type noHost struct{}

func (noHost) SlotEvent()               {}
func (noHost) Drain(done func())        { done() }
func (noHost) Ejected(*Slot, Function)  {}
func (noHost) Refused(*Slot, string)    {}
func (noHost) Changed(*Slot, SlotState) {}

// Slot is the slot of a root port. It holds one device, of which function 0 is plugged and
// unplugged; functions 1 to 7, which come with the machine only, leave with it.
type Slot struct {
	port *RootPort

	mu       sync.Mutex // taken before the root complex's lock
	state    SlotState
	draining []Function // off the bus, and a vCPU may be in there
	unaware  bool       // draining: the guest has not noticed yet that the device has gone

	// ACPI: events that the guest has not taken, and how many checks it has not reported on.
	check, eject bool
	checking     uint8

	// Native: the indicator as last written, a press or absence that the guest has been shown
	// for the request, and whether the interrupt condition holds (PCIe 6.7.3.4).
	indicator uint16
	asked     bool
	interrupt bool
}

// Slot is the port's slot.
func (p *RootPort) Slot() *Slot { return p.slot }

// Port is the root port that has the slot.
func (s *Slot) Port() *RootPort { return s.port }

// Occupant is the function in the slot, nil if there is none.
func (s *Slot) Occupant() Function {
	at := s.port.c.at.Load()
	if at == nil {
		return nil
	}
	at.bus.rc.mu.Lock()
	defer at.bus.rc.mu.Unlock()
	return s.port.secondary.fns[0]
}

// State is where the slot stands. A guest has a function that it has enabled, however it found it;
// [SlotHost] hears of that when it has dealt with the slot.
func (s *Slot) State() SlotState {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == SlotPlugging {
		if f := s.Occupant(); f != nil && f.Config().Uint16(RegCommand)&(CommandMemory|CommandMaster) != 0 {
			return SlotPresent
		}
	}
	return s.state
}

// then collects what to do once the lock is released.
type then []func()

func (t *then) add(f func()) { *t = append(*t, f) }

// locked runs f with the lock held, then what it wants done without.
func (s *Slot) locked(f func(after *then)) {
	var after then
	func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		was := s.state
		if f(&after); s.state != was {
			now := s.state
			after.add(func() { s.port.cfg.Host.Changed(s, now) })
		}
	}()
	for _, g := range after {
		g()
	}
}

// Plug puts f, which is on no bus, into the empty slot, as after power-on. The guest is told as
// soon as it listens.
func (s *Slot) Plug(f Function) (err error) {
	resetFunction(f)
	s.locked(func(after *then) {
		// A guest that works the slot itself looks again after it has noticed what left.
		free := s.state == SlotEmpty || s.state == SlotDraining && s.draining == nil && s.native()
		if !free {
			err = fmt.Errorf("plug %s: the slot of %s is %s", f.Config().id, s.port.c.id, s.describe())
			return
		}
		s.port.secondary.exorcise()
		if err = s.port.secondary.add(0, 0, f); err != nil {
			return
		}
		s.state, s.unaware, s.asked = SlotPlugging, false, false
		if !s.native() { // it will look as if it had always been there
			s.setIndicator(indicatorOn)
		}
		s.announce(after)
	})
	return err
}

// describe says why the slot cannot be used, in an error.
func (s *Slot) describe() string {
	if f := s.Occupant(); f != nil {
		return fmt.Sprintf("%s: %s is there", s.state, f.Config().id)
	}
	if s.state == SlotDraining {
		return "draining: the guest has not noticed yet that its device has gone"
	}
	return s.state.String()
}

// RequestUnplug begins to unplug what is in the slot; SlotHost hears how that ends. A request
// that waits may be repeated, which reminds the guest, or made a surprise.
func (s *Slot) RequestUnplug(mode UnplugMode) (err error) {
	s.locked(func(after *then) {
		switch {
		case s.state == SlotEmpty || s.state == SlotDraining:
			err = fmt.Errorf("unplug from %s: the slot is %s", s.port.c.id, s.describe())
		case mode == Surprise:
			s.pull(after, true)
		default:
			if s.state != SlotBusy {
				s.state = SlotRequested
			}
			s.request(after)
		}
	})
	return err
}

// Withdraw takes back a request. False says that it is too late: the guest has begun, and how
// it ends is not known yet.
func (s *Slot) Withdraw() (done bool) {
	s.locked(func(after *then) {
		switch {
		case s.state == SlotBusy && s.asked && s.indicator == indicatorBlink:
			// A second press cancels (PCIe 6.7.1.5); the indicator says whether it was in time.
			s.status(after, slotStatusButton)
			return
		case s.state != SlotRequested:
		case s.asked && s.statusBits()&slotStatusButton == 0:
			return // the guest has seen the press
		default:
			s.clearStatus(slotStatusButton)
			s.state, s.eject, s.asked = SlotPresent, false, false
			done = true
		}
	})
	return done
}

// pull takes the device off the bus. Unaware says that the guest does not know yet.
func (s *Slot) pull(after *then, unaware bool) {
	s.draining = append(s.draining, s.port.secondary.clear(unaware)...)
	s.state, s.unaware, s.eject, s.asked = SlotDraining, unaware, false, false
	if s.native() && s.indicator == indicatorOff {
		s.unaware = false // it does not use what is in there
	}
	s.clearStatus(slotStatusButton)
	s.port.show(false)
	if !s.native() && !s.port.cfg.Native {
		s.setIndicator(indicatorOff)
	}
	if unaware {
		s.announce(after)
	} else if s.native() {
		s.status(after, slotStatusPresenceEvent|slotStatusLinkEvent)
	}
	after.add(func() { s.port.cfg.Host.Drain(s.drained) })
}

// drained is called when no vCPU can be in what has left the bus.
func (s *Slot) drained() {
	s.locked(func(after *then) {
		fns := s.draining
		s.draining = nil
		s.settle()
		after.add(func() {
			for _, f := range fns {
				stopFunction(f) // a driver that skipped its teardown has left DMA running
				s.port.cfg.Host.Ejected(s, f)
			}
		})
	})
}

// settle makes the slot empty if nobody has to know any more.
func (s *Slot) settle() {
	if s.state == SlotDraining && s.draining == nil && !s.unaware {
		s.state = SlotEmpty
		s.port.secondary.exorcise()
	}
}

// refuse ends a request with the function where it was.
func (s *Slot) refuse(after *then, why string) {
	s.state, s.asked = SlotPresent, false
	after.add(func() { s.port.cfg.Host.Refused(s, why) })
}

// announce tells the guest that what is in the slot has changed.
func (s *Slot) announce(after *then) {
	switch {
	case s.native():
		s.status(after, slotStatusPresenceEvent|slotStatusLinkEvent)
	case !s.port.cfg.Native:
		s.check = true
		after.add(s.port.cfg.Host.SlotEvent)
	}
	// Otherwise the guest looks by itself when it enables the notification.
}

// request asks the guest to let go, if it listens and is not busy with the slot.
func (s *Slot) request(after *then) {
	switch {
	case !s.native() && !s.port.cfg.Native:
		s.eject = true
		after.add(s.port.cfg.Host.SlotEvent)
	case !s.native() || s.asked || s.indicator == indicatorBlink:
		// Not enabled, or a press would mean to cancel: controlWritten goes on.
	case s.indicator == indicatorOff:
		s.pull(after, false) // the guest does not use it
	case s.port.cfg.Button:
		s.asked = true
		s.status(after, slotStatusButton)
	default: // no way to ask but to show an empty slot, with the device alive
		s.asked = true
		s.state = SlotBusy
		s.port.show(false)
		s.status(after, slotStatusPresenceEvent|slotStatusLinkEvent)
	}
}

// reset is the machine's: no vCPU runs, and the guest has forgotten all. What was being
// unplugged has gone.
func (s *Slot) reset() {
	s.locked(func(after *then) {
		s.check, s.eject, s.asked, s.checking = false, false, false, 0
		s.interrupt = false
		s.port.c.update16(s.port.c.pcie+pcieSlotCtl, slotCtlInterruptEnable, 0)
		switch s.state {
		case SlotRequested, SlotBusy:
			s.pull(after, false)
		case SlotPlugging:
			s.state = SlotPresent
		}
		s.unaware = false
		s.port.secondary.exorcise()
		s.settle()
	})
}

// Settle does what the guest would have to do, for a guest that has not run since the machine
// was reset.
func (s *Slot) Settle() { s.reset() }
