package kvm

import (
	"math/bits"
	"slices"
	"testing"

	"baton/kvm/guestmem"
)

func TestMemorySlots(t *testing.T) {
	g := newGuest(t, guestMMIO)
	more, err := guestmem.New([]guestmem.Range{{Base: mmioBase, Size: 64 << 10}}, guestmem.Options{})
	must(t, err)
	defer more.Close()
	host := more.Regions()[0].Host
	regs := Regs{RIP: guestMMIO, RBX: mmioBase, RAX: 0x5a}

	g.start(t, regs)
	g.expect(t, ExitMMIO)
	g.Kick()
	g.expect(t, ExitIntr)

	must(t, g.vm.SetMemory(1, mmioBase, host, 0))
	g.start(t, regs)
	vcpu := onThread(func() {
		g.Bind()
		if r, err := g.Run(); r != ExitIntr || err != nil {
			t.Errorf("Run = %v, %v with RAM at the address", r, err)
		}
	})
	poll(t, "the guest's write", func() bool {
		v, _ := more.Load16(mmioBase)
		return v>>8 == 0x5a
	})
	g.Kick()
	await(t, "the guest", vcpu)

	must(t, g.vm.RemoveMemory(1))
	g.Bind()
	g.start(t, regs)
	g.expect(t, ExitMMIO)
}

