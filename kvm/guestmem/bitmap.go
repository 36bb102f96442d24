package guestmem

import (
	"iter"
	"math/bits"
	"sync/atomic"
)

// Bitmap is a set of guest pages of PageSize bytes: one bit per page of each region, in the
// layout of KVM_GET_DIRTY_LOG. All methods may be called at the same time; those that take
// or copy the whole set do so word by word.
type Bitmap struct{ regions []pages }

type pages struct {
	gpa, count uint64 // base address, number of pages
	words      []uint64
}

// NewBitmap returns an empty set over m's pages.
func NewBitmap(m *Memory) *Bitmap {
	b := new(Bitmap)
	for _, r := range m.regions {
		n := r.Size / PageSize
		b.regions = append(b.regions, pages{r.GPA, n, make([]uint64, (n+63)/64)})
	}
	return b
}

// Set adds the pages that the n bytes at gpa touch, up to the end of the region that holds
// gpa; outside of RAM it does nothing.
func (b *Bitmap) Set(gpa, n uint64) { b.each(gpa, n, or) }

// Unset takes them out, likewise.
func (b *Bitmap) Unset(gpa, n uint64) { b.each(gpa, n, andNot) }

func (b *Bitmap) each(gpa, n uint64, do func(word *uint64, mask uint64)) {
	for _, r := range b.regions {
		off := gpa - r.gpa
		if n == 0 || off >= r.count*PageSize {
			continue
		}
		first, last := off/PageSize, (off+min(n, r.count*PageSize-off)-1)/PageSize
		for w := first / 64; w <= last/64; w++ {
			mask := ^uint64(0)
			if w == first/64 {
				mask <<= first % 64
			}
			if w == last/64 {
				mask &= ^uint64(0) >> (63 - last%64)
			}
			do(&r.words[w], mask)
		}
		return
	}
}

// or spares the bus the locked write when the bits are there already.
func or(word *uint64, mask uint64) {
	if atomic.LoadUint64(word)&mask != mask {
		atomic.OrUint64(word, mask)
	}
}

func andNot(word *uint64, mask uint64) {
	if atomic.LoadUint64(word)&mask != 0 {
		atomic.AndUint64(word, ^mask)
	}
}

// Test says whether the page at gpa is in the set.
func (b *Bitmap) Test(gpa uint64) bool {
	for _, r := range b.regions {
		if page := (gpa - r.gpa) / PageSize; page < r.count {
			return atomic.LoadUint64(&r.words[page/64])>>(page%64)&1 != 0
		}
	}
	return false
}

// Count is the number of pages in the set.
func (b *Bitmap) Count() (n uint64) {
	for _, r := range b.regions {
		for i := range r.words {
			n += uint64(bits.OnesCount64(atomic.LoadUint64(&r.words[i])))
		}
	}
	return n
}

// Or adds the pages of o, a set over the same memory.
func (b *Bitmap) Or(o *Bitmap) {
	for i, r := range o.regions {
		b.OrWords(i, r.words)
	}
}

// OrWords adds the pages of one region by its index in Memory.Regions, bit 0 of words[0]
// being its first page: what KVM_GET_DIRTY_LOG reports for a slot that covers the region.
func (b *Bitmap) OrWords(region int, words []uint64) {
	r := b.regions[region]
	for i := range min(len(r.words), len(words)) {
		if w := atomic.LoadUint64(&words[i]); w != 0 {
			or(&r.words[i], w)
		}
	}
}

// Clear empties the set.
func (b *Bitmap) Clear() {
	for _, r := range b.regions {
		for i := range r.words {
			atomic.StoreUint64(&r.words[i], 0)
		}
	}
}

// moveTo takes all pages out of the set and adds them to o.
func (b *Bitmap) moveTo(o *Bitmap) {
	for i, r := range b.regions {
		for j := range r.words {
			if atomic.LoadUint64(&r.words[j]) != 0 {
				or(&o.regions[i].words[j], atomic.SwapUint64(&r.words[j], 0))
			}
		}
	}
}

// Runs iterates over the set in ascending order as runs of adjacent pages: guest-physical
// address and length in bytes. A run does not cross regions.
func (b *Bitmap) Runs() iter.Seq2[uint64, uint64] { return b.RunsIn(0, ^uint64(0)) }

// RunsIn iterates over those pages of the set that are in [base, base+size), as Runs does.
func (b *Bitmap) RunsIn(base, size uint64) iter.Seq2[uint64, uint64] {
	return func(yield func(gpa, n uint64) bool) {
		for _, r := range b.regions {
			first := uint64(0)
			if base > r.gpa {
				first = (base - r.gpa + PageSize - 1) / PageSize
			}
			if end := base + size; end >= base && end < r.gpa+r.count*PageSize {
				r.count = (max(end, r.gpa) - r.gpa) / PageSize // of this copy: look no further
			}
			for page := r.next(first, 0); page < r.count; {
				end := r.next(page+1, ^uint64(0))
				if !yield(r.gpa+page*PageSize, (end-page)*PageSize) {
					return
				}
				page = r.next(end, 0)
			}
		}
	}
}

// next is the first page from page on whose bit differs from the bits of same, or count.
func (r pages) next(page, same uint64) uint64 {
	for page < r.count {
		w := (atomic.LoadUint64(&r.words[page/64]) ^ same) >> (page % 64)
		if w != 0 {
			return min(page+uint64(bits.TrailingZeros64(w)), r.count)
		}
		page = (page/64 + 1) * 64
	}
	return r.count
}
