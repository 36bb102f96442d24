package acpi

import (
	"fmt"
	"slices"

	"baton/kvm/guestmem"
)

// pci is the root bridge: PCI Firmware Specification 3.3, 4.
func (c *Config) pci() []byte {
	windows := [][]byte{
		window(windowBuses, 16, guestmem.Range{Base: 0, Size: uint64(c.lastBus()) + 1}),
		window(windowPorts, 16, guestmem.Range{Base: 0xd00, Size: 0xf300}),
		window(windowMemory, 32, c.MMIO32),
	}
	if c.MMIO64.Size != 0 {
		windows = append(windows, window(windowMemory, 64, c.MMIO64))
	}
	return device("PCI0", append([][]byte{
		name("_HID", eisaID("PNP0A08")),
		name("_CID", eisaID("PNP0A03")),
		name("_UID", integer(0)),
		name("_SEG", integer(0)),
		name("_BBN", integer(0)),
		name("_CRS", resources(windows...)),
		name("_PRT", routing()),
		c.osc(),
	}, c.slots()...)...)
}

// Wired interrupts of PCI have the upper 8 of the IOAPIC's 24 pins.
const (
	firstINTx = 16
	numINTx   = 8
)

// INTx is the GSI of the pin (1: INTA#) of the function in a slot of the root bus. What is
// behind a root port has the port's slot: slot 0 there turns no pins (PCIe 2.2.8.1).
func INTx(slot, pin int) int { return firstINTx + (slot+pin-1)%numINTx }

// routing is the PCI routing table (ACPI 6.5, 6.2.13): for each slot, and any function, its
// pins with their GSIs, which are level triggered and active low.
func routing() []byte {
	var entries [][]byte
	for slot := range 32 {
		for pin := 1; pin <= 4; pin++ {
			entries = append(entries, packageOf(
				integer(uint64(slot)<<16|0xffff), integer(uint64(pin-1)), integer(0), integer(uint64(INTx(slot, pin)))))
		}
	}
	return packageOf(entries...)
}

// The control field and status bits of a root bridge's _OSC: PCI Firmware Specification
// 3.3, tables 4-5 and 4-6; ACPI 6.5, 6.2.11.
const (
	oscNativeHotplug = 1 << 0
	oscPME           = 1 << 2
	oscAER           = 1 << 3
	oscCapability    = 1 << 4

	oscUnknownUUID     = 1 << 2
	oscUnknownRevision = 1 << 3
	oscMasked          = 1 << 4
)

// oscUUID is 33DB4D5B-1FF7-401C-9657-7441C03DD766 as ToUUID lays it out.
var oscUUID = []byte{
	0x5b, 0x4d, 0xdb, 0x33, 0xf7, 0x1f, 0x1c, 0x40, 0x96, 0x57, 0x74, 0x41, 0xc0, 0x3d, 0xd7, 0x66,
}

// osc grants the OS what it asks for of the capability structure, PME and AER, and of
// native hotplug if that is configured. SHPC slots do not exist.
func (c *Config) osc() []byte {
	grant := uint64(oscPME | oscAER | oscCapability)
	if c.NativeHotplug {
		grant |= oscNativeHotplug
	}
	status, control := path("CDW1"), path("CDW3")
	return method("_OSC", 4,
		createDWordField(arg3, 0, "CDW1"),
		when(equal(arg0, buffer(oscUUID)),
			createDWordField(arg3, 8, "CDW3"),
			and(control, integer(grant), local0),
			when(notEqual(arg1, integer(1)), orInto(status, oscUnknownRevision)),
			when(notEqual(control, local0), orInto(status, oscMasked)),
			store(local0, control)),
		otherwise(orInto(status, oscUnknownUUID)),
		giveBack(arg3))
}

// Codes of the event register of the slots, and what Notify makes of them: ACPI 6.5, table 5.150.
const (
	slotCheck, slotEject = 2, 3

	notifyDeviceCheck = 1
	notifyEject       = 3
)

