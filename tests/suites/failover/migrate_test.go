package failover

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/journey"
)

// moved checks what became of a guest that had, or got, a primary.
func moved(t *testing.T, trip *journey.Trip) {
	t.Helper()
	movedBy(t, trip, 20)
}

// movedBy is moved, for one in so many pings that may be lost.
func movedBy(t *testing.T, trip *journey.Trip, pings int) {
	t.Helper()
	t.Log(trip)
	if trip.Status != "completed" {
		t.Fatalf("the migration %s: %s", trip.Status, trip.Query)
	}
	// What is lost is what came while the guest's driver let go, and while it began.
	if trip.Pings.Lost > trip.Pings.Sent/pings {
		t.Errorf("%v", trip.Pings)
	}
	if trip.TCP.Err != nil {
		t.Errorf("the connection: %v", trip.TCP.Err)
	}
	most := func(sent uint64) int { return max(200, int(sent/50)) }
	if trip.In.Lost > most(trip.Out.Sent) || trip.Out.Lost > most(trip.In.Sent) {
		t.Errorf("datagrams: to the guest %+v, from the guest %+v", trip.In, trip.Out)
	}
}

// thereAndBack has the guest go to the other host and back, and returns where it is then. One in so many pings may be lost.
func thereAndBack(ctx context.Context, t *testing.T, w *journey.World, way journey.Way, there *journey.Machine, pings int) *journey.Machine {
	t.Helper()
	for range 2 {
		to := w.Start(ctx, way, 1-there.Host, true)
		movedBy(t, w.Travel(ctx, way, there, to), pings)
		there.QMP.Do("quit", nil)
		there.Wait(ctx)
		there = to
	}
	return there
}

// TestMigrate has the guest go to the other host, each with a VF for it, and back.
func TestMigrate(t *testing.T) {
	for _, way := range []journey.Way{
		{Name: "auto"},
		{Name: "surprise, 4 vCPUs", Unplug: "surprise", CPUs: 4},
		{Name: "Linux 6.1", Kernel: harness.Linux61},
		{Name: "many datagrams", Datagrams: journey.ManyDatagrams}, // of which an emulated CPU sends what it can
	} {
		t.Run(way.Name, func(t *testing.T) {
			if way.Name != "auto" {
				long(t)
			}
			if way.Kernel != nil {
				way.Kernel(t) // or skip
			}
			ctx := harness.Context(t, 3*time.Minute)
			w := journey.NewWorld(t)
			there := w.Boot(ctx, way)
			there = thereAndBack(ctx, t, w, way, there, 20)
			if log := there.Sh(ctx, "dmesg"); strings.Contains(log, "BUG:") || strings.Contains(log, "Oops") || strings.Contains(log, "WARNING:") {
				t.Errorf("the guest's log:\n%s", log)
			}
		})
	}
}

// TestOneSided goes from a host with a primary to one without, and back.
func TestOneSided(t *testing.T) {
	long(t)
	way := journey.Way{Name: "one side", Primary: [2]string{"", "none"}}
	ctx := harness.Context(t, 3*time.Minute)
	w := journey.NewWorld(t)
	thereAndBack(ctx, t, w, way, w.Boot(ctx, way), 20)
}

// TestOtherPF has the guest do without its VF, as for work on the PF, and then with another PF's,
// which is on the same wire and is no port of its bridge.
func TestOtherPF(t *testing.T) {
	long(t)
	ctx := harness.Context(t, 2*time.Minute)
	w := journey.NewWorld(t)
	m := w.Boot(ctx, journey.Way{Name: "another PF"})
	pings := w.Peer.Pinger(journey.GuestIP, 5*time.Millisecond)
	for _, pf := range []int{1, 0} {
		m.QMP.Do("failover-switch", map[string]any{"id": "hostdev0", "to": "standby"})
		waitState(m.QMP, "standby")
		w.Peer.Ping(ctx, journey.GuestIP)
		m.QMP.Do("failover-switch", map[string]any{"id": "hostdev0", "to": "primary", "pool": w.Hosts[pf].PF.Name})
		waitState(m.QMP, "primary")
		answers(ctx, t, w, m)
		w.Peer.Ping(ctx, journey.GuestIP)
	}
	p := pings.Pings()
	pings.Stop()
	t.Log(p)
	if p.Lost > p.Sent/20 {
		t.Error("too many are lost")
	}
}

