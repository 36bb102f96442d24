package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"baton/tests/harness"
)

// migrateRuns is how often each VMM moves each guest.
const migrateRuns = 5

// TestMigrate measures moves of a guest between two processes of a VMM, by TCP over the loopback
// interface: the time that they take, and, in moves of their own, the stop, with a peer that sends a ping
// every millisecond. To answer those takes an emulated host more time than to move the guest.
func TestMigrate(t *testing.T) {
	peer := harness.NewVethPeer(t, hostAddr+"/24")
	harness.Tap(t, tapName, 1)
	harness.Tap(t, tapName+"b", 1)
	harness.Bridge(t, "wire", peer.Uplink, tapName, tapName+"b")
	harness.Up(t, "lo")
	results.notef("migration: 1 vCPU, tcp over lo, no limit of bandwidth, downtime-limit 300 ms; the stop is the longest time without an answer to a ping at 1 ms, in moves of their own")
	if emulated() {
		results.notef("migration: one move of each VMM comes before those that count, for the emulator translates code when it runs first")
		for _, c := range contenders(t, "host") {
			live(t, "first/"+c.name, func(t testing.TB) { measureMigration(t, c, peer, true, "", 256, 50) })
		}
	}
	for _, s := range []struct {
		name       string
		mib, dirty int
	}{
		{"idle 256 MiB", 256, 0},
		{"idle 1 GiB", 1024, 0},
		{"256 MiB, 50 MiB/s dirtied", 256, 50},
	} {
		for i := range migrateRuns {
			for _, c := range contenders(t, "host") {
				for _, pinged := range []bool{false, true} {
					live(t, fmt.Sprintf("%s/%s/%d/pinged=%v", s.name, c.name, i+1, pinged), func(t testing.TB) { measureMigration(t, c, peer, pinged, s.name, s.mib, s.dirty) })
				}
			}
		}
	}
}

// migration is query-migrate.
type migration struct {
	Status string
	Error  string  `json:"error-desc"`
	Total  float64 `json:"total-time"` // ms
	Setup  float64 `json:"setup-time"`
	Down   float64 `json:"downtime"`
	RAM    struct {
		Transferred float64 // bytes
		NormalBytes float64 `json:"normal-bytes"`
		DirtySyncs  float64 `json:"dirty-sync-count"`
	}
	looks []float64 // see there
}

func measureMigration(t testing.TB, c contender, peer *harness.Peer, pinged bool, name string, mib, dirty int) {
	dir, err := os.MkdirTemp("", "bench") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	start := func(name, tap string, more ...string) (*harness.Guest, *harness.QMP) {
		socket := filepath.Join(dir, name)
		args := append(c.args[:len(c.args):len(c.args)], "-m", fmt.Sprint(mib), "-smp", "1", "-qmp", "unix:"+socket+",server=on,wait=off",
			"-kernel", harness.Image(t, "vmlinuz"), "-initrd", harness.Image(t, "test.cpio"), "-append", cmdline,
			"-netdev", "tap,id=n0,ifname="+tap+",script=no,downscript=no,vhost=on", "-device", "virtio-net-pci,netdev=n0,mac="+guestMAC)
		g := harness.Start(t, harness.GuestConfig{Name: name, VMM: c.vmm, Args: append(args, more...)})
		q := harness.DialQMP(t, harness.Context(t, 3*time.Minute), socket)
		q.Do("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "events", "state": true}}})
		parameters := map[string]any{"max-bandwidth": 100 << 30}
		if c.vmm != harness.QEMU { // a nested host may stand still for seconds
			parameters["stall-timeout"] = 60000
		}
		q.Do("migrate-set-parameters", parameters)
		return g, q
	}
	scrub(t)
	source, from := start("source", tapName)
	ctx := harness.Context(t, 3*time.Minute)
	source.Output(ctx, "@addr", guestMAC, guestAddr+"/24")
	if dirty > 0 {
		source.Output(ctx, "@stamp", "64", fmt.Sprint(dirty))
	}
	peer.Ping(ctx, guestAddr)
	there, to := start("target", tapName+"b", "-incoming", "defer")
	const uri = "tcp:127.0.0.1:4499"
	to.Do("migrate-incoming", map[string]any{"uri": uri})
	var before, after struct{ Writes float64 }
	if dirty > 0 {
		decode(t, source.Output(ctx, "@stamp-check"), &before)
	}
	began := time.Now()
	var pings *harness.Pinger
	if pinged {
		pings = peer.Pinger(guestAddr, time.Millisecond)
	}
	from.Do("migrate", map[string]any{"uri": uri})
	m := migrationEnd(t, from)
	peer.Ping(ctx, guestAddr)
	if pinged {
		pings.Stop()
	}
	if dirty > 0 {
		decode(t, there.Output(ctx, "@stamp-check"), &after)
		t.Logf("%s dirties %.1f MiB/s", c.name, (after.Writes-before.Writes)/256/time.Since(began).Seconds())
	}
	t.Logf("%s: %+v", c.name, m)
	if name == "" {
		return
	}
	name = "migration, " + name
	if !pinged {
		record(t, c, name+", total time", "ms", atMost(0.7), m.Total)
		record(t, c, name+", bytes sent", "MiB", atMost(1), m.RAM.Transferred/(1<<20))
		return
	}
	seen := pings.Pings()
	t.Logf("ping: %v", seen)
	record(t, c, name+", pinged, total time", "ms", target{}, m.Total)
	record(t, c, name+", stop as the peer sees it", "ms", atMost(0.5), float64(seen.Longest().Duration().Microseconds())/1000)
	record(t, c, name+", downtime as reported", "ms", target{}, m.Down)
}

func atMost(ratio float64) target { return target{MaxRatio: ratio} }
