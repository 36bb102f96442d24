// Package guestmem is the guest's RAM: one anonymous mapping per region, which the kernel
// (KVM, vhost, VFIO) and the VMM share, and one accessor through which all of the VMM
// reaches it.
//
//	guest-physical                    host
//	0           ┌──────────┐          ┌──────────┐
//	            │ low RAM  │ ───────> │ Host     │ <── Bytes(gpa, n)
//	0xb0000000  ├──────────┤          └──────────┘
//	            │ (devices)│  RangeError
//	4 GiB       ├──────────┤          ┌──────────┐
//	            │ high RAM │ ───────> │ Host     │
//	            └──────────┘          └──────────┘
//
// Anonymous memory, and not a memfd, because by default only that gets transparent huge
// pages: a stock kernel then boots with a tenth of the nested page faults.
//
// The guest may change any byte at any time: copy first, then check, then use the copy.
// The race detector does not watch this memory.
package guestmem

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// PageSize is the unit of ranges and of the dirty bitmap, in bytes.
const PageSize = 4096

// Range is [Base, Base+Size) of an address space, in bytes. It may reach the top of the
// space, where its End is zero.
type Range struct{ Base, Size uint64 }

// End is the first address after the range.
func (r Range) End() uint64 { return r.Base + r.Size }

// Contains says whether addr lies in the range.
func (r Range) Contains(addr uint64) bool { return addr-r.Base < r.Size }

// Overlaps says whether the two ranges, neither of them empty, share an address.
func (r Range) Overlaps(o Range) bool { return r.Contains(o.Base) || o.Contains(r.Base) }

// String has the first and the last address.
func (r Range) String() string { return fmt.Sprintf("%#x-%#x", r.Base, r.End()-1) }

// Options say how the host backs the memory.
type Options struct {
	// PageSize is the host's page size in bytes: 0 or 4 KiB for normal pages, 2 MiB or
	// 1 GiB for huge pages, which the host must have reserved. A region whose size is no
	// multiple of it occupies one page more than it shows.
	PageSize uint64
	// Prealloc faults all pages in at once, so that a lack of memory shows in New.
	Prealloc bool
}

// Region is one mapped range.
type Region struct {
	GPA  uint64 // guest-physical base
	Size uint64 // bytes
	Host []byte // the mapping, Size bytes, never moved while Memory is open

	mapping []byte // Host and what its alignment cost around it
}

// Memory is all of a guest's RAM. Its methods may be called from any goroutine; windows
// that Bytes handed out must not be used after Close.
type Memory struct {
	regions []Region
	log     atomic.Pointer[Bitmap] // nil: not logging
}

// RangeError says that an access does not lie within one region, or is not aligned as an
// atomic access has to be.
type RangeError struct {
	GPA, Size  uint64
	Misaligned bool
}

func (e *RangeError) Error() string {
	if e.Misaligned {
		return fmt.Sprintf("guest memory %#x: not aligned to %d bytes", e.GPA, e.Size)
	}
	return fmt.Sprintf("guest memory %#x+%#x: outside of RAM", e.GPA, e.Size)
}

// New maps the ranges, of whole pages, which may come in any order but must not overlap.
func New(ranges []Range, o Options) (*Memory, error) {
	if o.PageSize == 0 {
		o.PageSize = PageSize
	}
	if !slices.Contains([]uint64{PageSize, 2 << 20, 1 << 30}, o.PageSize) {
		return nil, fmt.Errorf("guest memory: page size %d is not 4 KiB, 2 MiB or 1 GiB", o.PageSize)
	}
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b Range) int { return cmp.Compare(a.Base, b.Base) })
	end := uint64(0)
	for _, r := range ranges {
		switch {
		case r.Base%PageSize != 0 || r.Size%PageSize != 0 || r.Size == 0:
			return nil, fmt.Errorf("guest memory %#x+%#x: empty or not whole pages", r.Base, r.Size)
		case r.Base+r.Size < r.Base || r.Size > 1<<52:
			return nil, fmt.Errorf("guest memory %#x+%#x: beyond the physical address space", r.Base, r.Size)
		case r.Base < end:
			return nil, fmt.Errorf("guest memory %#x+%#x: overlaps another range", r.Base, r.Size)
		}
		end = r.Base + r.Size
	}
	m := new(Memory)
	for _, r := range ranges {
		region, err := mapRegion(r, o)
		if err != nil {
			return nil, errors.Join(err, m.Close())
		}
		m.regions = append(m.regions, region)
	}
	return m, nil
}

// hugePage is the alignment in bytes that lets guest and host share transparent huge pages.
const hugePage = 2 << 20

