package kvm

import (
	"bytes"
	_ "embed"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"baton/kvm/guestmem"
)

//go:embed testdata/guest.bin
var guestCode []byte

// Offsets of the guests in testdata/guest.S.
const (
	codeBase = 0x1000

	guestPIO     = codeBase + 0x000
	guestEcho    = codeBase + 0x020
	guestString  = codeBase + 0x040
	guestMMIO    = codeBase + 0x060
	guestSpin    = codeBase + 0x080
	guestDirty   = codeBase + 0x0a0
	guestHalt    = codeBase + 0x0c0
	guestHandler = codeBase + 0x100
	guestFault   = codeBase + 0x130
)

// Guest-physical memory of the tests.
const (
	idtBase  = 0x2000 // every vector leads to guestHandler
	gdtBase  = 0x3000 // 8: code, 0x10: data
	stackTop = 0x8000
	dataBase = 0x100000
	ramSize  = 8 << 20
	ramSlot  = 0
	mmioBase = 0x10000000 // in no slot
)

// guest is a machine with RAM and one vCPU that can run the code in testdata.
type guest struct {
	*VCPU
	sys *System
	vm  *VM
	mem *guestmem.Memory
}

// openKVM opens /dev/kvm or skips the test, because the machine has none.
func openKVM(t testing.TB) *System {
	t.Helper()
	s, err := Open()
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		t.Skip("needs /dev/kvm:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// newGuest makes a machine whose vCPU is about to run at rip; prepare gets the VM before it
// has a vCPU.
func newGuest(t testing.TB, rip uint64, prepare ...func(*VM)) *guest {
	t.Helper()
	g := &guest{sys: openKVM(t)}
	var err error
	if g.mem, err = guestmem.New([]guestmem.Range{{Base: 0, Size: ramSize}}, guestmem.Options{}); err != nil {
		t.Fatal(err)
	}
	if g.vm, err = g.sys.CreateVM(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(g.vm.Close(), g.mem.Close()); err != nil {
			t.Error(err)
		}
	})
	must(t, g.vm.SetMemory(ramSlot, 0, g.mem.Regions()[0].Host, 0))
	for _, f := range prepare {
		f(g.vm)
	}
	g.VCPU = g.newVCPU(t, 0)
	ram := g.mem.Regions()[0].Host
	copy(ram[codeBase:], guestCode)
	for i := range 256 {
		gate := uint64(guestHandler)&0xffff | 8<<16 | 0x8e00<<32 | guestHandler>>16<<48
		binary.LittleEndian.PutUint64(ram[idtBase+8*i:], gate)
	}
	binary.LittleEndian.PutUint64(ram[gdtBase+0x08:], 0x00cf9b000000ffff)
	binary.LittleEndian.PutUint64(ram[gdtBase+0x10:], 0x00cf93000000ffff)
	g.start(t, Regs{RIP: rip})
	return g
}

// newVCPU adds a vCPU with the host's CPUID.
func (g *guest) newVCPU(t testing.TB, id int) *VCPU {
	t.Helper()
	v, err := g.vm.CreateVCPU(id)
	must(t, err)
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	cpuid, err := g.sys.GuestCPUID(id, 2)
	must(t, err)
	must(t, v.SetCPUID(cpuid))
	return v
}

// start puts the vCPU into flat protected mode with the registers given.
func (g *guest) start(t testing.TB, r Regs) {
	t.Helper()
	s, err := g.Sregs()
	must(t, err)
	data := Segment{Limit: 0xffffffff, Selector: 0x10, Typ: 3, Present: 1, DB: 1, S: 1, G: 1}
	s.CS = data
	s.CS.Selector, s.CS.Typ = 8, 11
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.GDT = Descriptor{Base: gdtBase, Limit: 0x17}
	s.IDT = Descriptor{Base: idtBase, Limit: 0x7ff}
	s.CR0 = s.CR0&^(1<<29|1<<30) | 1 // caches on, protection enabled
	must(t, g.SetSregs(s))
	r.RSP, r.RFLAGS = stackTop, 2
	must(t, g.SetRegs(r))
}

// expect runs the vCPU and wants a certain exit.
func (g *guest) expect(t testing.TB, want ExitReason) {
	t.Helper()
	got, err := g.Run()
	if err != nil || got != want {
		t.Fatalf("Run = %v, %v, want %v%s", got, err, want, g.detail(got))
	}
}

func (g *guest) detail(r ExitReason) string {
	if r == ExitInternalError {
		return ": " + g.InternalError().Error()
	}
	return ""
}

// onThread runs f as a vCPU's goroutine, on a thread of its own, and returns a channel that
// closes at its end.
func onThread(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		f()
	}()
	return done
}

// await fails the test when the channel does not close in good time.
func await(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		t.Fatal("still waiting for ", what)
	}
}

// poll waits for a condition that the guest makes true while it runs.
func poll(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("still waiting for ", what)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestGuestCode assembles the guests anew and compares.
func TestGuestCode(t *testing.T) {
	for _, tool := range []string{"as", "ld"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("needs binutils:", err)
		}
	}
	obj, bin := filepath.Join(t.TempDir(), "o"), filepath.Join(t.TempDir(), "bin")
	for _, args := range [][]string{
		{"as", "--32", "-o", obj, "testdata/guest.S"},
		{"ld", "-m", "elf_i386", "-Ttext", "0x1000", "--oformat", "binary", "-o", bin, obj},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	got, err := os.ReadFile(bin)
	must(t, err)
	if !bytes.Equal(got, guestCode) {
		t.Error("testdata/guest.bin is not what guest.S assembles to")
	}
}
