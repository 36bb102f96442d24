package kvm

import (
	"fmt"
	"slices"
)

// MPState is whether a vCPU runs, halts or waits to be started, KVM_MP_STATE_*.
type MPState uint32

// States of x86.
const (
	MPRunnable MPState = iota
	MPUninitialized
	MPInitReceived
	MPHalted
	MPSIPIReceived
)

// get reads one of the vCPU's structures.
func get[T any](v *VCPU, r request) (T, error) {
	var t T
	_, err := ioctl(v.fd, r, &t)
	return t, err
}

// set writes one.
func set[T any](v *VCPU, r request, t T) error {
	_, err := ioctl(v.fd, r, &t)
	return err
}

// Regs reads the general registers.
func (v *VCPU) Regs() (Regs, error) { return get[Regs](v, kvmGetRegs) }

// SetRegs writes the general registers; a pending exception is lost.
func (v *VCPU) SetRegs(r Regs) error { return set(v, kvmSetRegs, r) }

// Sregs reads segments, control registers, EFER and the APIC base.
func (v *VCPU) Sregs() (Sregs, error) { return get[Sregs](v, kvmGetSregs2) }

// SetSregs writes them.
func (v *VCPU) SetSregs(s Sregs) error { return set(v, kvmSetSregs2, s) }

// LAPIC reads the local APIC's register page.
func (v *VCPU) LAPIC() (LAPIC, error) { return get[LAPIC](v, kvmGetLAPIC) }

// SetLAPIC writes it.
func (v *VCPU) SetLAPIC(l LAPIC) error { return set(v, kvmSetLAPIC, l) }

// MPState reads whether the vCPU runs.
func (v *VCPU) MPState() (MPState, error) { return get[MPState](v, kvmGetMPState) }

// SetMPState sets it.
func (v *VCPU) SetMPState(s MPState) error { return set(v, kvmSetMPState, s) }

// TSCKHz is the frequency of the guest's TSC in kHz.
func (v *VCPU) TSCKHz() (int, error) { return ioctlValue(v.fd, kvmGetTSCKHz, 0) }

// SetTSCKHz sets it; any other value than the host's needs CapTSCControl.
func (v *VCPU) SetTSCKHz(khz int) error {
	_, err := ioctlValue(v.fd, kvmSetTSCKHz, uintptr(khz))
	return err
}

// TSCOffset is what the guest's TSC is ahead of the host's, modulo 2^64, if their
// frequencies are the same (Linux 5.16).
func (v *VCPU) TSCOffset() (offset uint64, err error) {
	err = attribute(v.fd, kvmGetDeviceAttr, vcpuTSCControl, vcpuTSCOffset, &offset)
	return offset, err
}

// SetTSCOffset sets it.
func (v *VCPU) SetTSCOffset(offset uint64) error {
	return attribute(v.fd, kvmSetDeviceAttr, vcpuTSCControl, vcpuTSCOffset, &offset)
}

// MSRs reads model-specific registers. Those that the kernel refuses are not in the result
// but in refused, by index.
func (v *VCPU) MSRs(indices []uint32) (msrs []MSR, refused []uint32, err error) {
	want := make([]MSR, len(indices))
	for i, index := range indices {
		want[i].Index = index
	}
	return v.eachMSR(kvmGetMSRs, want)
}

// SetMSRs writes registers in the order given, and returns those that the kernel refused.
func (v *VCPU) SetMSRs(msrs []MSR) (refused []uint32, err error) {
	_, refused, err = v.eachMSR(kvmSetMSRs, msrs)
	return refused, err
}

// eachMSR gets or sets in batches. The kernel stops at the first register that it refuses
// and returns how many it did: that one is skipped.
func (v *VCPU) eachMSR(r request, msrs []MSR) (done []MSR, refused []uint32, err error) {
	l := new(msrList)
	for len(msrs) > 0 {
		l.n = uint32(copy(l.entries[:], msrs))
		n, err := ioctl(v.fd, r, l)
		if err != nil {
			return done, refused, err
		}
		done = append(done, l.entries[:n]...)
		if n < int(l.n) {
			refused = append(refused, msrs[n].Index)
			n++
		}
		msrs = msrs[n:]
	}
	return done, refused, nil
}

