// Package virtio is the part of virtio that all devices share: split virtqueues and the
// virtio-pci transport. Sections cited are those of the Virtual I/O Device specification,
// version 1.2. The models (blk, console, net, rng) are packages of their own below it.
//
//	guest driver ─ config, BAR ──> PCI (transport) ── Activate, Reset ──> Device (model)
//	      │                                                                 │
//	      ├─ rings in guest RAM ──> Queue ── Pop: Chain ──> Worker ─────────┤
//	      └─ doorbell (Kick) ─────────^                                     v
//	                     Call (MSI-X vector) <── Queue ── Push, Notify ── backend
//
// A guest that breaks the rules stops its own device, which then has the status bit
// DEVICE_NEEDS_RESET; nothing else is affected.
package virtio

import (
	"baton/devices"
	"baton/kvm/guestmem"
)

// Device types: section 5.
const (
	TypeNet     = 1
	TypeBlock   = 2
	TypeConsole = 3
	TypeEntropy = 4
)

// Feature bits of the core: section 6.
const (
	FeatureIndirectDesc = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx     = 1 << 29 // VIRTIO_F_EVENT_IDX
	FeatureVersion1     = 1 << 32 // VIRTIO_F_VERSION_1

	// CoreFeatures is what Queue can do. Every device offers it, unless its backend reads the
	// rings itself and can do less; FeatureVersion1 is a must.
	CoreFeatures = FeatureIndirectDesc | FeatureEventIdx | FeatureVersion1
)

// Device is a model: what kind of device the guest sees, whatever the transport.
//
// All but ReadConfig are never called at the same time. ReadConfig may be called at any time, from
// any vCPU's thread. Nothing in the configuration space of a device here is the driver's to write.
type Device interface {
	// Type is the device type of section 5.
	Type() uint32
	// Features are the feature bits that the driver may choose from, CoreFeatures included.
	Features() uint64
	// QueueSizes is the greatest size of each queue, a power of two up to MaxQueueSize.
	QueueSizes() []uint16
	// ReadConfig fills p from the device configuration space (2.5) at off; what lies
	// beyond its end is zero. Any width may come.
	ReadConfig(off uint64, p []byte)
	// Activate begins to serve the queues. It is called once between two resets. After an
	// error the device is reset before it is activated again.
	Activate(Activation) error
	// Reset ends what Activate began: when it returns nothing of the device touches guest
	// memory or signals the guest any more. Resetting a device that is not active is harmless.
	Reset()
	// Pause ends what Activate or Resume began as Reset does, but what the driver has set
	// stays as it is, and the queues stand where Resume goes on.
	Pause()
	// Resume goes on, after Pause or LoadState. An error leaves the device paused.
	Resume(Activation) error
	// SaveState is what the device knows beside its configuration and its queues, encoded by
	// devices.EncodeState; nil if there is nothing. It is paused or not active.
	SaveState() ([]byte, error)
	// LoadState takes it over into a device that has been reset. Info is for errors; data is not
	// to be trusted.
	LoadState(info devices.StateInfo, version uint16, data []byte) error
	// Close resets the device and gives back what it holds of the host.
	Close() error
}

// Activation is all that a device gets when the driver has set DRIVER_OK (3.1.1).
type Activation struct {
	Mem *guestmem.Memory
	// Features are the negotiated bits, those of the core included.
	Features uint64
	// Queues are all of the device's queues by index. Those that the driver did not set up
	// have Enabled false.
	Queues []*Queue
	// ConfigChanged tells the driver that the configuration space has changed (2.5.1). It may
	// be called from any goroutine until Reset returns.
	ConfigChanged func()
	// Failed sets DEVICE_NEEDS_RESET (2.1.2) and tells the driver. The error is logged.
	// It may be called from any goroutine until Reset returns.
	Failed func(error)
}

// CopyConfig is ReadConfig of a device whose configuration space is the bytes of config.
func CopyConfig(p, config []byte, off uint64) {
	n := 0
	if off < uint64(len(config)) {
		n = copy(p, config[off:])
	}
	clear(p[n:])
}
