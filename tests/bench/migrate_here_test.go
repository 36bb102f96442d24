package bench

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// fill writes to each page of the MiB from 16 on, so that all of them have to be sent.
func fill(mib int) tiny.Code {
	const pagesOfMiB = 256
	c := binary.LittleEndian.AppendUint32(tiny.Code{0xbf}, 16<<20)                     //     mov $16 MiB, %edi
	c = binary.LittleEndian.AppendUint32(append(c, 0xb9), uint32(mib)*pagesOfMiB)      //     mov $pages, %ecx
	return append(c, 0x89, 0x3f, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x49, 0x75, 0xf5) // 1: mov %edi, (%edi); add $4096, %edi; dec %ecx; jnz 1b
}

// fillForEver does that over and over.
func fillForEver(mib int) tiny.Code {
	c := fill(mib)
	return append(c, 0xe9, byte(-len(c)-5), 0xff, 0xff, 0xff) // jmp to the beginning
}

// TestMigrateHere measures moves of a guest of a few instructions over the loopback interface: on
// any KVM, the machine's own included, so that what is measured is the VMM and not the
// emulation below it.
func TestMigrateHere(t *testing.T) {
	onlyHere(t)
	const mib = 2560
	idle := tiny.Kernel(t, fill(mib), tiny.Say("up"), tiny.Halt)
	results.notef("tiny guests: %d MiB written, 1 vCPU, tcp over lo, no limit of bandwidth, downtime-limit 300 ms", mib)
	for i := range migrateRuns {
		for _, channels := range []int{0, 1, 2, 4} {
			for _, c := range contenders(t, "host,-arch-capabilities") {
				t.Run(fmt.Sprintf("%d channels/%s/%d", channels, c.name, i+1), func(t *testing.T) {
					m := moveTiny(t, c, idle, mib+140, mib+140, channels)
					name, goal := fmt.Sprintf("migration here, %d channels, ", channels), target{MinRatio: 1.3}
					if channels == 0 {
						name, goal = "migration here, ", target{MinRatio: 2.5}
					}
					record(t, c, name+"RAM rate", "GB/s", goal, m.RAM.NormalBytes/1e6/(m.Total-m.Setup))
					record(t, c, name+"stop", "ms", atMost(0.5), m.Down)
				})
			}
		}
	}
	for i := range migrateRuns {
		busy := tiny.Kernel(t, fill(256), tiny.Say("up"), fillForEver(16))
		for _, c := range contenders(t, "host,-arch-capabilities") {
			t.Run(fmt.Sprintf("busy/%s/%d", c.name, i+1), func(t *testing.T) {
				m := moveTiny(t, c, busy, 512, 300, 0)
				record(t, c, "migration here, 256 MiB, 16 MiB of it written all the time, total time", "ms", target{}, m.Total)
				record(t, c, "migration here, 256 MiB, 16 MiB of it written all the time, stop", "ms", atMost(0.5), m.Down)
			})
		}
	}
}

// TestMigrateGrowth shows how the total time grows with RAM, of which 256 MiB are written: what is
// left is the cost of looking at it, and of the dirty log.
func TestMigrateGrowth(t *testing.T) {
	onlyHere(t)
	kernel := tiny.Kernel(t, fill(256), tiny.Say("up"), tiny.Halt)
	sizes := []float64{1, 2, 4, 8, 16}
	figure := func(gib float64) string {
		return fmt.Sprintf("migration here, %2v GiB, 256 MiB written, total time", gib)
	}
	for i := range migrateRuns {
		for _, gib := range sizes {
			for _, c := range contenders(t, "host,-arch-capabilities") {
				t.Run(fmt.Sprintf("%v GiB/%s/%d", gib, c.name, i+1), func(t *testing.T) {
					m := moveTiny(t, c, kernel, int(gib)<<10, 300, 0)
					record(t, c, figure(gib), "ms", atMost(1), m.Total)
					if gib == 8 {
						record(t, c, "migration here, 8 GiB, one look at the dirty log", "ms", target{}, median(m.looks))
					}
				})
			}
		}
	}
	for _, c := range contenders(t, "host,-arch-capabilities") {
		var times []float64
		for _, gib := range sizes {
			times = append(times, median(*c.values(results.figure(figure(gib), "ms", atMost(1)))))
		}
		if slices.Contains(times, 0) { // not all were asked for
			continue
		}
		base, slope, off := line(sizes, times)
		results.notef("growth, %s: %.0f ms and %.1f ms a GiB; no median is further than %.0f ms from that line", c.name, base, slope, off)
	}
}

