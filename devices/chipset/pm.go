package chipset

import (
	"sync"

	"baton/devices"
)

// Values that the ACPI tables state.
const (
	SleepTypeS5 = 5    // SLP_TYP for power off, in \_S5
	ResetValue  = 0x06 // what the reset register takes, in the FADT
)

// Bits of the GED event register. It is read to clear; its interrupt is asserted while a bit
// is set, so that nothing is lost on a guest that has no handler yet.
const (
	EventPowerButton = 1 << 0 // the power button was pressed
	EventSlot        = 1 << 1 // a slot has an event: see pci.SlotBlock
)

// Register bits: ACPI 6.5, 4.8.3.7 for the sleep control register; ICH9 data sheet, 13.7.5
// for the reset control register; i8042 commands.
const (
	sleepTypeShift = 2
	sleepTypeMask  = 7
	sleepEnable    = 1 << 5

	resetCPU  = 1 << 2
	resetMask = 0x0e

	keyboardPulseReset = 0xfe
)

// Power is what the guest asks of the machine. The functions are called on the vCPU's
// thread, perhaps more than once and by several vCPUs; they must not wait for a vCPU.
type Power struct {
	Reset func() // by reset register or keyboard controller
	Off   func() // by S5
}

// PM is the power management of a hardware-reduced ACPI machine: sleep, reset and the
// event register behind the generic event device (ACPI 6.5, 5.6.9).
type PM struct {
	ged   devices.Line
	power Power

	mu      sync.Mutex
	events  uint32
	control byte // reset control register as last written
}

// NewPM returns a PM block that signals its events on the line ged.
func NewPM(ged devices.Line, power Power) *PM { return &PM{ged: ged, power: power} }

// Attach claims the block's ports.
func (m *PM) Attach(ports *devices.Bus) error {
	for _, c := range []struct {
		port, size uint64
		name       string
		dev        registers
	}{
		{SleepControlPort, 1, "acpi sleep control", registers{zero, m.sleep}},
		{SleepStatusPort, 1, "acpi sleep status", registers{zero, ignore}}, // WAK_STS is never set
		{EventPort, 4, "acpi events", registers{m.takeEvents, ignore}},
		{ResetPort, 1, "reset control", registers{m.resetControl, m.setResetControl}},
		// A status of zero says that a command may be written.
		{KeyboardCommandPort, 1, "keyboard reset", registers{zero, m.keyboard}},
	} {
		if err := ports.Insert(devices.Range{Base: c.port, Size: c.size}, c.name, c.dev); err != nil {
			return err
		}
	}
	return nil
}

// PowerButton presses the power button.
func (m *PM) PowerButton() { m.raise(EventPowerButton) }

// SlotEvent says that a slot has an event.
func (m *PM) SlotEvent() { m.raise(EventSlot) }

// Reset clears the registers.
func (m *PM) Reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.events, m.control = 0, 0
	m.ged.SetLevel(false)
}

func (m *PM) raise(events uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.events |= events
	m.ged.SetLevel(true)
}

func (m *PM) takeEvents(off uint64) byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := byte(m.events >> (8 * off))
	m.events &^= 0xff << (8 * off)
	m.ged.SetLevel(m.events != 0)
	return v
}

func (m *PM) sleep(_ uint64, v byte) {
	if v&sleepEnable != 0 && v>>sleepTypeShift&sleepTypeMask == SleepTypeS5 {
		m.power.Off()
	}
}

func (m *PM) resetControl(uint64) byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.control
}

func (m *PM) setResetControl(_ uint64, v byte) {
	m.mu.Lock()
	m.control = v & resetMask &^ resetCPU
	m.mu.Unlock()
	if v&resetCPU != 0 {
		m.power.Reset()
	}
}

func (m *PM) keyboard(_ uint64, v byte) {
	if v == keyboardPulseReset {
		m.power.Reset()
	}
}

// registers is a device with registers a byte wide.
type registers struct {
	read  func(off uint64) byte
	write func(off uint64, v byte)
}

func (r registers) Read(off uint64, p []byte)  { readBytes(off, p, r.read) }
func (r registers) Write(off uint64, p []byte) { writeBytes(off, p, r.write) }

func zero(uint64) byte    { return 0 }
func ignore(uint64, byte) {}
