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
	file := int32(fd)
	var pin runtime.Pinner // the kernel follows the pointer inside the argument
	defer pin.Unpin()
	pin.Pin(&file)
	_, err := ioctl(v.fd, kvmSetDeviceAttr, &deviceAttr{group: devVFIOFile, attr: attr, addr: &file})
	return err
}

// Close drops the handle.
func (v *VFIO) Close() error { return unix.Close(v.fd) }
