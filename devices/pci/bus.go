package pci

import (
	"fmt"
	"strings"

	"baton/devices"
)

// Function is a PCI function: what a bus holds.
type Function interface {
	// Config is the function's configuration space, always the same one.
	Config() *Config
	// Reset stops the device and takes it back to power-on. The caller resets the Config
	// afterwards. It may come from a vCPU's thread, but never twice at the same time.
	Reset()
	// Close releases what the function holds, after it was removed.
	Close() error
}

// Stopper is a function whose Reset takes long, but which can be stopped at once: it raises no
// interrupts and does no DMA until it is reset, which or whose Close follows.
type Stopper interface{ Stop() }

// Bus holds functions by slot (device number) and function number. The root bus has 32
// slots; the bus behind a root port, a link with one end, has slot 0 only (PCIe 7.3.1).
type Bus struct {
	// ID is the name for bus=: "pcie.0", or the root port's.
	ID string

	rc   *RootComplex // nil until its port is added
	port *RootPort    // nil for the root bus
	fns  []Function   // by slot*8+function, guarded by the root complex's lock

	ghosts []devices.Range // of functions that were pulled; the same
}

// Add puts f at slot and fn. Slot -1 is the first free slot; fn -1 is function 0. Function
// 0 of a slot with others must be multifunction; it may be added after them. Behind a port
// this is for what the guest finds when it starts, see [Slot.Plug].
func (b *Bus) Add(slot, fn int, f Function) error {
	if b.port == nil {
		return b.add(slot, fn, f)
	}
	s := b.port.slot
	s.mu.Lock()
	err := b.add(slot, fn, f)
	if err == nil && s.Occupant() != nil {
		s.state = SlotPresent
	}
	s.mu.Unlock()
	s.resetRegisters()
	return err
}

// add is Add with the slot's lock held.
func (b *Bus) add(slot, fn int, f Function) error {
	c := f.Config()
	fail := func(format string, args ...any) error {
		return fmt.Errorf("add %s: %s", c.id, fmt.Sprintf(format, args...))
	}
	if b.rc == nil {
		return fail("bus %s is behind a root port that is on no bus\nadd the root port first", b.ID)
	}
	b.rc.mu.Lock()
	defer b.rc.mu.Unlock()
	port, isPort := f.(*RootPort)
	if isPort && b.port != nil {
		return fail("a root port goes on the root bus, not on bus %s\nuse bus=%s", b.ID, b.rc.root.ID)
	}
	if at := c.at.Load(); at != nil {
		return fail("it is already on bus %s", at.bus.ID)
	}
	if fn == -1 {
		fn = 0
	}
	if slot == -1 {
		if slot = b.freeSlot(); slot == -1 {
			return fail("no free slot on bus %s: %s\n%s", b.ID, b.occupants(), b.fullHint())
		}
	}
	switch slots := len(b.fns) / 8; {
	case fn < 0 || fn > 7:
		return fail("function %d does not exist\nfunctions are 0 to 7", fn)
	case (slot < 0 || slot >= slots) && b.port != nil:
		return fail("slot %d does not exist on bus %s\na bus behind a root port has slot 0 only: leave out addr=", slot, b.ID)
	case slot < 0 || slot >= slots:
		return fail("slot %d does not exist on bus %s\nslots are 0 to %d", slot, b.ID, slots-1)
	}
	devfn := slot*8 + fn
	if o := b.fns[devfn]; o != nil {
		return fail("slot %d function %d of bus %s is taken by %s\nchoose another addr=, or leave it out for the first free slot",
			slot, fn, b.ID, o.Config().id)
	}
	if zero := b.fns[slot*8]; fn != 0 && zero != nil && !zero.Config().multifunction() {
		return fail("slot %d of bus %s has a single function: %s\ngive %[3]s multifunction=on, or choose another slot", slot, b.ID, zero.Config().id)
	}
	if other := b.inSlot(slot); fn == 0 && other != nil && !c.multifunction() {
		return fail("slot %d of bus %s has another function already: %s\ngive %s multifunction=on, or choose another slot", slot, b.ID, other.Config().id, c.id)
	}
	if b.port == nil {
		c.integrate()
	}
	b.fns[devfn] = f
	c.at.Store(&place{bus: b, devfn: devfn, fn: f})
	if isPort {
		port.secondary.rc = b.rc
	}
	b.occupancyChanged()
	b.rc.decode()
	return nil
}

