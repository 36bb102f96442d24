package net

import "encoding/binary"

// Announce tells the network where the guest's MAC is now, by a RARP request (RFC 903) in the
// guest's name, and asks the driver to announce its IP addresses, VLANs and all (5.1.6.5.4),
// if it can. Nothing is sent while the link is down.
func (n *Net) Announce() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.up {
		return nil
	}
	if n.act != nil && n.act.Features&featureGuestAnnounce != 0 && n.act.Features&featureStatus != 0 {
		n.announce = true
		n.setConfig()
		n.act.ConfigChanged()
	}
	return n.backend.Send(rarp(n.filter.MAC))
}

// rarp is a RARP request of a host for its own address, which bridges learn from and nobody
// answers. It is as long as the shortest Ethernet frame, without checksum.
func rarp(mac MAC) []byte {
	f := make([]byte, 0, 60)
	f = append(f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	f = append(f, mac[:]...)
	for _, v := range []uint16{0x8035 /* RARP */, 1 /* Ethernet */, 0x0800 /* IPv4 */, 6<<8 | 4 /* lengths */, 3 /* request reverse */} {
		f = binary.BigEndian.AppendUint16(f, v)
	}
	f = append(f, mac[:]...)
	f = append(f, 0, 0, 0, 0)
	f = append(f, mac[:]...)
	return f[:cap(f)]
}
