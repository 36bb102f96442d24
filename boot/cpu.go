package boot

// Segment is the hidden part of a segment register, as in struct kvm_segment.
type Segment struct {
	Base               uint64
	Limit              uint32
	Selector           uint16
	Type               uint8 // Intel SDM vol. 3, tables 3-1 and 3-2
	Present, DPL, DB   uint8
	System, Long, Gran uint8 // System is the descriptor's S bit: 1 for code and data
}

// CPUState is the state in which a vCPU enters the kernel. Registers not named here are
// zero, or as after reset where the architecture fixes them.
type CPUState struct {
	RIP, RBX, RFLAGS uint64
	CR0              uint64 // CR3, CR4 and EFER are zero
	CS               Segment
	Data             Segment // DS, ES, FS, GS and SS
	TR               Segment
}

const (
	cr0PE       = 1 << 0 // Intel SDM vol. 3, 2.5
	cr0ET       = 1 << 4
	rflagsFixed = 1 << 1 // Intel SDM vol. 1, 3.4.3

	typeCode   = 0xb // execute, read, accessed
	typeData   = 0x3 // read, write, accessed
	typeTSS32  = 0xb // busy 32-bit TSS
	selCode    = 0x08
	selData    = 0x10
	selTSS     = 0x18
	tssLimit32 = 0x67
)

// CPU is the first vCPU's state at the PVH entry point: 32-bit protected mode, flat
// segments, paging and interrupts off, EBX at the start info (Xen: docs/misc/pvh.pandoc).
func (e Entry) CPU() CPUState {
	flat := func(sel uint16, typ uint8) Segment {
		return Segment{Limit: 0xffff_ffff, Selector: sel, Type: typ, Present: 1, DB: 1, System: 1, Gran: 1}
	}
	return CPUState{
		RIP: e.PC, RBX: e.StartInfo, RFLAGS: rflagsFixed,
		CR0:  cr0PE | cr0ET,
		CS:   flat(selCode, typeCode),
		Data: flat(selData, typeData),
		TR:   Segment{Limit: tssLimit32, Selector: selTSS, Type: typeTSS32, Present: 1},
	}
}
