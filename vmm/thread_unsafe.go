package vmm

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// setThreadName names the calling thread in the host's tools; the kernel keeps 15 bytes.
func setThreadName(name string) {
	b := append([]byte(name), 0)
	_, _, _ = unix.Syscall(unix.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(&b[0])), 0)
}
