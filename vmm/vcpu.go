package vmm

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"baton/boot"
	"baton/kvm"

	"golang.org/x/sys/unix"
)

// vcpu is one virtual processor and the thread that runs it.
type vcpu struct {
	*kvm.VCPU
	m     *Machine
	power kvm.State // as KVM made it, before the first instruction
	// unfinished: the instruction of the last exit is complete only in the next Run.
	unfinished bool
	tid        atomic.Int32
}

// run executes the guest until the gate says that it is over. It is the hot path: bus
// dispatch and KVM_RUN allocate nothing.
func (c *vcpu) run() {
	runtime.LockOSThread() // never unlocked, but for the first thread: the thread ends with the goroutine
	tid := unix.Gettid()
	if tid == os.Getpid() { // whose name is the process's: another thread, then, while this one waits
		defer runtime.UnlockOSThread()
		done := make(chan struct{})
		go func() { defer close(done); c.run() }()
		<-done
		return
	}
	c.tid.Store(int32(tid))
	_ = os.WriteFile(fmt.Sprintf("/proc/self/task/%d/comm", tid), fmt.Appendf(nil, "CPU %d/KVM", c.ID()), 0) // for top and the like
	for {
		// No vCPU stands before the gate in the middle of an instruction: it goes on to Run, which
		// finishes that and, kicked, executes nothing else. Who shuts the gate from now on kicks.
		if c.unfinished && c.m.gate.shut.Load() {
			c.Kick()
		} else if !c.unfinished && !c.m.gate.pass() {
			return
		}
		reason, err := c.Run()
		c.unfinished = err == nil && (reason == kvm.ExitIO || reason == kvm.ExitMMIO)
		if err != nil {
			c.m.crash(c, err.Error())
			continue
		}
		switch reason {
		case kvm.ExitIO:
			c.pio()
		case kvm.ExitMMIO:
			x := c.MMIO()
			if x.Write {
				c.m.mmio.Write(x.Addr, x.Data)
			} else {
				c.m.mmio.Read(x.Addr, x.Data)
			}
		case kvm.ExitIntr:
		case kvm.ExitDirtyRingFull:
			if err := c.m.ring.collect(); err != nil {
				c.m.crash(c, err.Error())
			}
		case kvm.ExitIOAPICEOI:
			c.m.ioapic.EOI(c.EOIVector())
		case kvm.ExitShutdown:
			c.m.tripleFault(c)
		case kvm.ExitSystemEvent:
			c.m.request(requestReset, "guest-reset")
		case kvm.ExitFailEntry:
			hw, cpu := c.FailEntry()
			c.m.crash(c, fmt.Sprintf("kvm could not enter the guest: hardware reason %#x on host cpu %d", hw, cpu))
		case kvm.ExitInternalError:
			c.m.crash(c, c.InternalError().Error())
		default:
			c.m.crash(c, fmt.Sprintf("kvm exit %v that baton does not handle", reason))
		}
	}
}

// pio carries out a port access; a string instruction moves Count items through one port.
func (c *vcpu) pio() {
	x := c.IO()
	for p := x.Data; len(p) >= x.Size && x.Size > 0; p = p[x.Size:] {
		if x.Out {
			c.m.ports.Write(uint64(x.Port), p[:x.Size])
		} else {
			c.m.ports.Read(uint64(x.Port), p[:x.Size])
		}
	}
}

// enter puts the vCPU at the kernel's entry point.
func (c *vcpu) enter(e boot.Entry) error {
	s, err := c.Sregs()
	if err != nil {
		return err
	}
	cpu := e.CPU()
	s.CR0, s.CR3, s.CR4, s.EFER = cpu.CR0, 0, 0, 0
	s.CS, s.TR = segment(cpu.CS), segment(cpu.TR)
	data := segment(cpu.Data)
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	if err := c.SetSregs(s); err != nil {
		return err
	}
	return c.SetRegs(kvm.Regs{RIP: cpu.RIP, RBX: cpu.RBX, RFLAGS: cpu.RFLAGS})
}

func segment(s boot.Segment) kvm.Segment {
	return kvm.Segment{
		Base: s.Base, Limit: s.Limit, Selector: s.Selector, Typ: s.Type,
		Present: s.Present, DPL: s.DPL, DB: s.DB, S: s.System, L: s.Long, G: s.Gran,
	}
}
