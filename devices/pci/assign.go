package pci

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"baton/devices"
)

// What a port's windows are at least, so that a device can be plugged in later: the
// non-prefetchable one Linux's own default, the other enough for a VF's BARs.
const (
	reserveMem  = 2 << 20
	reservePref = 32 << 20

	windowUnit = 1 << 20 // of bridge windows: PCIe 7.5.1.3.8
)

// piece is something to place: a BAR, or a port's window with what goes into it.
type piece struct {
	name        string
	size, align uint64
	place       func(base uint64)
}

// Assign numbers the buses and places windows and BARs as firmware would, the same way for
// the same tree: BARs by size and address, each aligned to its size. Ports get windows with
// room for hot-plug if there is enough, and are enabled; functions are left for the guest to
// enable. An error lists all that did not fit.
func (rc *RootComplex) Assign() error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	buses := rc.buses()
	for _, b := range buses {
		for _, f := range b.functions() {
			f.Config().update16(RegCommand, CommandMemory|CommandMaster, 0)
		}
	}
	rc.decode()
	if most := min(rc.layout.ECAM.Size>>20, 256); uint64(len(buses)) > most {
		return fmt.Errorf("assign PCI resources: %d root ports, but only %d buses for them", len(buses)-1, most-1)
	}
	var errs []error
	for n, b := range buses {
		errs = append(errs, b.orphans()...)
		if b.port != nil {
			b.port.c.PutUint16(regSecondary, uint16(n)<<8|uint16(n)) // and subordinate
		}
	}
	err := rc.placeAll(buses, reserveMem, reservePref)
	if err != nil {
		err = rc.placeAll(buses, 0, 0)
	}
	for _, b := range buses[1:] {
		b.port.c.update16(RegCommand, CommandMemory|CommandMaster, CommandMemory|CommandMaster)
	}
	rc.decode()
	return errors.Join(append(errs, err)...)
}

// orphans are the functions that no guest looks for, because their slot has no function 0.
func (b *Bus) orphans() (errs []error) {
	for slot := range len(b.fns) / 8 {
		if f := b.inSlot(slot); f != nil && b.fns[slot*8] == nil {
			errs = append(errs, fmt.Errorf("assign PCI resources: %s is in slot %d of bus %s, which has no function 0\nthe guest would not find it: add one with multifunction=on",
				f.Config().id, slot, b.ID))
		}
	}
	return errs
}

// placeAll places everything, with at least the given sizes for the windows of ports.
func (rc *RootComplex) placeAll(buses []*Bus, reserveMem, reservePref uint64) error {
	if rc.layout.MMIO64.Size == 0 {
		reservePref = 0
	}
	low, high := rc.pieces(buses[0])
	for _, b := range buses[1:] {
		mem, pref := rc.pieces(b)
		var w struct{ mem, pref devices.Range }
		set := func() { b.port.c.setWindows(w.mem, w.pref) }
		set()
		low = append(low, windowPiece(b.ID, mem, reserveMem, func(r devices.Range) { w.mem = r; set() })...)
		high = append(high, windowPiece(b.ID, pref, reservePref, func(r devices.Range) { w.pref = r; set() })...)
	}
	return errors.Join(
		pack("32-bit", rc.layout.MMIO32, low),
		pack("64-bit", rc.layout.MMIO64, high))
}

// pieces are the BARs of the functions on a bus, by the window that they go into. Only
// prefetchable 64-bit BARs may go above 4 GiB behind a port (PCIe 7.5.1.3.9), and so they
// do on the root bus.
func (rc *RootComplex) pieces(b *Bus) (low, high []piece) {
	for _, f := range b.functions() {
		c := f.Config()
		for _, bar := range c.bars {
			if bar == nil {
				continue
			}
			c.setAddress(bar, 0) // unless it fits
			p := piece{bar.name, bar.Size, bar.Size, func(base uint64) { c.setAddress(bar, base) }}
			if bar.Is64 && bar.Prefetchable && rc.layout.MMIO64.Size != 0 {
				high = append(high, p)
			} else {
				low = append(low, p)
			}
		}
	}
	return low, high
}

// windowPiece is the window of a port with the BARs in it, or nothing if it can stay closed.
func windowPiece(bus string, bars []piece, reserve uint64, set func(devices.Range)) []piece {
	bySize(bars)
	names := []string{"the window of " + bus}
	size, align := uint64(0), uint64(windowUnit)
	for _, b := range bars {
		size += b.size
		align = max(align, b.align)
		names = append(names, b.name)
	}
	size = (max(size, reserve) + windowUnit - 1) &^ (windowUnit - 1)
	if size == 0 {
		return nil
	}
	return []piece{{strings.Join(names, " with "), size, max(align, reserve), func(base uint64) {
		set(devices.Range{Base: base, Size: size})
		for _, b := range bars {
			b.place(base)
			base += b.size // stays aligned: sizes are powers of two and do not grow
		}
	}}}
}

// bySize sorts the largest alignment first, which leaves the fewest gaps.
func bySize(p []piece) {
	slices.SortStableFunc(p, func(a, b piece) int { return cmp.Compare(b.align, a.align) })
}

// pack places the pieces in a range, those with the largest alignment first.
func pack(what string, in devices.Range, pieces []piece) error {
	bySize(pieces)
	next, free := in.Base, in.Size
	var unfit []string
	for _, p := range pieces {
		gap := -next & (p.align - 1)
		if gap > free || p.size > free-gap {
			unfit = append(unfit, fmt.Sprintf("%s (%d KiB)", p.name, p.size>>10))
			continue
		}
		p.place(next + gap)
		next, free = next+gap+p.size, free-gap-p.size
	}
	if unfit == nil {
		return nil
	}
	return fmt.Errorf("assign PCI resources: the %s window of %d MiB has no room for %s", what, in.Size>>20, strings.Join(unfit, ", "))
}
