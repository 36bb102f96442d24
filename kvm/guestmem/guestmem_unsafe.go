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

// word returns the 32 bits at gpa for an atomic access.
func (m *Memory) word(gpa uint64) (*uint32, error) {
	if gpa%4 != 0 {
		return nil, &RangeError{GPA: gpa, Size: 4, Misaligned: true}
	}
	b, err := m.Bytes(gpa, 4)
	return (*uint32)(unsafe.Pointer(unsafe.SliceData(b))), err
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
	w, err := m.word(gpa)
	if err != nil {
		return 0, err
	}
	return atomic.LoadUint32(w), nil
}

// Store16 writes the little-endian 16-bit word at gpa and marks it dirty. The half-word
// beside it keeps what others write to it meanwhile.
func (m *Memory) Store16(gpa uint64, v uint16) error {
	if gpa%2 != 0 {
		return &RangeError{GPA: gpa, Size: 2, Misaligned: true}
	}
	w, err := m.word(gpa &^ 3)
	if err != nil {
		return err
	}
	shift := gpa & 2 * 8
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			break
		}
	}
	m.MarkDirty(gpa, 2)
	return nil
}

// address is where a mapping lies in this process.
func address(mapping []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mapping))))
}