// clear takes all functions behind a port off the bus. An access that was under way may still
// reach them. With ghosts, what answers in their place
// stays behind, until exorcise.
func (b *Bus) clear(ghosts bool) []Function {
	b.rc.mu.Lock()
	defer b.rc.mu.Unlock()
	fns := b.functions()
	for _, f := range fns {
		var gone []bar
		for _, bar := range f.Config().bars {
			if ghosts && bar != nil && bar.mapped && bar.Gone != nil {
				gone = append(gone, *bar)
			}
		}
		b.remove(f)
		for _, bar := range gone {
			r := devices.Range{Base: bar.base, Size: bar.Size}
			if b.rc.mmio.Insert(r, bar.name+" (gone)", bar.Gone) == nil {
				b.ghosts = append(b.ghosts, r)
			}
		}
	}
	return fns
}

// exorcise removes what clear has left behind.
func (b *Bus) exorcise() {
	b.rc.mu.Lock()
	defer b.rc.mu.Unlock()
	for _, r := range b.ghosts {
		_ = b.rc.mmio.Remove(r) // it is there
	}
	if b.ghosts != nil {
		b.ghosts = nil
		b.rc.decode() // what they were in the way of
	}
}

// remove takes f off the bus and unmaps its BARs; the root complex's lock is held.
func (b *Bus) remove(f Function) {
	c := f.Config()
	for _, bar := range c.bars {
		b.rc.unmap(bar)
	}
	b.fns[c.at.Load().devfn] = nil
	c.at.Store(nil)
	b.occupancyChanged()
	b.rc.decode() // what f was in the way of
}

// occupancyChanged shows on the port whether the slot has a device, which is its function 0.
func (b *Bus) occupancyChanged() {
	if b.port != nil {
		b.port.show(b.fns[0] != nil)
	}
}

// inSlot is the slot's first function, or nil.
func (b *Bus) inSlot(slot int) Function {
	for _, f := range b.fns[slot*8 : slot*8+8] {
		if f != nil {
			return f
		}
	}
	return nil
}

func (b *Bus) freeSlot() int {
	for slot := range len(b.fns) / 8 {
		if b.inSlot(slot) == nil {
			return slot
		}
	}
	return -1
}

// occupants lists who is in the way when a bus is full.
func (b *Bus) occupants() string {
	var s []string
	for slot := range len(b.fns) / 8 {
		s = append(s, fmt.Sprintf("%d %s", slot, b.inSlot(slot).Config().id))
	}
	return strings.Join(s, ", ")
}

func (b *Bus) fullHint() string {
	if b.port != nil {
		return "use the bus of another root port"
	}
	return "up to 8 root ports fit into a slot: multifunction=on and addr=SLOT.0 to addr=SLOT.7"
}

// functions are the functions on the bus in the order of their addresses.
func (b *Bus) functions() (fns []Function) {
	for _, f := range b.fns {
		if f != nil {
			fns = append(fns, f)
		}
	}
	return fns
}

func (c *Config) multifunction() bool { return c.Uint16(RegHeaderType)&headerMultifunction != 0 }

// stopFunction stops the device, and resets its configuration space.
func stopFunction(f Function) {
	s, ok := f.(Stopper)
	if !ok {
		resetFunction(f)
		return
	}
	c := f.Config()
	c.resetting.Lock()
	defer c.resetting.Unlock()
	s.Stop()
	c.Reset()
}

// resetFunction resets the device and its configuration space.
func resetFunction(f Function) {
	c := f.Config()
	c.resetting.Lock()
	defer c.resetting.Unlock()
	f.Reset()
	c.Reset()
}
