package vmm

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"baton/devices/steer"
	virtionet "baton/devices/virtio/net"
	"baton/vmm/failover"
)

// The cases of QEMU's suite that migrate. There, the stream goes to a file and comes from it;
// here, from one machine to another.

// target starts a machine that waits for a guest, and returns where.
func target(t *testing.T, devices ...string) (s *scripted, uri string) {
	t.Helper()
	args := append(failoverNets(), "-incoming", "defer")
	for _, d := range devices {
		args = append(args, "-device", d)
	}
	s = startScripted(t, args...)
	uri = "unix:" + filepath.Join(s.dir, "mig")
	s.watchMigration()
	s.execute("migrate-incoming", map[string]any{"uri": uri, "exit-on-error": false})
	return s, uri
}

func (s *scripted) watchMigration(more ...string) {
	s.t.Helper()
	var list []any
	for _, c := range append(more, "events") {
		list = append(list, map[string]any{"capability": c, "state": true})
	}
	s.execute("migrate-set-capabilities", map[string]any{"capabilities": list})
}

// status is the migration's.
func (s *scripted) status() string {
	s.t.Helper()
	var r struct{ Status string }
	if err := json.Unmarshal([]byte(s.execute("query-migrate", nil)), &r); err != nil {
		s.t.Fatal(err)
	}
	return r.Status
}

// reaches waits for a state of the migration, and fails when one of the others comes first.
func (s *scripted) reaches(want string, never ...string) {
	s.t.Helper()
	for {
		var data struct{ Status string }
		if err := json.Unmarshal([]byte(s.event("MIGRATION", "")), &data); err != nil {
			s.t.Fatal(err)
		}
		if data.Status == want {
			return
		}
		if slices.Contains(never, data.Status) {
			s.t.Fatalf("the migration is %s, before %s: %s", data.Status, want, s.execute("query-migrate", nil))
		}
	}
}

// leaves starts the migration and waits until the primary is asked to go.
func (s *scripted) leaves(uri string) {
	s.t.Helper()
	s.execute("migrate", map[string]any{"uri": uri})
	s.event("UNPLUG_PRIMARY", `{"device-id":"primary0"}`)
}

// both are the cards as on QEMU's command line.
func both(failover string) []string { return []string{standby0 + failover, primary0 + "standby0"} }

// negotiated starts a machine whose guest has its primary.
func negotiated(t *testing.T, more ...string) *scripted {
	t.Helper()
	s := startPair(t, standby0+"on", primary0+"standby0,failover-unplug-timeout=60000", more...)
	s.probe("standby0").start(0)
	s.event("FAILOVER_NEGOTIATED", negotiated0)
	s.shown(true, true)
	s.watchMigration("pause-before-switchover")
	return s
}

var notYet = []string{"active", "completed", "failed", "cancelling", "cancelled"}

func TestQtestMigrateOn(t *testing.T) {
	s := negotiated(t)
	d, uri := target(t, both("on")...)
	d.shown(true, false)
	t.Run("out", func(t *testing.T) {
		s.leaves(uri)
		s.reaches("wait-unplug", notYet...)
		if s.seq["UNPLUG_PRIMARY"] > s.seq["MIGRATION"] {
			t.Error("QEMU says wait-unplug after UNPLUG_PRIMARY")
		}
		for begin := time.Now(); time.Since(begin) < 100*time.Millisecond; {
			if got := s.status(); got != "wait-unplug" {
				t.Fatalf("%s, but the guest has not let go", got)
			}
		}
		if got := s.execute("query-migrate", nil); !strings.Contains(got, `"primary-id":"primary0","state":"unplugging"`) {
			t.Errorf("nobody says what is waited for: %s", got)
		}
		s.ejects(2)
		s.reaches("pre-switchover", "failed")
		s.shown(true, false)
		s.execute("migrate-continue", map[string]any{"state": "pre-switchover"})
		s.event("STOP", "")
		s.reaches("completed", "failed")
	})
	t.Run("in", func(t *testing.T) {
		d.event("FAILOVER_NEGOTIATED", negotiated0)
		// QEMU shows the primary here, while the guest stands still; baton does after the resume.
		d.event("RESUME", "")
		d.pair(failover.Plugging)
		d.shown(true, true)
		if port, code := d.slotEvent(); port != 2 || code != 2 {
			t.Errorf("the guest is told of event %d of slot %d", code, port)
		}
		if got := d.status(); got != "completed" {
			t.Error(got)
		}
	})
	t.Run("cont on the source", func(t *testing.T) { // QEMU: without its primary
		d.execute("quit", nil)
		s.execute("cont", nil)
		s.pair(failover.Plugging)
		s.shown(true, true)
	})
}

