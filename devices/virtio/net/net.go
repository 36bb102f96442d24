// Package net is the virtio network device of VIRTIO 1.2, 5.1. The model answers the control
// queue and keeps configuration space and link state; a Backend moves the frames.
//
//	queues 0, 2, ...  receive  <──┐
//	queues 1, 3, ...  transmit ───┴── Backend: vhost-net in the kernel (no VMM in the path)
//	last queue        control              or userspace, both on a TAP
//	                     └─> Net: MAC, filters, VLANs, queue pairs, offloads
package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"baton/devices/virtio"
)

// Feature bits: 5.1.3.
const (
	featureCSUM          = 1 << 0
	featureGuestCSUM     = 1 << 1
	featureGuestOffloads = 1 << 2 // VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
	featureMTU           = 1 << 3
	featureMAC           = 1 << 5
	featureGuestTSO4     = 1 << 7
	featureGuestTSO6     = 1 << 8
	featureGuestECN      = 1 << 9
	featureGuestUFO      = 1 << 10
	featureHostTSO4      = 1 << 11
	featureHostTSO6      = 1 << 12
	featureHostECN       = 1 << 13
	featureHostUFO       = 1 << 14
	featureMergeRX       = 1 << 15 // VIRTIO_NET_F_MRG_RXBUF
	featureStatus        = 1 << 16
	featureCtrlVQ        = 1 << 17
	featureCtrlRX        = 1 << 18
	featureCtrlVLAN      = 1 << 19
	featureCtrlRXExtra   = 1 << 20
	featureGuestAnnounce = 1 << 21
	featureMQ            = 1 << 22
	featureCtrlMAC       = 1 << 23 // VIRTIO_NET_F_CTRL_MAC_ADDR
	featureGuestUSO4     = 1 << 54 // VIRTIO 1.3, as are the next two
	featureGuestUSO6     = 1 << 55
	featureHostUSO       = 1 << 56
	// FeatureStandby says that the driver pairs the device with a primary of the same MAC.
	FeatureStandby     = 1 << 62
	featureSpeedDuplex = 1 << 63

	guestOffloads = featureGuestCSUM | featureGuestTSO4 | featureGuestTSO6 | featureGuestECN |
		featureGuestUFO | featureGuestUSO4 | featureGuestUSO6
)

// Configuration layout: 5.1.4.
const (
	configMAC    = 0
	configStatus = 6 // le16
	configPairs  = 8
	configMTU    = 10
	configSpeed  = 12 // le32
	configDuplex = 16
	configSize   = 17

	statusLinkUp   = 1
	statusAnnounce = 2
	duplexFull     = 1
)

const (
	defaultQueueSize = 256
	ctrlQueueSize    = 64
)

// MAC is an Ethernet address.
type MAC [6]byte

// Config describes what the guest sees.
type Config struct {
	MAC MAC
	// Queues is the number of queue pairs, 0 for as many as the backend has.
	Queues int
	// QueueSize is the number of entries of receive and transmit queues, a power of two up
	// to virtio.MaxQueueSize, 0 for 256.
	QueueSize uint16
	// MTU tells the driver the longest payload to use, at least 68 bytes; 0 tells nothing.
	MTU uint16
	// Speed is the link speed in Mbit/s that the driver shows, full duplex; 0 tells nothing.
	Speed uint32
	// Standby offers FeatureStandby.
	Standby bool
	// FilterChanged, which may be nil, is called after the driver has changed what RxFilter
	// returns.
	FilterChanged func()
	// Activated, which may be nil, is called with the features that the driver has acked each
	// time it begins to use the device, or goes on to. It must not wait for the device.
	Activated func(features uint64, goesOn bool)
}

// Net is the device. It is a virtio.Device; SetLink, Announce and RxFilter may be called at any time.
type Net struct {
	cfg     Config
	backend Backend
	config  atomic.Pointer[[configSize]byte] // replaced, under mu, as a whole
	ctrl    *virtio.Worker

	mu       sync.Mutex
	up       bool
	announce bool               // the driver is asked to, and has not answered yet
	act      *virtio.Activation // nil: not active
	pairs    int                // that the driver uses
	offloads uint64             // that the driver uses, in feature bits
	running  int                // that the backend serves
	held     []*holder          // of each of those, while frames are held
	waiting  [][]byte           // for the driver once the device is served again
	filter   RxFilter
}

// New returns a device, with the link up, on a backend that it then owns. It fails when the
// backend has fewer queue pairs than are asked for.
func New(c Config, b Backend) (*Net, error) {
	if c.Queues == 0 {
		c.Queues = b.Pairs()
	}
	if c.QueueSize == 0 {
		c.QueueSize = defaultQueueSize
	}
	switch {
	case c.Queues < 0 || c.Queues > b.Pairs():
		return nil, fmt.Errorf("create virtio-net: %d queue pairs, but the host's end has %d\nopen the TAP with queues=%[1]d", c.Queues, b.Pairs())
	case c.QueueSize > virtio.MaxQueueSize || c.QueueSize&(c.QueueSize-1) != 0:
		return nil, fmt.Errorf("create virtio-net: queue size %d is no power of two up to %d", c.QueueSize, virtio.MaxQueueSize)
	case c.MTU != 0 && c.MTU < 68:
		return nil, fmt.Errorf("create virtio-net: MTU %d is below 68", c.MTU)
	}
	n := &Net{cfg: c, backend: b, up: true}
	n.Reset()
	return n, nil
}

