package net

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"baton/devices/tap"
	"baton/devices/virtio"
)

const announcement = "ffffffffffff" + "525400123456" + "8035" + "0001" + "0800" + "0604" + "0003" +
	"525400123456" + "00000000" + "525400123456" + "00000000" + "000000000000000000000000000000000000"

func TestAnnounce(t *testing.T) {
	for _, tc := range []struct {
		features uint64
		status   byte
		changes  int32
	}{
		{featureStatus | featureGuestAnnounce | featureCtrlVQ, statusLinkUp | statusAnnounce, 1},
		{featureStatus, statusLinkUp, 0},
		{featureGuestAnnounce, statusLinkUp, 0},
	} {
		n, f := active(t)
		var changes atomic.Int32
		n.act = &virtio.Activation{Features: tc.features, ConfigChanged: func() { changes.Add(1) }}
		f.take()
		if err := n.Announce(); err != nil {
			t.Error(err)
		}
		if got := f.take(); got != "send "+announcement {
			t.Errorf("the backend was told: %s", got)
		}
		var status [1]byte
		if n.ReadConfig(configStatus, status[:]); status[0] != tc.status || changes.Load() != tc.changes {
			t.Errorf("features %#x: status %d, %d changes", tc.features, status[0], changes.Load())
		}
	}
}

func TestAnnounceErrors(t *testing.T) {
	n, f := active(t)
	n.act.Features = 0
	f.failAt("send " + announcement)
	if err := n.Announce(); err == nil || !strings.Contains(err.Error(), "fake: send") {
		t.Errorf("error %v", err)
	}
	n.act = nil
	n.SetLink(false)
	f.take()
	if err := n.Announce(); err != nil || f.take() != "" {
		t.Errorf("link down: %v", err)
	}
	n.announce = true
	n.Reset()
	if n.announce {
		t.Error("a reset leaves the question open")
	}
}

// What bridges learn is 60 bytes, the least that Ethernet carries.
func TestRARPLength(t *testing.T) {
	if got := fmt.Sprintf("%x", tap.RARP(testMAC)); got != announcement || len(got) != 120 {
		t.Errorf("%d: %s", len(got)/2, got)
	}
}