// mapRegion maps the memory of one range.
func mapRegion(r Range, o Options) (Region, error) {
	length := (r.Size + o.PageSize - 1) / o.PageSize * o.PageSize
	fail := func(op string, err error) (Region, error) {
		err = fmt.Errorf("guest memory %#x+%#x: %s: %w", r.Base, r.Size, op, err)
		if o.PageSize > PageSize {
			err = fmt.Errorf("%w\nreserve %d huge pages for it in /sys/kernel/mm/hugepages/hugepages-%dkB/nr_hugepages",
				err, length/o.PageSize, o.PageSize>>10)
		}
		return Region{}, err
	}
	flags := unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	slack := uint64(0)
	switch o.PageSize {
	case 1 << 30:
		flags |= unix.MAP_HUGETLB | unix.MAP_HUGE_1GB
	case 2 << 20:
		flags |= unix.MAP_HUGETLB | unix.MAP_HUGE_2MB
	default:
		flags |= unix.MAP_NORESERVE
		slack = hugePage
	}
	mapping, err := unix.Mmap(-1, 0, int(length+slack), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return fail("mmap", err)
	}
	host := mapping
	if slack != 0 {
		host = mapping[-address(mapping)%hugePage:][:length]
	}
	// Wishes: transparent huge pages, a core dump without the guest in it, and a child
	// process (a network script) that does not copy what VFIO has pinned.
	for _, advice := range []int{unix.MADV_HUGEPAGE, unix.MADV_DONTDUMP, unix.MADV_DONTFORK} {
		_ = unix.Madvise(mapping, advice)
	}
	if o.Prealloc {
		if err := unix.Madvise(host, unix.MADV_POPULATE_WRITE); err != nil {
			return fail("preallocate (MADV_POPULATE_WRITE, Linux 5.14)", errors.Join(err, unix.Munmap(mapping)))
		}
	}
	return Region{GPA: r.Base, Size: r.Size, Host: host[:r.Size:r.Size], mapping: mapping}, nil
}

// Close unmaps the memory. Nothing may use it any more: neither a vCPU nor a device.
func (m *Memory) Close() error {
	var errs []error
	for _, r := range m.regions {
		errs = append(errs, unix.Munmap(r.mapping))
	}
	m.regions = nil
	return errors.Join(errs...)
}

// Regions returns the regions in ascending order; the slice is not to be changed.
func (m *Memory) Regions() []Region { return m.regions }

// Size is the amount of RAM in bytes.
func (m *Memory) Size() (n uint64) {
	for i := range m.regions {
		n += m.regions[i].Size
	}
	return n
}

// Bytes returns a window of n bytes at gpa, which has to lie in one region; otherwise
// the error is a *RangeError. Who writes through the window calls MarkDirty after.
func (m *Memory) Bytes(gpa, n uint64) ([]byte, error) {
	for i := range m.regions {
		r := &m.regions[i]
		if off := gpa - r.GPA; off < r.Size && n <= r.Size-off {
			return r.Host[off : off+n : off+n], nil
		}
	}
	return nil, &RangeError{GPA: gpa, Size: n}
}

// ReadAt copies from guest-physical address gpa to p: all of it or nothing.
func (m *Memory) ReadAt(p []byte, gpa int64) (int, error) {
	b, err := m.Bytes(uint64(gpa), uint64(len(p)))
	return copy(p, b), err
}

// WriteAt copies p to guest-physical address gpa, all of it or nothing, and marks it dirty.
func (m *Memory) WriteAt(p []byte, gpa int64) (int, error) {
	b, err := m.Bytes(uint64(gpa), uint64(len(p)))
	n := copy(b, p)
	m.MarkDirty(uint64(gpa), uint64(n))
	return n, err
}

// MarkDirty says that the n bytes at gpa were written. Call it after the write: a page that
// is copied in between is then copied again. Without a log it costs one load.
func (m *Memory) MarkDirty(gpa, n uint64) {
	if log := m.log.Load(); log != nil {
		log.Set(gpa, n)
	}
}

// StartDirtyLog begins to collect what MarkDirty reports, with an empty log.
func (m *Memory) StartDirtyLog() { m.log.Store(NewBitmap(m)) }

// SyncDirtyLog moves what was collected since the last call into b.
func (m *Memory) SyncDirtyLog(b *Bitmap) {
	if log := m.log.Load(); log != nil {
		log.moveTo(b)
	}
}

// StopDirtyLog ends the collection and forgets what was not synced.
func (m *Memory) StopDirtyLog() { m.log.Store(nil) }
