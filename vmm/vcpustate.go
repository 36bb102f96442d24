package vmm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"baton/devices"
	"baton/kvm"
)

// msrTSC is IA32_TIME_STAMP_COUNTER, which is a part of the machine's clock.
const msrTSC = 0x10

// vcpuSection is a processor's state. The parts are the kernel's structures of KVM's API, as bytes.
type vcpuSection struct {
	CPUID     []byte     `cbor:"1,keyasint"` // of kvm_cpuid_entry2, one after the other
	MPState   uint32     `cbor:"2,keyasint"` // KVM_MP_STATE_*
	Regs      []byte     `cbor:"3,keyasint"` // kvm_regs
	Sregs     []byte     `cbor:"4,keyasint"` // kvm_sregs2
	XSave     []byte     `cbor:"5,keyasint"` // XSAVE area, standard format
	XCRs      []byte     `cbor:"6,keyasint"` // kvm_xcrs
	DebugRegs []byte     `cbor:"7,keyasint"` // kvm_debugregs
	LAPIC     []byte     `cbor:"8,keyasint"` // kvm_lapic_state
	Events    []byte     `cbor:"9,keyasint"` // kvm_vcpu_events
	MSRs      []msrState `cbor:"10,keyasint"`
}

type msrState struct {
	Index uint32 `cbor:"1,keyasint"`
	Value uint64 `cbor:"2,keyasint"`
}

// vcpuState is a vCPU that stands still, its last instruction complete.
type vcpuState struct{ *vcpu }

// StateInfo implements [devices.Stater]. The ID has the APIC ID.
func (c vcpuState) StateInfo() devices.StateInfo {
	return devices.StateInfo{ID: fmt.Sprintf("vcpu/%d", c.ID()), Type: "x86-64", Version: 1, MinVersion: 1}
}

// SaveState implements [devices.Stater].
func (c vcpuState) SaveState() ([]byte, error) {
	s, err := c.VCPU.SaveState()
	if err != nil {
		return nil, err
	}
	v := vcpuSection{MPState: uint32(s.MPState), XSave: s.XSave}
	for _, part := range []struct {
		to   *[]byte
		from any
	}{
		{&v.CPUID, s.CPUID}, {&v.Regs, s.Regs}, {&v.Sregs, s.Sregs}, {&v.XCRs, s.XCRs},
		{&v.DebugRegs, s.DebugRegs}, {&v.LAPIC, s.LAPIC}, {&v.Events, s.Events},
	} {
		if *part.to, err = binary.Append(nil, binary.LittleEndian, part.from); err != nil {
			return nil, fmt.Errorf("save %s: %w", c.StateInfo(), err)
		}
	}
	for _, m := range s.MSRs {
		if m.Index != msrTSC {
			v.MSRs = append(v.MSRs, msrState{m.Index, m.Data})
		}
	}
	return devices.EncodeState(v)
}

// LoadState implements [devices.Stater]. A register that this host's KVM refuses is an error
// unless it has the value already.
func (c vcpuState) LoadState(version uint16, data []byte) error {
	info := c.StateInfo()
	var v vcpuSection
	if err := devices.DecodeState(info, version, data, &v, nil); err != nil {
		return err
	}
	s := kvm.State{MPState: kvm.MPState(v.MPState), XSave: v.XSave}
	entry := binary.Size(kvm.CPUIDEntry{})
	if len(v.CPUID)%entry != 0 {
		return info.BadField("CPUID", "%d bytes", len(v.CPUID))
	}
	s.CPUID = make([]kvm.CPUIDEntry, len(v.CPUID)/entry)
	for _, part := range []struct {
		name string
		from []byte
		to   any
	}{
		{"CPUID", v.CPUID, s.CPUID}, {"Regs", v.Regs, &s.Regs}, {"Sregs", v.Sregs, &s.Sregs}, {"XCRs", v.XCRs, &s.XCRs},
		{"DebugRegs", v.DebugRegs, &s.DebugRegs}, {"LAPIC", v.LAPIC, &s.LAPIC}, {"Events", v.Events, &s.Events},
	} {
		if len(part.from) != binary.Size(part.to) {
			return info.BadField(part.name, "%d bytes, not %d", len(part.from), binary.Size(part.to))
		}
		if err := binary.Read(bytes.NewReader(part.from), binary.LittleEndian, part.to); err != nil {
			return info.BadField(part.name, "%w", err)
		}
	}
	for _, m := range v.MSRs {
		if m.Index != msrTSC {
			s.MSRs = append(s.MSRs, kvm.MSR{Index: m.Index, Data: m.Value})
		}
	}
	refused, err := c.VCPU.LoadState(s)
	if err != nil {
		return info.BadField("", "%w", err)
	}
	return c.checkRefused(info, s.MSRs, refused)
}

// checkRefused tells registers that are as they shall be from those that cannot be made so.
func (c vcpuState) checkRefused(info devices.StateInfo, want []kvm.MSR, refused []uint32) error {
	have, _, err := c.VCPU.MSRs(refused)
	if err != nil {
		return info.BadField("MSRs", "%w", err)
	}
	for _, m := range want {
		if slices.Contains(refused, m.Index) && !slices.Contains(have, m) {
			return info.BadField("MSRs", "this host's KVM refuses %#x for MSR %#x", m.Data, m.Index)
		}
	}
	return nil
}
