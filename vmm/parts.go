package vmm

import (
	"baton/devices"
	"baton/devices/pci"
	"baton/devices/virtio/blk"
	"baton/devices/virtio/net"
	"baton/migrate"
)

// staters are all parts of the machine that have a state and move with the guest, in the order in which it is loaded:
// time first, for the timers of the LAPICs count by it, then the vCPUs, who get the interrupts
// that the devices raise when they are loaded.
func (m *Machine) staters() []devices.Stater {
	list := []devices.Stater{&clock{m}}
	for _, c := range m.vcpus {
		list = append(list, vcpuState{c})
	}
	list = append(list, m.ioapic, m.pm, m.rtc)
	if m.serial != nil {
		list = append(list, m.serial)
	}
	for _, f := range m.pci.Staters() {
		if fn, ok := f.(pci.Function); !ok || !m.isPrimary(fn) {
			list = append(list, f)
		}
	}
	return list
}

// quiescers are those that do something by themselves, in the order in which they go on. They
// stop in the reverse order.
func (m *Machine) quiescers() (list []devices.Quiescer) {
	list = append(list, m.irq)
	for _, s := range m.staters() {
		if q, ok := s.(devices.Quiescer); ok {
			list = append(list, q)
		}
	}
	return list
}

// dirtySources are all that write to guest memory: the guest itself, baton, and the kernel's
// virtio-net.
func (m *Machine) dirtySources() []migrate.DirtySource {
	list := []migrate.DirtySource{newKVMLog(m.kvm, m.mem), ownWrites{m.mem}}
	if m.ring != nil {
		list[0] = m.ring
	}
	var nets []*net.Net
	for _, d := range m.devices {
		if n, ok := d.model.(*net.Net); ok {
			nets = append(nets, n)
		}
	}
	return append(list, &vhostLog{mem: m.mem, nets: nets})
}

// lockables are the disks, which another machine may want.
func (m *Machine) lockables() (list []*blk.Disk) {
	for _, d := range m.devices {
		if b, ok := d.model.(*blk.Device); ok {
			list = append(list, b.Disk())
		}
	}
	return list
}
