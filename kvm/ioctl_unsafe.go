package kvm

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl issues r with a pointer to arg and starts again when a signal interrupts it, which
// the Go runtime sends for preemption. The pointer becomes an integer only in the call
// expression: else the stack that holds arg could move before the kernel writes to it.
func ioctl[T any](fd int, r request, arg *T) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), r.nr, uintptr(unsafe.Pointer(arg)))
		if errno == 0 {
			return int(n), nil
		}
		if errno != unix.EINTR {
			return 0, &OpError{Op: "ioctl " + r.name, Err: errno}
		}
	}
}

// ioctlAtOnce is ioctl for what waits for nothing but the kernel, and takes about a millisecond at most. The scheduler does
// not hear of it: it would have another thread go on in this one's place, and look after all threads more closely for a
// while, which takes longer than such a call where CPUs are emulated.
func ioctlAtOnce[T any](fd int, r request, arg *T) error {
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), r.nr, uintptr(unsafe.Pointer(arg)))
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return &OpError{Op: "ioctl " + r.name, Err: errno}
		}
	}
}

// ioctlValue issues r with a plain number.
func ioctlValue(fd int, r request, arg uintptr) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), r.nr, arg)
		if errno == 0 {
			return int(n), nil
		}
		if errno != unix.EINTR {
			return 0, &OpError{Op: "ioctl " + r.name, Err: errno}
		}
	}
}

// hostAddr is the address of memory that does not move: a mapping, not Go's heap.
func hostAddr(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

// asRunPage views the head of a vCPU's shared mapping as kvm_run.
func asRunPage(mapping []byte) *runPage { return (*runPage)(unsafe.Pointer(&mapping[0])) }

// asRing views a mapping as an array of kvm_dirty_gfn.
func asRing(mapping []byte) []dirtyGFN {
	return unsafe.Slice((*dirtyGFN)(unsafe.Pointer(&mapping[0])), len(mapping)/int(unsafe.Sizeof(dirtyGFN{})))
}

// exitAs views the exit union of kvm_run as one of its members.
func exitAs[T any](r *runPage) *T { return (*T)(unsafe.Pointer(&r.exit)) }
