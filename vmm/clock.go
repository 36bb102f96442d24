package vmm

import (
	"time"

	"baton/devices"
	"baton/kvm"
)

// maxAway is how long a guest may be on its way for the time to count as passed for it. A
// guest that has been in a file for longer goes on where it stood, and asks its time server.
const maxAway = time.Minute

// clock is the machine's time: kvm-clock and the TSCs of all vCPUs, which have to stay as far
// apart as they are, for guests reckon the one from the other.
//
//	source ── kvm-clock, TSCs, real time ──> target: all of them + real time since then
type clock struct{ m *Machine }

type clockSection struct {
	Clock    uint64   `cbor:"1,keyasint"` // kvm-clock, ns
	Realtime uint64   `cbor:"2,keyasint"` // at the same moment, ns since 1970
	TSCKHz   uint32   `cbor:"3,keyasint"` // 0: unknown
	TSC      []uint64 `cbor:"4,keyasint"` // of each vCPU by APIC ID, at the same moment
}

// StateInfo implements [devices.Stater].
func (*clock) StateInfo() devices.StateInfo {
	return devices.StateInfo{ID: "clock", Type: "kvm-clock", Version: 1, MinVersion: 1}
}

// Quiesce implements [devices.Quiescer]: time does not stop.
func (*clock) Quiesce() error { return nil }

// Unquiesce implements [devices.Quiescer]. The guest is told that it was stopped.
func (k *clock) Unquiesce() error {
	for _, c := range k.m.vcpus {
		if err := c.ClockPaused(); err != nil {
			return err
		}
	}
	return nil
}

// SaveState implements [devices.Stater].
func (k *clock) SaveState() ([]byte, error) {
	var s clockSection
	now, err := k.m.kvm.Clock()
	if err != nil {
		return nil, err
	}
	s.Clock, s.Realtime = now.Clock, now.Realtime
	if now.Flags&kvm.ClockRealtime == 0 {
		s.Realtime = uint64(time.Now().UnixNano())
	}
	for _, c := range k.m.vcpus {
		khz, _ := c.TSCKHz() // unknown on hosts with an unstable TSC
		s.TSCKHz = uint32(khz)
		tsc, err := c.tscAt(now, khz)
		if err != nil {
			return nil, err
		}
		s.TSC = append(s.TSC, tsc)
	}
	return devices.EncodeState(s)
}

// tscAt is the vCPU's TSC at a reading of the clock, or else now, which is some microseconds
// later.
func (c *vcpu) tscAt(at kvm.ClockData, khz int) (uint64, error) {
	if at.Flags&kvm.ClockHostTSC != 0 && khz == c.power.TSCKHz {
		if offset, err := c.TSCOffset(); err == nil {
			return at.HostTSC + offset, nil
		}
	}
	msrs, _, err := c.MSRs([]uint32{msrTSC})
	if err != nil || len(msrs) == 0 {
		return 0, err
	}
	return msrs[0].Data, nil
}

// LoadState implements [devices.Stater].
func (k *clock) LoadState(version uint16, data []byte) error {
	info := k.StateInfo()
	var s clockSection
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	if len(s.TSC) != len(k.m.vcpus) {
		return info.BadField("TSC", "of %d vCPUs; here there are %d", len(s.TSC), len(k.m.vcpus))
	}
	if int32(s.TSCKHz) < 0 {
		return info.BadField("TSCKHz", "%d kHz", s.TSCKHz)
	}
	set := kvm.ClockData{Clock: s.Clock}
	if away := uint64(time.Now().UnixNano()) - s.Realtime; away < uint64(maxAway) { // or it has not begun yet
		if k.m.kvm.CheckExtension(kvm.CapAdjustClock)&kvm.ClockRealtime != 0 {
			set.Flags, set.Realtime = kvm.ClockRealtime, s.Realtime
		} else {
			set.Clock += away
		}
	}
	if err := k.m.kvm.SetClock(set); err != nil {
		return info.BadField("Clock", "%w", err)
	}
	for i, c := range k.m.vcpus {
		if err := c.setTSC(info, s.TSC[i], s.Clock, int(s.TSCKHz)); err != nil {
			return err
		}
	}
	return nil
}

// setTSC has the vCPU's TSC go on at khz such that it read tsc when kvm-clock was at clock.
func (c *vcpu) setTSC(info devices.StateInfo, tsc, clock uint64, khz int) error {
	here, _ := c.TSCKHz()
	if khz != 0 && khz != here {
		if err := c.SetTSCKHz(khz); err != nil {
			return info.BadField("TSCKHz", "%d kHz, here %d: %w\nthis host cannot scale the guest's TSC", khz, here, err)
		}
	}
	now, err := c.m.kvm.Clock()
	if err != nil {
		return info.BadField("Clock", "%w", err)
	}
	tsc += ticks(now.Clock-clock, khz)
	if now.Flags&kvm.ClockHostTSC != 0 && khz == c.power.TSCKHz && c.SetTSCOffset(tsc-now.HostTSC) == nil {
		return nil
	}
	if _, err := c.SetMSRs([]kvm.MSR{{Index: msrTSC, Data: tsc}}); err != nil {
		return info.BadField("TSC", "%w", err)
	}
	return nil
}

// ticks is how often a TSC counts in so many nanoseconds.
func ticks(ns uint64, khz int) uint64 {
	const million = 1_000_000
	return ns/million*uint64(khz) + ns%million*uint64(khz)/million
}