func TestQtestMigrateOff(t *testing.T) {
	source := func(t *testing.T) *scripted {
		s := startPair(t, standby0+"off", primary0+"standby0")
		s.probe("standby0").start(0)
		s.shown(true, true)
		s.watchMigration("pause-before-switchover")
		return s
	}
	s := source(t)
	d, uri := target(t)
	d.execute("device_add", deviceArgs(standby0+"off"))
	d.execute("device_add", deviceArgs(primary0+"standby0"))
	t.Run("out", func(t *testing.T) {
		s.execute("migrate", map[string]any{"uri": uri})
		s.reaches("pre-switchover", "failed", "cancelling", "cancelled")
		s.execute("migrate-continue", map[string]any{"state": "pre-switchover"})
		s.event("STOP", "")
		s.reaches("completed", "failed", "cancelling", "cancelled")
		s.shown(true, true)
	})
	t.Run("in", func(t *testing.T) {
		d.event("RESUME", "")
		d.shown(true, true)
		if d.heard("FAILOVER_NEGOTIATED") {
			t.Error("FAILOVER_NEGOTIATED")
		}
	})
	t.Run("abort", func(t *testing.T) {
		s := source(t)
		_, uri := target(t, standby0+"off", primary0+"standby0")
		s.execute("migrate", map[string]any{"uri": uri})
		s.reaches("pre-switchover", "failed")
		s.execute("migrate_cancel", nil)
		s.reaches("cancelled", "failed", "active", "completed")
		s.shown(true, true)
	})
}

func TestQtestMigrateGuestOff(t *testing.T) {
	source := func(t *testing.T) *scripted {
		s := startPair(t, standby0+"on", primary0+"standby0")
		s.shown(true, false)
		s.probe("standby0").start(virtionet.FeatureStandby)
		s.shown(true, false)
		s.watchMigration("pause-before-switchover")
		return s
	}
	s := source(t)
	d, uri := target(t, both("on")...)
	t.Run("out", func(t *testing.T) {
		s.execute("migrate", map[string]any{"uri": uri})
		s.reaches("pre-switchover", "failed", "cancelling", "cancelled")
		s.execute("migrate-continue", map[string]any{"state": "pre-switchover"})
		s.event("STOP", "")
		s.reaches("completed", "failed", "cancelling", "cancelled")
		s.shown(true, false)
	})
	t.Run("in", func(t *testing.T) {
		d.event("RESUME", "")
		d.do(func() {})
		d.shown(true, false)
		if d.heard("FAILOVER_NEGOTIATED") {
			t.Error("FAILOVER_NEGOTIATED")
		}
	})
	t.Run("abort", func(t *testing.T) {
		s := source(t)
		_, uri := target(t, both("on")...)
		s.execute("migrate", map[string]any{"uri": uri})
		s.reaches("pre-switchover", "failed")
		s.execute("migrate_cancel", nil)
		s.reaches("cancelled", "failed", "active", "completed")
		s.shown(true, false)
	})
}

func TestQtestMigrateAbort(t *testing.T) {
	t.Run("wait-unplug", func(t *testing.T) {
		s := negotiated(t)
		_, uri := target(t, both("on")...)
		s.leaves(uri)
		s.reaches("wait-unplug", notYet...)
		s.execute("migrate_cancel", nil)
		// QEMU is cancelling until the guest has ejected; baton takes the request back.
		s.reaches("cancelled", "completed", "failed", "active")
		s.pair(failover.Plugging)
		s.shown(true, true)
		if _, code := s.slotEvent(); code == 3 {
			t.Error("the guest is still asked to eject")
		}
	})
	t.Run("active", func(t *testing.T) {
		s := negotiated(t)
		_, uri := target(t, both("on")...)
		s.leaves(uri)
		s.ejects(2)
		s.reaches("pre-switchover", "failed")
		s.execute("migrate_cancel", nil)
		s.reaches("cancelled", "failed", "completed")
		s.pair(failover.Plugging)
		s.shown(true, true)
	})
	t.Run("timeout", func(t *testing.T) {
		s := negotiated(t)
		_, uri := target(t, both("on")...)
		s.leaves(uri)
		s.reaches("wait-unplug", notYet...)
		for { // the guest begins, and does not end
			if _, code := s.slotEvent(); code == 3 {
				break
			}
		}
		s.execute("migrate_cancel", nil)
		began := time.Now()
		s.reaches("cancelled", "completed", "failed", "active")
		if d := time.Since(began); d > 10*time.Second { // QEMU: 30 s
			t.Errorf("cancelled after %v", d)
		}
		s.shown(true, true)
		s.eject(2) // too late: it gets it back
		s.pair(failover.Plugging)
		s.shown(true, true)
	})
}

