package kvm

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// VFIO is KVM's side of device assignment (virt/kvm/devices/vfio.rst): it is told which VFIO
// groups belong to the VM, as their devices' DMA may or may not snoop caches.
type VFIO struct{ fd int }

// CreateVFIO makes the VM's one VFIO device, which it holds for ever.
func (vm *VM) CreateVFIO() (*VFIO, error) {
	a := createDevice{kind: devTypeVFIO}
	if _, err := ioctl(vm.fd, kvmCreateDevice, &a); err != nil {
		return nil, err
	}
	return &VFIO{int(a.fd)}, nil
}

// AddFile adds an open VFIO group.
func (v *VFIO) AddFile(fd int) error { return v.set(devVFIOFileAdd, fd) }

// RemoveFile removes one that was added.
func (v *VFIO) RemoveFile(fd int) error { return v.set(devVFIOFileDel, fd) }

func (v *VFIO) set(attr uint64, fd int) error {
	file := uint64(fd) // the kernel reads an int32, its low half
	return attribute(v.fd, kvmSetDeviceAttr, devVFIOFile, attr, &file)
}

// attribute reads or writes an attribute of a vCPU or a device.
func attribute(fd int, r request, group uint32, attr uint64, value *uint64) error {
	var pin runtime.Pinner // the kernel follows the pointer inside the argument
	defer pin.Unpin()
	pin.Pin(value)
	_, err := ioctl(fd, r, &deviceAttr{group: group, attr: attr, addr: value})
	return err
}

// Close drops the handle.
func (v *VFIO) Close() error { return unix.Close(v.fd) }