// slots are the root ports with what is in their slots, and what an event of theirs does: the
// port is told to look again, or the device that it is to go. Linux evaluates _OST when it is
// done with either. There is no _STA: configuration space says what is there.
func (c *Config) slots() (terms [][]byte) {
	if c.NativeHotplug || len(c.RootPorts) == 0 {
		return nil
	}
	report := func(port int) []byte {
		return method("_OST", 3, call("HPRP", arg0, arg1, integer(uint64(port))))
	}
	event := [][]byte{store(path("HPEV"), local0), and(local0, integer(0xffff), local0)}
	terms = [][]byte{
		portRegister("HPR0", "HPEV", c.SlotBlock),
		portRegister("HPR1", "HPEJ", c.SlotBlock+4),
		portRegister("HPR2", "HPST", c.SlotBlock+8),
		method("HPRP", 3, or(or(shiftLeft(arg0, 16), shiftLeft(and(arg1, integer(0xff), nothing), 8), nothing), arg2, path("HPST"))),
	}
	for i, p := range c.RootPorts {
		n, port := i+1, fmt.Sprintf("S%02X", p.Device<<3|p.Function)
		terms = append(terms, device(port,
			name("_ADR", integer(uint64(p.Device)<<16|uint64(p.Function))),
			report(n),
			device("S00",
				name("_ADR", integer(0)),
				name("_SUN", integer(uint64(p.Slot))),
				method("_EJ0", 1, store(integer(uint64(n)), path("HPEJ"))),
				report(n))))
		event = append(event,
			when(equal(local0, integer(uint64(n)<<8|slotCheck)), notify(port, notifyDeviceCheck)),
			when(equal(local0, integer(uint64(n)<<8|slotEject)), notify(`\_SB.PCI0.`+port+".S00", notifyEject)))
	}
	return append(terms, method("HPEX", 0, event...))
}

// motherboard reserves what belongs to no other device. Linux uses the ECAM only if it
// is reserved here.
func (c *Config) motherboard() []byte {
	p := &c.Power
	return device("MBRD",
		name("_HID", eisaID("PNP0C02")),
		name("_UID", integer(0)),
		name("_CRS", resources(
			memory32(c.ECAM),
			ports(p.SleepControl, 1), ports(p.SleepStatus, 1), ports(p.Reset, 1))))
}

// events is the generic event device (ACPI 6.5, 5.6.9): one read of the register takes all
// events that wait.
func (c *Config) events() []byte {
	const pressed = 0x80
	handle := [][]byte{
		store(path("EVST"), local0),
		when(and(local0, integer(uint64(c.Power.PowerButton)), nothing), notify(`\_SB.PWRB`, pressed)),
	}
	if !c.NativeHotplug && len(c.RootPorts) > 0 {
		handle = append(handle, when(and(local0, integer(uint64(c.Power.SlotEvent)), nothing), call(`\_SB.PCI0.HPEX`)))
	}
	return device("GED",
		name("_HID", text("ACPI0013")),
		name("_UID", integer(0)),
		name("_CRS", resources(interrupt(c.Power.EventGSI))),
		portRegister("EVRG", "EVST", c.Power.Event),
		method("_EVT", 1, handle...))
}

func powerButton() []byte { return device("PWRB", name("_HID", eisaID("PNP0C0C"))) }

func rtc() []byte {
	return device("RTC",
		name("_HID", eisaID("PNP0B00")),
		name("_CRS", resources(ports(0x70, 2))))
}

func com1() []byte {
	return device("COM1",
		name("_HID", eisaID("PNP0501")),
		name("_UID", integer(0)),
		name("_CRS", resources(slices.Concat(ports(0x3f8, 8), isaIRQ(4)))))
}

// pvpanic has a name of QEMU's: docs/specs/pvpanic.rst.
func (c *Config) pvpanic() []byte {
	return device("PEVT",
		name("_HID", text("QEMU0001")),
		name("_CRS", resources(ports(c.Panic, 1))))
}
