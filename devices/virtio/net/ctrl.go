package net

import (
	"encoding/binary"
	"reflect"

	"baton/devices/virtio"
)

// Control commands, class and command: 5.1.6.5.
const (
	cmdPromisc   = 0x0000 // VIRTIO_NET_CTRL_RX
	cmdAllMulti  = 0x0001
	cmdAllUni    = 0x0002
	cmdNoMulti   = 0x0003
	cmdNoUni     = 0x0004
	cmdNoBcast   = 0x0005
	cmdMACTable  = 0x0100 // VIRTIO_NET_CTRL_MAC
	cmdMACAddr   = 0x0101
	cmdVLANAdd   = 0x0200 // VIRTIO_NET_CTRL_VLAN
	cmdVLANDel   = 0x0201
	cmdAnnounced = 0x0300 // VIRTIO_NET_CTRL_ANNOUNCE
	cmdPairsSet  = 0x0400 // VIRTIO_NET_CTRL_MQ
	cmdOffloads  = 0x0500 // VIRTIO_NET_CTRL_GUEST_OFFLOADS
	ackOK        = 0
	ackErr       = 1
	maxVLAN      = 4095
	maxTableMACs = 64 // unicast and multicast together; more are said to overflow
)

// RxFilter is what the driver wants to receive. The host may deliver more.
type RxFilter struct {
	MAC         MAC  `cbor:"1,keyasint"`
	Promiscuous bool `cbor:"6,keyasint"` // as after reset
	AllMulti    bool `cbor:"7,keyasint"`
	AllUni      bool `cbor:"8,keyasint"`
	NoMulti     bool `cbor:"9,keyasint"`
	NoUni       bool `cbor:"10,keyasint"`
	NoBroadcast bool `cbor:"11,keyasint"`
	// Unicast and Multicast are the addresses besides MAC; an overflow means too many to
	// list, so that all are wanted.
	Unicast           []MAC `cbor:"12,keyasint,omitempty"`
	Multicast         []MAC `cbor:"13,keyasint,omitempty"`
	UnicastOverflow   bool  `cbor:"14,keyasint"`
	MulticastOverflow bool  `cbor:"15,keyasint"`
	// VLANFilter says that only frames without a tag and of VLANs are wanted.
	VLANFilter bool  `cbor:"16,keyasint"`
	VLANs      VLANs `cbor:"17,keyasint"`
}

// VLANs is a set of VLANs: bit v%64 of word v/64 is VLAN v.
type VLANs [(maxVLAN + 1) / 64]uint64

// RxFilter returns the filter as the driver last set it; the lists are not to be changed.
func (n *Net) RxFilter() RxFilter {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.filter
}

// control serves the control queue.
func (n *Net) control(q *virtio.Queue, w *virtio.Worker) {
	for c := w.Next(); c != nil; c = w.Next() {
		ack, before := [1]byte{ackErr}, n.RxFilter()
		if n.command(c) {
			ack[0] = ackOK
		}
		if n.cfg.FilterChanged != nil && !reflect.DeepEqual(before, n.RxFilter()) {
			n.cfg.FilterChanged()
		}
		q.Push(c, uint32(c.Write(ack[:])))
	}
}

// command carries out one command, and says whether it was one: its length has to be right
// to the byte, and its feature negotiated.
func (n *Net) command(c *virtio.Chain) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	var head [2]byte
	if c.Read(head[:]) < len(head) {
		return false
	}
	f := &n.filter
	switch cmd := binary.BigEndian.Uint16(head[:]); cmd {
	case cmdPromisc:
		return n.setFlag(c, &f.Promiscuous, featureCtrlRX)
	case cmdAllMulti:
		return n.setFlag(c, &f.AllMulti, featureCtrlRX)
	case cmdAllUni:
		return n.setFlag(c, &f.AllUni, featureCtrlRXExtra)
	case cmdNoMulti:
		return n.setFlag(c, &f.NoMulti, featureCtrlRXExtra)
	case cmdNoUni:
		return n.setFlag(c, &f.NoUni, featureCtrlRXExtra)
	case cmdNoBcast:
		return n.setFlag(c, &f.NoBroadcast, featureCtrlRXExtra)
	case cmdMACTable:
		return n.setMACTable(c)
	case cmdMACAddr:
		var mac MAC
		if !n.read(c, mac[:], featureCtrlMAC) {
			return false
		}
		f.MAC = mac
		n.setConfig()
	case cmdVLANAdd, cmdVLANDel:
		var b [2]byte
		if !n.read(c, b[:], featureCtrlVLAN) || binary.LittleEndian.Uint16(b[:]) > maxVLAN {
			return false
		}
		v := binary.LittleEndian.Uint16(b[:])
		if f.VLANs[v/64] |= 1 << (v % 64); cmd == cmdVLANDel {
			f.VLANs[v/64] &^= 1 << (v % 64)
		}
	case cmdAnnounced:
		if !n.read(c, nil, featureGuestAnnounce) {
			return false
		}
		n.announce = false
		n.setConfig()
	case cmdPairsSet:
		var b [2]byte
		if !n.read(c, b[:], featureMQ) {
			return false
		}
		k := int(binary.LittleEndian.Uint16(b[:]))
		return k >= 1 && k <= n.cfg.Queues && n.setPairs(k) == nil
	case cmdOffloads:
		var b [8]byte
		if !n.read(c, b[:], featureGuestOffloads) {
			return false
		}
		want := binary.LittleEndian.Uint64(b[:])
		if want&^(n.act.Features&guestOffloads) != 0 || n.backend.SetOffloads(want) != nil {
			return false
		}
		n.offloads = want
	default:
		return false
	}
	return true
}

// read takes all that is left of the command, which has to be as long as p.
func (n *Net) read(c *virtio.Chain, p []byte, feature uint64) bool {
	return n.act.Features&feature != 0 && c.OutLen() == uint32(len(p)) && c.Read(p) == len(p)
}

func (n *Net) setFlag(c *virtio.Chain, flag *bool, feature uint64) bool {
	var on [1]byte
	if !n.read(c, on[:], feature) || on[0] > 1 {
		return false
	}
	*flag = on[0] == 1
	return true
}

// setMACTable takes two lists, unicast and multicast, each after its length as le32.
func (n *Net) setMACTable(c *virtio.Chain) bool {
	if n.act.Features&featureCtrlRX == 0 {
		return false
	}
	uni, uniOver, ok := readMACs(c, maxTableMACs)
	if !ok {
		return false
	}
	multi, multiOver, ok := readMACs(c, maxTableMACs-len(uni))
	if !ok || c.OutLen() != 0 {
		return false
	}
	f := &n.filter
	f.Unicast, f.UnicastOverflow, f.Multicast, f.MulticastOverflow = uni, uniOver, multi, multiOver
	return true
}

// readMACs reads one list; one of more than room addresses is skipped.
func readMACs(c *virtio.Chain, room int) (macs []MAC, overflow, ok bool) {
	var b [4]byte
	if c.Read(b[:]) < len(b) {
		return nil, false, false
	}
	count := uint64(binary.LittleEndian.Uint32(b[:]))
	if count*uint64(len(MAC{})) > uint64(c.OutLen()) {
		return nil, false, false
	}
	overflow = count > uint64(room)
	for range count {
		var mac MAC
		if c.Read(mac[:]); !overflow {
			macs = append(macs, mac)
		}
	}
	return macs, overflow, true
}
