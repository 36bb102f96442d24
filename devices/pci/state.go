package pci

import (
	"bytes"
	"fmt"

	"baton/devices"
)

// State of a function, one section each: its registers and MSI-X (ConfigState), and what
// the device has beyond that. Sections are loaded from the root down. BARs are mapped and
// vectors programmed as the registers come in; what is in the way of a BAR only until its
// own section is loaded is of no consequence.

// ConfigState is the saved state of a configuration space and of MSI-X.
type ConfigState struct {
	// Registers is all of the space without the zeroes at its end. What the guest cannot
	// change has to be the same on both sides, or it is another device.
	Registers []byte `cbor:"1,keyasint"`
	// Table is the MSI-X table, Pending its pending bits; both are empty without MSI-X.
	Table   []byte `cbor:"2,keyasint,omitempty"`
	Pending []byte `cbor:"3,keyasint,omitempty"`
}

// SaveState is the state as it stands.
func (c *Config) SaveState() ConfigState {
	c.mu.Lock()
	s := ConfigState{Registers: bytes.TrimRight(c.data[:], "\x00")}
	s.Registers = bytes.Clone(s.Registers)
	c.mu.Unlock()
	if c.msix != nil {
		s.Table, s.Pending = c.msix.save()
	}
	return s
}

// LoadState takes the state over, maps the BARs and programs the vectors. Hooks do not run.
// Info is for errors.
func (c *Config) LoadState(info devices.StateInfo, s ConfigState) error {
	if len(s.Registers) > ConfigSize {
		return info.BadField("Registers", "%d bytes, more than %d", len(s.Registers), ConfigSize)
	}
	var data [ConfigSize]byte
	copy(data[:], s.Registers)
	c.mu.Lock()
	for i := range data {
		guest := c.wmask[i] | c.w1c[i]
		if fixed := ^guest &^ c.dmask[i]; (data[i]^c.data[i])&fixed != 0 {
			was := c.data[i]
			c.mu.Unlock()
			return info.BadField("Registers", "byte %#x is %#02x and here %#02x: another device, or another address\n"+
				"start the target with the same devices at the same addresses", i, data[i], was)
		}
		data[i] = data[i]&guest | c.data[i]&^guest
	}
	c.data = data
	c.mu.Unlock()
	if at := c.at.Load(); at != nil {
		at.bus.rc.loaded()
	}
	switch {
	case c.msix != nil:
		return c.msix.load(info, s)
	case len(s.Table)+len(s.Pending) > 0:
		return info.BadField("Table", "there is no MSI-X here")
	}
	return nil
}

// Path is where a function that is on a bus is found, whatever number the guest gave to
// the bus: 0000:00:03.0 on the root bus, 0000:00:03.0/00.0 behind a port.
func (c *Config) Path() string {
	at := c.at.Load()
	if at == nil {
		return "nowhere/" + c.id
	}
	devfn := BDF(at.devfn)
	if at.bus.port == nil {
		return devfn.String()
	}
	return fmt.Sprintf("%s/%02x.%d", at.bus.port.c.Path(), devfn.Device(), devfn.Function())
}

// StateInfo is that of a function's section, in its first format.
func (c *Config) StateInfo(typ string) devices.StateInfo {
	return devices.StateInfo{ID: "pci/" + c.Path(), Type: typ, Version: 1, MinVersion: 1}
}

// Staters are the functions that have a state to save, from the root down.
func (rc *RootComplex) Staters() (all []devices.Stater) {
	rc.Walk(func(_ BDF, f Function) {
		if s, ok := f.(devices.Stater); ok {
			all = append(all, s)
		}
	})
	return all
}

// loaded is redecode after one of many sections: conflicts are to be expected until the
// last one is there.
func (rc *RootComplex) loaded() {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	rc.loading = true
	rc.decode()
	rc.loading = false
}

func (m *MSIX) save() (table, pending []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	pending = make([]byte, (len(m.vectors)+7)/8)
	for i, v := range m.vectors {
		if v.Pending() {
			pending[i/8] |= 1 << (i % 8)
		}
	}
	return bytes.Clone(m.entries), pending
}

