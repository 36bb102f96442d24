// Package devices holds the contracts that every device of the machine meets and the
// range bus that routes a vCPU's port and memory accesses to them.
//
//	vCPU exit ──> Bus (I/O ports) ──> 16550, RTC, ACPI, debug port
//	          └─> Bus (MMIO)      ──> IOAPIC, ECAM, BARs of PCI functions
//
//	device ──> Line ──> IOAPIC pin ──┐
//	device ──> Vector (eventfd) ─────┴─> MSI ──> LAPIC
//
// Devices reach KVM only through the small interfaces declared here; the machine
// (package vmm) implements them.
package devices

// BusDevice answers accesses to one range of an address space. Off is relative to the
// start of the range; len(p) is the access width as the guest chose it, normally 1, 2, 4
// or 8 bytes but never to be trusted. Read must fill p; both may be called from any
// vCPU's thread at the same time.
type BusDevice interface {
	Read(off uint64, p []byte)
	Write(off uint64, p []byte)
}

// Line is a wired interrupt, such as a pin of the IOAPIC. SetLevel with the level that the
// line already has does nothing; an edge-triggered pin fires on false to true.
type Line interface {
	SetLevel(high bool)
}

// MSI is the write that raises a message-signalled interrupt: Intel SDM vol. 3, 11.11.
type MSI struct {
	Addr uint64
	Data uint32
}

// MSISink delivers one message to the LAPICs at once.
type MSISink interface {
	SignalMSI(m MSI) error
}

// Vector is one interrupt source of a device. A signal is a write to its eventfd, which
// the kernel (irqfd) turns into the MSI that Set programmed, without the VMM.
type Vector interface {
	// Set programs the message. While masked, signals wait in the eventfd and are
	// delivered, as one, when a later Set unmasks.
	Set(m MSI, masked bool) error
	// Pending says whether a signal waits because the vector is masked.
	Pending() bool
	// EventFD is the descriptor that backends such as vhost write to. The vector owns it.
	EventFD() int
	// Signal raises the interrupt.
	Signal()
	Close() error
}

// VectorSource hands out vectors; an error names the exhausted resource.
type VectorSource interface {
	NewVector() (Vector, error)
}

// Doorbells binds eventfds to guest-physical addresses: a guest's write of any value, of
// exactly size bytes (0: any size), signals fd in the kernel without leaving to the VMM.
type Doorbells interface {
	AddDoorbell(addr uint64, size int, fd int) error
	RemoveDoorbell(addr uint64, size int, fd int) error
}