func TestQtestMigrateMulti(t *testing.T) {
	const (
		standby1 = "virtio-net-pci,netdev=hs2,id=standby1,bus=root2,mac=52:54:00:44:44:44,failover=on"
		primary1 = "virtio-net-pci,netdev=hs3,id=primary1,bus=root3,mac=52:54:00:33:33:33,failover_pair_id=standby1"
	)
	four := append(both("on"), standby1, primary1)
	s := startPair(t, "", "", "-device", four[0], "-device", four[1]+",failover-unplug-timeout=0", "-device", four[2], "-device", four[3]+",failover-unplug-timeout=0")
	for i := range 2 {
		s.probe(fmt.Sprintf("standby%d", i)).start(0)
		s.event("FAILOVER_NEGOTIATED", fmt.Sprintf(`{"device-id":"standby%d"}`, i))
	}
	s.watchMigration()
	d, uri := target(t, four...)
	t.Run("out", func(t *testing.T) {
		s.execute("migrate", map[string]any{"uri": uri})
		asked := []string{s.event("UNPLUG_PRIMARY", ""), s.event("UNPLUG_PRIMARY", "")}
		slices.Sort(asked)
		if strings.Join(asked, "") != `{"device-id":"primary0"}{"device-id":"primary1"}` {
			t.Fatal(asked)
		}
		s.reaches("wait-unplug", notYet...)
		for _, code := s.slotEvent(); code == 0; _, code = s.slotEvent() {
		}
		s.eject(4)
		s.do(func() {})
		if got := s.status(); got != "wait-unplug" {
			t.Errorf("%s, but primary0 is there", got)
		}
		s.eject(2)
		s.event("STOP", "")
		s.reaches("completed", "failed")
	})
	t.Run("in", func(t *testing.T) {
		seen := []string{d.event("FAILOVER_NEGOTIATED", ""), d.event("FAILOVER_NEGOTIATED", "")}
		slices.Sort(seen)
		if strings.Join(seen, "") != `{"device-id":"standby0"}{"device-id":"standby1"}` {
			t.Fatal(seen)
		}
		d.event("RESUME", "")
		d.pair(failover.Plugging)
		d.shown(true, true)
		for !d.visible("primary1") {
		}
	})
}

// A target that must have its primary, and cannot, refuses before anything is done to the guest.
func TestRequiredPrimary(t *testing.T) {
	for _, policy := range []string{"require", "prefer"} {
		t.Run(policy, func(t *testing.T) {
			s := negotiated(t)
			busy := strings.Replace(primary0, "hs1", "hs3", 1)
			d, uri := target(t, standby0+"on", busy+"standby0,failover-primary="+policy)
			d.do(func() { // somebody has its TAP
				for i := range d.cfg.Netdevs {
					if d.cfg.Netdevs[i].ID == "hs3" {
						d.cfg.Netdevs[i].IfName = "lo"
					}
				}
				if b := d.nics.take("hs3"); b != nil {
					b.Close()
				}
			})
			s.execute("migrate", map[string]any{"uri": uri})
			if policy == "require" {
				s.reaches("failed", "wait-unplug")
				if got := s.execute("query-migrate", nil); !strings.Contains(got, "lo") {
					t.Errorf("the source does not say why: %s", got)
				}
				if s.heard("UNPLUG_PRIMARY") {
					t.Error("the guest was asked to eject")
				}
				s.shown(true, true)
				return
			}
			s.event("UNPLUG_PRIMARY", "")
			s.ejects(2)
			s.reaches("pre-switchover", "failed")
			s.execute("migrate-continue", map[string]any{"state": "pre-switchover"})
			s.reaches("completed", "failed")
			d.event("RESUME", "")
			if st := d.pair(failover.Failed); st.Why == nil || st.Retries == 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// What reaches the source's TAP when the guest stands still there goes after it.
func TestLateFrames(t *testing.T) {
	s := negotiated(t)
	d, uri := target(t, both("on")...)
	tap := func(m *scripted) (name string) {
		m.do(func() { name = m.cfg.Netdev("hs0").IfName })
		if out, err := exec.Command("ip", "link", "set", name, "up").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return name
	}
	from := tap(s)
	tap(d)
	s.leaves(uri)
	s.ejects(2)
	s.reaches("pre-switchover", "failed")
	frame := make([]byte, 12+60)
	copy(frame[12:], "\x52\x54\x00\x22\x22\x22")
	if sent, err := steer.Send(from, [][]byte{frame}); sent != 1 {
		t.Fatal(err)
	}
	s.execute("migrate-continue", map[string]any{"state": "pre-switchover"})
	s.reaches("completed", "failed")
	held := regexp.MustCompile(`"point":"resume","to":"standby","outage-us":[1-9]\d*,"held":[1-9]`)
	for begin := time.Now(); !held.MatchString(d.execute("query-failover", nil)); {
		if time.Since(begin) > patience {
			t.Fatalf("it has not arrived: %s", d.execute("query-failover", nil))
		}
	}
}