// TestNIC has a whole NIC as the primary, which no PF steers: away and back on its host, then to
// a host without one, and back.
func TestNIC(t *testing.T) {
	long(t)
	ctx := harness.Context(t, 4*time.Minute)
	w, primary := journey.NewNICWorld(t)
	way := journey.Way{Name: "e1000e", Primary: [2]string{primary, "none"}, Driver: "e1000e", Datagrams: journey.ManyDatagrams}
	there := w.Boot(ctx, way)
	switched(there.QMP)
	for _, to := range []string{"standby", "primary"} {
		there.QMP.Do("failover-switch", map[string]any{"id": "net1", "to": to})
		t.Logf("to the %s: %+v", to, switched(there.QMP))
		waitState(there.QMP, to)
		w.Peer.Ping(ctx, journey.GuestIP)
	}
	there = thereAndBack(ctx, t, w, way, there, 10) // its link takes half a second to come up
	there.QMP.Do("quit", nil)                       // the NIC is its driver's again
	there.Wait(ctx)
}

// TestToAndFro does it again and again.
func TestToAndFro(t *testing.T) {
	long(t)
	const n = 50
	way := journey.Way{Name: "to and fro"}
	ctx := harness.Context(t, time.Duration(n+3)*30*time.Second)
	w := journey.NewWorld(t)
	there := w.Boot(ctx, way)
	for range n {
		to := w.Start(ctx, way, 1-there.Host, true)
		moved(t, w.Travel(ctx, way, there, to))
		there.QMP.Do("quit", nil)
		there.Wait(ctx)
		there = to
	}
}

// answers checks that the guest runs on m with its primary, and nowhere else.
func answers(ctx context.Context, t *testing.T, w *journey.World, m *journey.Machine) {
	t.Helper()
	m.WaitPrimary(ctx)
	w.Peer.Ping(ctx, journey.GuestIP)
	var s struct{ Running bool }
	if err := json.Unmarshal(m.QMP.Do("query-status", nil), &s); err != nil || !s.Running {
		t.Errorf("the guest does not run: %v", err)
	}
}

