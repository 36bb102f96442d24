package migrate

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
)

// moves is how often a guest moves, to and fro: 100 times in the long form.
func moves() int {
	if os.Getenv("BATON_LONG") != "" {
		return 100
	}
	return 5
}

// again moves the guest to and fro under load. Its time goes on, nothing is lost, and neither it
// nor its machines take more of anything than at first.
func (w *world) again(m *machine) *machine {
	ahead, free, first := w.clock(m), memory(w.t, m), use(w.t, m)
	was := w.stopped
	for i := range moves() {
		m = w.move(m, (i+1)%2, w.uri((i+1)%2))
		if i%5 == 4 {
			w.check(m)
		}
	}
	n, stopped := time.Duration(moves()), w.stopped-was
	drift := w.clock(m) - ahead
	w.t.Logf("%d moves: %v stopped, the guest's clock is %v ahead of where it was; %d KiB free, %d at first; %+v, %+v at first", n, stopped, drift, memory(w.t, m), free, use(w.t, m), first)
	if allowed := n*time.Millisecond + stopped + clockError; drift > allowed || drift < -allowed {
		w.t.Errorf("the guest's clock is off by %v after %d moves", drift, n)
	}
	if now := memory(w.t, m); now < free-16<<10 {
		w.t.Errorf("the guest has %d KiB left of %d", now, free)
	}
	if now := use(w.t, m); now.fds > first.fds || now.threads > first.threads+8 || now.rss > first.rss+20<<10 {
		w.t.Errorf("baton uses %+v, at first %+v", now, first)
	}
	return m
}

// clockError is what clock may be wrong by: half the time of the fastest question.
const clockError = 20 * time.Millisecond

// clock returns how far the guest's time is ahead of the host's.
func (w *world) clock(m *machine) time.Duration {
	w.t.Helper()
	best, ahead := time.Hour, time.Duration(0)
	var last int64
	for range 10 {
		before := time.Now()
		out := m.Output(harness.Context(w.t, limit), "@clock")
		took := time.Since(before)
		var c struct{ Real, Monotonic int64 }
		if err := json.Unmarshal([]byte(out), &c); err != nil {
			w.t.Fatal(err)
		}
		if c.Monotonic <= last {
			w.t.Errorf("the monotonic clock says %d after %d", c.Monotonic, last)
		}
		last = c.Monotonic
		if took < best {
			best, ahead = took, time.Unix(0, c.Real).Sub(before.Add(took/2))
		}
	}
	if last < w.monotonic {
		w.t.Errorf("the monotonic clock says %d, and %d before", last, w.monotonic)
	}
	w.monotonic = last
	return ahead
}

// memory is what the guest has available, in KiB.
func memory(t *testing.T, m *machine) int {
	t.Helper()
	text := m.Output(harness.Context(t, limit), "@cat", "/proc/meminfo")
	v := regexp.MustCompile(`MemAvailable: +(\d+) kB`).FindStringSubmatch(text)
	if v == nil {
		t.Fatal(text)
	}
	n, _ := strconv.Atoi(v[1])
	return n
}

// usage is what a baton has of the host.
type usage struct{ fds, threads, rss int } // rss in KiB, guest RAM included

func use(t *testing.T, m *machine) (u usage) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", m.PID())
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	u.fds = len(fds)
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "Threads: %d", &u.threads)
		fmt.Sscanf(line, "VmRSS: %d", &u.rss)
	}
	return u
}
