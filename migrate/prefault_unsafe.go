package migrate

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// populate has the kernel map memory, which is some, as if it had been written to (Linux 5.14; without, the
// receiver waits). It is not told to Go's scheduler: see wire.
func populate(memory []byte) {
	_, _, _ = syscall.RawSyscall(unix.SYS_MADVISE, uintptr(unsafe.Pointer(&memory[0])), uintptr(len(memory)), unix.MADV_POPULATE_WRITE)
}
