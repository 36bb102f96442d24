package vhost

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl passes a pointer to one of abi.go's structures, or nil.
func ioctl[T any](fd int, req uintptr, arg *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return errno
	}
	return nil
}

// words views a mapping, which begins and ends on a page.
func words(mapping []byte) []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(mapping))), len(mapping)/8)
}

// address is where the log lies in this process.
func (l *Log) address() uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(l.mapping)))) }
