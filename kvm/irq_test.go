package kvm

import (
	"testing"

	"golang.org/x/sys/unix"
)

const (
	msiBase    = 0xfee00000 // physical destination 0, Intel SDM vol. 3, 11.11.1
	levelMSI   = 1 << 15    // data: trigger mode
	assertMSI  = 1 << 14    // data: level
	vector     = 0x51
	reportPort = 0x21 // the handler's
)

func splitIRQChip(t testing.TB) func(*VM) {
	return func(vm *VM) { must(t, vm.EnableSplitIRQChip(24)) }
}

func newEventFD(t testing.TB) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	must(t, err)
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func signal(t testing.TB, fd int) {
	t.Helper()
	if _, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
}

// signalled takes the eventfd's counter; it is complete as soon as the vCPU has left the guest.
func signalled(t testing.TB, fd int) uint64 {
	t.Helper()
	var b [8]byte
	if _, err := unix.Read(fd, b[:]); err == unix.EAGAIN {
		return 0
	} else if err != nil {
		t.Fatal(err)
	}
	return uint64(b[0])
}

// halted makes a guest that waits for interrupts.
func halted(t testing.TB) *guest {
	g := newGuest(t, guestHalt, splitIRQChip(t))
	g.expect(t, ExitIO)
	return g
}

// interrupted wants the guest's handler to run once.
func (g *guest) interrupted(t testing.TB) {
	t.Helper()
	g.Bind()
	g.expect(t, ExitIO)
	if e := g.IO(); e.Port != reportPort {
		t.Fatalf("IO = %+v, want the handler's report", e)
	}
}

// quiet wants no interrupt to be pending for the halted guest.
func (g *guest) quiet(t testing.TB) {
	t.Helper()
	g.Kick()
	g.expect(t, ExitIntr)
	l, err := g.LAPIC()
	must(t, err)
	if irr := l.Regs[0x200+vector/32*0x10+vector%32/8] >> (vector % 8) & 1; irr != 0 {
		t.Fatal("an interrupt is pending")
	}
}

func TestSignalMSI(t *testing.T) {
	g := halted(t)
	g.quiet(t)
	must(t, g.vm.SignalMSI(msiBase, vector))
	g.interrupted(t)
}

func TestIRQFD(t *testing.T) {
	g := halted(t)
	fd := newEventFD(t)
	const gsi = 30
	must(t, g.vm.IRQFD(fd, gsi))
	signal(t, fd) // no route yet: lost
	g.quiet(t)
	must(t, g.vm.SetRoutes([]Route{{GSI: 5, Addr: msiBase, Data: 0x40}, {GSI: gsi, Addr: msiBase, Data: vector}}))
	for range 3 {
		signal(t, fd)
		g.interrupted(t)
	}
	if err := g.vm.IRQFD(fd, gsi); err == nil {
		t.Error("one eventfd was accepted twice")
	}
	must(t, g.vm.RemoveIRQFD(fd, gsi))
	signal(t, fd)
	g.quiet(t)
	must(t, g.vm.SetRoutes(nil))
}

