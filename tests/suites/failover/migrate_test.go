package failover

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/journey"
)

// moved checks what became of a guest that had, or got, a primary.
func moved(t *testing.T, trip *journey.Trip) {
	t.Helper()
	t.Log(trip)
	if trip.Status != "completed" {
		t.Fatalf("the migration %s: %s", trip.Status, trip.Query)
	}
	// What is lost is what came while the guest's driver let go, and while it began.
	if trip.Pings.Lost > trip.Pings.Sent/20 {
		t.Errorf("%v", trip.Pings)
	}
	if trip.TCP.Err != nil {
		t.Errorf("the connection: %v", trip.TCP.Err)
	}
	if trip.In.Lost > 200 || trip.Out.Lost > 200 {
		t.Errorf("datagrams: to the guest %+v, from the guest %+v", trip.In, trip.Out)
	}
}

// TestMigrate has the guest go to the other host, each with a VF for it, and back.
func TestMigrate(t *testing.T) {
	for _, way := range []journey.Way{
		{Name: "auto"},
		{Name: "surprise, 4 vCPUs", Unplug: "surprise", CPUs: 4},
		{Name: "Linux 6.1", Kernel: harness.Linux61},
	} {
		t.Run(way.Name, func(t *testing.T) {
			if way.Kernel != nil {
				way.Kernel(t) // or skip
			}
			ctx := harness.Context(t, 3*time.Minute)
			w := journey.NewWorld(t)
			there := w.Boot(ctx, way)
			for range 2 {
				to := w.Start(ctx, way, 1-there.Host, true)
				moved(t, w.Travel(ctx, way, there, to))
				there.QMP.Do("quit", nil)
				there.Wait(ctx)
				there = to
			}
			if log := there.Sh(ctx, "dmesg"); strings.Contains(log, "BUG:") || strings.Contains(log, "Oops") || strings.Contains(log, "WARNING:") {
				t.Errorf("the guest's log:\n%s", log)
			}
		})
	}
}

// TestOneSided goes from a host with a primary to one without, and back.
func TestOneSided(t *testing.T) {
	way := journey.Way{Name: "one side", Primary: [2]string{"", "none"}}
	ctx := harness.Context(t, 3*time.Minute)
	w := journey.NewWorld(t)
	there := w.Boot(ctx, way)
	for range 2 {
		to := w.Start(ctx, way, 1-there.Host, true)
		moved(t, w.Travel(ctx, way, there, to))
		there.QMP.Do("quit", nil)
		there.Wait(ctx)
		there = to
	}
}

// TestToAndFro does it again and again; the long form 50 times.
func TestToAndFro(t *testing.T) {
	n, rate := 4, 0
	if os.Getenv("BATON_LONG") != "" {
		n, rate = 50, 2000
	}
	way := journey.Way{Name: "to and fro", Rate: rate}
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
	way := journey.Way{Name: "rollback"}
	ctx := harness.Context(t, 4*time.Minute)
	w := journey.NewWorld(t)
	from := w.Boot(ctx, way)
	migrate := func(uri string) string {
		seen := len(from.Log.Events())
		from.QMP.Do("migrate", map[string]any{"uri": uri})
		return from.Log.WaitStatusAfter(ctx, seen, "completed", "failed", "cancelled")
	}

	t.Run("nobody there", func(t *testing.T) {
		if s := migrate("unix:/nosuch"); s != "failed" {
			t.Error(s)
		}
		if from.Log.Count("UNPLUG_PRIMARY") != 0 {
			t.Error("the primary was taken away for nothing")
		}
		answers(ctx, t, w, from)
	})
	t.Run("the target requires a VF that is taken", func(t *testing.T) {
		w.Hosts[1].VF.BindVFIO(t)
		busy, err := os.Open("/dev/vfio/" + groupOf(t, w.Hosts[1].VF))
		if err != nil {
			t.Fatal(err)
		}
		defer busy.Close()
		other := way
		other.Primary = [2]string{"", "vfio-pci,failover-primary=require,host=" + w.Hosts[1].VF.PCI}
		to := w.Start(ctx, other, 1, true)
		if s := migrate(to.URI); s != "failed" {
			t.Error(s)
		}
		if q := string(from.QMP.Do("query-migrate", nil)); !strings.Contains(q, "busy") {
			t.Errorf("the source does not say why: %s", q)
		}
		if from.Log.Count("UNPLUG_PRIMARY") != 0 {
			t.Error("the primary was taken away for nothing")
		}
		answers(ctx, t, w, from)
		to.Kill()
	})
	t.Run("cancelled while the guest lets go", func(t *testing.T) {
		to := w.Start(ctx, way, 1, true)
		seen := len(from.Log.Events())
		from.QMP.Do("migrate", map[string]any{"uri": to.URI})
		if err := from.Log.Wait(ctx, "UNPLUG_PRIMARY", ""); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		from.QMP.Do("migrate_cancel", nil)
		if s := from.Log.WaitStatusAfter(ctx, seen, "completed", "failed", "cancelled"); s != "cancelled" {
			t.Errorf("%s", s)
		}
		t.Logf("cancelled after %v", time.Since(began))
		answers(ctx, t, w, from)
		to.Kill()
	})
	t.Run("the target dies", func(t *testing.T) {
		to := w.Start(ctx, way, 1, true)
		from.QMP.Do("migrate-set-parameters", map[string]any{"max-bandwidth": 4 << 20})
		seen := len(from.Log.Events())
		from.QMP.Do("migrate", map[string]any{"uri": to.URI})
		if s := from.Log.WaitStatusAfter(ctx, seen, "active"); s != "active" {
			t.Fatal(s)
		}
		to.Kill()
		if s := from.Log.WaitStatusAfter(ctx, seen, "completed", "failed"); s != "failed" {
			t.Error(s)
		}
		from.QMP.Do("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 30})
		answers(ctx, t, w, from)
	})
	t.Run("second try", func(t *testing.T) {
		to := w.Start(ctx, way, 1, true)
		moved(t, w.Travel(ctx, way, from, to))
		answers(ctx, t, w, to)
	})
}

// TestSilent has a guest that does not listen to its slots.
func TestSilent(t *testing.T) {
	ctx := harness.Context(t, 4*time.Minute)
	deaf := func(t testing.TB, words ...string) []string {
		return harness.Linux(t, append(words, "acpiphp.disable=1")...)
	}
	w := journey.NewWorld(t)
	way := journey.Way{Name: "silent", Kernel: deaf, Unplug: "cooperative,failover-unplug-timeout=1000"}
	from := w.Boot(ctx, way)
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
