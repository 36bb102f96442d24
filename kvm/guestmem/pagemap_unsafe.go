package guestmem

import (
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readAtOnce fills p, from a file that does not make anyone wait; Go's scheduler does not hear of it.
func readAtOnce(f *os.File, p []byte, off int64) error {
	for len(p) > 0 {
		n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, f.Fd(), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), uintptr(off), 0, 0)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return os.NewSyscallError("pread "+f.Name(), errno)
		case n == 0:
			return io.ErrUnexpectedEOF
		default:
			p, off = p[n:], off+int64(n)
		}
	}
	return nil
}