// TestRollback has migrations come to nothing: the guest goes on with its primary, and a second
// try succeeds.
func TestRollback(t *testing.T) {
	long(t)
	way := journey.Way{Name: "rollback"}
	ctx := harness.Context(t, 4*time.Minute)
	w := journey.NewWorld(t)
	from := w.Boot(ctx, way)
	seen := 0 // events before the last migration
	migrate := func(uri string) {
		seen = len(from.Log.Events())
		from.QMP.Do("migrate", map[string]any{"uri": uri})
	}
	ends := func(t *testing.T, want string) {
		t.Helper()
		if s := from.Log.WaitStatusAfter(ctx, seen, "completed", "failed", "cancelled"); s != want {
			t.Errorf("the migration %s: %s", s, from.QMP.Do("query-migrate", nil))
		}
		answers(ctx, t, w, from)
	}
	kept := func(t *testing.T) {
		t.Helper()
		ends(t, "failed")
		if from.Log.Count("UNPLUG_PRIMARY") != 0 {
			t.Error("the primary was taken away for nothing")
		}
	}

	t.Run("nobody there", func(t *testing.T) {
		migrate("unix:/nosuch")
		kept(t)
	})
	vf := w.Hosts[1].VF
	host := "vfio-pci,host=" + vf.PCI
	taken := func(t *testing.T) func() {
		vf.BindVFIO(t)
		busy, err := os.Open("/dev/vfio/" + groupOf(t, vf))
		if err != nil {
			t.Fatal(err)
		}
		return func() { busy.Close() }
	}
	for _, c := range []struct {
		name, primary, why string
		arrange            func(t *testing.T) (undo func())
	}{
		{"the target's VF is taken", host, "busy", taken},
		{"the target's VF is another driver's", host, "bind=auto takes it", func(*testing.T) func() { return func() {} }},
		{"the target cannot bind its VF", host + ",bind=auto", "bind it to vfio-pci: ", func(t *testing.T) func() {
			return wrapped(t, `unshare -m sh -c 'mount -o remount,bind,ro /sys && exec "$0" "$@"'`)
		}},
		{"the target's PF refuses the MAC", host + ",bind=auto", "steer " + journey.GuestMAC + " to hide: give VF 0 of ", func(t *testing.T) func() {
			return wrapped(t, "setpriv --inh-caps=-net_admin --bounding-set=-net_admin")
		}},
		{"the target cannot reset its VF", host + ",bind=auto", "reset", func(t *testing.T) func() {
			method := "/sys/bus/pci/devices/" + vf.PCI + "/reset_method"
			was, err := os.ReadFile(method)
			if err == nil {
				err = os.WriteFile(method, []byte("\n"), 0)
			}
			if err != nil {
				t.Fatal(err)
			}
			return func() { _ = os.WriteFile(method, was, 0) }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer c.arrange(t)()
			other := way
			other.Primary = [2]string{"", c.primary + ",failover-primary=require"}
			to := w.Start(ctx, other, 1, true)
			defer to.Kill()
			migrate(to.URI)
			kept(t)
			if q := string(from.QMP.Do("query-migrate", nil)); !strings.Contains(q, c.why) {
				t.Errorf("the source does not say why: %s", q)
			}
		})
	}
	cancel := func(t *testing.T) {
		t.Helper()
		began := time.Now()
		from.QMP.Do("migrate_cancel", nil)
		ends(t, "cancelled")
		t.Logf("the guest has its primary %v after the cancel", time.Since(began))
	}
	t.Run("cancelled while the guest lets go", func(t *testing.T) {
		to := w.Start(ctx, way, 1, true)
		defer to.Kill()
		migrate(to.URI)
		if err := from.Log.Wait(ctx, "FAILOVER_STATE", "unplugging"); err != nil {
			t.Fatal(err)
		}
		cancel(t)
	})
	t.Run("cancelled while RAM is sent", func(t *testing.T) {
		to := w.Start(ctx, way, 1, true)
		defer to.Kill()
		from.QMP.Do("migrate-set-parameters", map[string]any{"max-bandwidth": 4 << 20})
		migrate(to.URI)
		from.Log.WaitStatusAfter(ctx, seen, "active")
		cancel(t)
	})
	t.Run("the target dies", func(t *testing.T) {
		to := w.Start(ctx, way, 1, true)
		migrate(to.URI)
		from.Log.WaitStatusAfter(ctx, seen, "active")
		to.Kill()
		ends(t, "failed")
		from.QMP.Do("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 30})
	})
	t.Run("cancelled before the switch", func(t *testing.T) {
		hold := func(on bool) {
			from.QMP.Do("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "pause-before-switchover", "state": on}}})
		}
		hold(true)
		defer hold(false)
		to := w.Start(ctx, way, 1, true)
		defer to.Kill()
		migrate(to.URI)
		from.Log.WaitStatusAfter(ctx, seen, "pre-switchover")
		cancel(t)
	})
	t.Run("second try, to a VF that is taken", func(t *testing.T) {
		release := sync.OnceFunc(taken(t))
		defer release()
		other := way
		other.Primary = [2]string{"", host}
		to := w.Start(ctx, other, 1, true)
		defer to.Kill()
		migrate(to.URI)
		if s := from.Log.WaitStatusAfter(ctx, seen, "completed", "failed", "cancelled"); s != "completed" {
			t.Fatalf("the migration %s: %s", s, from.QMP.Do("query-migrate", nil))
		}
		w.Peer.Ping(ctx, journey.GuestIP)
		if err := to.Log.Wait(ctx, "FAILOVER_STATE", "failed"); err != nil {
			t.Fatal(err)
		}
		if q := string(to.QMP.Do("query-failover", nil)); !strings.Contains(q, "busy") {
			t.Errorf("the target does not say why: %s", q)
		}
		release()
		answers(ctx, t, w, to) // it was tried again
	})
}

// wrapped has batons started by a command that takes something from them.
func wrapped(t *testing.T, command string) (undo func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "baton")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nexec "+command+" "+harness.Baton(t)+" \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv(harness.EnvBaton, path)
	return func() {}
}

// TestBlinking has migrations begin while the indicator of a slot of the native kind blinks, which
// it does for 5 s when the guest is asked: a cancel then is a second press.
func TestBlinking(t *testing.T) {
	long(t)
	ctx := harness.Context(t, 3*time.Minute)
	w := journey.NewWorld(t)
	way := journey.Way{Name: "blinking", Args: []string{"-machine", "q35,native-hotplug=on"}}
	from := w.Boot(ctx, way)
	to := w.Start(ctx, way, 1, true)
	from.QMP.Do("migrate", map[string]any{"uri": to.URI})
	for busy := false; !busy; {
		q := string(from.QMP.Do("query-migrate", nil))
		if busy = strings.Contains(q, `"slot":"busy"`); !busy && !strings.Contains(q, `"status":"setup"`) && !strings.Contains(q, `"status":"wait-unplug"`) {
			t.Fatal(q)
		}
	}
	began := time.Now()
	from.QMP.Do("migrate_cancel", nil)
	if s := from.Log.WaitStatusAfter(ctx, 0, "completed", "failed", "cancelled"); s != "cancelled" {
		t.Fatalf("the migration %s", s)
	}
	t.Logf("cancelled in %v", time.Since(began))
	if time.Since(began) > 3*time.Second {
		t.Error("it has waited for the slot")
	}
	from.Sh(ctx, "until dmesg | grep -q 'canceling request to power off'; do sleep 0.05; done")
	answers(ctx, t, w, from)

	// The other blinking is that of a slot which is being turned on.
	from.QMP.Do("failover-switch", map[string]any{"id": "net1", "to": "standby"})
	waitState(from.QMP, "standby")
	to = w.Start(ctx, way, 1, true)
	from.QMP.Do("failover-switch", map[string]any{"id": "net1", "to": "primary"})
	waitState(from.QMP, "plugging")
	moved(t, w.Travel(ctx, way, from, to))
	log := to.Sh(ctx, "dmesg | grep -i pciehp")
	t.Log(log)
	if strings.Count(log, "will power off in 5 sec") != 3 || strings.Count(log, "canceling request to power off") != 1 {
		t.Error("want three requests, one of them taken back")
	}
}

// TestUnsteered has nobody move the MAC: what is lost is as much as with QEMU, which is shown beside.
func TestUnsteered(t *testing.T) {
	long(t)
	var lost [2]int
	for i, way := range []journey.Way{{Name: "steer=none", Steer: "none"}, {Name: "QEMU", VMM: harness.QEMU}} {
		t.Run(way.Name, func(t *testing.T) {
			ctx := harness.Context(t, 2*time.Minute)
			w := journey.NewWorld(t)
			from := w.Boot(ctx, way)
			trip := w.Travel(ctx, way, from, w.Start(ctx, way, 1, true))
			t.Log(trip)
			if trip.Status != "completed" || trip.TCP.Err != nil {
				t.Fatalf("the migration %s: %s; the connection: %v", trip.Status, trip.Query, trip.TCP.Err)
			}
			lost[i] = trip.Pings.Lost
		})
	}
	t.Logf("pings lost: baton with steer=none %d, QEMU %d", lost[0], lost[1])
	if 4*lost[0] < lost[1] || lost[0] > 2*lost[1] {
		t.Error("these are not alike")
	}
}

// TestScript has a program steer, which is told of each step in its environment. This one writes
// that down, and does nothing else.
func TestScript(t *testing.T) {
	long(t)
	ctx := harness.Context(t, 2*time.Minute)
	w := journey.NewWorld(t)
	dir := t.TempDir()
	script, out := filepath.Join(dir, "steer"), filepath.Join(dir, "out")
	text := "#!/bin/sh\necho $BATON_TAP $1 $BATON_STEP $BATON_MAC $BATON_PF $BATON_VF >>" + out + "\n"
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	way := journey.Way{Name: "script", Steer: "script=" + script}
	from := w.Boot(ctx, way)
	to := w.Start(ctx, way, 1, true)
	from.QMP.Do("migrate", map[string]any{"uri": to.URI})
	if s := from.Log.WaitStatusAfter(ctx, 0, "completed", "failed", "cancelled"); s != "completed" {
		t.Fatalf("the migration %s: %s", s, from.QMP.Do("query-migrate", nil))
	}
	to.WaitPrimary(ctx)
	waitState(to.QMP, "primary") // a busy guest may have the carrier before
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", got)
	for i, steps := range []string{"hide both mac primary both standby gone", "hide standby both mac primary"} {
		h, rest, found := w.Hosts[i], string(got), false
		for _, s := range strings.Fields(steps) {
			line := fmt.Sprintf("%s %s %[2]s %s %s 0\n", h.TAP, s, journey.GuestMAC, h.PF.Name)
			if _, rest, found = strings.Cut(rest, line); !found {
				t.Fatalf("%q does not come, or not in its turn", line)
			}
		}
	}
}

// TestSilent has a guest that does not listen to its slots.
func TestSilent(t *testing.T) {
	ctx := harness.Context(t, 4*time.Minute)
	deaf := func(t testing.TB, words ...string) []string {
		return harness.Linux(t, append(words, "acpiphp.disable=1")...)
	}
	w := journey.NewWorld(t)
	way := journey.Way{Name: "silent", Kernel: deaf, Unplug: "cooperative,failover-unplug-timeout=1000"}
	from := w.Start(ctx, way, 0, false)
	from.Output(ctx, "@addr", "eth0", journey.GuestIP+"/24")
	if err := from.Log.Wait(ctx, "FAILOVER_STATE", "plugging"); err != nil {
		t.Fatal(err)
	}
	from.Sh(ctx, "echo 1 >/sys/bus/pci/rescan") // it has not heard of that, either
	answers(ctx, t, w, from)
	to := w.Start(ctx, way, 1, true)
	seen := len(from.Log.Events())
	from.QMP.Do("migrate", map[string]any{"uri": to.URI})
	if s := from.Log.WaitStatusAfter(ctx, seen, "completed", "failed"); s != "failed" {
		t.Fatal(s)
	}
	if q := string(from.QMP.Do("query-migrate", nil)); !strings.Contains(q, "has not let go of it in 1s") {
		t.Errorf("the source does not say why: %s", q)
	}
	answers(ctx, t, w, from)
}

func groupOf(t *testing.T, vf harness.VF) string {
	t.Helper()
	target, err := os.Readlink("/sys/bus/pci/devices/" + vf.PCI + "/iommu_group")
	if err != nil {
		t.Fatal(err)
	}
	return target[strings.LastIndexByte(target, '/')+1:]
}
