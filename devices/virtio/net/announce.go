package net

import "baton/devices/tap"

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
	return n.backend.Send(tap.RARP(n.filter.MAC))
}
