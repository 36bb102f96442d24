package harness

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// syscallBytes is read or write on a descriptor that does not block, of which Go's scheduler is not told.
func syscallBytes(call, fd uintptr, b []byte) (n int, errno syscall.Errno) {
	r, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	return int(r), errno
}

// readable waits, for so long at most, until there is something to read. Go's scheduler is not told.
func readable(fd uintptr, d time.Duration) {
	p := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	t := unix.NsecToTimespec(max(int64(d), 0))
	_, _, _ = syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&t)), 0, 0, 0)
}
