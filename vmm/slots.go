package vmm

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"baton/boot/acpi"
	"baton/devices/pci"
	"baton/vmm/qmp"
)

// unplugging is what waits for a device to leave its slot.
type unplugging struct {
	mode  pci.UnplugMode
	timer *time.Timer
	done  []func(error)
	del   bool // device_del waits
}

// slotHost is what the slots need of the machine.
type slotHost struct{ *Machine }

// SlotEvent implements [pci.SlotHost].
func (h slotHost) SlotEvent() { h.pm.SlotEvent() }

// Drain implements [pci.SlotHost].
func (h slotHost) Drain(done func()) { h.post(func() { h.flushVCPUs(); done() }) }

// Ejected implements [pci.SlotHost]. It is called by what Drain calls, in the main loop.
func (h slotHost) Ejected(_ *pci.Slot, f pci.Function) {
	i := slices.IndexFunc(h.devices, func(d *device) bool { return d.fn == f })
	if i < 0 {
		return
	}
	d := h.devices[i]
	if p := h.pairWith(d.ID); p != nil && p.device == d && d.unplug == nil {
		p.ejected()
		return
	}
	if d.unplug == nil { // the guest's own idea
		h.deleteDevice(d)
		return
	}
	d.finishUnplug(nil)
}

// Refused implements [pci.SlotHost].
func (h slotHost) Refused(s *pci.Slot, why string) {
	f := s.Occupant()
	h.post(func() {
		for _, d := range h.devices {
			if d.fn == f && d.unplug != nil {
				d.finishUnplug(h.slotError(d, why))
			}
		}
	})
}

// Changed implements [pci.SlotHost].
func (h slotHost) Changed(s *pci.Slot, state pci.SlotState) {
	h.post(func() {
		for _, p := range h.pairs {
			if p.primary != nil && p.primary.Bus == s.Port().Secondary().ID {
				p.slotChanged(state)
			}
		}
	})
}

// flushVCPUs returns when no vCPU is in an access that it began before.
func (m *Machine) flushVCPUs() {
	running := m.State() == StateRunning
	m.stopVCPUs()
	if running {
		m.goOn()
	}
}

// goOn lets vCPUs go on that were stopped for a moment.
func (m *Machine) goOn() {
	if len(m.requests) == 0 { // a request stops the guest, and is served next
		m.gate.open()
	}
}

// slotOf is the slot that a device is in, or was in; nil if it is on the root bus.
func (m *Machine) slotOf(d *Device) *pci.Slot {
	for _, p := range m.pci.Ports() {
		if p.Secondary().ID == d.Bus {
			return p.Slot()
		}
	}
	return nil
}

// acpiPorts are the root ports as the ACPI tables describe them.
func (m *Machine) acpiPorts() (ports []acpi.RootPort) {
	for _, p := range m.pci.Ports() {
		_, slot := p.Number()
		ports = append(ports, acpi.RootPort{Device: uint8(p.Address().Device()), Function: uint8(p.Address().Function()), Slot: slot})
	}
	return ports
}

// slotError is why a device is still there, with what its slot was then.
type slotError struct {
	error
	state pci.SlotState
}

func (m *Machine) slotError(d *device, why string) error {
	state := m.slotOf(d.Device).State()
	return slotError{fmt.Errorf("unplug %s: %s\nthe slot of %s is %s", d.Device, why, d.Bus, state), state}
}

// freePort is the first root port whose slot takes a device.
func (m *Machine) freePort() (*pci.RootPort, error) {
	var taken []string
	for _, p := range m.pci.Ports() {
		id, s := p.Secondary().ID, p.Slot().State()
		switch d := find(m.cfg.Devices, func(d *Device) bool { return d.Bus == id }); {
		case d != nil:
			taken = append(taken, fmt.Sprintf("%s: %s (%s)", id, d, s)) // a hidden primary keeps an empty one
		case s == pci.SlotEmpty:
			return p, nil
		default:
			taken = append(taken, fmt.Sprintf("%s: %s", id, s))
		}
	}
	if taken == nil {
		return nil, errors.New("there is no slot to plug into\ngive the machine a -device pcie-root-port,id=ID when it starts")
	}
	return nil, fmt.Errorf("every slot is taken: %s\nunplug one of these, or start with more root ports", strings.Join(taken, ", "))
}

// complete is the configuration with d in addition, whose bus, address and MAC are filled in.
func (m *Machine) complete(d Device) (cfg *Config, index int, err error) {
	if d.Bus == "" {
		port, err := m.freePort()
		if err != nil {
			return nil, 0, fmt.Errorf("%s: %w", &d, err)
		}
		d.Bus = port.Secondary().ID
	}
	if slot := m.slotOf(&d); slot == nil {
		return nil, 0, fmt.Errorf("%s: bus %s has no slots that can be plugged into", &d, d.Bus)
	} else if d.Addr == "" {
		d.Addr = "00.0"
	} else if d.Addr != "00.0" {
		return nil, 0, fmt.Errorf("%s: addr=%s: a slot takes a device at 00.0", &d, d.Addr)
	}
	c := *m.cfg
	c.Devices = append(slices.Clone(c.Devices), d)
	c.Complete()
	index = slices.IndexFunc(c.Devices, func(o Device) bool { return o.Bus == d.Bus && o.Addr == d.Addr && o.Driver == d.Driver && o.ID == d.ID })
	return &c, index, c.Validate()
}

