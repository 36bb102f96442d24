package devices

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"baton/kvm/guestmem"
)

// Range is a range of an address space.
type Range = guestmem.Range

// Bus routes accesses of one address space (I/O ports or memory) to devices by range. An
// unclaimed read is all ones, an unclaimed write is dropped, and so is the part of an
// access that straddles the end of a range. Lookups take no lock and do not allocate;
// changes copy the table, so a device that was removed may still see an access that
// was under way.
type Bus struct {
	mu    sync.Mutex
	table atomic.Pointer[[]claim] // sorted by base, without overlaps
}

type claim struct {
	Range
	dev  BusDevice
	name string
}

// NewBus returns an empty bus.
func NewBus() *Bus {
	b := new(Bus)
	b.table.Store(new([]claim))
	return b
}

// Insert gives the range to dev; name is what errors call it. It fails when the range is
// empty, wraps around or overlaps another claim.
func (b *Bus) Insert(r Range, name string, dev BusDevice) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	t, err := insert(slices.Clone(*b.table.Load()), claim{r, dev, name})
	if err != nil {
		return err
	}
	b.table.Store(&t)
	return nil
}

// Remove takes back the claim that covers exactly r.
func (b *Bus) Remove(r Range) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	t, _, err := remove(slices.Clone(*b.table.Load()), r)
	if err != nil {
		return err
	}
	b.table.Store(&t)
	return nil
}

// Move moves the claim that covers exactly from to the range to, as one step that no
// access can see half done. When it fails, nothing has changed.
func (b *Bus) Move(from, to Range) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	t, c, err := remove(slices.Clone(*b.table.Load()), from)
	if err != nil {
		return err
	}
	c.Range = to
	if t, err = insert(t, c); err != nil {
		return err
	}
	b.table.Store(&t)
	return nil
}

// Walk calls f for every claim in ascending order.
func (b *Bus) Walk(f func(r Range, name string)) {
	for _, c := range *b.table.Load() {
		f(c.Range, c.name)
	}
}

// Read fills p from the device that claims addr.
func (b *Bus) Read(addr uint64, p []byte) {
	AllOnes(p)
	if c, n := b.find(addr, len(p)); c != nil {
		c.dev.Read(addr-c.Base, p[:n])
	}
}

// AllOnes fills p with what a read finds where nothing answers.
func AllOnes(p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}

// Write hands p to the device that claims addr.
func (b *Bus) Write(addr uint64, p []byte) {
	if c, n := b.find(addr, len(p)); c != nil {
		c.dev.Write(addr-c.Base, p[:n])
	}
}

// find returns the claim on addr and how many of n bytes lie in it.
func (b *Bus) find(addr uint64, n int) (*claim, int) {
	t := *b.table.Load()
	lo, hi := 0, len(t) // the last claim with Base <= addr is t[lo-1]
	for lo < hi {
		if mid := int(uint(lo+hi) / 2); t[mid].Base <= addr {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 || !t[lo-1].Contains(addr) {
		return nil, 0
	}
	c := &t[lo-1]
	return c, int(min(uint64(n), c.End()-addr))
}

func insert(t []claim, c claim) ([]claim, error) {
	if c.Size == 0 || c.Base+c.Size-1 < c.Base {
		return nil, fmt.Errorf("claim %s: range %#x+%#x is empty or wraps around", c.name, c.Base, c.Size)
	}
	i, _ := slices.BinarySearchFunc(t, c.Base, func(e claim, base uint64) int { return cmp.Compare(e.Base, base) })
	for _, j := range []int{i - 1, i} {
		if j >= 0 && j < len(t) && t[j].Overlaps(c.Range) {
			return nil, fmt.Errorf("claim %s: %s overlaps %s at %s", c.name, c.Range, t[j].name, t[j].Range)
		}
	}
	return slices.Insert(t, i, c), nil
}

func remove(t []claim, r Range) ([]claim, claim, error) {
	i := slices.IndexFunc(t, func(c claim) bool { return c.Range == r })
	if i < 0 {
		return nil, claim{}, fmt.Errorf("release %s: nothing claims exactly this range", r)
	}
	c := t[i]
	return slices.Delete(t, i, i+1), c, nil
}