// State is all that a vCPU is, without the VM's clock. It is plain data.
type State struct {
	CPUID     []CPUIDEntry
	TSCKHz    int // 0: unknown
	MPState   MPState
	Regs      Regs
	Sregs     Sregs
	XSave     []byte // XSAVE area, standard format: Intel SDM vol. 1, 13.4
	XCRs      XCRs
	DebugRegs DebugRegs
	LAPIC     LAPIC
	MSRs      []MSR
	Events    Events
}

// SaveState reads the whole state. The vCPU does not run, and its last exit is complete: it
// was ExitIntr. MSRs that the kernel lists but refuses to read are left out.
func (v *VCPU) SaveState() (State, error) {
	var s State
	indices, err := v.sys.MSRIndices()
	if err != nil {
		return s, err
	}
	s.XSave = make([]byte, v.xsaveSize)
	getXSave := kvmGetXSave2
	if v.xsaveSize == len(xsave{}) {
		getXSave = kvmGetXSave
	}
	// MP state comes first: reading it lets a pending INIT or SIPI take effect. Events come
	// last: they hold what the other calls made pending.
	err = firstError(
		func() (err error) { s.MPState, err = v.MPState(); return },
		func() (err error) { s.CPUID, err = v.CPUID(); return },
		func() (err error) { s.Regs, err = v.Regs(); return },
		func() (err error) { s.Sregs, err = v.Sregs(); return },
		func() (err error) { _, err = ioctl(v.fd, getXSave, &s.XSave[0]); return },
		func() (err error) { s.XCRs, err = get[XCRs](v, kvmGetXCRs); return },
		func() (err error) { s.DebugRegs, err = get[DebugRegs](v, kvmGetDebugRegs); return },
		func() (err error) { s.LAPIC, err = v.LAPIC(); return },
		func() (err error) { s.MSRs, _, err = v.MSRs(indices); return },
		func() (err error) { s.Events, err = get[Events](v, kvmGetVCPUEvents); return },
	)
	if err != nil {
		return s, fmt.Errorf("save vcpu %d: %w", v.id, err)
	}
	s.TSCKHz, _ = v.TSCKHz() // unknown on hosts with an unstable TSC
	return s, nil
}

// LoadState writes the whole state to a vCPU that has not run yet, or has the state's CPUID:
// so it also puts a vCPU back to an earlier state of its own. MSRs that the kernel
// refuses are returned: a host may list what it then refuses, so whether one matters is for the
// caller to say.
func (v *VCPU) LoadState(s State) (refused []uint32, err error) {
	if len(s.XSave) != v.xsaveSize {
		return nil, fmt.Errorf("load vcpu %d: XSAVE area of %d bytes, here it has %d", v.id, len(s.XSave), v.xsaveSize)
	}
	// The TSC deadline is relative to the TSC and means nothing to a LAPIC in another timer
	// mode: LAPIC, then the other MSRs, then it.
	const tscDeadline = 0x6e0 // IA32_TSC_DEADLINE
	msrs := slices.Clone(s.MSRs)
	slices.SortStableFunc(msrs, func(a, b MSR) int {
		switch {
		case a.Index == b.Index:
			return 0
		case a.Index == tscDeadline:
			return 1
		case b.Index == tscDeadline:
			return -1
		}
		return 0
	})
	err = firstError(
		func() error { return v.SetCPUID(s.CPUID) },
		func() error {
			if khz, err := v.TSCKHz(); s.TSCKHz == 0 || err == nil && khz == s.TSCKHz {
				return nil
			}
			return v.SetTSCKHz(s.TSCKHz)
		},
		func() error { return v.SetMPState(s.MPState) },
		func() error { return v.SetRegs(s.Regs) },
		func() error { return v.SetSregs(s.Sregs) },
		func() error { return set(v, kvmSetXCRs, s.XCRs) }, // before XSAVE, which they allow
		func() error { _, err := ioctl(v.fd, kvmSetXSave, &s.XSave[0]); return err },
		func() error { return set(v, kvmSetDebugRegs, s.DebugRegs) },
		func() error { return v.SetLAPIC(s.LAPIC) },
		func() (err error) { refused, err = v.SetMSRs(msrs); return },
		func() error { return set(v, kvmSetVCPUEvents, s.Events) },
	)
	if err != nil {
		return refused, fmt.Errorf("load vcpu %d: %w", v.id, err)
	}
	return refused, nil
}

func firstError(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
