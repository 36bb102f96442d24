package bench

import (
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/journey"
)

// TestFailover has a guest with a VF migrate under load, on baton and on QEMU, by their defaults
// and, QEMU, with a script that takes the MAC from the VF when the primary is asked to go.
func TestFailover(t *testing.T) {
	results.notef("failover: ping every 5 ms, 100 datagrams/s each way; 82576 VFs, one on each host's NIC, on one wire")
	contender := contenders(t, "host")
	for i, way := range []journey.Way{
		{Name: "baton"},
		{Name: "QEMU", VMM: harness.QEMU},
		{Name: "QEMU steered", VMM: harness.QEMU, Script: true},
	} {
		t.Run(way.Name, func(t *testing.T) {
			trip := travel(t, way)
			goal, suffix := 0.1, ""
			if i == 2 {
				goal, suffix = 0.3, ", QEMU steered by a script"
			}
			measure := func(c int, suffix string, goal float64) {
				lost := func(name string, n int) {
					record(t, contender[c], name+suffix, "", target{MaxRatio: goal}, float64(n))
				}
				lost("failover migration, pings lost", trip.Pings.Lost)
				lost("failover migration, datagrams to the guest lost", trip.In.Lost)
				lost("failover migration, datagrams from the guest lost", trip.Out.Lost)
				record(t, contender[c], "failover migration, longest gap"+suffix, "ms", target{MaxRatio: goal}, trip.Pings.Longest().Duration().Seconds()*1000)
			}
			switch i {
			case 0: // beside both
				measure(0, "", 0.1)
				measure(0, ", QEMU steered by a script", 0.3)
				record(t, contender[0], "failover, primary taken away", "ms", target{}, 1000*trip.Phase("primary taken away"))
				record(t, contender[0], "failover, resume to the primary's carrier", "ms", target{MaxRatio: 1}, 1000*trip.Plugged)
				record(t, contender[0], "failover, stop to resume", "ms", target{MaxRatio: 1}, 1000*trip.Phase("stop to resume"))
			default:
				measure(1, suffix, goal)
				if i == 1 {
					record(t, contender[1], "failover, primary taken away", "ms", target{}, 1000*trip.Phase("primary taken away"))
					record(t, contender[1], "failover, resume to the primary's carrier", "ms", target{MaxRatio: 1}, 1000*trip.Plugged)
					record(t, contender[1], "failover, stop to resume", "ms", target{MaxRatio: 1}, 1000*trip.Phase("stop to resume"))
				}
			}
		})
	}
}

// TestFailoverRAM shows that the stop does not depend on the VF of the target, for which all of
// the RAM is pinned, nor on how much that is.
func TestFailoverRAM(t *testing.T) {
	for _, way := range []journey.Way{
		{Name: "stop to resume, 256 MiB, no VF", Primary: [2]string{"none", "none"}},
		{Name: "stop to resume, 256 MiB, a VF on the target", Primary: [2]string{"none", ""}},
		{Name: "stop to resume, 1 GiB, a VF on the target", Primary: [2]string{"none", ""}, Memory: 1024},
	} {
		t.Run(way.Name, func(t *testing.T) {
			record(t, contenders(t, "host")[0], way.Name, "ms", target{}, 1000*travel(t, way).Phase("stop to resume"))
		})
	}
}

func travel(t *testing.T, way journey.Way) *journey.Trip {
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
