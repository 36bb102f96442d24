package net

import (
	"baton/devices"
	"baton/devices/vhost"
	"baton/devices/virtio"
)

// state is what the driver has set by the control queue, and the link.
type state struct {
	RxFilter
	LinkUp   bool   `cbor:"2,keyasint"`
	Announce bool   `cbor:"3,keyasint"` // the driver has been asked and has not answered
	Pairs    uint16 `cbor:"4,keyasint"` // in use
	Offloads uint64 `cbor:"5,keyasint"` // feature bits
	// What the driver was told, which the target has to be configured for.
	MaxPairs uint16 `cbor:"18,keyasint"`
	MTU      uint16 `cbor:"19,keyasint"`
	Speed    uint32 `cbor:"20,keyasint"`
}

// UnmarshalCBOR takes six bytes.
func (m *MAC) UnmarshalCBOR(data []byte) error { return devices.DecodeArray(data, m[:]) }

// UnmarshalCBOR takes all VLANs.
func (v *VLANs) UnmarshalCBOR(data []byte) error { return devices.DecodeArray(data, v[:]) }

// SetLog has what the kernel writes to guest memory for this device logged; nil ends it. It may
// be called at any time.
func (n *Net) SetLog(log *vhost.Log) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.backend.SetLog(log)
}

// Pause implements [virtio.Device]. Frames for the driver wait at the host's end.
func (n *Net) Pause() {
	if n.ctrl != nil { // without mu, for which a command may wait
		n.ctrl.Stop()
		n.ctrl = nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.act = nil
	_ = n.serve() // stops, which does not fail
}

// Resume implements [virtio.Device].
func (n *Net) Resume(a virtio.Activation) error {
	if n.cfg.Activated != nil {
		n.cfg.Activated(a.Features, true)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.start(&a)
}

// SaveState implements [virtio.Device].
func (n *Net) SaveState() ([]byte, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return devices.EncodeState(state{
		n.filter, n.up, n.announce, uint16(n.pairs), n.offloads, uint16(n.cfg.Queues), n.cfg.MTU, n.cfg.Speed,
	})
}

// LoadState implements [virtio.Device].
func (n *Net) LoadState(info devices.StateInfo, version uint16, data []byte) error {
	var s state
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	switch {
	case len(s.Unicast) > maxTableMACs || len(s.Multicast) > maxTableMACs:
		return info.BadField("Unicast, Multicast", "more than %d addresses", maxTableMACs)
	case s.Pairs == 0 || int(s.Pairs) > n.cfg.Queues:
		return info.BadField("Pairs", "%d, not 1 to %d", s.Pairs, n.cfg.Queues)
	case s.Offloads&^n.Features() != 0:
		return info.BadField("Offloads", "the driver takes %#x, which the TAP cannot give", s.Offloads&^n.Features())
	case int(s.MaxPairs) != n.cfg.Queues:
		return info.BadField("MaxPairs", "%d, here %d\ngive the TAP and the device as many queues", s.MaxPairs, n.cfg.Queues)
	case s.MTU != n.cfg.MTU:
		return info.BadField("MTU", "%d, here %d\nset host_mtu", s.MTU, n.cfg.MTU)
	case s.Speed != n.cfg.Speed:
		return info.BadField("Speed", "%d, here %d\nset speed", s.Speed, n.cfg.Speed)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.up, n.announce, n.pairs, n.offloads, n.filter = s.LinkUp, s.Announce, int(s.Pairs), s.Offloads, s.RxFilter
	n.setConfig()
	return nil
}
