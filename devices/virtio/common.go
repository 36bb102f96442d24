package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// struct virtio_pci_common_cfg: 4.1.4.3.
const (
	regDeviceFeatureSelect = 0x00
	regDeviceFeature       = 0x04
	regDriverFeatureSelect = 0x08
	regDriverFeature       = 0x0c
	regConfigVector        = 0x10
	regNumQueues           = 0x12
	regDeviceStatus        = 0x14
	regConfigGeneration    = 0x15
	regQueueSelect         = 0x16
	regQueueSize           = 0x18
	regQueueVector         = 0x1a
	regQueueEnable         = 0x1c
	regQueueNotifyOff      = 0x1e
	regQueueDesc           = 0x20
	regQueueDriver         = 0x28
	regQueueDevice         = 0x30
	commonSize             = 0x38
)

// Device status: 2.1.
const (
	statusAcknowledge = 1 << 0
	statusDriver      = 1 << 1
	statusDriverOK    = 1 << 2
	statusFeaturesOK  = 1 << 3
	statusNeedsReset  = 1 << 6
	statusFailed      = 1 << 7
	statusDriverBits  = statusAcknowledge | statusDriver | statusDriverOK | statusFeaturesOK | statusFailed
)

// width is the only width in which the register at off may be accessed, 0 where none
// begins: 4.1.3.1.
func width(off uint64) int {
	switch {
	case off == regDeviceStatus || off == regConfigGeneration:
		return 1
	case off >= regConfigVector && off < regQueueDesc && off%2 == 0:
		return 2
	case off < commonSize && off%4 == 0: // 64-bit registers are accessed as halves
		return 4
	}
	return 0
}

func (p *PCI) readCommon(off uint64, b []byte) {
	if len(b) != width(off) {
		return
	}
	v := p.common(off)
	for i := range b {
		b[i] = byte(v >> (8 * i))
	}
}

