// Package chipset holds the few devices that a PC guest expects outside PCI: the serial
// port, the IOAPIC, the clock, and what stands in for power management.
//
//	I/O ports                                     memory
//	  0x064          keyboard reset      ─┐         0xfec00000  IOAPIC
//	  0x070, 0x071   RTC and its NVRAM    │                       pin 4  <── COM1
//	  0x0e9, 0x402   debug output         │                       pin 9  <── GED
//	  0x3f8 .. 0x3ff COM1 (16550A)        │                       │
//	  0x505          pvpanic              │                       │
//	  0x600, 0x601   sleep control, status├─ PM                   └──> MSI to the LAPICs
//	  0x610 .. 0x613 GED event register   │
//	  0x620 .. 0x62b slots (package pci)  │
//	  0xcf9          reset control       ─┘
//
// There is no 8259, PIT, PM timer or SCI: the ACPI tables (package boot/acpi) describe a
// hardware-reduced machine, whose events come through a generic event device (GED).
// Accesses of any width are taken apart into bytes where the hardware is a byte wide.
package chipset

// Ports and pins of the machine. The guest learns them from the ACPI tables, except those
// that every PC has.
const (
	KeyboardCommandPort = 0x64  // i8042 command and status, 1 port
	RTCPort             = 0x70  // index and data, 2 ports
	BochsDebugPort      = 0xe9  // debug output, 1 port
	COM1Port            = 0x3f8 // SerialPorts ports
	DebugPort           = 0x402 // debug output, 1 port
	SleepControlPort    = 0x600 // ACPI 6.5, 4.8.3.7: 1 port
	SleepStatusPort     = 0x601 // 1 port
	EventPort           = 0x610 // GED event register, 4 ports
	SlotPort            = 0x620 // registers of the slots: see pci.SlotBlock
	ResetPort           = 0xcf9 // reset control, 1 port

	COM1Pin = 4 // IOAPIC pin, edge triggered
	GEDPin  = 9 // IOAPIC pin, level triggered
)

// readBytes and writeBytes take an access apart for a register file that is a byte wide.
func readBytes(off uint64, p []byte, read func(reg uint64) byte) {
	for i := range p {
		p[i] = read(off + uint64(i))
	}
}

func writeBytes(off uint64, p []byte, write func(reg uint64, v byte)) {
	for i, v := range p {
		write(off+uint64(i), v)
	}
}
