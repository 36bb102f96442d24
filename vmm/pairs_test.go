package vmm

import (
	"encoding/json"
	"strings"
	"testing"

	virtionet "baton/devices/virtio/net"
	"baton/vmm/failover"
)

// A driver that comes without STANDBY after one with it must not be shown the primary any
// longer, nor must the next guest after a reset.
func TestHiddenAgain(t *testing.T) {
	t.Run("driver", func(t *testing.T) {
		s := startPair(t, standby0+"on", primary0+"standby0")
		d := s.probe("standby0")
		d.start(0)
		s.shown(true, true)
		d.start(virtionet.FeatureStandby)
		s.pair(failover.Unplugging)
		s.ejects(2)
		s.pair(failover.Hidden)
		s.shown(true, false)
		d.start(0)
		s.pair(failover.Plugging)
		s.shown(true, true)
	})
	t.Run("reset", func(t *testing.T) {
		s := startPair(t, standby0+"on", primary0+"standby0")
		s.probe("standby0").start(0)
		s.shown(true, true)
		s.execute("system_reset", nil)
		s.shown(true, false)
		s.pair(failover.Hidden)
		s.probe("standby0").start(virtionet.FeatureStandby)
		s.shown(true, false)
		s.execute("system_reset", nil)
		s.probe("standby0").start(0)
		s.pair(failover.Plugging)
		s.shown(true, true)
	})
}

// A hidden primary can be deleted and replaced.
func TestHiddenPrimary(t *testing.T) {
	s := startPair(t, standby0+"on", primary0+"standby0")
	other := strings.Replace(strings.Replace(primary0, "hs1", "hs2", 1), "primary0", "primary1", 1) + "standby0"
	s.fails("device_add", deviceArgs(other), "Cannot attach more than one primary device to 'standby0': 'primary0' and 'primary1'")
	s.fails("device_add", deviceArgs(primary0+"standby0"), "Duplicate device ID 'primary0'")
	var pairs []pairInfo
	if err := json.Unmarshal([]byte(s.execute("query-failover", nil)), &pairs); err != nil || len(pairs) != 1 || *pairs[0].Primary != "primary0" || pairs[0].State != failover.Hidden || pairs[0].Open {
		t.Fatalf("%+v, %v", pairs, err)
	}
	s.execute("device_del", map[string]any{"id": "primary0"})
	s.event("DEVICE_DELETED", `{"device":"primary0","path":"/machine/peripheral/primary0"}`)
	s.fails("device_del", map[string]any{"id": "primary0"}, "Device 'primary0' not found")
	s.execute("device_add", deviceArgs(other))
	if s.visible("primary1") {
		t.Error("primary1 is visible")
	}
	s.probe("standby0").start(0)
	s.pair(failover.Plugging)
	if !s.visible("primary1") {
		t.Error("primary1 is hidden")
	}
}

// A primary that the guest has can be deleted as any device, and a hidden one comes after it.
func TestDeletePrimary(t *testing.T) {
	s := startPair(t, standby0+"on", primary0+"standby0")
	d := s.probe("standby0")
	d.start(0)
	s.shown(true, true)
	s.execute("device_del", map[string]any{"id": "primary0"})
	s.ejects(2)
	s.event("DEVICE_DELETED", `{"device":"primary0","path":"/machine/peripheral/primary0"}`)
	s.shown(true, false)
	s.execute("device_add", deviceArgs(primary0+"standby0"))
	s.shown(true, true)
	// Without its standby it is an ordinary device.
	s.execute("device_del", map[string]any{"id": "standby0"})
	s.ejects(1)
	s.event("DEVICE_DELETED", `{"device":"standby0","path":"/machine/peripheral/standby0"}`)
	s.shown(false, true)
	if got := s.execute("query-failover", nil); got != "[]" {
		t.Error(got)
	}
}

// The guest ejects its primary by itself: it is kept for it.
func TestGuestEjectsPrimary(t *testing.T) {
	s := startPair(t, standby0+"on", primary0+"standby0")
	s.probe("standby0").start(0)
	s.pair(failover.Plugging)
	s.eject(2)
	if st := s.pair(failover.Standby); st.Why == nil || !st.Away {
		t.Errorf("%+v", st)
	}
	s.shown(true, false)
	s.execute("failover-switch", map[string]any{"id": "primary0", "to": "primary"})
	s.pair(failover.Plugging)
	s.shown(true, true)
}

