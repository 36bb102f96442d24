package boot

import (
	"fmt"

	"baton/kvm/guestmem"
)

// Fixed places of the guest-physical address space.
const (
	LowRAMMax   = 0xb000_0000 // RAM above this size continues at HighRAM
	ECAMBase    = 0xb000_0000 // 256 buses of 1 MiB: PCI Firmware Specification 3.3, 4.1.2
	ECAMSize    = 0x1000_0000
	MMIO32Base  = 0xc000_0000
	MMIO32Size  = 0x3ec0_0000 // to 0xfebfffff
	IOAPICAddr  = 0xfec0_0000
	LAPICAddr   = 0xfee0_0000
	IdentityMap = 0xfffb_c000 // one page, then three for the TSS: KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR
	TSSAddr     = 0xfffb_d000
	HighRAM     = 0x1_0000_0000

	// ACPIBase is where Config.ACPI goes: the part of the BIOS area that an operating
	// system also searches for the RSDP (ACPI 6.5, 5.2.5.1).
	ACPIBase = 0xe_0000
	ACPISize = resetVector - ACPIBase

	// resetVector is where a CPU in real mode begins with the BIOS, f000:fff0. Linux jumps
	// there to reboot a hardware-reduced ACPI machine that has no EFI (arch/x86/kernel/reboot.c).
	resetVector = 0xf_fff0
)

// resetCode is the whole BIOS: it writes 6, a full reset, to the reset control register.
var resetCode = []byte{
	0xba, 0xf9, 0x0c, // mov $0xcf9, %dx
	0xb0, 0x06, //       mov $6, %al
	0xee, //             out %al, (%dx)
	0xf4, //             hlt
}

const (
	page   = 4 << 10
	gib    = 1 << 30
	minRAM = 64 << 20
	maxRAM = 64 * gib

	legacyBase = 0xa_0000 // VGA, option ROMs, BIOS: RAM that the guest is told not to use
	legacyEnd  = 0x10_0000

	// mmio64End keeps 64-bit BARs below AMD's HyperTransport range (AMD I/O Virtualization
	// Technology Specification, 2.1.2), which an IOMMU would not translate.
	mmio64End = 0xfd_0000_0000
)

// Map is the guest-physical memory map of a machine. Ranges are in bytes.
//
//	0           RAM      0xa0000  legacy hole, ACPI tables  0x100000
//	0x100000    RAM (Low)
//	0xb0000000  ECAM     0xc0000000  MMIO32     0xfec00000  IOAPIC
//	0xfee00000  LAPIC    0xfffbc000  KVM's own pages
//	4 GiB       RAM (High), then MMIO64 from the next GiB on
type Map struct {
	Low    guestmem.Range // RAM from 0, the legacy hole included
	High   guestmem.Range // RAM from 4 GiB; Size 0 when all of it is low
	ECAM   guestmem.Range
	MMIO32 guestmem.Range // window for 32-bit BARs
	MMIO64 guestmem.Range // window for 64-bit BARs, aligned to 1 GiB
}

// Layout computes the memory map for ram bytes of RAM (64 MiB to 64 GiB, whole pages) and
// vCPUs with physBits bits of physical address (CPUID 0x80000008 EAX[7:0]).
func Layout(ram uint64, physBits int) (Map, error) {
	switch {
	case ram < minRAM || ram > maxRAM:
		return Map{}, fmt.Errorf("lay out memory: %d bytes of RAM are out of range\nuse 64 MiB to 64 GiB", ram)
	case ram%page != 0:
		return Map{}, fmt.Errorf("lay out memory: %d bytes of RAM are not a multiple of 4 KiB", ram)
	case physBits < 32 || physBits > 52:
		return Map{}, fmt.Errorf("lay out memory: %d physical address bits are out of range (32 to 52)", physBits)
	}
	m := Map{
		Low:    guestmem.Range{Base: 0, Size: min(ram, LowRAMMax)},
		High:   guestmem.Range{Base: HighRAM, Size: ram - min(ram, LowRAMMax)},
		ECAM:   guestmem.Range{Base: ECAMBase, Size: ECAMSize},
		MMIO32: guestmem.Range{Base: MMIO32Base, Size: MMIO32Size},
	}
	base := (m.High.End() + gib - 1) &^ (gib - 1)
	limit := min(uint64(1)<<physBits, mmio64End)
	if base+gib > limit {
		return Map{}, fmt.Errorf("lay out memory: %d bytes of RAM and 1 GiB for 64-bit BARs end at %#x, but %d address bits at %#x\ngive the guest less memory",
			ram, base+gib, physBits, limit)
	}
	m.MMIO64 = guestmem.Range{Base: base, Size: limit - base}
	return m, nil
}

// RAM returns the ranges that guest memory has to back, in ascending order.
func (m Map) RAM() []guestmem.Range {
	if m.High.Size == 0 {
		return []guestmem.Range{m.Low}
	}
	return []guestmem.Range{m.Low, m.High}
}

// MemType is what a range of the guest's memory map is (ACPI 6.5, table 15.4).
type MemType uint32

const (
	MemRAM      MemType = 1 // for the guest to use
	MemReserved MemType = 2 // not
)

// MemRange is one line of the memory map that the guest is given.
type MemRange struct {
	guestmem.Range
	Type MemType
}

// E820 returns the memory map for the guest, ascending and without overlaps. ECAM is
// reserved there because Linux uses MCFG only then.
func (m Map) E820() []MemRange {
	r := func(base, end uint64, t MemType) MemRange {
		return MemRange{guestmem.Range{Base: base, Size: end - base}, t}
	}
	e := []MemRange{
		r(0, legacyBase, MemRAM),
		r(legacyBase, legacyEnd, MemReserved),
		r(legacyEnd, m.Low.End(), MemRAM),
		{m.ECAM, MemReserved},
		r(IdentityMap, TSSAddr+3*page, MemReserved),
	}
	if m.High.Size != 0 {
		e = append(e, MemRange{m.High, MemRAM})
	}
	return e
}
