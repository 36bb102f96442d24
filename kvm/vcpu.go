package kvm

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// VCPU is one virtual CPU. See the package's documentation for who may call what.
type VCPU struct {
	id   int
	fd   int
	sys  *System
	page []byte // the shared mapping, run is its head
	run  *runPage
	ring *DirtyRing

	xsaveSize int
	tid       atomic.Int32 // thread that Kick signals
	mu        sync.Mutex   // Kick against Close
	closed    bool
}

// CreateVCPU adds a vCPU whose APIC ID is id.
func (vm *VM) CreateVCPU(id int) (_ *VCPU, err error) {
	fd, err := ioctlValue(vm.fd, kvmCreateVCPU, uintptr(id))
	if err != nil {
		return nil, fmt.Errorf("vcpu %d: %w", id, err)
	}
	v := &VCPU{id: id, fd: fd, sys: vm.sys, xsaveSize: max(vm.CheckExtension(CapXSave2), len(xsave{}))}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Close())
		}
	}()
	v.page, err = unix.Mmap(fd, 0, vm.sys.mmapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, &OpError{Op: fmt.Sprintf("mmap vcpu %d", id), Err: err}
	}
	v.run = asRunPage(v.page)
	vm.memMu.Lock()
	defer vm.memMu.Unlock()
	if vm.ringSize > 0 {
		if v.ring, err = mapRing(fd, vm.ringSize); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// Close frees the vCPU, which must not run. Kick does nothing afterwards.
func (v *VCPU) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return nil
	}
	v.closed = true
	var errs []error
	if v.ring != nil {
		errs = append(errs, unix.Munmap(v.ring.mapping))
	}
	if v.page != nil {
		errs = append(errs, unix.Munmap(v.page))
	}
	return errors.Join(append(errs, unix.Close(v.fd))...)
}

// ID is the APIC ID.
func (v *VCPU) ID() int { return v.id }

// XSaveSize is the length of State.XSave in bytes.
func (v *VCPU) XSaveSize() int { return v.xsaveSize }

// DirtyRing is nil unless EnableDirtyRing came before CreateVCPU.
func (v *VCPU) DirtyRing() *DirtyRing { return v.ring }

// Bind makes the calling thread the one that Kick signals. The first Run does it by
// itself; a vCPU that moves to another thread calls Bind there.
func (v *VCPU) Bind() { v.tid.Store(int32(unix.Gettid())) }

// Run lets the guest run until it needs the VMM, and says why. ExitIntr answers a Kick:
// by then the access of the exit before it is complete, so that the state can be saved.
// The exit's details (IO, MMIO, ...) are valid until the next Run. It does not allocate.
func (v *VCPU) Run() (ExitReason, error) {
	if v.tid.Load() == 0 {
		v.Bind()
	}
	for {
		// Not RawSyscall: the scheduler has to know that this thread is gone for long.
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(v.fd), kvmRun.nr, 0)
		switch errno {
		case 0:
			return ExitReason(v.run.exitReason), nil
		case unix.EINTR:
			// Cleared before the caller looks at why it was kicked: a later Kick is not lost.
			// Without the flag it was the Go runtime's own signal.
			if atomic.SwapUint32(&v.run.control, 0)&immediateExit != 0 {
				return ExitIntr, nil
			}
		case unix.EAGAIN: // a vCPU that waited for INIT or SIPI got one
		default:
			return ExitReason(v.run.exitReason), &OpError{Op: "ioctl KVM_RUN", Err: errno}
		}
	}
}

// Kick makes the Run under way, or else the next one, return ExitIntr. Several kicks may be
// answered by one ExitIntr. It may be called from any thread.
func (v *VCPU) Kick() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return
	}
	// The flag first: KVM_RUN looks at it before it enters the guest, and the signal takes
	// it out of the guest. SIGURG is what the Go runtime expects to be disturbed by.
	atomic.StoreUint32(&v.run.control, immediateExit)
	if tid := v.tid.Load(); tid != 0 {
		_ = unix.Tgkill(os.Getpid(), int(tid), unix.SIGURG) // a thread that ended needs no kick
	}
}

// PreFault maps the n bytes at gpa, some MiB at a time, as if the guest had read them. It may be called from any thread,
// but never while the vCPU runs, for the end of which it would wait, with all of Go's threads; Kick and Close wait for
// it. It needs CapPreFaultMemory, and fails where there is no second level of page tables.
func (v *VCPU) PreFault(gpa, n uint64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return unix.EBADF
	}
	for p := (preFault{gpa: gpa, size: n}); p.size > 0; { // the kernel goes on from where it was interrupted
		if err := ioctlAtOnce(v.fd, kvmPreFault, &p); err != nil && !errors.Is(err, unix.EAGAIN) {
			return err
		}
	}
	return nil
}

// Translate walks the guest's page tables. ok is false when gva is not mapped.
func (v *VCPU) Translate(gva uint64) (gpa uint64, ok bool, err error) {
	t := gokvm.Translation{LinearAddress: gva}
	_, err = ioctl(v.fd, kvmTranslate, &t)
	return t.PhysicalAddress, t.Valid != 0, err
}

// ClockPaused tells the guest that it was stopped, so that its watchdogs bear with it.
// A guest without kvm-clock is not told.
func (v *VCPU) ClockPaused() error {
	_, err := ioctlValue(v.fd, kvmKVMClockCtrl, 0)
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}
