package kvm

import (
	"bytes"
	"encoding/binary"
	"sync/atomic"
	"testing"
)

func TestPIO(t *testing.T) {
	g := newGuest(t, guestPIO)
	g.start(t, Regs{RIP: guestPIO, RDX: 0x10, RAX: 7})
	for want := byte(7); want < 12; want++ {
		g.expect(t, ExitIO)
		e := g.IO()
		if e.Port != 0x10 || e.Size != 1 || e.Count != 1 || !e.Out || !bytes.Equal(e.Data, []byte{want}) {
			t.Fatalf("IO = %+v, want %#x out to port 0x10", e, want)
		}
	}
}

func TestPIOIn(t *testing.T) {
	g := newGuest(t, guestEcho)
	g.start(t, Regs{RIP: guestEcho, RDX: 0xcf8})
	for _, v := range []uint32{0, 0xdeadbeef, 0xffffffff} {
		g.expect(t, ExitIO)
		e := g.IO()
		if e.Out || e.Size != 4 || len(e.Data) != 4 {
			t.Fatalf("IO = %+v, want a 4 byte IN", e)
		}
		binary.LittleEndian.PutUint32(e.Data, v)
		g.expect(t, ExitIO)
		if e := g.IO(); !e.Out || binary.LittleEndian.Uint32(e.Data) != v+1 {
			t.Fatalf("IO = %+v, want OUT of %#x", e, v+1)
		}
	}
}

func TestPIOString(t *testing.T) {
	g := newGuest(t, guestString)
	text := []byte("a string that REP OUTSB writes")
	if _, err := g.mem.WriteAt(text, dataBase); err != nil {
		t.Fatal(err)
	}
	g.start(t, Regs{RIP: guestString, RDX: 0x402, RSI: dataBase, RCX: uint64(len(text))})
	var got []byte
	for len(got) < len(text) {
		g.expect(t, ExitIO)
		e := g.IO()
		if e.Port != 0x402 || e.Size != 1 || e.Count != len(e.Data) {
			t.Fatalf("IO = %+v, want single bytes to port 0x402", e)
		}
		got = append(got, e.Data...)
	}
	if !bytes.Equal(got, text) {
		t.Fatalf("got %q, want %q", got, text)
	}
	g.expect(t, ExitHLT) // leaves to the VMM, since this VM has no LAPIC
}

func TestMMIO(t *testing.T) {
	g := newGuest(t, guestMMIO)
	g.start(t, Regs{RIP: guestMMIO, RBX: mmioBase, RAX: 0x11223344})
	step := func(addr uint64, write bool, data []byte) {
		t.Helper()
		g.expect(t, ExitMMIO)
		e := g.MMIO()
		if e.Addr != addr || e.Write != write || len(e.Data) != len(data) {
			t.Fatalf("MMIO = %+v, want %#x, write %v, %d bytes", e, addr, write, len(data))
		}
		if !write {
			copy(e.Data, data)
		} else if !bytes.Equal(e.Data, data) {
			t.Fatalf("MMIO data = %x, want %x", e.Data, data)
		}
	}
	step(mmioBase, true, []byte{0x44, 0x33, 0x22, 0x11})
	step(mmioBase, false, []byte{0xab})
	step(mmioBase+1, true, []byte{0xab})
	step(mmioBase, true, []byte{0xab, 0x33, 0x22, 0x11})
}

func TestShutdown(t *testing.T) {
	g := newGuest(t, guestFault)
	s, err := g.Sregs()
	must(t, err)
	s.IDT.Limit = 0 // no handler for the fault, nor for the double fault that follows
	must(t, g.SetSregs(s))
	g.expect(t, ExitShutdown)
}

func TestTranslate(t *testing.T) {
	g := newGuest(t, guestSpin)
	if gpa, ok, err := g.Translate(guestSpin + 3); gpa != guestSpin+3 || !ok || err != nil {
		t.Errorf("Translate = %#x, %v, %v without paging", gpa, ok, err)
	}
}

// TestRunDoesNotAllocate holds for the exits that are frequent, and for looking at them.
func TestRunDoesNotAllocate(t *testing.T) {
	pio, mmio := newGuest(t, guestPIO), newGuest(t, guestMMIO)
	mmio.start(t, Regs{RIP: guestMMIO, RBX: mmioBase})
	var sum byte
	n := testing.AllocsPerRun(50, func() {
		pio.expect(t, ExitIO)
		sum += pio.IO().Data[0]
		mmio.expect(t, ExitMMIO)
		sum += mmio.MMIO().Data[0]
	})
	if n != 0 {
		t.Errorf("%v allocations per exit", n)
	}
}

func TestKickBeforeRun(t *testing.T) {
	g := newGuest(t, guestSpin)
	g.start(t, Regs{RIP: guestSpin, RBX: dataBase})
	for range 3 {
		g.Kick()
		g.Kick() // two kicks may be answered by one exit
		g.expect(t, ExitIntr)
	}
	if n, _ := g.mem.Load32(dataBase); n != 0 {
		t.Errorf("the guest ran %d rounds with a kick pending", n)
	}
}

