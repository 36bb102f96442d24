package pci

// SlotBlock is the registers by which AML (package boot/acpi) works the slots: three of 32
// bits. Ports are numbered from 1 in the order of their addresses, see [RootComplex.Ports].
//
//	0  event   read: takes one event, port<<8 | code; 0: none
//	4  eject   write: the port whose device the guest has let go of (_EJ0)
//	8  report  write: event<<16 | status<<8 | port (_OST: ACPI 6.5, 6.3.5)
type SlotBlock struct{ rc *RootComplex }

// SlotBlockSize is the size of the block, in bytes.
const SlotBlockSize = 12

// Codes of events, and what the guest reports on: the values of Notify.
const (
	slotEventCheck = 2 // look whether the device is there
	slotEventEject = 3 // let go of the device

	notifyBusCheck    = 0
	notifyDeviceCheck = 1
	notifyEject       = 3

	statusEjectionPending = 0x84 // ACPI 6.5, table 6.15: not the last word
)

// SlotBlock returns the registers of all slots.
func (rc *RootComplex) SlotBlock() *SlotBlock { return &SlotBlock{rc} }

// Ports are the root ports in the order of their addresses.
func (rc *RootComplex) Ports() (ports []*RootPort) {
	for _, b := range rc.Buses()[1:] {
		ports = append(ports, b.port)
	}
	return ports
}

// Read implements [devices.BusDevice]. Only a whole read of the event register takes one.
func (b *SlotBlock) Read(off uint64, p []byte) {
	clear(p)
	if off == 0 && len(p) == 4 {
		le.PutUint32(p, b.take())
	}
}

// take takes the first event that waits, and asks to be read again if there are more.
func (b *SlotBlock) take() (event uint32) {
	for i, port := range b.rc.Ports() {
		if event != 0 {
			if port.slot.waiting() {
				port.cfg.Host.SlotEvent()
				break
			}
			continue
		}
		if code := port.slot.takeEvent(); code != 0 {
			event = uint32(i+1)<<8 | code
			if port.slot.waiting() {
				port.cfg.Host.SlotEvent()
				break
			}
		}
	}
	return event
}

// Write implements [devices.BusDevice].
func (b *SlotBlock) Write(off uint64, p []byte) {
	if len(p) != 4 || off != 4 && off != 8 {
		return
	}
	v := le.Uint32(p)
	ports := b.rc.Ports()
	i := int(v&0xff) - 1
	if i < 0 || i >= len(ports) {
		return
	}
	if off == 4 {
		ports[i].slot.ejected()
	} else {
		ports[i].slot.reported(v>>16, byte(v>>8))
	}
}

func (s *Slot) waiting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.check || s.eject
}

// takeEvent is the event that the guest is told of now.
func (s *Slot) takeEvent() (code uint32) {
	s.locked(func(*then) {
		switch {
		case s.check:
			s.check = false
			s.checking = min(s.checking, 254) + 1
			code = slotEventCheck
		case s.eject:
			s.eject = false
			if s.state == SlotRequested {
				s.state = SlotBusy
			}
			code = slotEventEject
		}
	})
	return code
}

// ejected is the guest's word that it has let go, whether it was asked or not.
func (s *Slot) ejected() {
	s.locked(func(after *then) {
		if s.state != SlotEmpty && s.state != SlotDraining {
			s.pull(after, false)
		}
	})
}

// reported is the guest's word that it has dealt with an event.
func (s *Slot) reported(event uint32, status byte) {
	s.locked(func(after *then) {
		switch event {
		case notifyBusCheck, notifyDeviceCheck:
			s.checking = max(s.checking, 1) - 1
			if s.check || s.checking > 0 {
				return // it will look again
			}
			s.unaware = false
			s.settle()
			if s.state == SlotPlugging {
				s.state = SlotPresent
			}
		case notifyEject:
			if s.state == SlotBusy && status != 0 && status < statusEjectionPending {
				s.refuse(after, ejectionStatus(status))
			}
		}
	})
}

// ejectionStatus spells a status of _OST: ACPI 6.5, tables 6.13 and 6.15.
func ejectionStatus(status byte) string {
	switch status {
	case 0x80:
		return "the guest does not support ejection"
	case 0x81:
		return "an application of the guest uses it"
	case 0x82:
		return "it is busy in the guest"
	case 0x83:
		return "something that depends on it is busy in the guest"
	}
	return "the guest failed to eject it"
}