// line is the straight line y = base + slope x with the least squares, and how far the furthest
// point is from it.
func line(x, y []float64) (base, slope, off float64) {
	var mx, my, xy, xx float64
	for i := range x {
		mx, my = mx+x[i]/float64(len(x)), my+y[i]/float64(len(x))
	}
	for i := range x {
		xy, xx = xy+(x[i]-mx)*(y[i]-my), xx+(x[i]-mx)*(x[i]-mx)
	}
	slope = xy / xx
	base = my - slope*mx
	for i := range x {
		off = max(off, math.Abs(y[i]-base-slope*x[i]))
	}
	return base, slope, off
}

// looks are how long a VMM took each time, in ms, to find the pages that were written.
func looks(t *testing.T, c contender, log string) (ms []float64) {
	t.Helper()
	if c.vmm != harness.QEMU {
		for _, m := range regexp.MustCompile(`found in ([0-9.]+[mµ]?s)`).FindAllStringSubmatch(log, -1) {
			d, err := time.ParseDuration(m[1])
			if err != nil {
				t.Fatal(err)
			}
			ms = append(ms, d.Seconds()*1e3)
		}
		return ms
	}
	began := 0.0
	for i, m := range regexp.MustCompile(`@([0-9.]+):migration_bitmap_sync_(start|end)`).FindAllStringSubmatch(log, -1) {
		at, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		if m[2] == "start" {
			began = at
		} else if i > 1 { // the first is the beginning of the log
			ms = append(ms, (at-began)*1e3)
		}
	}
	return ms
}

// onlyHere is for what needs more memory than the nested host has.
func onlyHere(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skip(err)
	}
	if harness.Nested() {
		t.Skip("the nested host has too little memory: make bench runs it on this machine")
	}
}

// moveTiny moves a guest that says up when it may be moved, of whose memory it has written so much.
func moveTiny(t *testing.T, c contender, kernel string, mib, written, channels int) migration {
	dir, err := os.MkdirTemp("", "bench") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	start := func(name string, more ...string) (*harness.Guest, *harness.QMP) {
		socket := filepath.Join(dir, name)
		if c.vmm == harness.QEMU {
			more = append(more, "-msg", "timestamp=on", "-trace", "migration_bitmap_sync_start", "-trace", "migration_bitmap_sync_end")
		}
		args := append(c.args[:len(c.args):len(c.args)], "-m", fmt.Sprint(mib), "-qmp", "unix:"+socket+",server=on,wait=off", "-kernel", kernel)
		g := harness.Start(t, harness.GuestConfig{Name: name, VMM: c.vmm, NoAgent: true, Args: append(args, more...)})
		q := harness.DialQMP(t, harness.Context(t, time.Minute), socket)
		caps := []any{map[string]any{"capability": "events", "state": true}}
		if channels > 0 {
			caps = append(caps, map[string]any{"capability": "multifd", "state": true})
			q.Do("migrate-set-parameters", map[string]any{"multifd-channels": channels})
		}
		q.Do("migrate-set-capabilities", map[string]any{"capabilities": caps})
		q.Do("migrate-set-parameters", map[string]any{"max-bandwidth": 100 << 30})
		return g, q
	}
	source, from := start("source")
	source.WaitSerial(harness.Context(t, time.Minute), "up")
	_, to := start("target", "-incoming", "defer")
	const uri = "tcp:127.0.0.1:4498"
	to.Do("migrate-incoming", map[string]any{"uri": uri})
	// A machine that is virtual itself may get back from its host, page by page, what has been free
	// for some seconds, which takes longer than all else: what the guest is to have is freed just now.
	occupy(t, written<<20)()
	from.Do("migrate", map[string]any{"uri": uri})
	m := migrationEnd(t, from)
	t.Logf("%s: %s", c.name, from.Do("query-migrate", nil))
	m.looks = looks(t, c, source.Stderr.String())
	from.Do("quit", nil)
	to.Do("quit", nil)
	return m
}

// migrationEnd waits for a migration's end.
func migrationEnd(t testing.TB, q *harness.QMP) (m migration) {
	t.Helper()
	for {
		var data struct{ Status string }
		decode(t, string(q.WaitEvent("MIGRATION").Data), &data)
		switch data.Status {
		case "failed", "cancelled":
			t.Fatalf("migration %s: %s", data.Status, q.Do("query-migrate", nil))
		case "completed":
			decode(t, string(q.Do("query-migrate", nil)), &m)
			return m
		}
	}
}
