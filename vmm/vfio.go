package vmm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"baton/boot/acpi"
	"baton/devices"
	"baton/devices/pci"
	"baton/devices/vfio"
	"baton/kvm"
	"baton/kvm/guestmem"
)

// memorySlots hands out the KVM memory slots above those of RAM. It implements vfio.Slots.
type memorySlots struct {
	vm    *kvm.VM
	first uint32

	mu   sync.Mutex
	used []devices.Range // from first on; a free one has no size
}

func (s *memorySlots) Map(gpa uint64, host []byte) (uint32, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := 0
	for i < len(s.used) && s.used[i].Size != 0 {
		i++
	}
	if i == len(s.used) {
		s.used = append(s.used, devices.Range{})
	}
	slot := s.first + uint32(i)
	if err := s.vm.SetMemory(slot, gpa, host, 0); err != nil {
		return 0, err
	}
	s.used[i] = devices.Range{Base: gpa, Size: uint64(len(host))}
	return slot, nil
}

func (s *memorySlots) Unmap(slot uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used[slot-s.first] = devices.Range{}
	return s.vm.RemoveMemory(slot)
}

// walk visits those that are in use.
func (s *memorySlots) walk(f func(slot uint32, r devices.Range)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, r := range s.used {
		if r.Size != 0 {
			f(s.first+uint32(i), r)
		}
	}
}

// passthrough is what the functions of the host that a guest has share. Its methods may be
// called from any goroutine.
type passthrough struct {
	vm    *kvm.VM
	mem   *guestmem.Memory
	slots memorySlots

	mu        sync.Mutex
	files     *kvm.VFIO
	container *vfio.Container
}

func newPassthrough(vm *kvm.VM, mem *guestmem.Memory) *passthrough {
	return &passthrough{vm: vm, mem: mem, slots: memorySlots{vm: vm, first: uint32(len(mem.Regions()))}}
}

// open opens VFIO with the first device that needs it.
func (p *passthrough) open() (_ *vfio.Container, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.files == nil {
		if p.files, err = p.vm.CreateVFIO(); err != nil {
			return nil, err
		}
	}
	if p.container == nil {
		p.container, err = vfio.NewContainer(p.mem, p.files)
	}
	return p.container, err
}

// Close gives back what is left when all devices are closed.
func (p *passthrough) Close() (err error) {
	if p.container != nil {
		err = p.container.Close()
	}
	if p.files != nil {
		err = errors.Join(err, p.files.Close())
	}
	return err
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

// hostFunction is the address on the host of what a vfio-pci device names, "" for a pool. One
// in sysfs is looked up.
func (d *Device) hostFunction() (bdf string, err error) {
	given := 0
	for _, p := range []string{"host", "sysfsdev", "pool"} {
		if d.Given(p) {
			given++
		}
	}
	switch {
	case given != 1:
		return "", fmt.Errorf("which function of the host? give it one of host=0000:01:10.0, sysfsdev=PATH, and pool=PF for any free VF")
	case d.Given("host"):
		return vfio.ParseHost(d.Text("host"))
	case d.Given("sysfsdev"):
		return vfio.ParseSysfs(d.Text("sysfsdev"))
	}
	return "", nil
}

// freeVFs are the VFs of pool= that nobody on the host is known to use, those first that need
// no binding.
func (d *Device) freeVFs() (bdfs []string, err error) {
	list, err := vfio.VFs(d.Text("pool"))
	if err != nil {
		return nil, err
	}
	var others, used []string
	for _, vf := range list {
		switch {
		case vf.Driver == vfio.Driver:
			bdfs = append(bdfs, vf.BDF)
		case vf.Up:
			used = append(used, fmt.Sprintf("%s is the host's %s", vf.BDF, vf.Link))
		case d.Text("bind") == "auto":
			others = append(others, vf.BDF)
		default:
			used = append(used, fmt.Sprintf("%s has the driver %q (bind=auto would take it)", vf.BDF, vf.Driver))
		}
	}
	if bdfs = append(bdfs, others...); bdfs == nil {
		return nil, fmt.Errorf("pool=%s has no free VF: %s", d.Text("pool"), strings.Join(used, ", "))
	}
	return bdfs, nil
}

// reserve opens the function of the host that a vfio-pci device names: it is reset, has all of
// the guest's RAM for its DMA, and is on no bus. It can be plugged at once, without anything
// that takes long or can fail for the host's reasons; Close gives it back. Opening and closing
// may take seconds, as RAM is pinned and unpinned, so a running machine does both outside its
// main loop; any goroutine may. Ctx calls it off.
func (m *Machine) reserve(ctx context.Context, d *Device) (*vfio.Function, error) {
	fail := func(err error) (*vfio.Function, error) { return nil, fmt.Errorf("%s: %w", d, err) }
	bdf, err := d.hostFunction()
	bdfs := []string{bdf}
	if bdf == "" && err == nil {
		bdfs, err = d.freeVFs()
	}
	if err != nil {
		return fail(err)
	}
	c, err := m.vfio.open()
	if err != nil {
		return fail(err)
	}
	var dev *vfio.Device
	var errs []error
	for _, bdf := range bdfs { // others may be faster
		if dev, err = c.Open(ctx, bdf, d.Text("bind") == "auto"); err == nil || ctx.Err() != nil {
			break
		}
		errs = append(errs, err)
	}
	if err != nil {
		return fail(errors.Join(append(errs, context.Cause(ctx))...))
	}
	return vfio.New(dev, vfio.Options{
		ID:            d.String(),
		Multifunction: d.Bool("multifunction"),
		Slots:         &m.vfio.slots,
		Vectors:       m.irq,
		INTx: func(slot, pin int, ended func()) vfio.Line {
			return m.ioapic.ResampleLine(acpi.INTx(slot, pin), ended)
		},
		ROM: d.Uint("rombar") == 1,
		Log: m.log,
	})
}

// vfioPCI is reserve as a builder.
func (b *builder) vfioPCI(d *Device) (_ pci.Function, err error) {
	var f *vfio.Function
	b.wait(func() { f, err = b.reserve(b.ctx, d) })
	if err != nil {
		return nil, err // not a nil *vfio.Function
	}
	return f, nil
}
