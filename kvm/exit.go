package kvm

import (
	"fmt"
	"slices"
	"strings"
)

// ExitReason says why Run returned, KVM_EXIT_*.
type ExitReason uint32

// Exit reasons of x86: api.rst, 5 "The kvm_run structure".
const (
	ExitUnknown       ExitReason = 0
	ExitException     ExitReason = 1
	ExitIO            ExitReason = 2 // see VCPU.IO
	ExitHypercall     ExitReason = 3
	ExitDebug         ExitReason = 4
	ExitHLT           ExitReason = 5 // only without a LAPIC in the kernel
	ExitMMIO          ExitReason = 6 // see VCPU.MMIO
	ExitIRQWindowOpen ExitReason = 7
	ExitShutdown      ExitReason = 8  // triple fault
	ExitFailEntry     ExitReason = 9  // see VCPU.FailEntry
	ExitIntr          ExitReason = 10 // Kick
	ExitSetTPR        ExitReason = 11
	ExitTPRAccess     ExitReason = 12
	ExitNMI           ExitReason = 16
	ExitInternalError ExitReason = 17 // see VCPU.InternalError
	ExitSystemEvent   ExitReason = 24
	ExitIOAPICEOI     ExitReason = 26 // see VCPU.EOIVector
	ExitHyperV        ExitReason = 27
	ExitRDMSR         ExitReason = 29
	ExitWRMSR         ExitReason = 30
	ExitDirtyRingFull ExitReason = 31
	ExitBusLock       ExitReason = 33
	ExitXen           ExitReason = 34
	ExitNotify        ExitReason = 37
	ExitMemoryFault   ExitReason = 39
)

var exitNames = map[ExitReason]string{
	ExitUnknown: "unknown", ExitException: "exception", ExitIO: "io", ExitHypercall: "hypercall",
	ExitDebug: "debug", ExitHLT: "hlt", ExitMMIO: "mmio", ExitIRQWindowOpen: "irq window open",
	ExitShutdown: "shutdown", ExitFailEntry: "fail entry", ExitIntr: "intr", ExitSetTPR: "set tpr",
	ExitTPRAccess: "tpr access", ExitNMI: "nmi", ExitInternalError: "internal error",
	ExitSystemEvent: "system event", ExitIOAPICEOI: "ioapic eoi", ExitHyperV: "hyperv",
	ExitRDMSR: "rdmsr", ExitWRMSR: "wrmsr", ExitDirtyRingFull: "dirty ring full",
	ExitBusLock: "bus lock", ExitXen: "xen", ExitNotify: "notify", ExitMemoryFault: "memory fault",
}

func (r ExitReason) String() string {
	if s, ok := exitNames[r]; ok {
		return s
	}
	return fmt.Sprintf("exit %d", uint32(r))
}

// IOExit is an access to an I/O port: Count items of Size bytes (1, 2 or 4), more than one
// for a string instruction, all to Port. Data is a window into the run area: an IN is
// answered by filling it before the next Run.
type IOExit struct {
	Port  uint16
	Size  int
	Count int
	Out   bool
	Data  []byte
}

// IO is the detail of ExitIO.
func (v *VCPU) IO() IOExit {
	e := exitAs[exitIO](v.run)
	n := uint64(e.size) * uint64(e.count)
	return IOExit{Port: e.port, Size: int(e.size), Count: int(e.count), Out: e.out != 0,
		Data: v.page[e.offset : e.offset+n : e.offset+n]}
}

// MMIOExit is an access of 1 to 8 bytes to guest-physical memory that is in no slot. A
// read is answered by filling Data before the next Run.
type MMIOExit struct {
	Addr  uint64
	Write bool
	Data  []byte
}

// MMIO is the detail of ExitMMIO.
func (v *VCPU) MMIO() MMIOExit {
	e := exitAs[exitMMIO](v.run)
	n := min(int(e.size), len(e.data))
	return MMIOExit{Addr: e.addr, Write: e.write != 0, Data: e.data[:n:n]}
}

// EOIVector is the detail of ExitIOAPICEOI: the vector whose interrupt the guest ended.
func (v *VCPU) EOIVector() uint8 { return v.run.exit[0] }

// FailEntry is the detail of ExitFailEntry: the processor refused the vCPU's state. Reason
// is the processor's code (Intel SDM vol. 3, 27.8 or AMD APM vol. 2, appendix C).
func (v *VCPU) FailEntry() (reason uint64, cpu uint32) {
	e := exitAs[exitFailEntry](v.run)
	return e.reason, e.cpu
}

// InternalError is the detail of ExitInternalError: KVM could not go on.
type InternalError struct {
	Suberror uint32   // KVM_INTERNAL_ERROR_*: 1 emulation, 2 exceptions, 3 delivery, 4 exit reason
	Data     []uint64 // unspecified, for a bug report
	Insn     []byte   // the instruction that could not be emulated, where known
}

func (e *InternalError) Error() string {
	var b strings.Builder
	switch e.Suberror {
	case internalEmulation:
		b.WriteString("kvm cannot emulate an instruction of the guest")
	case internalSimulEx:
		b.WriteString("kvm met exceptions that cannot occur together")
	case internalDelivery:
		b.WriteString("kvm met an exit while it delivered an event")
	case internalExitReason:
		b.WriteString("kvm met an exit reason that it does not know")
	default:
		fmt.Fprintf(&b, "kvm internal error %d", e.Suberror)
	}
	if len(e.Insn) > 0 {
		fmt.Fprintf(&b, ", bytes % x", e.Insn)
	} else if len(e.Data) > 0 {
		fmt.Fprintf(&b, ", data %#x", e.Data)
	}
	return b.String()
}

// InternalError returns a copy of the detail of ExitInternalError.
func (v *VCPU) InternalError() *InternalError {
	e := exitAs[exitInternal](v.run)
	n := min(int(e.n), len(e.data))
	i := &InternalError{Suberror: e.suberror, Data: slices.Clone(e.data[:n])}
	if e.suberror == internalEmulation && n >= 3 && e.data[0]&1 != 0 {
		bytes := v.run.exit[insnOffset+1:]
		i.Insn = slices.Clone(bytes[:min(v.run.exit[insnOffset], 15)])
	}
	return i
}
