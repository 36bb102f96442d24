package guestmem

import (
	"encoding/binary"
	"fmt"
	"os"
)

// Pagemap is what the kernel tells of this process's memory, /proc/self/pagemap. It is for one goroutine at a time.
type Pagemap struct {
	mem     *Memory
	file    *os.File
	entries []byte
}

// OpenPagemap opens that of m.
func OpenPagemap(m *Memory) (*Pagemap, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, fmt.Errorf("guest memory: %w", err)
	}
	return &Pagemap{mem: m, file: f}, nil
}

// Close closes it.
func (p *Pagemap) Close() error { return p.file.Close() }

// Touched adds to b those of the n bytes at gpa, whole pages of one region, some MiB at a time, that the host has memory
// for; all others are zeros, which nobody has to read to know. What is touched meanwhile may be missing.
func (p *Pagemap) Touched(b *Bitmap, gpa, n uint64) error {
	window, err := p.mem.Bytes(gpa, n)
	if err != nil {
		return err
	}
	const entrySize, presentOrSwapped = 8, 3 << 62 // Documentation/admin-guide/mm/pagemap.rst
	if size := int(n / PageSize * entrySize); cap(p.entries) < size {
		p.entries = make([]byte, size)
	}
	entries := p.entries[:n/PageSize*entrySize]
	if err := readAtOnce(p.file, entries, int64(address(window))/PageSize*entrySize); err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	there := func(page uint64) bool {
		return page < n/PageSize && binary.LittleEndian.Uint64(entries[page*entrySize:])&presentOrSwapped != 0
	}
	for page := uint64(0); page < n/PageSize; page++ {
		first := page
		for there(page) {
			page++
		}
		b.Set(gpa+first*PageSize, (page-first)*PageSize)
	}
	return nil
}
