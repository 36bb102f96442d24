package vmm

import (
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/arch/x86/x86asm"
	"golang.org/x/sys/unix"
)

// crash reports that vCPU c cannot go on and asks the main loop to end the machine.
func (m *Machine) crash(c *vcpu, cause string) {
	m.log.Error("guest crashed\n" + m.describe(c, cause))
	m.events.Publish("GUEST_CRASHED", crashData{int64(c.ID()), cause})
	m.request(requestCrash, "internal-error")
}

// tripleFault handles the shutdown cycle of a vCPU. It is how some guests reboot, so it
// is a reset, but one that is reported.
func (m *Machine) tripleFault(c *vcpu) {
	m.log.Warn("guest triple fault\n" + m.describe(c, "triple fault"))
	m.request(requestReset, "guest-reset")
}

// panicked handles the guest kernel's own report through the pvpanic device, on the thread
// of the vCPU that makes it; the kernel goes on to reboot or halt as its command line says.
func (m *Machine) panicked() {
	report := "guest panicked"
	for _, c := range m.vcpus {
		if c.tid.Load() == int32(unix.Gettid()) {
			report += "\n" + m.describe(c, "panic")
		}
	}
	m.log.Error(report)
	m.events.Publish("GUEST_PANICKED", panicData{"run"})
}

type panicData struct {
	Action string `json:"action"` // what becomes of the guest
}

type crashData struct {
	CPU   int64  `json:"cpu-index"`
	Cause string `json:"cause"`
}

// Where a CPU begins after a reset: Intel SDM vol. 3, table 10-1. An AMD CPU leaves nothing
// defined of a guest after a shutdown (APM vol. 2, 15.14.3), so KVM puts it there.
const (
	resetRIP    = 0xfff0
	resetCSBase = 0xffff_0000
)

// describe says where vCPU c stands: registers and the instruction at RIP. It must be
// called from the vCPU's own thread or while it is parked.
func (m *Machine) describe(c *vcpu, cause string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "  cpu %d: %s\n", c.ID(), cause)
	r, err := c.Regs()
	if err != nil {
		fmt.Fprintf(&b, "  registers: %v", err)
		return b.String()
	}
	s, err := c.Sregs()
	if err != nil {
		fmt.Fprintf(&b, "  registers: %v", err)
		return b.String()
	}
	if r.RIP == resetRIP && s.CS.Base == resetCSBase {
		b.WriteString("  KVM on AMD has reset this vCPU: its registers are lost")
		return b.String()
	}
	mode := 16
	switch {
	case s.CS.L == 1:
		mode = 64
	case s.CS.DB == 1:
		mode = 32
	}
	fmt.Fprintf(&b, "  rip %#x  rsp %#x  rflags %#x  cr0 %#x  cr2 %#x  cr3 %#x  cr4 %#x\n",
		r.RIP, r.RSP, r.RFLAGS, s.CR0, s.CR2, s.CR3, s.CR4)
	fmt.Fprintf(&b, "  rax %#x  rbx %#x  rcx %#x  rdx %#x  rsi %#x  rdi %#x  %d-bit code\n",
		r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, mode)
	fmt.Fprintf(&b, "  at rip: %s", m.instruction(c, s.CS.Base+r.RIP, mode))
	return b.String()
}

// interrupts says what a vCPU that stands still waits for: whether it runs, what its local APIC
// has for it, and when the timer is due.
func (c *vcpu) interrupts() string {
	mp, err := c.MPState()
	if err != nil {
		return err.Error()
	}
	l, err := c.LAPIC()
	if err != nil {
		return err.Error()
	}
	register := func(off int) uint32 { return binary.LittleEndian.Uint32(l.Regs[off:]) } // Intel SDM vol. 3, table 11-1
	vectors := func(off int) (list []string) {                                           // 11.8.4: 8 registers of 32 bits
		for v := range 256 {
			if register(off+v/32*16)>>(v%32)&1 != 0 {
				list = append(list, fmt.Sprintf("%#x", v))
			}
		}
		return list
	}
	text := fmt.Sprintf("mp state %d  tpr %#x  requested %v  in service %v  timer %#x, %d of %d left", mp,
		register(0x80), vectors(0x200), vectors(0x100), register(0x320), register(0x390), register(0x380))
	const deadline = 0x6e0 // IA32_TSC_DEADLINE
	if msrs, _, err := c.MSRs([]uint32{msrTSC, deadline}); err == nil && len(msrs) == 2 && msrs[1].Data != 0 {
		text += fmt.Sprintf(", deadline in %d ticks", int64(msrs[1].Data-msrs[0].Data))
	}
	return text
}

// maxInstruction is the longest x86 instruction in bytes: Intel SDM vol. 2, 2.3.11.
const maxInstruction = 15

// instruction disassembles what lies at a linear address of vCPU c.
func (m *Machine) instruction(c *vcpu, linear uint64, mode int) string {
	phys, ok, err := c.Translate(linear)
	if err != nil || !ok {
		return fmt.Sprintf("linear address %#x is not mapped", linear)
	}
	n := min(maxInstruction, 0x1000-phys&0xfff)
	code, err := m.mem.Bytes(phys, n)
	if err != nil {
		return fmt.Sprintf("physical address %#x is not RAM", phys)
	}
	inst, err := x86asm.Decode(code, mode)
	if err != nil {
		return fmt.Sprintf("% x (%v)", code, err)
	}
	return fmt.Sprintf("% x  %s", code[:inst.Len], x86asm.GNUSyntax(inst, linear, nil))
}
