package bench

import (
	"context"
	"fmt"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/journey"

	"golang.org/x/sys/unix"
)

// failoverRuns is how often each way is measured, which takes about a minute.
const failoverRuns = 3

// TestFailover has a guest with a VF migrate under load, on baton and on QEMU, by their defaults
// and, QEMU, with a script that takes the MAC from the VF when the primary is asked to go. The time to the carrier
// is measured with nobody's load as well: while QEMU's guest waits for it nothing of the load reaches that, and it
// has its CPU for itself.
func TestFailover(t *testing.T) {
	results.notef("failover: ping every 5 ms, %d datagrams/s each way; 82576 VFs, one on each host's NIC, on one wire", journey.UDPRate())
	contender := contenders(t, "host")
	const steered = ", QEMU steered by a script"
	if emulated() {
		results.notef("failover: one trip of each VMM comes before those that count, for the emulator translates code when it runs first")
		for _, way := range []journey.Way{{Name: "first baton"}, {Name: "first QEMU", VMM: harness.QEMU}} {
			live(t, way.Name, func(t testing.TB) { travel(t, way) })
		}
	}
	for run := range failoverRuns {
		for i, way := range []journey.Way{
			{Name: "baton"},
			{Name: "QEMU", VMM: harness.QEMU},
			{Name: "QEMU steered", VMM: harness.QEMU, Script: true},
			{Name: "baton, quiet", Quiet: true},
			{Name: "QEMU, quiet", VMM: harness.QEMU, Quiet: true},
		} {
			live(t, fmt.Sprintf("%s/%d", way.Name, run+1), func(t testing.TB) {
				trip := travel(t, way)
				c := contender[0]
				if way.VMM != "" {
					c = contender[1]
				}
				carrier := func(suffix string) {
					record(t, c, "failover, resume to the primary's carrier"+suffix, "ms", target{MaxRatio: 1}, 1000*trip.Plugged)
				}
				if way.Quiet {
					carrier(", no load")
					return
				}
				network := func(suffix string, goal float64) {
					goals := target{MaxRatio: goal}
					record(t, c, "failover migration, pings lost"+suffix, "", goals, float64(trip.Pings.Lost))
					record(t, c, "failover migration, datagrams to the guest lost"+suffix, "", goals, float64(trip.In.Lost))
					record(t, c, "failover migration, datagrams from the guest lost"+suffix, "", goals, float64(trip.Out.Lost))
					record(t, c, "failover migration, longest gap"+suffix, "ms", goals, trip.Pings.Longest().Duration().Seconds()*1000)
				}
				if i != 1 {
					network(steered, 0.3)
				}
				if i != 2 {
					network("", 0.1)
					record(t, c, "failover, primary taken away", "ms", target{}, 1000*trip.Phase("primary taken away"))
					carrier("")
					record(t, c, "failover, stop to resume", "ms", target{MaxRatio: 1}, 1000*trip.Phase("stop to resume"))
				}
			})
		}
	}
}

// TestFailoverUnplug compares the time from the request to the primary's end with what the
// guest takes to remove it by itself, without anybody's request. The difference is baton's.
func TestFailoverUnplug(t *testing.T) {
	scrub(t)
	ctx := harness.Context(t, 3*time.Minute)
	w := journey.NewWorld(t)
	m := w.Boot(ctx, journey.Way{Name: "unplug"})
	c := contenders(t, "host")[0]
	for range 5 {
		record(t, c, "failover, the guest's own removal of the VF", "ms", target{}, guestRemoves(ctx, t, m))
		m.WaitPrimary(ctx)
		began := len(m.Log.Events())
		m.QMP.Do("failover-switch", map[string]any{"id": "net1", "to": "standby"})
		asked, err := m.Log.WaitAfter(ctx, began, "FAILOVER_STATE", "unplugging")
		if err != nil {
			t.Fatal(err)
		}
		gone, err := m.Log.WaitAfter(ctx, began, "FAILOVER_STATE", "standby")
		if err != nil {
			t.Fatal(err)
		}
		record(t, c, "failover, request to the primary's end", "ms", target{}, 1000*(gone.Time-asked.Time))
		m.QMP.Do("failover-switch", map[string]any{"id": "net1", "to": "primary"})
		if _, err := m.Log.WaitAfter(ctx, began, "FAILOVER_STATE", "primary"); err != nil {
			t.Fatal(err)
		}
		m.WaitPrimary(ctx)
	}
}

// guestRemoves has the guest remove its VF, and find it again, and returns how many ms the first
// took, by the guest's clock.
func guestRemoves(ctx context.Context, t testing.TB, m *journey.Machine) float64 {
	t.Helper()
	var from, to float64
	out := m.Sh(ctx, "d=$(readlink -f /sys/class/net/eth2/device); read a x </proc/uptime; echo 1 >$d/remove; read b x </proc/uptime; echo $a $b; echo 1 >/sys/bus/pci/rescan")
	if _, err := fmt.Sscan(out, &from, &to); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	return 1000 * (to - from)
}

// TestFailoverRAM shows that the stop does not depend on the VF of the target, for which all of
// the RAM is pinned, nor on how much that is.
func TestFailoverRAM(t *testing.T) {
	var host unix.Sysinfo_t
	if err := unix.Sysinfo(&host); err != nil {
		t.Fatal(err)
	}
	if host.Totalram < 4<<30 {
		t.Fatalf("a guest of 2 GiB on both sides takes 4 GiB, and this host has %d MiB; the nested host has them where the machine has 10 GiB to spare", host.Totalram>>20)
	}
	for run := range failoverRuns {
		for _, way := range []journey.Way{
			{Name: "stop to resume, 256 MiB, no VF", Primary: [2]string{"none", "none"}},
			{Name: "stop to resume, 256 MiB, a VF on the target", Primary: [2]string{"none", ""}},
			{Name: "stop to resume, 2 GiB, a VF on the target", Primary: [2]string{"none", ""}, Memory: 2048},
		} {
			live(t, fmt.Sprintf("%s/%d", way.Name, run+1), func(t testing.TB) {
				record(t, contenders(t, "host")[0], way.Name, "ms", target{}, 1000*travel(t, way).Phase("stop to resume"))
			})
		}
	}
}

func travel(t testing.TB, way journey.Way) *journey.Trip {
	scrub(t)
	ctx := harness.Context(t, 3*time.Minute)
	w := journey.NewWorld(t)
	from := w.Boot(ctx, way)
	to := w.Start(ctx, way, 1, true)
	trip := w.Travel(ctx, way, from, to)
	t.Log(trip)
	if trip.Status != "completed" {
		t.Fatalf("%s: %s", trip.Status, trip.Query)
	}
	return trip
}
