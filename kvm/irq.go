package kvm

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// EnableSplitIRQChip puts the LAPICs into the kernel and leaves the IOAPIC to userspace.
// The first pins GSIs (at least 1) are its pins: a route of theirs with the level bit set
// makes the vCPU exit with ExitIOAPICEOI when the guest ends such an interrupt. Routes and
// irqfds need it.
func (vm *VM) EnableSplitIRQChip(pins int) error {
	return vm.enableCap(CapSplitIRQChip, uint64(pins))
}

// Route is what an irqfd's GSI delivers: one MSI.
type Route struct {
	GSI  uint32
	Addr uint64
	Data uint32
}

// SetRoutes replaces all routes: at most one per GSI, GSIs below 4096. A GSI without one is
// silent.
func (vm *VM) SetRoutes(routes []Route) error {
	if len(routes) > maxRoutes {
		return fmt.Errorf("set routes: %d, more than %d", len(routes), maxRoutes)
	}
	l := new(irqRouting)
	for i, r := range routes {
		l.entries[i] = irqRoutingEntry{gsi: r.GSI, kind: irqRoutingMSI,
			addrLo: uint32(r.Addr), addrHi: uint32(r.Addr >> 32), data: r.Data}
	}
	l.n = uint32(len(routes))
	vm.irqMu.Lock()
	defer vm.irqMu.Unlock()
	if _, err := ioctl(vm.fd, kvmSetGSIRouting, l); err != nil {
		return fmt.Errorf("set %d routes: %w", len(routes), err)
	}
	vm.routes = slices.Clone(routes)
	return nil
}

// SignalMSI delivers a message at once: Intel SDM vol. 3, 11.11.
func (vm *VM) SignalMSI(addr uint64, data uint32) error {
	_, err := ioctl(vm.fd, kvmSignalMSI, &msi{addrLo: uint32(addr), addrHi: uint32(addr >> 32), data: data})
	return err
}

// IRQFD makes every signal of the eventfd deliver the GSI's route, without the VMM.
func (vm *VM) IRQFD(fd int, gsi uint32) error {
	return vm.irqfd(irqfd{fd: uint32(fd), gsi: gsi})
}

// IRQFDResample is IRQFD for a level-triggered pin: when the guest has ended the interrupt,
// EndOfInterrupt signals the eventfd resample, on which the device looks at its line again
// and signals fd if it is still high. KVM_IRQFD_FLAG_RESAMPLE would do it in the kernel, but
// only for the kernel's own IOAPIC.
func (vm *VM) IRQFDResample(fd, resample int, gsi uint32) error {
	if err := vm.IRQFD(fd, gsi); err != nil {
		return err
	}
	vm.irqMu.Lock()
	defer vm.irqMu.Unlock()
	vm.resample[gsi] = resample
	return nil
}

// RemoveIRQFD undoes IRQFD and IRQFDResample; it waits for deliveries under way.
func (vm *VM) RemoveIRQFD(fd int, gsi uint32) error {
	vm.irqMu.Lock()
	delete(vm.resample, gsi)
	vm.irqMu.Unlock()
	return vm.irqfd(irqfd{fd: uint32(fd), gsi: gsi, flags: irqfdDeassign})
}

// EndOfInterrupt passes on what ExitIOAPICEOI reported: it signals the resample eventfds of
// all GSIs whose route has the vector.
func (vm *VM) EndOfInterrupt(vector uint8) {
	vm.irqMu.Lock()
	defer vm.irqMu.Unlock()
	one := [8]byte{1} // the counter that is added, native byte order
	for _, r := range vm.routes {
		if fd, ok := vm.resample[r.GSI]; ok && uint8(r.Data) == vector {
			_, _ = unix.Write(fd, one[:]) // fails only when the counter is full, so signalled
		}
	}
}

func (vm *VM) irqfd(a irqfd) error {
	if _, err := ioctl(vm.fd, kvmIRQFD, &a); err != nil {
		return fmt.Errorf("gsi %d: %w", a.gsi, err)
	}
	return nil
}

// IOEvent is a guest's write that signals an eventfd instead of leaving to the VMM.
type IOEvent struct {
	Addr  uint64 // guest-physical address or I/O port
	Len   int    // width in bytes; 0: any (then without Match)
	FD    int
	PIO   bool    // Addr is an I/O port
	Match *uint64 // only a write of this value; nil: any value
}

// IOEventFD binds an event.
func (vm *VM) IOEventFD(e IOEvent) error { return vm.ioeventfd(e, 0) }

// RemoveIOEventFD unbinds an event, which must equal the one that was bound.
func (vm *VM) RemoveIOEventFD(e IOEvent) error { return vm.ioeventfd(e, ioeventfdDeassign) }

func (vm *VM) ioeventfd(e IOEvent, flags uint32) error {
	a := ioeventfd{addr: e.Addr, length: uint32(e.Len), fd: int32(e.FD), flags: flags}
	if e.PIO {
		a.flags |= ioeventfdPIO
	}
	if e.Match != nil {
		a.flags |= ioeventfdMatch
		a.match = *e.Match
	}
	if _, err := ioctl(vm.fd, kvmIOEventFD, &a); err != nil {
		return fmt.Errorf("address %#x: %w", e.Addr, err)
	}
	return nil
}
