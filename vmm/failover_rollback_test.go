package vmm

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"baton/vmm/failover"
)

// goes has the guest let go of its primary and arrive at the target.
func (s *scripted) goes(d *scripted) {
	s.t.Helper()
	s.event("UNPLUG_PRIMARY", "")
	s.ejects(2)
	s.reaches("completed", "failed", "cancelled")
	d.event("RESUME", "")
	d.pair(failover.Plugging)
}

// Whatever keeps the primary from leaving: the guest goes on with it, and the next try succeeds.
func TestRollback(t *testing.T) {
	for _, c := range []struct {
		name, options string
		guest         func(s *scripted) // what it does when it is asked
		why           string
	}{
		{"refuses", "failover-unplug=cooperative,failover-unplug-timeout=60000", func(s *scripted) {
			for _, code := s.slotEvent(); code != 3; _, code = s.slotEvent() {
			}
			s.ost(2, 3, 0x82)
		}, "it is busy in the guest"},
		{"silent", "failover-unplug=cooperative,failover-unplug-timeout=1500", func(*scripted) {}, "the guest has not let go of it in 1.5s"},
		{"begins and stops", "failover-unplug=cooperative,failover-unplug-timeout=1500", func(s *scripted) {
			for _, code := s.slotEvent(); code != 3; _, code = s.slotEvent() {
			}
		}, "the guest has not let go of it in 1.5s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := startPair(t, standby0+"on", primary0+"standby0,"+c.options)
			s.probe("standby0").start(0)
			s.shown(true, true)
			s.watchMigration()
			_, uri := target(t, both("on")...)
			s.leaves(uri)
			c.guest(s)
			s.reaches("failed", "active", "completed")
			if got := s.execute("query-migrate", nil); !strings.Contains(got, "unplug primary primary0: ") || !strings.Contains(got, c.why) {
				t.Errorf("the reason: %s", got)
			}
			s.shown(true, true)
			if c.name == "begins and stops" { // and goes on much later
				s.eject(2)
			}
			s.pair(failover.Plugging)
			s.shown(true, true)
			d, uri := target(t, both("on")...)
			s.execute("migrate", map[string]any{"uri": uri})
			s.goes(d)
		})
	}
}

// A guest that says nothing loses its primary by surprise where that is allowed; so does one
// that does not run, which finds an empty slot when it goes on.
func TestSilentGuestMigrates(t *testing.T) {
	for _, paused := range []bool{false, true} {
		s := startPair(t, standby0+"on", primary0+"standby0,failover-unplug-timeout=100")
		s.probe("standby0").start(0)
		s.shown(true, true)
		s.watchMigration()
		d, uri := target(t, both("on")...)
		if paused {
			s.execute("stop", nil)
		}
		s.leaves(uri)
		s.reaches("completed", "failed")
		if paused {
			d.execute("cont", nil)
		}
		d.event("RESUME", "")
		for _, code := d.slotEvent(); code != 0; _, code = d.slotEvent() {
		}
		d.ost(2, 1, 0) // it has looked
		d.pair(failover.Plugging)
		d.shown(true, true)
	}
}

// steeredBy is a standby with a script.
func steeredBy(t *testing.T, text string) string {
	t.Helper()
	script := filepath.Join(t.TempDir(), "steer")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return standby0 + "on,steer=script=" + script
}

// Steering that is refused from the first is found out while the guest is where it was.
func TestSteeringRefused(t *testing.T) {
	s := negotiated(t)
	_, uri := target(t, steeredBy(t, "exit 1"), primary0+"standby0,failover-primary=require")
	s.execute("migrate", map[string]any{"uri": uri})
	s.reaches("failed", "wait-unplug")
	if got := s.execute("query-migrate", nil); !strings.Contains(got, "steer 52:54:00:22:22:22 to hide: script") || !strings.Contains(got, "steer=none") {
		t.Errorf("the source does not say why: %s", got)
	}
	if s.heard("UNPLUG_PRIMARY") {
		t.Error("the guest was asked to eject")
	}
	s.shown(true, true)
}

// Steering that fails later costs frames, not the migration.
func TestSteeringFails(t *testing.T) {
	steered := steeredBy(t, "[ $1 = hide ]")
	s := startPair(t, steered, primary0+"standby0,failover-unplug-timeout=60000")
	s.probe("standby0").start(0)
	s.shown(true, true)
	s.probe("primary0").msix(true)
	s.pair(failover.Primary)
	s.watchMigration()
	d, uri := target(t, steered, primary0+"standby0")
	s.execute("migrate", map[string]any{"uri": uri})
	s.goes(d)
	d.probe("primary0").msix(true)
	d.pair(failover.Primary)
	d.event("FAILOVER_SWITCHED", "") // at the resume
	if got := d.event("FAILOVER_SWITCHED", ""); !strings.Contains(got, `"point":"plug","to":"primary"`) {
		t.Error(got)
	}
}

// While the guest is asked, query-migrate says for how long, for which device and how far its slot
// is; a cancel answers at once, however silent the guest is.
func TestWaitUnplug(t *testing.T) {
	s := negotiated(t)
	_, uri := target(t, both("on")...)
	s.leaves(uri)
	s.reaches("wait-unplug", notYet...)
	ask := func(slot string, after int64) (elapsed int64) {
		t.Helper()
		for begin := time.Now(); time.Since(begin) < patience; {
			var info migrationInfo
			if err := json.Unmarshal([]byte(s.execute("query-migrate", nil)), &info); err != nil {
				t.Fatal(err)
			}
			if *info.Status != "wait-unplug" || info.PrepareTime == nil || info.TotalTime == nil || *info.TotalTime < *info.PrepareTime || len(info.Failover) != 1 {
				t.Fatalf("%+v", info)
			}
			p := info.Failover[0]
			if *p.Primary != "primary0" || p.State != failover.Unplugging || *p.Unplug != "cooperative" || string(*p.Slot) != slot {
				t.Fatalf("want a slot that is %s: %s", slot, s.execute("query-migrate", nil))
			}
			if *info.PrepareTime > after && p.For > after {
				return *info.PrepareTime
			}
		}
		t.Fatal("no time passes")
		return 0
	}
	was := ask("requested", 0)
	for _, code := s.slotEvent(); code != 3; _, code = s.slotEvent() { // the guest begins, and does not end
	}
	ask("busy", was)
	began := time.Now()
	s.execute("migrate_cancel", nil)
	answered := time.Since(began)
	s.reaches("cancelled", "completed", "failed", "active")
	if t.Log("cancel:", answered, "to the answer,", time.Since(began), "to the end"); time.Since(began) > 2*time.Second { // the guest has 60 s
		t.Error("it has waited for the guest")
	}
	s.shown(true, true)
}
