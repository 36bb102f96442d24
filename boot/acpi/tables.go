// Package acpi writes the tables by which the guest finds its processors, interrupt
// controller, PCI Express hierarchy and power management. The machine is hardware-reduced
// (ACPI 6.5, 4.1): no SCI, PM timer or fixed registers but sleep and reset; events come
// through a generic event device.
//
//	RSDP ──> XSDT ─┬─> FADT ──> DSDT   \_SB  PCI0  root bridge: windows, _OSC; root ports and
//	               │                               what is in their slots: _EJ0
//	               │                         MBRD  what belongs to no device: ECAM, ports
//	               │                         GED   events ──Notify──> PWRB, root ports, slots
//	               │                         COM1, RTC, PEVT (pvpanic)
//	               ├─> MADT            \_S5
//	               └─> MCFG
package acpi

import (
	"encoding/binary"
	"slices"

	"baton/kvm/guestmem"
)

// MaxCPUs is how many processors the tables describe: the 8-bit APIC IDs less the
// broadcast address.
const MaxCPUs = 255

// Power says where the power management is: I/O ports, and the values that they take.
type Power struct {
	SleepControl uint16 // sleep control register, 1 port
	SleepStatus  uint16 // sleep status register, 1 port
	SleepTypeS5  uint8  // SLP_TYP for power off, 0 to 7
	Reset        uint16 // reset register, 1 port
	ResetValue   uint8
	Event        uint16 // event register, 4 ports, cleared by reading
	EventGSI     uint32 // its level-triggered interrupt
	PowerButton  uint32 // its bit for a press of the power button
	SlotEvent    uint32 // its bit for an event of a slot
}

// RootPort is a root port on bus 0 whose slot the OS works by ACPI.
type RootPort struct {
	Device, Function uint8  // where it is: 0 to 31, 0 to 7
	Slot             uint16 // physical slot number, _SUN
}

// Config describes the machine. The limits are the caller's to keep.
type Config struct {
	Base          uint64         // where the tables will be; a multiple of 16
	CPUs          int            // 1 to MaxCPUs, APIC IDs from 0
	IOAPIC        uint32         // address; its ID and first GSI are 0
	ECAM          guestmem.Range // below 4 GiB; 1 MiB a bus, from bus 0
	MMIO32        guestmem.Range // window of the root bridge below 4 GiB
	MMIO64        guestmem.Range // another one above; not there if its size is 0
	Power         Power
	Panic         uint16 // port of the pvpanic device
	Serial        bool   // there is a COM1
	NativeHotplug bool   // the OS may drive the slots of root ports itself, instead of by ACPI
	SlotBlock     uint16 // registers of the slots, 12 ports: see pci.SlotBlock
	RootPorts     []RootPort
}

// Tables returns the tables as they shall be in memory from c.Base on, and the address of
// the RSDP among them.
func Tables(c Config) (blob []byte, rsdpAddr uint64) {
	blob = make([]byte, rsdpSize)
	add := func(t []byte) uint64 {
		blob = append(blob, make([]byte, -len(blob)&15)...)
		addr := c.Base + uint64(len(blob))
		blob = append(blob, t...)
		return addr
	}
	dsdt := add(c.dsdt())
	var entries []byte
	for _, t := range [][]byte{c.fadt(dsdt), c.madt(), c.mcfg()} {
		entries = binary.LittleEndian.AppendUint64(entries, add(t))
	}
	copy(blob, rsdp(add(table("XSDT", 1, entries))))
	return blob, c.Base
}

const (
	oemID     = "BATON "
	creatorID = "BATN"
	revision  = 1
)

// table puts the header before a body: ACPI 6.5, 5.2.6.
func table(signature string, rev byte, body []byte) []byte {
	const headerSize, checksumAt = 36, 9
	le := binary.LittleEndian
	t := []byte(signature)
	t = le.AppendUint32(t, uint32(headerSize+len(body)))
	t = append(t, rev, 0)
	t = append(t, oemID+"BATON   "...)
	t = le.AppendUint32(t, revision)
	t = append(t, creatorID...)
	t = le.AppendUint32(t, revision)
	t = append(t, body...)
	t[checksumAt] = checksum(t)
	return t
}

// checksum is what makes the sum of all bytes zero.
func checksum(p []byte) (sum byte) {
	for _, v := range p {
		sum -= v
	}
	return sum
}

const rsdpSize = 36

