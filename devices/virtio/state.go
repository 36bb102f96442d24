package virtio

import (
	"fmt"

	"baton/devices"
	"baton/devices/pci"
)

// The section of a virtio-pci function: configuration space and MSI-X, the registers of the
// transport, and the device's own part.
type pciState struct {
	Config         pci.ConfigState `cbor:"1,keyasint"`
	Status         uint8           `cbor:"2,keyasint"`
	ISR            uint8           `cbor:"3,keyasint"`
	Generation     uint8           `cbor:"4,keyasint"`
	ConfigVector   uint16          `cbor:"5,keyasint"`
	DeviceSelect   uint32          `cbor:"6,keyasint"`
	DriverSelect   uint32          `cbor:"7,keyasint"`
	DriverFeatures uint64          `cbor:"8,keyasint"`
	QueueSelect    uint16          `cbor:"9,keyasint"`
	Active         bool            `cbor:"10,keyasint"`
	Queues         []queueState    `cbor:"11,keyasint"`
	Device         []byte          `cbor:"12,keyasint,omitempty"`
}

type queueState struct {
	Size    uint16 `cbor:"1,keyasint"`
	Desc    uint64 `cbor:"2,keyasint"`
	Avail   uint64 `cbor:"3,keyasint"`
	Used    uint64 `cbor:"4,keyasint"`
	Enabled bool   `cbor:"5,keyasint"`
	Vector  uint16 `cbor:"6,keyasint"`
	Next    uint16 `cbor:"7,keyasint"` // free-running index of the chain to take next
}

var typeNames = map[uint32]string{
	TypeNet:     "virtio-net-pci",
	TypeBlock:   "virtio-blk-pci",
	TypeConsole: "virtio-serial-pci",
	TypeEntropy: "virtio-rng-pci",
}

// StateInfo implements [devices.Stater].
func (p *PCI) StateInfo() devices.StateInfo { return p.config.StateInfo(typeNames[p.dev.Type()]) }

// Quiesce implements [devices.Quiescer].
func (p *PCI) Quiesce() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.paused {
		return nil
	}
	p.paused = true
	if p.active {
		p.dev.Pause()
	}
	return nil
}

// Unquiesce implements [devices.Quiescer]. A device that cannot go on needs a reset by its
// driver. An interrupt or a kick may have been on its way when the other side stopped:
// all are raised once more, for a spurious one does no harm.
func (p *PCI) Unquiesce() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.paused {
		return nil
	}
	p.paused = false
	if !p.active {
		return nil
	}
	if err := p.dev.Resume(p.activation()); err != nil {
		err = fmt.Errorf("resume: %w", err)
		p.failed(err)
		return fmt.Errorf("device %s: %w", p.o.ID, err)
	}
	p.bells.setActive(true)
	for i, q := range p.queues {
		if q.Enabled {
			q.Kick.Signal()
			p.interrupt(&p.vectors[i], 0)
		}
	}
	p.interrupt(&p.configVector, 0)
	return nil
}

// SaveState implements [devices.Stater].
func (p *PCI) SaveState() ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := pciState{
		Config:         p.config.SaveState(),
		Status:         uint8(p.status.Load()),
		ISR:            uint8(p.isr.Load()),
		Generation:     uint8(p.generation.Load()),
		ConfigVector:   uint16(p.configVector.Load()),
		DeviceSelect:   p.deviceSelect,
		DriverSelect:   p.driverSelect,
		DriverFeatures: p.driverFeatures,
		QueueSelect:    p.queueSelect,
		Active:         p.active,
	}
	for i, q := range p.queues {
		v := queueState{q.Size, q.Desc, q.Avail, q.Used, q.Enabled, uint16(p.vectors[i].Load()), 0}
		if p.active && q.Enabled {
			v.Next = q.Position()
		}
		s.Queues = append(s.Queues, v)
	}
	var err error
	if s.Device, err = p.dev.SaveState(); err != nil {
		return nil, fmt.Errorf("save %s: %w", p.StateInfo(), err)
	}
	return devices.EncodeState(s)
}

// LoadState implements [devices.Stater]. Guest memory is loaded before, for the rings are
// looked at.
func (p *PCI) LoadState(version uint16, data []byte) error {
	info := p.StateInfo()
	var s pciState
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.check(info, &s); err != nil {
		return err
	}
	p.deviceSelect, p.driverSelect, p.driverFeatures, p.queueSelect = s.DeviceSelect, s.DriverSelect, s.DriverFeatures, s.QueueSelect
	p.isr.Store(uint32(s.ISR))
	p.generation.Store(uint32(s.Generation))
	p.configVector.Store(uint32(s.ConfigVector))
	for i, v := range s.Queues {
		q := p.queues[i]
		q.Size, q.Desc, q.Avail, q.Used, q.Enabled = v.Size, v.Desc, v.Avail, v.Used, v.Enabled
		p.vectors[i].Store(uint32(v.Vector))
	}
	if err := p.dev.LoadState(info, version, s.Device); err != nil {
		return err
	}
	if err := p.config.LoadState(info, s.Config); err != nil {
		return err
	}
	if s.Active {
		if err := p.startQueues(); err != nil {
			return info.BadField("Queues", "%w", err)
		}
		for i, v := range s.Queues {
			if !v.Enabled {
				continue
			}
			q := p.queues[i]
			q.Seek(v.Next)
			if n := q.inFlight(); n > q.Size {
				return info.BadField("Queues", "queue %d: Next: %d requests in flight, the size is %d", i, n, q.Size)
			}
		}
	}
	p.active = s.Active
	p.status.Store(uint32(s.Status))
	return nil
}

// check looks at what does not depend on other parts of the machine.
func (p *PCI) check(info devices.StateInfo, s *pciState) error {
	switch {
	case !p.paused || p.active:
		return info.BadField("", "the device is in use")
	case s.Status&^(statusDriverBits|statusNeedsReset) != 0:
		return info.BadField("Status", "%#x is none", s.Status)
	case s.Active && s.Status&statusDriverOK == 0:
		return info.BadField("Active", "without DRIVER_OK")
	case s.Status&statusFeaturesOK != 0 && s.DriverFeatures&^p.features() != 0:
		return info.BadField("DriverFeatures", "the driver uses %#x, which is not offered here\n"+
			"start the target with the same properties, and on a host that has what they need", s.DriverFeatures&^p.features())
	case p.vector(uint32(s.ConfigVector)) != uint32(s.ConfigVector):
		return info.BadField("ConfigVector", "there is no vector %d", s.ConfigVector)
	case len(s.Queues) != len(p.queues):
		return info.BadField("Queues", "%d; here there are %d", len(s.Queues), len(p.queues))
	}
	for i, q := range s.Queues {
		switch {
		case q.Size == 0 || q.Size&(q.Size-1) != 0 || q.Size > p.sizes[i]:
			return info.BadField("Queues", "queue %d: Size: %d is no power of two up to %d", i, q.Size, p.sizes[i])
		case p.vector(uint32(q.Vector)) != uint32(q.Vector):
			return info.BadField("Queues", "queue %d: there is no vector %d", i, q.Vector)
		}
	}
	return nil
}

// Stateless is the part of Device that has no state of its own to save.
type Stateless struct{}

// SaveState implements [Device].
func (Stateless) SaveState() ([]byte, error) { return nil, nil }

// LoadState implements [Device].
func (Stateless) LoadState(info devices.StateInfo, _ uint16, data []byte) error {
	if len(data) != 0 {
		return info.BadField("Device", "%d bytes, but this device has no state of its own", len(data))
	}
	return nil
}
