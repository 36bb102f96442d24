package kvm

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// MSRs whose values the tests know: Intel SDM vol. 4.
const (
	msrTSC         = 0x10
	msrSysenterEIP = 0x176
	msrPAT         = 0x277
	msrDeadline    = 0x6e0
	msrSTAR        = 0xc0000081

	msrHVVPRuntime    = 0x40000010 // Hyper-V TLFS, 7.11
	msrHVTimeRefCount = 0x40000020
)

// xmm3 is the register's place in the XSAVE area: Intel SDM vol. 1, 10.5.1.
const xmm3 = 160 + 3*16

// interesting makes a machine whose vCPU has something to lose in every part of its state,
// and stands between the IN and the OUT of guestEcho.
func interesting(t *testing.T) *guest {
	g := newGuest(t, guestEcho, splitIRQChip(t))
	g.start(t, Regs{RIP: guestEcho, RDX: 0x80, R8: 8, R15: math.MaxUint64, RBP: 0x1234})
	g.expect(t, ExitIO)
	binary.LittleEndian.PutUint32(g.IO().Data, 0x1000)
	g.Kick()
	g.expect(t, ExitIntr) // the IN is complete

	x, err := get[xsave](g.VCPU, kvmGetXSave)
	must(t, err)
	x[512] |= 2 // XSTATE_BV: SSE
	binary.LittleEndian.PutUint32(x[xmm3:], 0xcafe)
	must(t, set(g.VCPU, kvmSetXSave, x))
	s, err := g.Sregs()
	must(t, err)
	s.CR2 = 0xdead000
	must(t, g.SetSregs(s))
	d, err := get[DebugRegs](g.VCPU, kvmGetDebugRegs)
	must(t, err)
	d.DB = [4]uint64{0x1000, 0x2000, 0x3000, 0x4000}
	must(t, set(g.VCPU, kvmSetDebugRegs, d))
	l, err := g.LAPIC()
	must(t, err)
	binary.LittleEndian.PutUint32(l.Regs[0x80:], 0x20)     // TPR
	binary.LittleEndian.PutUint32(l.Regs[0xf0:], 0x1ff)    // SVR: on
	binary.LittleEndian.PutUint32(l.Regs[0x320:], 0x400ef) // timer: TSC deadline mode, vector 0xef
	must(t, g.SetLAPIC(l))
	refused, err := g.SetMSRs([]MSR{
		{Index: msrSysenterEIP, Data: 0x5000},
		{Index: msrPAT, Data: 0x0007010600070106},
		{Index: msrSTAR, Data: 0x0023001000000000},
		{Index: msrDeadline, Data: math.MaxUint64 >> 2},
	})
	if err != nil || refused != nil {
		t.Fatalf("SetMSRs refused %#x, %v", refused, err)
	}
	e, err := get[Events](g.VCPU, kvmGetVCPUEvents)
	must(t, err)
	e.N.Masked = 1
	must(t, set(g.VCPU, kvmSetVCPUEvents, e))
	return g
}

func msr(s State, index uint32) uint64 {
	i := slices.IndexFunc(s.MSRs, func(m MSR) bool { return m.Index == index })
	if i < 0 {
		return 0
	}
	return s.MSRs[i].Data
}

// stable returns the state without what moves on by itself.
func stable(s State) State {
	s.MSRs = slices.DeleteFunc(slices.Clone(s.MSRs), func(m MSR) bool {
		return m.Index == msrTSC || m.Index == msrHVVPRuntime || m.Index == msrHVTimeRefCount
	})
	binary.LittleEndian.PutUint32(s.LAPIC.Regs[0x390:], 0) // the timer's current count
	return s
}

func TestStateMoves(t *testing.T) {
	source := interesting(t)
	saved, err := source.SaveState()
	must(t, err)
	if saved.Regs.RAX != 0x1000 || saved.Events.N.Masked != 1 || saved.DebugRegs.DB[3] != 0x4000 ||
		msr(saved, msrSTAR) != 0x0023001000000000 || msr(saved, msrDeadline) == 0 || saved.Sregs.CR2 != 0xdead000 ||
		binary.LittleEndian.Uint32(saved.XSave[xmm3:]) != 0xcafe {
		t.Fatalf("the state lacks what was put into it: %+v", saved)
	}

	target := newGuest(t, guestSpin, splitIRQChip(t))
	refused, err := target.LoadState(saved)
	must(t, err)
	t.Logf("refused MSRs: %#x", refused)
	loaded, err := target.SaveState()
	must(t, err)
	if d := cmp.Diff(stable(saved), stable(loaded)); d != "" {
		t.Errorf("state changed on its way:\n%s", d)
	}
	if from, to := msr(saved, msrTSC), msr(loaded, msrTSC); to < from {
		t.Errorf("TSC went back from %d to %d", from, to)
	}

	target.expect(t, ExitIO)
	if e := target.IO(); !e.Out || binary.LittleEndian.Uint32(e.Data) != 0x1001 {
		t.Errorf("IO = %+v, want the guest to go on with 0x1001", e)
	}
}

// TestStateReset puts a vCPU that has run back to where it was, as a reset of the machine does.
func TestStateReset(t *testing.T) {
	g := newGuest(t, guestPIO, splitIRQChip(t))
	g.start(t, Regs{RIP: guestPIO, RDX: 0x10, RAX: 1})
	power, err := g.SaveState()
	must(t, err)
	for range 3 {
		for want := byte(1); want < 5; want++ {
			g.expect(t, ExitIO)
			if got := g.IO().Data[0]; got != want {
				t.Fatalf("the guest counts %d, want %d", got, want)
			}
		}
		g.Kick()
		g.expect(t, ExitIntr)
		_, err := g.LoadState(power)
		must(t, err)
	}
}