// Type is 1: 5.1.1.
func (n *Net) Type() uint32 { return virtio.TypeNet }

// Features are those of the backend and of the control queue, and what Config adds.
func (n *Net) Features() uint64 {
	f := n.backend.Features() | featureMAC | featureStatus | featureCtrlVQ | featureCtrlRX |
		featureCtrlRXExtra | featureCtrlVLAN | featureCtrlMAC | featureGuestOffloads | featureGuestAnnounce
	if n.cfg.Queues > 1 {
		f |= featureMQ
	}
	if n.cfg.MTU != 0 {
		f |= featureMTU
	}
	if n.cfg.Speed != 0 {
		f |= featureSpeedDuplex
	}
	if n.cfg.Standby {
		f |= FeatureStandby
	}
	return f
}

// QueueSizes is receive and transmit of each pair, and control: 5.1.2.
func (n *Net) QueueSizes() []uint16 {
	return append(slices.Repeat([]uint16{n.cfg.QueueSize}, 2*n.cfg.Queues), ctrlQueueSize)
}

// ReadConfig reads struct virtio_net_config: 5.1.4.
func (n *Net) ReadConfig(off uint64, p []byte) { virtio.CopyConfig(p, n.config.Load()[:], off) }

// setConfig renews the configuration space; mu is held.
func (n *Net) setConfig() {
	c := new([configSize]byte)
	copy(c[configMAC:], n.filter.MAC[:])
	if n.up {
		c[configStatus] = statusLinkUp
	}
	if n.announce {
		c[configStatus] |= statusAnnounce
	}
	binary.LittleEndian.PutUint16(c[configPairs:], uint16(n.cfg.Queues))
	binary.LittleEndian.PutUint16(c[configMTU:], n.cfg.MTU)
	binary.LittleEndian.PutUint32(c[configSpeed:], n.cfg.Speed)
	c[configDuplex] = duplexFull
	n.config.Store(c)
}

// Activate serves the first pair, until the driver asks for more, and the control queue.
func (n *Net) Activate(a virtio.Activation) error {
	if n.cfg.Activated != nil {
		n.cfg.Activated(a.Features, false)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.offloads = a.Features & guestOffloads
	n.filter.VLANFilter = a.Features&featureCtrlVLAN != 0
	return n.start(&a)
}

// start serves the queues as the driver has set it up so far; mu is held.
func (n *Net) start(a *virtio.Activation) error {
	if err := errors.Join(n.backend.SetOffloads(n.offloads), n.backend.SetPairs(n.pairs)); err != nil {
		return err
	}
	n.act = a
	if err := n.serve(); err != nil {
		n.act = nil
		_ = n.serve()
		return err
	}
	i := 2 // 5.1.2: the control queue follows the pairs, of which there is one without MQ
	if a.Features&featureMQ != 0 {
		i = 2 * n.cfg.Queues
	}
	if q := a.Queues[i]; a.Features&featureCtrlVQ != 0 && q.Enabled {
		n.ctrl = q.Go(a.Failed, func(w *virtio.Worker) { n.control(q, w) })
	}
	return nil
}

// Reset stops all queues. MAC and filters are as at the start; the link stays as it is.
func (n *Net) Reset() {
	n.Pause()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pairs, n.offloads, n.announce = 1, 0, false
	// A TAP that fails here is gone, which Activate will say.
	_, _ = n.backend.SetPairs(1), n.backend.SetOffloads(0)
	n.filter, n.waiting = RxFilter{MAC: n.cfg.MAC, Promiscuous: true}, nil
	n.setConfig()
}

// Close resets the device and closes the backend.
func (n *Net) Close() error {
	n.Reset()
	return n.backend.Close()
}

// setPairs makes the first k pairs those in use, or changes nothing; mu is held.
func (n *Net) setPairs(k int) error {
	old := n.pairs
	n.pairs = max(k, old) // the host must not choose a queue that nobody serves
	err := n.serve()
	if err == nil {
		err = n.backend.SetPairs(k)
	}
	if err != nil {
		k = old
	}
	n.pairs = k
	return errors.Join(err, n.serve())
}

// serve has the backend serve the pairs in use while the device is active and the link is
// up; mu is held.
func (n *Net) serve() error {
	want := 0
	if n.act != nil && n.up {
		want = n.pairs
	}
	if n.running != want && n.held != nil {
		if n.act == nil {
			n.stopHolding()
		} else if err := n.release((*holder).end); err != nil {
			return err
		}
	}
	for n.running > want {
		n.running--
		n.waiting = append(n.waiting, n.backend.Stop(n.running)...)
	}
	for ; n.running < want; n.running++ {
		for _, q := range n.act.Queues[2*n.running:][:2] {
			if !q.Enabled {
				return fmt.Errorf("virtio-net: the driver has not set up queue %d", q.Index)
			}
		}
		if err := n.backend.Start(n.running, n.act); err != nil {
			return err
		}
	}
	if n.running > 0 && len(n.waiting) > 0 {
		return n.giveWaiting()
	}
	return nil
}

// SetLink sets the link's state, of which the driver is told. While it is down no queue is
// served, and what arrives from the host is lost.
func (n *Net) SetLink(up bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.up == up {
		return
	}
	n.up = up
	n.setConfig()
	if n.act == nil {
		return
	}
	if up {
		n.waiting = nil
		n.backend.Take(0)
	}
	if err := n.serve(); err != nil {
		n.act.Failed(err)
	}
	if n.act.Features&featureStatus != 0 {
		n.act.ConfigChanged()
	}
}
