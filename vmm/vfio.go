package vmm

import (
	"fmt"
	"sync"

	"baton/devices/pci"
	"baton/devices/vfio"
	"baton/kvm"
)

// memorySlots hands out the KVM memory slots above those of RAM. It implements vfio.Slots.
type memorySlots struct {
	vm    *kvm.VM
	first uint32

	mu   sync.Mutex
	used []bool // from first on
}

func (s *memorySlots) Map(gpa uint64, host []byte) (uint32, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := 0
	for i < len(s.used) && s.used[i] {
		i++
	}
	if i == len(s.used) {
		s.used = append(s.used, false)
	}
	slot := s.first + uint32(i)
	if err := s.vm.SetMemory(slot, gpa, host, 0); err != nil {
		return 0, err
	}
	s.used[i] = true
	return slot, nil
}

func (s *memorySlots) Unmap(slot uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used[slot-s.first] = false
	return s.vm.RemoveMemory(slot)
}

// passthrough is what the functions of the host that a guest has share.
type passthrough struct {
	container *vfio.Container
	slots     *memorySlots
}

// openPassthrough opens VFIO with the first device that needs it.
func (m *Machine) openPassthrough() (*passthrough, error) {
	if m.vfio != nil {
		return m.vfio, nil
	}
	files, err := m.kvm.CreateVFIO()
	if err != nil {
		return nil, err
	}
	m.onClose(files.Close)
	c, err := vfio.NewContainer(m.mem, files)
	if err != nil {
		return nil, err
	}
	m.onClose(c.Close)
	m.vfio = &passthrough{c, &memorySlots{vm: m.kvm, first: uint32(len(m.mem.Regions()))}}
	return m.vfio, nil
}

// recoverBindings gives back what a baton that was killed has left bound to vfio-pci.
func (m *Machine) recoverBindings() {
	bdfs, err := vfio.Recover()
	for _, bdf := range bdfs {
		m.log.Info(fmt.Sprintf("%s was left bound to %s; gave it back", bdf, vfio.Driver))
	}
	if err != nil {
		m.log.Warn("recover bindings to vfio-pci: " + err.Error())
	}
}

// hostFunction is the address of a vfio-pci device on the host. One in sysfs is looked up.
func (d *Device) hostFunction() (string, error) {
	switch {
	case d.Given("host") == d.Given("sysfsdev"):
		return "", fmt.Errorf("which function of the host? give it host=0000:01:10.0, or sysfsdev=PATH")
	case d.Given("host"):
		return vfio.ParseHost(d.Text("host"))
	}
	return vfio.ParseSysfs(d.Text("sysfsdev"))
}

func (b *builder) vfioPCI(d *Device) (pci.Function, error) {
	fail := func(err error) (pci.Function, error) { return nil, fmt.Errorf("%s: %w", d, err) }
	bdf, err := d.hostFunction()
	if err != nil {
		return fail(err)
	}
	p, err := b.openPassthrough()
	if err != nil {
		return fail(err)
	}
	dev, err := p.container.Open(bdf, d.Text("bind") == "auto")
	if err != nil {
		return fail(err)
	}
	return vfio.New(dev, vfio.Options{
		ID:            d.String(),
		Multifunction: d.Bool("multifunction"),
		Slots:         p.slots,
		Vectors:       b.irq,
		Log:           b.log,
	})
}
