package kvm

import (
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// MemFlags of a memory slot, KVM_MEM_*.
type MemFlags uint32

// MemLogDirty has the guest's writes to a slot logged.
const MemLogDirty MemFlags = 1 << 0

// pageSize is the unit of slots and dirty logs.
const pageSize = 4096

// SetMemory maps host at guest-physical address gpa as memory slot, or changes the flags
// of a slot that is mapped so already. Host must be a mapping (not Go's heap), whole
// pages, and stay mapped until RemoveMemory.
func (vm *VM) SetMemory(slot uint32, gpa uint64, host []byte, flags MemFlags) error {
	if len(host) == 0 {
		return fmt.Errorf("set memory slot %d: no memory", slot)
	}
	return vm.setMemory(userMemoryRegion{slot, uint32(flags), gpa, uint64(len(host)), hostAddr(host)})
}

// RemoveMemory unmaps a slot.
func (vm *VM) RemoveMemory(slot uint32) error { return vm.setMemory(userMemoryRegion{slot: slot}) }

func (vm *VM) setMemory(r userMemoryRegion) error {
	vm.memMu.Lock()
	defer vm.memMu.Unlock()
	if _, err := ioctl(vm.fd, kvmSetUserMemoryRegion, &r); err != nil {
		return fmt.Errorf("memory slot %d at %#x+%#x: %w", r.slot, r.gpa, r.size, err)
	}
	vm.slots[r.slot] = r.size / pageSize
	return nil
}

// EnableManualDirtyLog makes GetDirtyLog leave the log as it is, so that pages are write
// protected again only by ClearDirtyLog, in pieces. Where the kernel can (Linux 5.7), a
// log that starts then reports every page and protects none, which spares a stall.
func (vm *VM) EnableManualDirtyLog() error {
	flags := vm.CheckExtension(CapManualDirtyLogProtect2) & initiallySet
	return vm.enableCap(CapManualDirtyLogProtect2, uint64(flags|manualProtect))
}

// GetDirtyLog writes the slot's log to bitmap, bit 0 of word 0 being the slot's first
// page; bitmap needs (pages+63)/64 words. Without the manual log, it also clears it.
func (vm *VM) GetDirtyLog(slot uint32, bitmap []uint64) error {
	vm.memMu.Lock()
	defer vm.memMu.Unlock()
	if pages := vm.slots[slot]; pages == 0 || uint64(len(bitmap)) < (pages+63)/64 {
		return fmt.Errorf("dirty log of slot %d: bitmap of %d words for %d pages", slot, len(bitmap), pages)
	}
	var pin runtime.Pinner // the kernel follows the pointer inside the argument
	defer pin.Unpin()
	pin.Pin(&bitmap[0])
	return ioctlAtOnce(vm.fd, kvmGetDirtyLog, &dirtyLog{slot: slot, bitmap: &bitmap[0]})
}

// ClearDirtyLog clears those of the n pages from first on that are set in bitmap, whose bit
// 0 of word 0 is page first, and protects them again. First is a multiple of 64, and so is
// n unless it reaches the end of the slot; some thousands at a time, for Go's scheduler does not hear of it. It needs the
// manual log.
func (vm *VM) ClearDirtyLog(slot uint32, first uint64, n uint32, bitmap []uint64) error {
	if n == 0 || len(bitmap) < (int(n)+63)/64 {
		return fmt.Errorf("clear dirty log of slot %d: bitmap of %d words for %d pages", slot, len(bitmap), n)
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&bitmap[0])
	return ioctlAtOnce(vm.fd, kvmClearDirtyLog, &clearDirtyLog{slot: slot, pages: n, first: first, bitmap: &bitmap[0]})
}

// DirtyRingEntry is the size in bytes of a page's entry in a dirty ring.
const DirtyRingEntry = 16

// EnableDirtyRing gives every vCPU that is created from now on a ring of the pages that it
// dirtied, in place of the dirty log; size is in bytes (16 per page), a power of two, at most
// what CapDirtyLogRing says, and at least 16 KiB, as Intel's PML needs room in it.
func (vm *VM) EnableDirtyRing(size int) error {
	if size < 16<<10 || bits.OnesCount(uint(size)) != 1 {
		return fmt.Errorf("dirty ring of %d bytes: not a power of two of at least 16 KiB", size)
	}
	if err := vm.enableCap(CapDirtyLogRing, uint64(size)); err != nil {
		return err
	}
	vm.memMu.Lock()
	defer vm.memMu.Unlock()
	vm.ringSize = size
	return nil
}

// ResetDirtyRings protects all pages again that DirtyRing.Collect took, and makes room in
// the rings. It returns the number of entries that it freed.
func (vm *VM) ResetDirtyRings() (int, error) { return ioctlValue(vm.fd, kvmResetDirtyRings, 0) }

// DirtyRing is a vCPU's list of dirtied pages. It is for one goroutine at a time, which
// may be another than the vCPU's.
type DirtyRing struct {
	mapping []byte
	entries []dirtyGFN
	next    uint32
}

func mapRing(fd, size int) (*DirtyRing, error) {
	m, err := unix.Mmap(fd, int64(dirtyLogPageOffset*os.Getpagesize()), size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, &OpError{Op: "mmap dirty ring", Err: err}
	}
	return &DirtyRing{mapping: m, entries: asRing(m)}, nil
}

// Collect calls f with the slot and the page number in it of every new entry, and hands
// the entries back for ResetDirtyRings. It returns their number.
func (r *DirtyRing) Collect(f func(slot uint32, page uint64)) (n int) {
	for ; n < len(r.entries); n++ {
		e := &r.entries[r.next%uint32(len(r.entries))]
		if atomic.LoadUint32(&e.flags) != dirtyGFNDirty {
			break
		}
		f(e.slot, e.offset)
		atomic.StoreUint32(&e.flags, dirtyGFNReset)
		r.next++
	}
	return n
}
