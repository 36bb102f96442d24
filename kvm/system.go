package kvm

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// System is an open /dev/kvm.
type System struct {
	fd       int
	mmapSize int // of a vCPU's run area
}

// Kind is the implementation behind /dev/kvm.
type Kind string

// The kinds. PVM is a software KVM, which needs no virtualization hardware and cannot run
// a stock kernel.
const (
	VMX     Kind = "vmx"
	SVM     Kind = "svm"
	PVM     Kind = "pvm"
	Unknown Kind = "unknown"
)

// Open opens /dev/kvm. The error says how to get at it.
func Open() (*System, error) {
	const dev, apiVersion = "/dev/kvm", 12
	fd, err := unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &OpError{Op: "open " + dev, Err: err, Hint: openHint(err)}
	}
	s := &System{fd: fd}
	version, err := ioctlValue(fd, kvmGetAPIVersion, 0)
	if err == nil && version != apiVersion {
		err = fmt.Errorf("%s: API version %d instead of %d", dev, version, apiVersion)
	}
	if err == nil {
		s.mmapSize, err = ioctlValue(fd, kvmGetVCPUMmapSize, 0)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return s, nil
}

// Close closes the handle; VMs live on.
func (s *System) Close() error { return unix.Close(s.fd) }

// Kind says which implementation runs, going by the loaded module.
func (s *System) Kind() Kind {
	for _, m := range []struct {
		module string
		kind   Kind
	}{{"kvm_intel", VMX}, {"kvm_amd", SVM}, {"kvm_pvm", PVM}} {
		if _, err := os.Stat("/sys/module/" + m.module); err == nil {
			return m.kind
		}
	}
	return Unknown
}

// CheckExtension is 0 when the kernel lacks the capability, and else 1 or what the
// capability's constant says.
func (s *System) CheckExtension(c Cap) int { return checkExtension(s.fd, c) }

func checkExtension(fd int, c Cap) int {
	n, err := ioctlValue(fd, kvmCheckExtension, uintptr(c))
	if err != nil {
		return 0
	}
	return n
}

// SupportedCPUID is what KVM and the host's CPU can offer to a guest; see GuestCPUID.
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	return getCPUID(s.fd, kvmGetSupportedCPUID)
}

// MSRIndices lists the MSRs that make up a vCPU's state. The kernel may still refuse some.
func (s *System) MSRIndices() ([]uint32, error) {
	var l msrIndexList
	l.n = uint32(len(l.indices))
	if _, err := ioctl(s.fd, kvmGetMSRIndexList, &l); err != nil {
		return nil, err
	}
	return l.indices[:l.n], nil
}

// CreateVM makes an empty virtual machine.
func (s *System) CreateVM() (*VM, error) {
	fd, err := ioctlValue(s.fd, kvmCreateVM, 0)
	if err != nil {
		return nil, err
	}
	return &VM{sys: s, fd: fd, slots: map[uint32]uint64{}, resample: map[uint32]int{}}, nil
}
