package tap

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Readv reads one frame with its header from a queue into the buffers, one after another.
// It does not block: no frame is unix.EAGAIN. A frame that is too long loses its end without
// a sign, so leave room. iov has 1 to 1024 elements, each of memory that stays in place.
func (t *TAP) Readv(queue int, iov []unix.Iovec) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_READV, uintptr(t.fds[queue]), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// Writev sends one frame with its header. A queue that is full is unix.EAGAIN, a header or a
// frame that the kernel does not understand unix.EINVAL, an interface that is down unix.EIO.
func (t *TAP) Writev(queue int, iov []unix.Iovec) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_WRITEV, uintptr(t.fds[queue]), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
