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

// skip returns v, which it changes, without its first n bytes.
func skip(v []unix.Iovec, n uint64) []unix.Iovec {
	for len(v) > 0 && n >= v[0].Len {
		n -= v[0].Len
		v = v[1:]
	}
	if n > 0 {
		v[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(v[0].Base), n))
		v[0].Len -= n
	}
	return v
}