// TestStateRefusedMSR wants an unknown MSR to be reported, and all others to be loaded.
func TestStateRefusedMSR(t *testing.T) {
	source := interesting(t)
	s, err := source.SaveState()
	must(t, err)
	const unknown = 0xdeadbeef
	s.MSRs = slices.Insert(s.MSRs, 3, MSR{Index: unknown, Data: 1})
	target := newGuest(t, guestSpin, splitIRQChip(t))
	refused, err := target.LoadState(s)
	must(t, err)
	if !slices.Contains(refused, unknown) {
		t.Errorf("refused %#x, want %#x among them", refused, unknown)
	}
	loaded, err := target.SaveState()
	must(t, err)
	for _, index := range []uint32{msrSysenterEIP, msrPAT, msrSTAR, msrDeadline} {
		if got, want := msr(loaded, index), msr(s, index); got != want {
			t.Errorf("MSR %#x is %#x, want %#x", index, got, want)
		}
	}
}

func TestStateErrors(t *testing.T) {
	g := newGuest(t, guestSpin, splitIRQChip(t))
	s, err := g.SaveState()
	must(t, err)
	for name, spoil := range map[string]func(*State){
		"short XSAVE":       func(s *State) { s.XSave = s.XSave[:100] },
		"too many CPUID":    func(s *State) { s.CPUID = make([]CPUIDEntry, maxCPUID+1) },
		"MP state":          func(s *State) { s.MPState = 99 },
		"reserved CR4 bits": func(s *State) { s.Sregs.CR4 = 1 << 63 },
		"reserved XCR0":     func(s *State) { s.XCRs.Registers[0].Value = 0 },
		"reserved DR7":      func(s *State) { s.DebugRegs.DR7 = 1 << 40 },
		"event flags":       func(s *State) { s.Events.Flags = 1 << 31 },
	} {
		bad := s
		spoil(&bad)
		if _, err := g.LoadState(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := g.LoadState(s); err != nil {
		t.Error("the right state after the wrong ones: ", err)
	}
}

func TestMSRBatches(t *testing.T) {
	g := newGuest(t, guestSpin)
	var indices []uint32
	for range 2 * maxMSRs {
		indices = append(indices, msrTSC, 0xdeadbeef, msrPAT)
	}
	msrs, refused, err := g.MSRs(indices)
	must(t, err)
	if len(msrs) != 4*maxMSRs || len(refused) != 2*maxMSRs {
		t.Fatalf("%d read, %d refused, want %d and %d", len(msrs), len(refused), 4*maxMSRs, 2*maxMSRs)
	}
	for i, m := range msrs {
		if want := []uint32{msrTSC, msrPAT}[i%2]; m.Index != want || m.Data == 0 {
			t.Fatalf("MSR %d is %#x, want %#x", i, m, want)
		}
	}
}

// TestMSRsListed tolerates MSRs that the kernel lists and refuses: kvm_pvm does so with
// IA32_ARCH_CAPABILITIES (0x10a).
func TestMSRsListed(t *testing.T) {
	g := newGuest(t, guestSpin)
	indices, err := g.sys.MSRIndices()
	must(t, err)
	msrs, refused, err := g.MSRs(indices)
	must(t, err)
	if len(msrs)+len(refused) != len(indices) || len(msrs) == 0 {
		t.Errorf("%d read, %#x refused of %d", len(msrs), refused, len(indices))
	}
	refusedWrites, err := g.SetMSRs(msrs)
	must(t, err)
	t.Logf("of %d MSRs, reads refused: %#x, writes refused: %#x", len(indices), refused, refusedWrites)
}

func TestClock(t *testing.T) {
	a, b := newGuest(t, guestSpin, splitIRQChip(t)), newGuest(t, guestSpin, splitIRQChip(t))
	const hour = 3600e9
	must(t, a.vm.SetClock(ClockData{Clock: hour}))
	saved, err := a.vm.Clock()
	must(t, err)
	if saved.Clock < hour || saved.Clock > hour+60e9 {
		t.Errorf("clock is %d ns after it was set to %d", saved.Clock, uint64(hour))
	}
	must(t, b.vm.SetClock(saved))
	loaded, err := b.vm.Clock()
	must(t, err)
	if loaded.Clock < saved.Clock {
		t.Errorf("clock went back from %d to %d", saved.Clock, loaded.Clock)
	}
	if saved.Flags&ClockRealtime != 0 {
		saved.Realtime -= 10e9 // ten seconds on the way
		must(t, b.vm.SetClock(saved))
		loaded, err := b.vm.Clock()
		must(t, err)
		if loaded.Clock < saved.Clock+10e9 {
			t.Errorf("clock %d does not count the time on the way from %d", loaded.Clock, saved.Clock)
		}
	}
	must(t, a.ClockPaused())
}

func TestTSCOffset(t *testing.T) {
	g := newGuest(t, guestSpin, splitIRQChip(t))
	if g.sys.Kind() == PVM {
		t.Skip("under kvm_pvm the guest's TSC is the host's")
	}
	old, err := g.TSCOffset()
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOTTY) {
		t.Skip("needs Linux 5.16:", err)
	}
	must(t, err)
	const ahead = 1 << 40
	must(t, g.SetTSCOffset(old+ahead))
	now, err := g.TSCOffset()
	must(t, err)
	if now != old+ahead {
		t.Errorf("offset %#x, want %#x", now, old+ahead)
	}
}
