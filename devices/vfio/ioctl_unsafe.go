package vfio

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl passes a pointer to one of abi.go's structures. It starts again when a signal
// interrupts it, which the Go runtime sends for preemption.
func ioctl[T any](fd int, req uintptr, arg *T) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(arg)))
		if errno == 0 {
			return int(n), nil
		}
		if errno != unix.EINTR {
			return 0, errno
		}
	}
}

// ioctlValue passes a plain number.
func ioctlValue(fd int, req, arg uintptr) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
		if errno == 0 {
			return int(n), nil
		}
		if errno != unix.EINTR {
			return 0, errno
		}
	}
}

// sizeOf is a structure's argsz.
func sizeOf[T any](*T) uint32 { return uint32(unsafe.Sizeof(*new(T))) }

// address is that of memory that does not move: a mapping, not Go's heap.
func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }
