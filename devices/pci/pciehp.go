package pci

// Native hot-plug: PCIe 6.7.
//
//	plug      presence and link up                               -> indicator blinks, then is on
//	request   button (if there is one), else presence, link down -> indicator blinks, then is off
//	surprise  presence and link down                             -> indicator off
//
// The indicator that the guest turns off is how a slot without a power controller says that
// the guest has let go.

// The power indicator in the slot control register: PCIe 7.5.3.10.
const (
	indicatorOn    = 1 << 8
	indicatorBlink = 2 << 8
	indicatorOff   = 3 << 8
)

// initSlotRegisters defines the registers of the slot.
func (s *Slot) initSlotRegisters() {
	p := s.port
	c, off := p.c, p.c.pcie
	capabilities := slotCapPowerIndicator | slotCapHotPlugSurprise | slotCapHotPlugCapable | slotCapNoCommandDone |
		uint32(p.cfg.Slot)<<slotCapNumberShift
	control := uint16(slotCtlPresenceEnable | slotCtlInterruptEnable | slotCtlPowerIndicator | slotCtlLinkEnable)
	status := uint16(slotStatusPresenceEvent | slotStatusLinkEvent)
	if p.cfg.Button {
		capabilities |= slotCapButton
		control |= slotCtlButtonEnable
		status |= slotStatusButton
	}
	c.define32(off+pcieSlotCap, capabilities, 0)
	c.define16(off+pcieSlotCtl, indicatorOff, control)
	c.SetW1C16(off+pcieSlotStatus, status)
	s.indicator = indicatorOff
	c.OnWrite(off+pcieSlotCtl, 4, s.controlWritten)
	c.resets = append(c.resets, s.resetRegisters)
}

// native says that the guest listens to the slot's own interrupt.
func (s *Slot) native() bool { return s.control()&slotCtlInterruptEnable != 0 }

func (s *Slot) control() uint16    { return s.port.c.Uint16(s.port.c.pcie + pcieSlotCtl) }
func (s *Slot) statusBits() uint16 { return s.port.c.Uint16(s.port.c.pcie + pcieSlotStatus) }

// status raises events. Before the guest has enabled the interrupt it does not want to hear
// of any; Linux would take them for a change of what it has found by then.
func (s *Slot) status(after *then, events uint16) {
	if s.native() {
		s.port.c.update16(s.port.c.pcie+pcieSlotStatus, events, events)
		s.updateInterrupt(after)
	}
}

func (s *Slot) clearStatus(events uint16) {
	s.port.c.update16(s.port.c.pcie+pcieSlotStatus, events, 0)
}

// updateInterrupt sends the message when the condition comes to hold: PCIe 6.7.3.4.
func (s *Slot) updateInterrupt(after *then) {
	control, status := s.control(), s.statusBits()
	// The enables of presence and link events stand where the event bits do, but for the link's.
	enabled := control & (slotCtlButtonEnable | slotCtlPresenceEnable)
	if control&slotCtlLinkEnable != 0 {
		enabled |= slotStatusLinkEvent
	}
	was := s.interrupt
	s.interrupt = control&slotCtlInterruptEnable != 0 && status&enabled != 0
	if s.interrupt && !was {
		after.add(func() { s.port.msix.Signal(0) })
	}
}

// controlWritten follows the guest's writes of slot control and slot status.
func (s *Slot) controlWritten() {
	s.locked(func(after *then) {
		was := s.indicator
		s.indicator = s.control() & slotCtlPowerIndicator
		if s.indicator != was {
			s.indicated(after, was)
		}
		if s.state == SlotRequested && s.native() {
			s.request(after)
		}
		s.updateInterrupt(after)
	})
}

// indicated is what a change of the power indicator means.
func (s *Slot) indicated(after *then, was uint16) {
	switch s.indicator {
	case indicatorBlink:
		if s.state == SlotRequested && s.asked {
			s.state = SlotBusy
		}
	case indicatorOn:
		switch {
		case s.state == SlotPlugging:
			s.state = SlotPresent
		case s.state == SlotBusy && s.asked && was == indicatorBlink && s.port.cfg.Button:
			s.refuse(after, "the guest keeps the slot turned on")
		}
	case indicatorOff:
		switch s.state {
		case SlotPresent, SlotRequested, SlotBusy:
			s.pull(after, false)
		case SlotDraining:
			s.unaware = false
			s.settle()
		}
	}
}

// resetRegisters gives the indicator of an occupied slot the value that its guest expects to
// find: on.
func (s *Slot) resetRegisters() {
	indicator := uint16(indicatorOff)
	if s.Occupant() != nil {
		indicator = indicatorOn
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setIndicator(indicator)
	s.interrupt = false
}

// setIndicator sets the indicator in the place of the guest.
func (s *Slot) setIndicator(v uint16) {
	s.port.c.update16(s.port.c.pcie+pcieSlotCtl, slotCtlPowerIndicator, v)
	s.indicator = v
}