// plugDevice makes a device and plugs it into the slot of d.Bus, or into the first free one.
// When it fails, nothing has changed.
func (m *Machine) plugDevice(d Device) error {
	cfg, index, err := m.complete(d)
	if err != nil {
		return err
	}
	own := cfg.Devices[index]
	if hidden, err := m.addPrimary(&own); hidden || err != nil {
		if err == nil {
			m.cfg.Devices = cfg.Devices
		}
		return err
	}
	b := builder{Machine: m, ctx: m.runs}
	dev, err := b.make(&own)
	if err != nil {
		return err
	}
	// A device of the host takes its time, in which others may have come and gone.
	if cfg, _, err = m.complete(own); err == nil {
		err = m.plugIn(dev)
	}
	if err != nil {
		return errors.Join(err, dev.fn.Close())
	}
	m.devices, m.cfg.Devices = append(m.devices, dev), cfg.Devices
	if dev.isStandby() {
		m.addStandby(dev.Device)
		m.attachStandby(dev)
	}
	return m.join(dev.fn)
}

// plugIn plugs a device that there is into the slot of its bus.
func (m *Machine) plugIn(d *device) error {
	slot := m.slotOf(d.Device)
	if err := slot.Plug(d.fn); err != nil {
		return err
	}
	if s := m.State(); s == StatePrelaunch || s == StateInMigrate {
		slot.Settle()
	}
	return nil
}

// unplug has a device leave its slot: by the guest's leave, if it is given within the deadline,
// or by surprise. Done is called in the main loop with the outcome; if it is nil, the device is
// off its bus and was reset, and no vCPU can reach it, but it is open and in the list of
// devices, for deleteDevice or plugIn. A deadline that ends while the guest does not run is
// extended. Whoever asks while the device is leaving waits as well.
func (m *Machine) unplug(id string, mode pci.UnplugMode, deadline time.Duration, done func(error)) error {
	d := m.qomDevice(id)
	if d == nil {
		return qmp.NoDevice(id)
	}
	slot := m.slotOf(d.Device)
	if slot == nil {
		return qmp.Errorf("Bus '%s' does not support hotplugging", d.Bus)
	}
	if d.unplug != nil && (mode == pci.Cooperative || d.unplug.mode == pci.Surprise) {
		d.unplug.done = append(d.unplug.done, done)
		return nil
	}
	if slot.State() != pci.SlotDraining || slot.Occupant() != nil { // else the guest was faster
		if err := slot.RequestUnplug(mode); err != nil {
			return err
		}
	}
	u := d.unplug
	if u == nil {
		u = &unplugging{}
		d.unplug = u
	}
	u.mode, u.done = mode, append(u.done, done)
	if m.State() == StatePrelaunch {
		slot.Settle()
	}
	u.stop()
	if mode == pci.Cooperative {
		m.expectUnplug(d, u, deadline)
	}
	return nil
}

// expectUnplug ends the wait for a guest's leave at the deadline.
func (m *Machine) expectUnplug(d *device, u *unplugging, deadline time.Duration) {
	u.timer = time.AfterFunc(deadline, func() {
		m.post(func() {
			switch slot := m.slotOf(d.Device); {
			case d.unplug != u || u.mode == pci.Surprise || slot.State() == pci.SlotDraining:
			case m.State() != StateRunning:
				m.expectUnplug(d, u, deadline)
			default:
				err := m.slotError(d, fmt.Sprintf("the guest did not let go of it within %v", deadline))
				slot.Withdraw()
				d.finishUnplug(err)
			}
		})
	})
}

func (u *unplugging) stop() {
	if u.timer != nil {
		u.timer.Stop()
	}
}

// finishUnplug tells those who wait.
func (d *device) finishUnplug(err error) {
	u := d.unplug
	d.unplug = nil
	u.stop()
	for _, done := range u.done {
		done(err)
	}
}

// deleteDevice gives back all that a device holds, which has left its slot, and then says so.
func (m *Machine) deleteDevice(d *device) {
	m.leavePair(d.ID)
	m.dropDevice(d.fn)
	m.closing.Go(func() { // a device of the host may take its time
		err := d.fn.Close()
		m.post(func() {
			if err != nil {
				m.log.Warn(fmt.Sprintf("close %s: %v", d.Device, err))
			}
			m.deleted(d.Device)
		})
	})
}

// deleted is the end of a device.
func (m *Machine) deleted(d *Device) {
	m.cfg.Devices = slices.DeleteFunc(slices.Clone(m.cfg.Devices), func(o Device) bool { return o.Bus == d.Bus && o.Addr == d.Addr })
	m.events.Publish("DEVICE_DELETED", deviceEvent{d.ID, d.path()})
}

func inProcess(d *device) error {
	return qmp.Errorf("Device %s is already in the process of unplug", d.ID)
}

// path is where QEMU's object model has the device.
func (d *Device) path() string {
	if d.ID == "" {
		return "/machine/peripheral-anon/" + d.netName()
	}
	return peripheral + "/" + d.ID
}