func (m *MSIX) load(info devices.StateInfo, s ConfigState) error {
	if len(s.Table) != len(m.entries) {
		return info.BadField("Table", "%d bytes; here the table has %d", len(s.Table), len(m.entries))
	}
	if len(s.Pending) != (len(m.vectors)+7)/8 {
		return info.BadField("Pending", "%d bytes for %d vectors", len(s.Pending), len(m.vectors))
	}
	m.mu.Lock()
	copy(m.entries, s.Table)
	for i := range m.vectors {
		e := m.entries[i*msixEntry:][:msixEntry]
		copy(e[12:], []byte{e[12] & msixMasked, 0, 0, 0})
	}
	m.mu.Unlock()
	if err := m.apply(0, len(m.vectors)); err != nil {
		return info.BadField("Table", "%w", err)
	}
	for i, v := range m.vectors {
		if s.Pending[i/8]>>(i%8)&1 != 0 {
			v.Signal()
		}
	}
	return nil
}

// bareState is the section of a function that is registers and nothing else.
type bareState struct {
	Config ConfigState `cbor:"1,keyasint"`
}

// StateInfo implements [devices.Stater].
func (p *RootPort) StateInfo() devices.StateInfo { return p.c.StateInfo("pcie-root-port") }

// portState is the section of a root port.
type portState struct {
	Config ConfigState `cbor:"1,keyasint"`
	Slot   slotState   `cbor:"2,keyasint"`
}

// slotState is what a slot is in the middle of. Whether there is a device is not part of it: the
// same one has to be in the slot on both sides.
type slotState struct {
	State    uint8 `cbor:"1,keyasint"` // SlotState
	Unaware  bool  `cbor:"2,keyasint,omitempty"`
	Check    bool  `cbor:"3,keyasint,omitempty"` // ACPI events that were not taken
	Eject    bool  `cbor:"4,keyasint,omitempty"`
	Checking uint8 `cbor:"5,keyasint,omitempty"` // and checks that were not reported on
	Asked    bool  `cbor:"6,keyasint,omitempty"` // native
}

// SaveState implements [devices.Stater].
func (p *RootPort) SaveState() ([]byte, error) {
	s := p.slot
	s.mu.Lock()
	state := slotState{uint8(s.state), s.unaware, s.check, s.eject, s.checking, s.asked}
	if s.state == SlotDraining && !s.unaware { // no vCPU runs, and where it goes nothing drains
		state.State = uint8(SlotEmpty)
	}
	s.mu.Unlock()
	return devices.EncodeState(portState{p.c.SaveState(), state})
}

// LoadState implements [devices.Stater].
func (p *RootPort) LoadState(version uint16, data []byte) error {
	info := p.StateInfo()
	var s portState
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	if s.Slot.State > uint8(SlotDraining) {
		return info.BadField("Slot.State", "there is no state %d", s.Slot.State)
	}
	state := SlotState(s.Slot.State)
	occupied := state != SlotEmpty && state != SlotDraining
	if f := p.slot.Occupant(); occupied && f == nil {
		return info.BadField("Slot.State", "the slot is %s, and here it is empty\nstart the target with the device that is in it", state)
	} else if !occupied && f != nil {
		return info.BadField("Slot.State", "the slot is %s, and here %s is in it\nstart the target without it", state, f.Config().ID())
	}
	if err := p.c.LoadState(info, s.Config); err != nil {
		return err
	}
	p.slot.load(state, s.Slot)
	return nil
}

// load takes the state over, after the registers.
func (s *Slot) load(state SlotState, from slotState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state, s.unaware = state, from.Unaware && state == SlotDraining
	s.check, s.eject, s.checking, s.asked = from.Check, from.Eject, from.Checking, from.Asked
	s.indicator = s.control() & slotCtlPowerIndicator
	s.updateInterrupt(new(then)) // its message was sent, or is among the pending ones
	if state == SlotBusy && s.asked && !s.port.cfg.Button {
		s.port.show(false) // that is how it was asked
	}
	s.settle()
}

// StateInfo implements [devices.Stater].
func (h hostBridge) StateInfo() devices.StateInfo { return h.c.StateInfo("host-bridge") }

// SaveState implements [devices.Stater].
func (h hostBridge) SaveState() ([]byte, error) {
	return devices.EncodeState(bareState{h.c.SaveState()})
}

// LoadState implements [devices.Stater].
func (h hostBridge) LoadState(version uint16, data []byte) error {
	return loadBare(h.c, h.StateInfo(), version, data)
}

func loadBare(c *Config, info devices.StateInfo, version uint16, data []byte) error {
	var s bareState
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	return c.LoadState(info, s.Config)
}
