package chipset

import (
	"bytes"

	"baton/devices"
)

// The lines of the IOAPIC's pins are not in its state: each device raises its own again when
// its state is loaded, which on an edge-triggered pin is a spurious interrupt at worst.
type ioapicState struct {
	ID       uint32   `cbor:"1,keyasint"` // the register
	Selected uint8    `cbor:"2,keyasint"`
	Entries  []uint64 `cbor:"3,keyasint"` // redirection table, remote IRR included
}

// StateInfo implements [devices.Stater].
func (a *IOAPIC) StateInfo() devices.StateInfo {
	return devices.StateInfo{ID: "ioapic", Type: "ioapic", Version: 1, MinVersion: 1}
}

// SaveState implements [devices.Stater].
func (a *IOAPIC) SaveState() ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := ioapicState{ID: a.id, Selected: a.selected}
	for _, p := range a.pins {
		s.Entries = append(s.Entries, p.rte)
	}
	return devices.EncodeState(s)
}

// LoadState implements [devices.Stater]. A level-triggered interrupt whose line is high and
// that does not wait for an EOI is delivered.
func (a *IOAPIC) LoadState(version uint16, data []byte) error {
	info := a.StateInfo()
	var s ioapicState
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	if len(s.Entries) != len(a.pins) {
		return info.BadField("Entries", "%d pins; here there are %d", len(s.Entries), len(a.pins))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.id, a.selected = s.ID&ioapicIDMask, s.Selected
	for i, rte := range s.Entries {
		p := &a.pins[i]
		p.rte = rte & (rteWritable | rteRemoteIRR)
		a.onRoute(i, message(p.rte), p.rte&rteMasked != 0)
		a.serve(p)
	}
	return nil
}

// maxSavedInput bounds input that waits, in bytes: what came on each host until the guest took it.
const maxSavedInput = 4096

type serialState struct {
	DLL     uint8  `cbor:"1,keyasint"`
	DLM     uint8  `cbor:"2,keyasint"`
	IER     uint8  `cbor:"3,keyasint"`
	FCR     uint8  `cbor:"4,keyasint"`
	LCR     uint8  `cbor:"5,keyasint"`
	MCR     uint8  `cbor:"6,keyasint"`
	SCR     uint8  `cbor:"7,keyasint"`
	Overrun bool   `cbor:"8,keyasint"`
	THRE    bool   `cbor:"9,keyasint"`  // its interrupt is due
	FIFO    []byte `cbor:"10,keyasint"` // received, unread
	Input   []byte `cbor:"11,keyasint"` // come from the host, not yet received
}

// StateInfo implements [devices.Stater].
func (s *Serial) StateInfo() devices.StateInfo {
	return devices.StateInfo{ID: "serial/com1", Type: "16550a", Version: 1, MinVersion: 1}
}

// Quiesce implements [devices.Quiescer]: what comes from the host waits.
func (s *Serial) Quiesce() error { s.setStopped(true); return nil }

// Unquiesce implements [devices.Quiescer].
func (s *Serial) Unquiesce() error { s.setStopped(false); return nil }

func (s *Serial) setStopped(stopped bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = stopped
	s.fill()
}

// SaveState implements [devices.Stater].
func (s *Serial) SaveState() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return devices.EncodeState(serialState{s.dll, s.dlm, s.ier, s.fcr, s.lcr, s.mcr, s.scr, s.overrun, s.thre, s.rx[:s.n], s.input})
}

// LoadState implements [devices.Stater].
func (s *Serial) LoadState(version uint16, data []byte) error {
	info := s.StateInfo()
	var v serialState
	if err := devices.DecodeState(info, version, data, &v, nil); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	depth := 1
	if v.FCR&fcrEnable != 0 {
		depth = fifoSize
	}
	switch {
	case len(v.FIFO) > depth:
		return info.BadField("FIFO", "%d bytes; it holds %d", len(v.FIFO), depth)
	case len(v.Input) > maxSavedInput:
		return info.BadField("Input", "%d bytes, more than %d", len(v.Input), maxSavedInput)
	}
	s.dll, s.dlm, s.lcr, s.scr = v.DLL, v.DLM, v.LCR, v.SCR
	s.ier, s.fcr, s.mcr = v.IER&ierMask, v.FCR&(fcrEnable|fcrTrigger), v.MCR&mcrMask
	s.overrun, s.thre = v.Overrun, v.THRE
	s.n = copy(s.rx[:], v.FIFO)
	s.input = append(bytes.Clone(v.Input), s.input...)
	s.fill()
	return nil
}

type pmState struct {
	Events  uint32 `cbor:"1,keyasint"`
	Control uint8  `cbor:"2,keyasint"` // reset control register
}

// StateInfo implements [devices.Stater].
func (m *PM) StateInfo() devices.StateInfo {
	return devices.StateInfo{ID: "pm", Type: "acpi-hw-reduced", Version: 1, MinVersion: 1}
}

// SaveState implements [devices.Stater].
func (m *PM) SaveState() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return devices.EncodeState(pmState{m.events, m.control})
}

// LoadState implements [devices.Stater]. Events that wait are signalled once more.
func (m *PM) LoadState(version uint16, data []byte) error {
	var s pmState
	if err := devices.DecodeState(m.StateInfo(), version, data, &s, nil); err != nil {
		return err
	}
	m.mu.Lock()
	m.control = s.Control & resetMask &^ resetCPU
	m.mu.Unlock()
	if s.Events != 0 {
		m.raise(s.Events)
	}
	return nil
}

// The time is the host's, so it is right on any host.
type rtcState struct {
	Index uint8  `cbor:"1,keyasint"`
	RAM   []byte `cbor:"2,keyasint"` // by register; those of the time are of no account
}

// StateInfo implements [devices.Stater].
func (r *RTC) StateInfo() devices.StateInfo {
	return devices.StateInfo{ID: "rtc", Type: "mc146818", Version: 1, MinVersion: 1}
}

// SaveState implements [devices.Stater].
func (r *RTC) SaveState() ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return devices.EncodeState(rtcState{r.index, r.ram[:]})
}

// LoadState implements [devices.Stater].
func (r *RTC) LoadState(version uint16, data []byte) error {
	info := r.StateInfo()
	var s rtcState
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	switch {
	case len(s.RAM) != len(r.ram):
		return info.BadField("RAM", "%d bytes, not %d", len(s.RAM), len(r.ram))
	case int(s.Index) >= len(r.ram):
		return info.BadField("Index", "%#x is no register", s.Index)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.index = s.Index
	copy(r.ram[:], s.RAM)
	r.ram[rtcA] &^= rtcAUIP
	r.ram[rtcB] |= rtcB24Hour
	r.ram[rtcC], r.ram[rtcD] = 0, rtcDValid
	return nil
}
