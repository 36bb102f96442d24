// Package pci is the PCI Express side of the machine: configuration space as data, base
// address registers, MSI-X, and a tree of one root complex with root ports.
//
//	vCPU exit ─> MMIO bus ─┬─ ECAM ─> RootComplex ─> Bus "pcie.0" ─┬─ 00.0 host bridge
//	                       │                                       ├─ 02.0 function
//	                       │                                       └─ 03.0 RootPort ─> Bus ─ 00.0 function
//	                       └─ BAR ──> BAR.Device
//
//	guest's write ─> Config (bytes, write mask, write-1-to-clear mask)
//	                   ├─ decode changed? ─> RootComplex maps, moves, unmaps BARs ─> BAR.Mapped
//	                   └─ OnWrite hooks ───> MSI-X, reset, the device
//
// A [Config] is bytes and masks, so that any access of any width and offset has one
// meaning; what a function adds to that is hooks. Section numbers "PCIe" are those of the
// PCI Express Base Specification 5.0, "PCI" those of PCI Local Bus 3.0.
//
// # Slots
//
// A [Slot] stands between a function and its guest, which works it by ACPI ([SlotBlock]) or by
// the registers of the root port (pciehp.go):
//
//	           Plug             guest took it          RequestUnplug       guest has begun
//	┌─> empty ─────> plugging ───────────────> present ────────────> requested ─────────> busy
//	│                   │                         │ ^                 │  │ Withdraw         │ │ refused
//	│                   │                         │ └─────────────────│──┴──────────────────│─┘
//	│    guest ejects, surprise, reset of a guest that was asked      │                     │
//	└──── draining <────┴─────────────────────────┴───────────────────┴─────────────────────┘
//	 no vCPU is in the function, and the guest knows that it has gone
//
// A device that has left its bus reads as all ones at once; it is handed back when no vCPU can be
// in it any more.
//
// # Locks
//
// A Slot has one lock, taken before that of the RootComplex. The RootComplex has one lock for the tree and for what the BARs decode. Each Config has
// one for its bytes, taken inside the former; it is a leaf. BAR.Mapped runs with the tree's
// lock held, so that calls come in the order of the changes: it must not use a Bus or the
// RootComplex. Hooks (OnRead, OnWrite), and Function.Reset run with no lock
// held and may do so; as two vCPUs may run the same one at the same time, they act on what
// the registers say when they look, not on what was written.
package pci