// TestKickCompletesAccess wants the IN of the last exit to be complete when Run answers a
// kick, though the guest does not run on: a state saved then must not lose it.
func TestKickCompletesAccess(t *testing.T) {
	g := newGuest(t, guestEcho)
	g.start(t, Regs{RIP: guestEcho, RDX: 0x60})
	g.expect(t, ExitIO)
	binary.LittleEndian.PutUint32(g.IO().Data, 0x12345678)
	g.Kick()
	g.expect(t, ExitIntr)
	after, err := g.Regs()
	must(t, err)
	if after.RAX != 0x12345678 || after.RIP != guestEcho+1 {
		t.Errorf("RAX %#x RIP %#x after the kick, want the IN complete", after.RAX, after.RIP)
	}
	g.expect(t, ExitIO)
	if got := binary.LittleEndian.Uint32(g.IO().Data); got != 0x12345679 {
		t.Errorf("the guest went on with %#x", got)
	}
}

// TestKickRunning kicks a vCPU many times from two threads while it runs, and each time
// waits for the answer: a lost kick makes it hang.
func TestKickRunning(t *testing.T) {
	const rounds = 2000
	g := newGuest(t, guestSpin)
	g.start(t, Regs{RIP: guestSpin, RBX: dataBase})
	var stop atomic.Bool
	answered := make(chan struct{}, 1)
	vcpu := onThread(func() {
		for !stop.Load() {
			if r, err := g.Run(); r != ExitIntr || err != nil {
				t.Errorf("Run = %v, %v%s", r, err, g.detail(r))
				return
			}
			select {
			case answered <- struct{}{}:
			default:
			}
		}
	})
	kickers := make(chan struct{})
	go func() {
		defer close(kickers)
		for range rounds {
			other := make(chan struct{})
			go func() { g.Kick(); close(other) }()
			g.Kick()
			select {
			case <-answered:
			case <-vcpu:
				return
			}
			<-other
		}
		stop.Store(true)
		g.Kick()
	}()
	await(t, "answers to all kicks", kickers)
	await(t, "the vCPU's end", vcpu)
	if n, _ := g.mem.Load32(dataBase); n == 0 {
		t.Error("the guest never ran")
	}
}

// TestKickHalted wants a vCPU that sleeps in the kernel to answer as well.
func TestKickHalted(t *testing.T) {
	g := newGuest(t, guestHalt, splitIRQChip(t))
	g.expect(t, ExitIO) // ready
	vcpu := onThread(func() {
		g.Bind()
		if r, err := g.Run(); r != ExitIntr || err != nil {
			t.Errorf("Run = %v, %v", r, err)
		}
	})
	g.Kick()
	await(t, "the halted vCPU", vcpu)
}

// TestKickWaitingForSIPI is TestKickHalted for a vCPU that was never started.
func TestKickWaitingForSIPI(t *testing.T) {
	g := newGuest(t, guestHalt, splitIRQChip(t))
	ap := g.newVCPU(t, 1)
	if s, err := ap.MPState(); s != MPUninitialized || err != nil {
		t.Fatalf("MPState = %v, %v", s, err)
	}
	vcpu := onThread(func() {
		if r, err := ap.Run(); r != ExitIntr || err != nil {
			t.Errorf("Run = %v, %v", r, err)
		}
	})
	ap.Kick()
	await(t, "the waiting vCPU", vcpu)
}

// TestKickAfterClose wants Kick to keep its hands off the pages that are gone.
func TestKickAfterClose(t *testing.T) {
	g := newGuest(t, guestSpin)
	v := g.newVCPU(t, 1)
	must(t, v.Close())
	v.Kick()
	must(t, v.Close())
}

// TestBind moves a vCPU to another thread, where Kick has to find it.
func TestBind(t *testing.T) {
	g := newGuest(t, guestSpin)
	g.start(t, Regs{RIP: guestSpin, RBX: dataBase})
	for range 3 {
		vcpu := onThread(func() {
			g.Bind()
			if r, err := g.Run(); r != ExitIntr || err != nil {
				t.Errorf("Run = %v, %v", r, err)
			}
		})
		first, _ := g.mem.Load32(dataBase)
		poll(t, "the guest to count", func() bool {
			n, _ := g.mem.Load32(dataBase)
			return n != first
		})
		g.Kick()
		await(t, "the vCPU on its new thread", vcpu)
	}
}

func TestStats(t *testing.T) {
	g := newGuest(t, guestPIO)
	const exits = 10
	for range exits {
		g.expect(t, ExitIO)
	}
	s, err := g.Stats()
	must(t, err)
	if s["exits"] < exits { // not io_exits, which a software KVM does not count
		t.Errorf("%d in %v after %d exits", s["exits"], s, exits)
	}
	s, err = g.vm.Stats()
	must(t, err)
	if len(s) == 0 {
		t.Error("no counters of the VM")
	}
}

func BenchmarkPIOExit(b *testing.B) {
	g := newGuest(b, guestPIO)
	b.ReportAllocs()
	for b.Loop() {
		g.expect(b, ExitIO)
		_ = g.IO()
	}
}

func BenchmarkMMIOExit(b *testing.B) {
	g := newGuest(b, guestMMIO)
	g.start(b, Regs{RIP: guestMMIO, RBX: mmioBase})
	b.ReportAllocs()
	for b.Loop() {
		g.expect(b, ExitMMIO)
		_ = g.MMIO()
	}
}