// rsdp: ACPI 6.5, 5.2.5.3. The first checksum covers what ACPI 1.0 knew.
func rsdp(xsdt uint64) []byte {
	const revision, checksumAt, v1Size, extChecksumAt = 2, 8, 20, 32
	le := binary.LittleEndian
	t := append([]byte("RSD PTR \x00"+oemID), revision)
	t = le.AppendUint32(t, 0) // no RSDT
	t = le.AppendUint32(t, rsdpSize)
	t = le.AppendUint64(t, xsdt)
	t = append(t, 0, 0, 0, 0)
	t[checksumAt] = checksum(t[:v1Size])
	t[extChecksumAt] = checksum(t)
	return t
}

// Offsets, flags and values of the FADT: ACPI 6.5, 5.2.9.
const (
	fadtRevision = 6
	fadtSize     = 276

	fadtProfile      = 45
	fadtCentury      = 108
	fadtBootArch     = 109
	fadtFlags        = 112
	fadtResetReg     = 116
	fadtResetValue   = 128
	fadtMinor        = 131
	fadtXDSDT        = 140
	fadtSleepControl = 244
	fadtSleepStatus  = 256
	fadtHypervisor   = 268

	profileEnterpriseServer = 4
	centuryRegister         = 0x32 // of the RTC

	bootVGANotPresent = 1 << 2

	flagWBINVD      = 1 << 0
	flagProcC1      = 1 << 2
	flagPowerButton = 1 << 4 // is a control method device
	flagSleepButton = 1 << 5 // is not a fixed one either
	flagResetReg    = 1 << 10
	flagHWReduced   = 1 << 20
)

func (c *Config) fadt(dsdt uint64) []byte {
	const headerSize = 36
	le := binary.LittleEndian
	t := make([]byte, fadtSize)
	t[fadtProfile] = profileEnterpriseServer
	t[fadtCentury] = centuryRegister
	le.PutUint16(t[fadtBootArch:], bootVGANotPresent) // and no 8042
	le.PutUint32(t[fadtFlags:], flagWBINVD|flagProcC1|flagPowerButton|flagSleepButton|flagResetReg|flagHWReduced)
	copy(t[fadtResetReg:], portAddress(c.Power.Reset))
	t[fadtResetValue] = c.Power.ResetValue
	t[fadtMinor] = 5
	le.PutUint64(t[fadtXDSDT:], dsdt)
	copy(t[fadtSleepControl:], portAddress(c.Power.SleepControl))
	copy(t[fadtSleepStatus:], portAddress(c.Power.SleepStatus))
	copy(t[fadtHypervisor:], oemID)
	return table("FACP", fadtRevision, t[headerSize:])
}

// portAddress is a generic address structure for a port a byte wide: ACPI 6.5, 5.2.3.2.
func portAddress(port uint16) []byte {
	const systemIO, bits, byteAccess = 1, 8, 1
	return binary.LittleEndian.AppendUint64([]byte{systemIO, bits, 0, byteAccess}, uint64(port))
}

// madt: ACPI 6.5, 5.2.12. Without an 8259 the ISA interrupts are the pins of the same
// number, edge triggered and active high, and need no override.
func (c *Config) madt() []byte {
	const lapicAddr = 0xfee00000
	const typeLAPIC, typeIOAPIC, typeLAPICNMI = 0, 1, 4
	const enabled, allProcessors, lint1 = 1, 0xff, 1
	le := binary.LittleEndian
	t := le.AppendUint32(nil, lapicAddr)
	t = le.AppendUint32(t, 0) // no 8259
	for id := range c.CPUs {
		t = append(t, typeLAPIC, 8, byte(id), byte(id), enabled, 0, 0, 0)
	}
	t = append(t, typeIOAPIC, 12, 0, 0)
	t = le.AppendUint32(t, c.IOAPIC)
	t = le.AppendUint32(t, 0)
	t = append(t, typeLAPICNMI, 6, allProcessors, 0, 0, lint1)
	return table("APIC", 5, t)
}

// mcfg: PCI Firmware Specification 3.3, 4.1.2.
func (c *Config) mcfg() []byte {
	t := binary.LittleEndian.AppendUint64(make([]byte, 8), c.ECAM.Base)
	t = append(t, 0, 0, 0, c.lastBus(), 0, 0, 0, 0) // segment, first and last bus
	return table("MCFG", 1, t)
}

func (c *Config) lastBus() byte { return byte(c.ECAM.Size>>20 - 1) }

func (c *Config) dsdt() []byte {
	devices := [][]byte{c.pci(), c.motherboard(), c.events(), powerButton(), rtc(), c.pvpanic()}
	if c.Serial {
		devices = append(devices, com1())
	}
	return table("DSDT", 2, slices.Concat(
		scope(`\_SB`, devices...),
		name(`\_S5`, packageOf(integer(uint64(c.Power.SleepTypeS5)), integer(0), integer(0), integer(0)))))
}
