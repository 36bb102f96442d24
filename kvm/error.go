package kvm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// OpError is a failed operation on KVM: "ioctl KVM_RUN: bad address". It unwraps to the
// errno. A hint, when there is one, is a line of its own.
type OpError struct {
	Op   string
	Err  error
	Hint string
}

func (e *OpError) Error() string {
	s := fmt.Sprintf("%s: %v", e.Op, e.Err)
	if e.Hint != "" {
		s += "\n" + e.Hint
	}
	return s
}

func (e *OpError) Unwrap() error { return e.Err }

// openHint says how to get at /dev/kvm.
func openHint(err error) string {
	switch {
	case errors.Is(err, unix.ENOENT):
		return "load the module: modprobe kvm_intel or kvm_amd; virtualization must be on in the firmware, or in the outer hypervisor"
	case errors.Is(err, unix.EACCES):
		return "add yourself to the group that owns /dev/kvm: usermod -aG kvm $USER, then log in again"
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return "the module is loaded but has no CPU to work with: enable virtualization in the firmware"
	}
	return ""
}
