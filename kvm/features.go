package kvm

import (
	"errors"
	"fmt"
)

// Feature is something that KVM may or may not be able to do.
type Feature struct {
	Name      string // KVM_CAP_*
	Cap       Cap
	MinKernel string // Linux version that brought it
	Hint      string // what it is for, or what goes without it
	Needed    bool   // no VM without it
	Supported bool
	Value     int // CheckExtension's answer
}

const (
	needed   = true
	optional = false
)

// features are those that the machine uses, the needed ones first.
var features = []Feature{
	{"KVM_CAP_USER_MEMORY", CapUserMemory, "2.6.25", "guest RAM", needed, false, 0},
	{"KVM_CAP_EXT_CPUID", CapExtCPUID, "2.6.26", "the guest's CPU model", needed, false, 0},
	{"KVM_CAP_MP_STATE", CapMPState, "2.6.26", "start of secondary vCPUs, migration", needed, false, 0},
	{"KVM_CAP_IRQFD", CapIRQFD, "2.6.32", "interrupts of devices", needed, false, 0},
	{"KVM_CAP_IOEVENTFD", CapIOEventFD, "2.6.32", "doorbells of virtio devices", needed, false, 0},
	{"KVM_CAP_ADJUST_CLOCK", CapAdjustClock, "2.6.33", "kvm-clock over pause and migration", needed, false, 0},
	{"KVM_CAP_VCPU_EVENTS", CapVCPUEvents, "2.6.33", "migration", needed, false, 0},
	{"KVM_CAP_DEBUGREGS", CapDebugRegs, "2.6.35", "migration", needed, false, 0},
	{"KVM_CAP_XCRS", CapXCRs, "2.6.36", "migration", needed, false, 0},
	{"KVM_CAP_SIGNAL_MSI", CapSignalMSI, "3.5", "interrupts of the IOAPIC", needed, false, 0},
	{"KVM_CAP_SPLIT_IRQCHIP", CapSplitIRQChip, "4.4", "LAPICs in the kernel, IOAPIC in the VMM", needed, false, 0},
	{"KVM_CAP_IMMEDIATE_EXIT", CapImmediateExit, "4.11", "pausing a vCPU without a race", needed, false, 0},
	{"KVM_CAP_SREGS2", CapSregs2, "5.14", "registers of the vCPU", needed, false, 0},
	{"KVM_CAP_TSC_DEADLINE_TIMER", CapTSCDeadlineTimer, "3.3", "without it the guest's timers use the slower LAPIC counter", optional, false, 0},
	{"KVM_CAP_IOEVENTFD_ANY_LENGTH", CapIOEventFDAnyLength, "4.4", "faster doorbells", optional, false, 0},
	{"KVM_CAP_TSC_CONTROL", CapTSCControl, "2.6.39", "needs TSC scaling in the CPU; without it a guest migrates only between hosts of one TSC frequency", optional, false, 0},
	{"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", CapManualDirtyLogProtect2, "5.2", "without it a migration stalls the guest at each round", optional, false, 0},
	{"KVM_CAP_DIRTY_LOG_RING", CapDirtyLogRing, "5.11", "dirty tracking whose cost follows the guest's writes, not its size", optional, false, 0},
	{"KVM_CAP_BINARY_STATS_FD", CapBinaryStatsFD, "5.14", "statistics of exits", optional, false, 0},
	{"KVM_CAP_PRE_FAULT_MEMORY", CapPreFaultMemory, "6.11", "without it a guest that has come faults at each page that it uses first", optional, false, 0},
	{"KVM_CAP_XSAVE2", CapXSave2, "5.17", "migration of AMX state", optional, false, 0},
}

// Features probes what the machine uses, the needed ones first. Supported means that it can be
// relied upon: kvm_pvm has a dirty ring, but writes on when it is full.
func (s *System) Features() []Feature {
	list := make([]Feature, len(features))
	for i, f := range features {
		f.Value = s.CheckExtension(f.Cap)
		f.Supported = f.Value > 0 && !(f.Cap == CapDirtyLogRing && s.Kind() == PVM)
		list[i] = f
	}
	return list
}

// Check fails when a needed feature is missing, and names all of those.
func (s *System) Check() error {
	var errs []error
	for _, f := range s.Features() {
		if f.Needed && !f.Supported {
			errs = append(errs, fmt.Errorf("KVM lacks %s (%s)\nLinux %s or later has it", f.Name, f.Hint, f.MinKernel))
		}
	}
	return errors.Join(errs...)
}

func (c Cap) String() string {
	for _, f := range features {
		if f.Cap == c {
			return f.Name
		}
	}
	return fmt.Sprintf("KVM_CAP %d", uint32(c))
}
