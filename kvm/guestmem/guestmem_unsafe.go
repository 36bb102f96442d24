package guestmem

import (
	"sync/atomic"
	"unsafe"
)

// HostAddr is the address of the n bytes at gpa in this process, as vhost and VFIO take
// it. It stays valid until Close.
func (m *Memory) HostAddr(gpa, n uint64) (uint64, error) {
	b, err := m.Bytes(gpa, n)
	return address(b), err
}

// word returns the n bytes at gpa for an atomic access.
func (m *Memory) word(gpa, n uint64) (unsafe.Pointer, error) {
	if gpa%n != 0 {
		return nil, &RangeError{GPA: gpa, Size: n, Misaligned: true}
	}
	b, err := m.Bytes(gpa, n)
	return unsafe.Pointer(unsafe.SliceData(b)), err
}

// Load16 reads the little-endian 16-bit word at gpa. As every Load and Store here it is
// atomic and sequentially consistent, like sync/atomic, and fails with a *RangeError when
// gpa is not in RAM or not aligned to the word's size.
func (m *Memory) Load16(gpa uint64) (uint16, error) {
	if gpa%2 != 0 {
		return 0, &RangeError{GPA: gpa, Size: 2, Misaligned: true}
	}
	v, err := m.Load32(gpa &^ 3) // regions are whole pages: the neighbour is in RAM as well
	return uint16(v >> (gpa & 2 * 8)), err
}

// Load32 reads the little-endian 32-bit word at gpa.
func (m *Memory) Load32(gpa uint64) (uint32, error) {
	p, err := m.word(gpa, 4)
	if err != nil {
		return 0, err
	}
	return atomic.LoadUint32((*uint32)(p)), nil
}

// Load64 reads the little-endian 64-bit word at gpa.
func (m *Memory) Load64(gpa uint64) (uint64, error) {
	p, err := m.word(gpa, 8)
	if err != nil {
		return 0, err
	}
	return atomic.LoadUint64((*uint64)(p)), nil
}

// Store16 writes the little-endian 16-bit word at gpa and marks it dirty. The half-word
// beside it keeps what others write to it meanwhile.
func (m *Memory) Store16(gpa uint64, v uint16) error {
	if gpa%2 != 0 {
		return &RangeError{GPA: gpa, Size: 2, Misaligned: true}
	}
	p, err := m.word(gpa&^3, 4)
	if err != nil {
		return err
	}
	shift := gpa & 2 * 8
	for w := (*uint32)(p); ; {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			break
		}
	}
	m.MarkDirty(gpa, 2)
	return nil
}

// Store32 writes the little-endian 32-bit word at gpa and marks it dirty.
func (m *Memory) Store32(gpa uint64, v uint32) error {
	p, err := m.word(gpa, 4)
	if err != nil {
		return err
	}
	atomic.StoreUint32((*uint32)(p), v)
	m.MarkDirty(gpa, 4)
	return nil
}

// Store64 writes the little-endian 64-bit word at gpa and marks it dirty.
func (m *Memory) Store64(gpa uint64, v uint64) error {
	p, err := m.word(gpa, 8)
	if err != nil {
		return err
	}
	atomic.StoreUint64((*uint64)(p), v)
	m.MarkDirty(gpa, 8)
	return nil
}

// address is where a mapping lies in this process.
func address(mapping []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mapping))))
}
