// Package vfio passes PCI functions of the host through to the guest: VFIO's container and
// group interface with the type 1 IOMMU (Documentation/driver-api/vfio.rst).
//
//	guest's driver ─┬─ configuration space ─> pci.Config: virtual, or passed on (see capabilities)
//	                ├─ BAR, mapped pages ───────────────────────────────────────> device
//	                └─ BAR, trapped: MSI-X table ─> pci.MSIX; other ─> pread ───> device
//
//	device ── MSI ──> host ── eventfd (SET_IRQS) ── irqfd ──> guest's LAPIC
//	device ── INTx ─> host masks it ── eventfd ──> intx ──> IOAPIC; the guest's EOI unmasks it
//	device ── DMA ──> IOMMU (Container: all of the guest's RAM, at its own addresses) ──> RAM
//
// A device's BARs are mapped into the guest (KVM memory slots), and follow its registers, but
// not for the DMA of other devices: mapping would make a vCPU wait for whatever is being pinned.
//
// A [Container] is the guest as devices see it, its memory; it holds IOMMU groups, and those
// devices. A [Function] is what the guest sees of one. The kernel resets a device when it is
// opened and when the last descriptor is closed, so no guest meets another one's state.
package vfio
