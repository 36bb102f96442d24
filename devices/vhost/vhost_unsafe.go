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
