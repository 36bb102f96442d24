package wire

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// vector is readv or writev on a descriptor that does not block.
func vector(call, fd uintptr, v []unix.Iovec) (n int, errno syscall.Errno) {
	for {
		r, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(&v[0])), uintptr(len(v)))
		switch errno {
		case 0:
			return int(r), 0
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// asWords are the whole words of p, which has one.
func asWords(p []byte) []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(&p[0])), len(p)/8)
}
