package net

import (
	"baton/devices"
	"baton/devices/vhost"
	"baton/devices/virtio"
)

// state is what the driver has set by the control queue, and the link.
type state struct {
	MAC               []byte   `cbor:"1,keyasint"`
	LinkUp            bool     `cbor:"2,keyasint"`
	Announce          bool     `cbor:"3,keyasint"` // the driver has been asked and has not answered
	Pairs             uint16   `cbor:"4,keyasint"` // in use
	Offloads          uint64   `cbor:"5,keyasint"` // feature bits
	Promiscuous       bool     `cbor:"6,keyasint"`
	AllMulti          bool     `cbor:"7,keyasint"`
	AllUni            bool     `cbor:"8,keyasint"`
	NoMulti           bool     `cbor:"9,keyasint"`
	NoUni             bool     `cbor:"10,keyasint"`
	NoBroadcast       bool     `cbor:"11,keyasint"`
	Unicast           [][]byte `cbor:"12,keyasint,omitempty"`
	Multicast         [][]byte `cbor:"13,keyasint,omitempty"`
	UnicastOverflow   bool     `cbor:"14,keyasint"`
	MulticastOverflow bool     `cbor:"15,keyasint"`
	VLANFilter        bool     `cbor:"16,keyasint"`
	VLANs             []uint64 `cbor:"17,keyasint"` // a bit for each
	// What the driver was told, which the target has to be configured for.
	MaxPairs uint16 `cbor:"18,keyasint"`
	MTU      uint16 `cbor:"19,keyasint"`
	Speed    uint32 `cbor:"20,keyasint"`
}

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
	f := &n.filter
	return devices.EncodeState(state{
		MAC: f.MAC[:], LinkUp: n.up, Announce: n.announce, Pairs: uint16(n.pairs), Offloads: n.offloads,
		Promiscuous: f.Promiscuous, AllMulti: f.AllMulti, AllUni: f.AllUni,
		NoMulti: f.NoMulti, NoUni: f.NoUni, NoBroadcast: f.NoBroadcast,
		Unicast: plain(f.Unicast), Multicast: plain(f.Multicast),
		UnicastOverflow: f.UnicastOverflow, MulticastOverflow: f.MulticastOverflow,
		VLANFilter: f.VLANFilter, VLANs: f.VLANs[:],
		MaxPairs: uint16(n.cfg.Queues), MTU: n.cfg.MTU, Speed: n.cfg.Speed,
	})
}

// LoadState implements [virtio.Device].
func (n *Net) LoadState(info devices.StateInfo, version uint16, data []byte) error {
	var s state
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	f := RxFilter{
		Promiscuous: s.Promiscuous, AllMulti: s.AllMulti, AllUni: s.AllUni,
		NoMulti: s.NoMulti, NoUni: s.NoUni, NoBroadcast: s.NoBroadcast,
		UnicastOverflow: s.UnicastOverflow, MulticastOverflow: s.MulticastOverflow, VLANFilter: s.VLANFilter,
	}
	var macOK, uniOK, multiOK bool
	f.MAC, macOK = asMAC(s.MAC)
	f.Unicast, uniOK = asMACs(s.Unicast)
	f.Multicast, multiOK = asMACs(s.Multicast)
	switch {
	case !macOK:
		return info.BadField("MAC", "%d bytes", len(s.MAC))
	case !uniOK || len(s.Unicast) > maxTableMACs:
		return info.BadField("Unicast", "not up to %d addresses", maxTableMACs)
	case !multiOK || len(s.Multicast) > maxTableMACs:
		return info.BadField("Multicast", "not up to %d addresses", maxTableMACs)
	case len(s.VLANs) != len(f.VLANs):
		return info.BadField("VLANs", "%d words, not %d", len(s.VLANs), len(f.VLANs))
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
	copy(f.VLANs[:], s.VLANs)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.up, n.announce, n.pairs, n.offloads, n.filter = s.LinkUp, s.Announce, int(s.Pairs), s.Offloads, f
	n.setConfig()
	return nil
}

func plain(macs []MAC) (list [][]byte) {
	for _, m := range macs {
		list = append(list, m[:])
	}
	return list
}

func asMAC(b []byte) (m MAC, ok bool) {
	copy(m[:], b)
	return m, len(b) == len(m)
}

func asMACs(list [][]byte) (macs []MAC, ok bool) {
	for _, b := range list {
		m, ok := asMAC(b)
		if !ok {
			return nil, false
		}
		macs = append(macs, m)
	}
	return macs, true
}
