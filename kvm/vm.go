package kvm

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// VM is one virtual machine. What has to be enabled before the first vCPU: the split
// irqchip, TSS and identity map addresses, the dirty ring.
type VM struct {
	sys *System
	fd  int

	memMu    sync.Mutex
	slots    map[uint32]uint64 // pages per memory slot
	ringSize int               // bytes per vCPU, 0: no ring

	irqMu    sync.Mutex
	routes   []Route
	resample map[uint32]int // eventfds by GSI
}

// Close drops the handle. The kernel frees the VM when its vCPUs and the devices that
// hold it are closed as well.
func (vm *VM) Close() error { return unix.Close(vm.fd) }

// CheckExtension is like System.CheckExtension, where the answer may differ per VM.
func (vm *VM) CheckExtension(c Cap) int { return checkExtension(vm.fd, c) }

func (vm *VM) enableCap(c Cap, arg uint64) error {
	_, err := ioctl(vm.fd, kvmEnableCap, &enableCap{cap: c, args: [4]uint64{arg}})
	if err != nil {
		return fmt.Errorf("enable %s: %w", c, err)
	}
	return nil
}

// SetTSSAddr reserves three pages of guest-physical memory below 4 GiB for Intel's real
// mode emulation: api.rst, KVM_SET_TSS_ADDR.
func (vm *VM) SetTSSAddr(gpa uint32) error {
	_, err := ioctlValue(vm.fd, kvmSetTSSAddr, uintptr(gpa))
	return err
}

// SetIdentityMapAddr reserves one page for the same purpose.
func (vm *VM) SetIdentityMapAddr(gpa uint64) error {
	_, err := ioctl(vm.fd, kvmSetIdentityMapAddr, &gpa)
	return err
}

// Flags of ClockData, KVM_CLOCK_*.
const (
	ClockRealtime = 1 << 2 // Realtime is valid (Linux 5.16)
	ClockHostTSC  = 1 << 3 // HostTSC is valid (Linux 5.16)
)

// Clock reads kvm-clock, together with the host's real time and TSC of the same moment
// where Flags says so.
func (vm *VM) Clock() (ClockData, error) {
	var c ClockData
	_, err := ioctl(vm.fd, kvmGetClock, &c)
	return c, err
}

// SetClock sets kvm-clock to c.Clock. With ClockRealtime in c.Flags the kernel adds the
// real time that passed since c.Realtime; the other flags are ignored.
func (vm *VM) SetClock(c ClockData) error {
	c.Flags &= ClockRealtime
	_, err := ioctl(vm.fd, kvmSetClock, &c)
	return err
}