func TestFailoverSwitch(t *testing.T) {
	s := startPair(t, standby0+"on,steer=none", primary0+"standby0,failover-unplug-timeout=60000")
	to := func(half string) map[string]any { return map[string]any{"id": "standby0", "to": half} }
	s.fails("failover-switch", map[string]any{"id": "nosuch", "to": "primary"}, "Device 'nosuch' not found")
	s.fails("failover-switch", to("none"), "Parameter 'to' does not accept value 'none'")
	s.fails("failover-switch", map[string]any{"id": "standby0", "to": "primary", "host": "00:1f.0"}, "Device 'primary0' is no function of the host")
	s.probe("standby0").start(0)
	s.pair(failover.Plugging)
	s.execute("failover-switch", to("standby"))
	s.pair(failover.Unplugging)
	s.shown(true, true)
	s.execute("failover-switch", to("primary")) // withdrawn: the guest has not begun
	s.pair(failover.Plugging)
	s.execute("failover-switch", to("standby"))
	s.ejects(2)
	s.pair(failover.Standby)
	s.shown(true, false)
	s.execute("failover-switch", to("standby"))
	s.execute("failover-switch", to("primary"))
	s.pair(failover.Plugging)
	s.shown(true, true)
}

// The guest does not let go: the primary stays, and is taken by surprise where that is allowed.
func TestFailoverSwitchSilent(t *testing.T) {
	for mode, want := range map[string]failover.State{"cooperative": failover.Plugging, "auto": failover.Standby, "surprise": failover.Standby} {
		t.Run(mode, func(t *testing.T) {
			s := startPair(t, standby0+"on", primary0+"standby0,failover-unplug-timeout=50,failover-unplug="+mode)
			s.probe("standby0").start(0)
			s.pair(failover.Plugging)
			s.execute("failover-switch", map[string]any{"id": "standby0", "to": "standby"})
			for !strings.Contains(s.event("FAILOVER_STATE", ""), `"state":"unplugging"`) {
			}
			s.pair(want)
			s.shown(true, want == failover.Plugging)
		})
	}
}

// A primary that is to be pulled from its driver goes a moment later, unless it is wanted back.
func TestPulled(t *testing.T) {
	s := startPair(t, standby0+"on", primary0+"standby0,failover-unplug=surprise")
	s.probe("standby0").start(0)
	s.shown(true, true)
	s.probe("primary0").msix(true)
	s.checks(2)
	s.event("FAILOVER_SWITCHED", "")
	for _, to := range []string{"standby", "primary"} {
		s.execute("failover-switch", map[string]any{"id": "standby0", "to": to})
	}
	s.pair(failover.Primary)
	s.shown(true, true)
	s.execute("failover-switch", map[string]any{"id": "standby0", "to": "standby"})
	s.checks(2)
	if got := s.event("FAILOVER_SWITCHED", ""); !strings.Contains(got, `"point":"unplug","to":"standby"`) {
		t.Error(got)
	}
	s.pair(failover.Standby)
	s.shown(true, false)
}

// Frames for the guest follow its driver: to the standby when it lets go of the primary, with
// what came in between.
func TestCarrier(t *testing.T) {
	s := startPair(t, standby0+"on", primary0+"standby0,failover-unplug-timeout=60000", "-smp", "2")
	d := s.probe("standby0")
	d.start(0)
	s.shown(true, true)
	p := s.probe("primary0")
	p.msix(true)
	var pairs []pairInfo
	if err := json.Unmarshal([]byte(s.execute("query-failover", nil)), &pairs); err != nil || len(pairs[0].Switches) != 0 {
		t.Errorf("while the driver is probed: %+v, %v", pairs, err)
	}
	s.checks(2)
	s.event("FAILOVER_SWITCHED", "")
	s.pair(failover.Primary)
	s.execute("failover-switch", map[string]any{"id": "standby0", "to": "standby"})
	s.pair(failover.Unplugging)
	p.msix(false)
	if got := s.event("FAILOVER_SWITCHED", ""); !strings.Contains(got, `"point":"unplug","to":"standby"`) {
		t.Error(got)
	}
	s.ejects(2)
	s.pair(failover.Standby)
	events, _, _ := s.events.Poll(1)
	n := 0
	for _, e := range events {
		if e.Name == "FAILOVER_SWITCHED" {
			n++
		}
	}
	if n != 2 {
		t.Errorf("%d switches", n)
	}
	if err := json.Unmarshal([]byte(s.execute("query-failover", nil)), &pairs); err != nil || len(pairs[0].Switches) != 2 || pairs[0].Switches[1].To != "standby" {
		t.Errorf("%+v, %v", pairs, err)
	}
}

// A primary to which a driver comes back, whose guest has let go of it and not ejected it, has left its guest before.
func TestDriverComesBack(t *testing.T) {
	s := startPair(t, standby0+"on", primary0+"standby0,failover-unplug-timeout=60000")
	s.probe("standby0").start(0)
	s.shown(true, true)
	p := s.probe("primary0")
	p.msix(true)
	s.checks(2)
	s.event("FAILOVER_SWITCHED", "")
	s.execute("failover-switch", map[string]any{"id": "standby0", "to": "standby"})
	s.pair(failover.Unplugging)
	p.msix(false)
	p.msix(true)
	for _, want := range []string{`"point":"unplug","to":"standby"`, `"point":"plug","to":"primary"`} {
		if got := s.event("FAILOVER_SWITCHED", ""); !strings.Contains(got, want) {
			t.Errorf("%s, not %s", got, want)
		}
	}
	p.msix(false)
	s.ejects(2)
	s.pair(failover.Standby)
}