// TestIRQFDResample is a level-triggered pin of the userspace IOAPIC: the guest's EOI leaves
// to the VMM and signals the resample eventfd.
func TestIRQFDResample(t *testing.T) {
	g := halted(t)
	fd, resample := newEventFD(t), newEventFD(t)
	const pin = 11
	must(t, g.vm.SetRoutes([]Route{{GSI: pin, Addr: msiBase, Data: levelMSI | assertMSI | vector}}))
	must(t, g.vm.IRQFDResample(fd, resample, pin))
	for range 3 {
		signal(t, fd)
		g.Bind()
		reports := 0
		for r, err := g.Run(); r != ExitIOAPICEOI || err != nil; r, err = g.Run() {
			if err != nil || r != ExitIO || g.IO().Port != reportPort {
				t.Fatalf("Run = %v, %v, want the handler's report or its EOI", r, err)
			}
			reports++
		}
		// kvm_pvm may lose or repeat an exit when its thread was preempted.
		if reports != 1 && g.sys.Kind() != PVM {
			t.Fatalf("%d reports before the EOI, want 1", reports)
		}
		if v := g.EOIVector(); v != vector {
			t.Fatalf("EOIVector = %#x, want %#x", v, vector)
		}
		if n := signalled(t, resample); n != 0 {
			t.Fatalf("resample eventfd: %d signals before the EOI was passed on", n)
		}
		g.vm.EndOfInterrupt(vector + 1)
		g.vm.EndOfInterrupt(vector)
		if n := signalled(t, resample); n != 1 {
			t.Fatalf("resample eventfd: %d signals for one EOI", n)
		}
	}
	must(t, g.vm.RemoveIRQFD(fd, pin))
	g.vm.EndOfInterrupt(vector)
	if n := signalled(t, resample); n != 0 {
		t.Errorf("resample eventfd: %d signals after its removal", n)
	}
}

func TestIOEventFD(t *testing.T) {
	match := uint64(0x22)
	for _, tt := range []struct {
		name  string
		event IOEvent
		entry uint64
		regs  Regs
		exit  ExitReason // the first that reaches the VMM
	}{
		{"mmio", IOEvent{Addr: mmioBase, Len: 4}, guestMMIO, Regs{RBX: mmioBase}, ExitMMIO},
		{"mmio any width", IOEvent{Addr: mmioBase}, guestMMIO, Regs{RBX: mmioBase}, ExitMMIO},
		{"pio match", IOEvent{Addr: 0x10, Len: 1, PIO: true, Match: &match}, guestPIO, Regs{RDX: 0x10, RAX: match}, ExitIO},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGuest(t, tt.entry)
			e := tt.event
			e.FD = newEventFD(t)
			must(t, g.vm.IOEventFD(e))
			tt.regs.RIP = tt.entry
			g.start(t, tt.regs)
			g.expect(t, tt.exit)
			switch tt.exit {
			case ExitMMIO: // the store went to the eventfd, this is the load
				if m := g.MMIO(); m.Write {
					t.Errorf("MMIO = %+v, want the read", m)
				}
			case ExitIO: // the value after the matching one
				if io := g.IO(); io.Data[0] != byte(match)+1 {
					t.Errorf("IO = %+v, want the value that does not match", io)
				}
			}
			if n := signalled(t, e.FD); n != 1 {
				t.Errorf("%d signals, want 1", n)
			}
			if err := g.vm.IOEventFD(e); err == nil {
				t.Error("the same event was accepted twice")
			}
			must(t, g.vm.RemoveIOEventFD(e))
			if err := g.vm.RemoveIOEventFD(e); err == nil {
				t.Error("an event was removed twice")
			}
			g.start(t, tt.regs)
			g.Kick()
			g.expect(t, ExitIntr) // ends the access that is under way, which moves RIP
			g.start(t, tt.regs)
			g.expect(t, tt.exit)
			if tt.exit == ExitMMIO && !g.MMIO().Write {
				t.Error("the store still goes to the eventfd")
			}
		})
	}
}

func TestRoutesErrors(t *testing.T) {
	g := halted(t)
	routes := make([]Route, maxRoutes+1)
	for i := range routes {
		routes[i] = Route{GSI: uint32(i), Addr: msiBase, Data: vector}
	}
	must(t, g.vm.SetRoutes(routes[:maxRoutes]))
	for name, bad := range map[string][]Route{
		"more than the kernel takes": routes,
		"a GSI twice":                {routes[1], routes[1]},
		"a GSI out of range":         {{GSI: maxRoutes, Addr: msiBase}},
	} {
		if err := g.vm.SetRoutes(bad); err == nil {
			t.Errorf("routes with %s were accepted", name)
		}
	}
}
