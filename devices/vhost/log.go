package vhost

import (
	"fmt"
	"sync/atomic"

	"baton/kvm/guestmem"

	"golang.org/x/sys/unix"
)

// Log is where the kernel notes which pages of guest memory it has written: one bit for every
// page of the address space up to the memory's end, holes included. Any number of Nets may
// share one. It is mapped, for the kernel writes to it from its own thread.
type Log struct {
	mapping []byte
	words   []uint64 // the mapping
	mem     *guestmem.Memory
}

// NewLog returns an empty log of mem.
func NewLog(mem *guestmem.Memory) (*Log, error) {
	end := uint64(0)
	for _, r := range mem.Regions() {
		end = max(end, r.GPA+r.Size)
	}
	n := (end/guestmem.PageSize + 63) / 64 * 8
	m, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map a vhost log of %d bytes: %w", n, err)
	}
	return &Log{m, words(m), mem}, nil
}

// Sync moves what was noted since the last call to b.
func (l *Log) Sync(b *guestmem.Bitmap) {
	for _, r := range l.mem.Regions() {
		first, end := r.GPA/guestmem.PageSize, (r.GPA+r.Size)/guestmem.PageSize
		for w := first / 64; w <= (end-1)/64; w++ {
			if atomic.LoadUint64(&l.words[w]) == 0 {
				continue
			}
			set := atomic.SwapUint64(&l.words[w], 0)
			for bit := uint64(0); set != 0; bit, set = bit+1, set>>1 {
				if set&1 != 0 {
					b.Set((w*64+bit)*guestmem.PageSize, 1)
				}
			}
		}
	}
}

// Close frees the log, which no Net may use any more.
func (l *Log) Close() error { return unix.Munmap(l.mapping) }