func (p *PCI) common(off uint64) uint32 {
	switch off { // without the lock: a reset that takes long is polled
	case regDeviceStatus:
		return p.status.Load()
	case regConfigGeneration:
		return p.generation.Load()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch off {
	case regDeviceFeatureSelect:
		return p.deviceSelect
	case regDeviceFeature:
		return half(p.features(), p.deviceSelect)
	case regDriverFeatureSelect:
		return p.driverSelect
	case regDriverFeature:
		return half(p.driverFeatures, p.driverSelect)
	case regConfigVector:
		return p.configVector.Load()
	case regNumQueues:
		return uint32(len(p.queues))
	case regQueueSelect:
		return uint32(p.queueSelect)
	}
	if int(p.queueSelect) >= len(p.queues) {
		if off == regQueueVector {
			return noVector
		}
		return 0 // a size of zero says that there is no such queue
	}
	q := p.queues[p.queueSelect]
	switch off {
	case regQueueSize:
		return uint32(q.Size)
	case regQueueVector:
		return p.vectors[q.Index].Load()
	case regQueueEnable:
		if q.Enabled {
			return 1
		}
		return 0
	case regQueueNotifyOff:
		return uint32(q.Index)
	}
	return half(*area(q, off), uint32(off/4)&1)
}

func (p *PCI) writeCommon(off uint64, b []byte) {
	if len(b) != width(off) {
		return
	}
	var word [4]byte
	copy(word[:], b)
	v := binary.LittleEndian.Uint32(word[:])
	p.mu.Lock()
	defer p.mu.Unlock()
	switch off {
	case regDeviceFeatureSelect:
		p.deviceSelect = v
	case regDriverFeatureSelect:
		p.driverSelect = v
	case regDriverFeature:
		if p.status.Load()&statusFeaturesOK == 0 {
			setHalf(&p.driverFeatures, p.driverSelect, v)
		}
	case regConfigVector:
		p.configVector.Store(p.vector(v))
	case regDeviceStatus:
		p.setStatus(v)
	case regQueueSelect:
		p.queueSelect = uint16(v)
	}
	if int(p.queueSelect) >= len(p.queues) {
		return
	}
	q := p.queues[p.queueSelect]
	if off == regQueueVector {
		p.vectors[q.Index].Store(p.vector(v))
	}
	// What the device works with stays as it is until the reset.
	if q.Enabled || p.active {
		return
	}
	switch off {
	case regQueueSize:
		if v != 0 && v&(v-1) == 0 && v <= uint32(p.sizes[q.Index]) {
			q.Size = uint16(v)
		}
	case regQueueEnable:
		q.Enabled = v == 1
	default:
		if off >= regQueueDesc {
			setHalf(area(q, off), uint32(off/4)&1, v)
		}
	}
}

// area is the address register of q that off lies in.
func area(q *Queue, off uint64) *uint64 {
	switch off &^ 7 {
	case regQueueDesc:
		return &q.Desc
	case regQueueDriver:
		return &q.Avail
	}
	return &q.Used
}

// features are the bits that the driver may choose from.
func (p *PCI) features() uint64 { return p.dev.Features() &^ p.o.FeaturesOff }

// half is bits 0 to 31 (0) or 32 to 63 (1) of v.
func half(v uint64, which uint32) uint32 {
	if which > 1 {
		return 0
	}
	return uint32(v >> (32 * which))
}

func setHalf(v *uint64, which, to uint32) {
	if which <= 1 {
		*v = *v&^(0xffffffff<<(32*which)) | uint64(to)<<(32*which)
	}
}

// vector is what a vector register reads after v was written: a vector that does not
// exist is refused by noVector (4.1.5.1.2.1).
func (p *PCI) vector(v uint32) uint32 {
	if v > uint32(len(p.queues)) {
		return noVector
	}
	return v
}

// setStatus is the driver's write to device_status: 2.1, 3.1.1. Bits are only ever added,
// until zero resets the device.
func (p *PCI) setStatus(v uint32) {
	if v == 0 {
		p.reset()
		return
	}
	was := p.status.Load()
	v &= statusDriverBits
	f := p.driverFeatures
	if f&^p.features() != 0 || f&FeatureVersion1 == 0 {
		v &^= statusFeaturesOK // the driver reads back that its choice is refused
	}
	now := p.status.Or(v) | v
	if v&^was&statusDriverOK == 0 {
		return
	}
	if now&statusFeaturesOK == 0 {
		p.failed(errors.New("DRIVER_OK without FEATURES_OK"))
		return
	}
	p.activate()
}

func (p *PCI) activate() {
	if err := p.startQueues(); err != nil {
		p.failed(err)
		return
	}
	p.active = true
	if err := p.dev.Activate(p.activation()); err != nil {
		p.failed(fmt.Errorf("activate: %w", err))
		return
	}
	p.bells.setActive(true)
}

func (p *PCI) startQueues() error {
	for _, q := range p.queues {
		if !q.Enabled {
			continue
		}
		if err := q.Start(p.o.Mem, p.driverFeatures); err != nil {
			return err
		}
		q.Call = nil
		if v := p.vectors[q.Index].Load(); v != noVector {
			q.Call = p.msix.Vector(int(v))
		}
	}
	return nil
}

func (p *PCI) activation() Activation {
	return Activation{
		Mem:           p.o.Mem,
		Features:      p.driverFeatures,
		Queues:        p.queues,
		ConfigChanged: p.configChanged,
		Failed:        p.failed,
	}
}

func (p *PCI) configChanged() {
	p.generation.Add(1)
	p.interrupt(&p.configVector, isrConfig)
}

// failed runs without the lock: a reset that waits for its caller may hold it.
func (p *PCI) failed(err error) {
	if p.status.Or(statusNeedsReset)&statusNeedsReset == 0 {
		p.o.Log.Warn("virtio device needs a reset", "device", p.o.ID, "err", err)
		p.configChanged()
	}
}

// reset is total: after it the device is as it was when it was made.
func (p *PCI) reset() {
	p.bells.setActive(false)
	p.dev.Reset()
	p.clear()
}

// clear gives all registers their initial values, the status last: the driver waits for it
// to become zero (4.1.4.3.2).
func (p *PCI) clear() {
	p.active = false
	p.deviceSelect, p.driverSelect, p.driverFeatures, p.queueSelect = 0, 0, 0, 0
	for i, q := range p.queues {
		q.Size, q.Desc, q.Avail, q.Used, q.Enabled, q.Call = p.sizes[i], 0, 0, 0, false, nil
		p.vectors[i].Store(noVector)
	}
	p.configVector.Store(noVector)
	p.isr.Store(0)
	p.status.Store(0)
}