func TestMemorySlotErrors(t *testing.T) {
	g := newGuest(t, guestSpin)
	host := g.mem.Regions()[0].Host
	for name, err := range map[string]error{
		"no memory":       g.vm.SetMemory(1, mmioBase, nil, 0),
		"odd size":        g.vm.SetMemory(1, mmioBase, host[:100], 0),
		"odd address":     g.vm.SetMemory(1, mmioBase+1, host[:pageSize], 0),
		"overlap":         g.vm.SetMemory(1, 0, host[:pageSize], 0),
		"slot number":     g.vm.SetMemory(1<<16-1, mmioBase, host[:pageSize], 0),
		"remove nothing":  g.vm.RemoveMemory(2),
		"short bitmap":    g.vm.GetDirtyLog(ramSlot, make([]uint64, ramSize/pageSize/64-1)),
		"no log":          g.vm.GetDirtyLog(ramSlot, make([]uint64, ramSize/pageSize/64)),
		"log of no slot":  g.vm.GetDirtyLog(7, make([]uint64, 1)),
		"clear too short": g.vm.ClearDirtyLog(ramSlot, 0, 65, make([]uint64, 1)),
		"clear nothing":   g.vm.ClearDirtyLog(ramSlot, 0, 0, make([]uint64, 1)),
		"clear, no log":   g.vm.ClearDirtyLog(ramSlot, 0, 64, make([]uint64, 1)),
		"ring not 2^n":    g.vm.EnableDirtyRing(24 << 10),
		"ring too small":  g.vm.EnableDirtyRing(8 << 10),
		"ring too late":   g.vm.EnableDirtyRing(16 << 10), // there is a vCPU
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// dirty writes to count pages from dataBase on whenever it runs to its exit.
func (g *guest) dirty(t *testing.T, count int) {
	t.Helper()
	g.Kick() // ends the OUT of the time before, which would move RIP
	g.expect(t, ExitIntr)
	g.start(t, Regs{RIP: guestDirty, RBX: dataBase, RCX: uint64(count), RDX: 0x80})
	g.expect(t, ExitIO)
}

// missing says which of the pages from dataBase on are not in the log. The log of a nested
// or software KVM may hold more than was written, such as those that the code runs from.
func missing(t *testing.T, log *guestmem.Bitmap, count int) (pages []int) {
	t.Helper()
	for i := range count {
		if !log.Test(uint64(dataBase + i*pageSize)) {
			pages = append(pages, i)
		}
	}
	return pages
}

func TestDirtyLog(t *testing.T) {
	g := newGuest(t, guestDirty)
	host := g.mem.Regions()[0].Host
	must(t, g.vm.SetMemory(ramSlot, 0, host, MemLogDirty))
	sync := func() *guestmem.Bitmap {
		words := make([]uint64, ramSize/pageSize/64)
		must(t, g.vm.GetDirtyLog(ramSlot, words))
		log := guestmem.NewBitmap(g.mem)
		log.OrWords(0, words)
		return log
	}
	for _, count := range []int{1, 65, 3} {
		g.dirty(t, count)
		log := sync()
		if m := missing(t, log, count); m != nil {
			t.Errorf("pages %v of %d are not in the log", m, count)
		}
		if beyond := uint64(dataBase + count*pageSize); log.Test(beyond) {
			t.Errorf("page %d is in the log, and was not written", count)
		}
		if left := sync(); left.Count() != 0 {
			t.Errorf("%d pages are left after the log was taken", left.Count())
		}
	}
	must(t, g.vm.SetMemory(ramSlot, 0, host, 0))
	if err := g.vm.GetDirtyLog(ramSlot, make([]uint64, ramSize/pageSize/64)); err == nil {
		t.Error("there is a log after it was switched off")
	}
}

func TestManualDirtyLog(t *testing.T) {
	const words, count = ramSize / pageSize / 64, 130
	g := newGuest(t, guestDirty)
	if g.vm.CheckExtension(CapManualDirtyLogProtect2) == 0 {
		t.Skip("the kernel lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
	}
	must(t, g.vm.EnableManualDirtyLog())
	must(t, g.vm.SetMemory(ramSlot, 0, g.mem.Regions()[0].Host, MemLogDirty))
	get := func() []uint64 {
		w := make([]uint64, words)
		must(t, g.vm.GetDirtyLog(ramSlot, w))
		return w
	}
	clearAll := func(w []uint64) { must(t, g.vm.ClearDirtyLog(ramSlot, 0, words*64, w)) }
	set := func(w []uint64, page int) bool { return w[page/64]>>(page%64)&1 != 0 }
	const first = dataBase / pageSize

	clearAll(get()) // the log begins with every page
	g.dirty(t, count)
	log := get()
	for i := range count {
		if !set(log, first+i) {
			t.Fatalf("page %d is not in the log", i)
		}
	}
	if again := get(); !slices.Equal(log, again) {
		t.Error("reading the log changed it")
	}
	// One word of 64 pages is cleared, the rest stays.
	must(t, g.vm.ClearDirtyLog(ramSlot, first, 64, []uint64{1<<3 | 1<<63}))
	after := get()
	for i := range count {
		if want := i != 3 && i != 63; set(after, first+i) != want {
			t.Errorf("page %d in the log: %v, want %v", i, !want, want)
		}
	}
	clearAll(after)
	if n := bits.OnesCount64(get()[first/64]); n != 0 {
		t.Errorf("%d pages are left in a word after it was cleared", n)
	}
	g.dirty(t, 1) // and is protected again
	if !set(get(), first) {
		t.Error("a write after clearing is not in the log")
	}
	if err := g.vm.ClearDirtyLog(ramSlot, 1, 64, make([]uint64, 1)); err == nil {
		t.Error("an odd first page was accepted")
	}
}

func TestDirtyRing(t *testing.T) {
	size := openKVM(t).CheckExtension(CapDirtyLogRing)
	if size == 0 {
		t.Skip("the kernel lacks KVM_CAP_DIRTY_LOG_RING")
	}
	const ring = 16 << 10 // bytes: 1024 pages
	g := newGuest(t, guestDirty, func(vm *VM) { must(t, vm.EnableDirtyRing(ring)) })
	must(t, g.vm.SetMemory(ramSlot, 0, g.mem.Regions()[0].Host, MemLogDirty))
	collect := func() *guestmem.Bitmap {
		log := guestmem.NewBitmap(g.mem)
		n := g.DirtyRing().Collect(func(slot uint32, page uint64) {
			if slot != ramSlot {
				t.Errorf("slot %d in the ring", slot)
			}
			log.Set(page*pageSize, pageSize)
		})
		freed, err := g.vm.ResetDirtyRings()
		if err != nil || freed != n {
			t.Errorf("ResetDirtyRings = %d, %v after %d entries", freed, err, n)
		}
		return log
	}
	for range 20 { // several times around the ring
		const count = 200
		g.dirty(t, count)
		if m := missing(t, collect(), count); m != nil {
			t.Fatalf("pages %v are not in the ring", m)
		}
	}
	if n := collect().Count(); n != 0 {
		t.Errorf("%d pages in the ring, and nothing ran", n)
	}
}

func TestDirtyRingFull(t *testing.T) {
	if openKVM(t).CheckExtension(CapDirtyLogRing) == 0 {
		t.Skip("the kernel lacks KVM_CAP_DIRTY_LOG_RING")
	}
	g := newGuest(t, guestDirty, func(vm *VM) { must(t, vm.EnableDirtyRing(16<<10)) })
	must(t, g.vm.SetMemory(ramSlot, 0, g.mem.Regions()[0].Host, MemLogDirty))
	if g.sys.Kind() == PVM {
		t.Skip("kvm_pvm does not stop at a full ring")
	}
	const count = 1500 // the ring holds 1024
	g.start(t, Regs{RIP: guestDirty, RBX: dataBase, RCX: count, RDX: 0x80})
	log := guestmem.NewBitmap(g.mem)
	full := 0
	for {
		r, err := g.Run()
		must(t, err)
		g.DirtyRing().Collect(func(_ uint32, page uint64) { log.Set(page*pageSize, 1) })
		if _, err := g.vm.ResetDirtyRings(); err != nil {
			t.Fatal(err)
		}
		if r == ExitIO {
			break
		}
		if r != ExitDirtyRingFull {
			t.Fatalf("Run = %v%s", r, g.detail(r))
		}
		full++
	}
	if full == 0 {
		t.Error("the ring never filled up")
	}
	if m := missing(t, log, count); m != nil {
		t.Errorf("pages %v were lost", m)
	}
}
