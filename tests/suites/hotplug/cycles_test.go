package hotplug

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"baton/tests/harness"
)

// TestCycles plugs and unplugs under traffic, by all ways of a machine in turn, and counts what
// baton holds: 20 times in all, or 200 times with BATON_LONG.
func TestCycles(t *testing.T) {
	n := 10
	if os.Getenv("BATON_LONG") != "" {
		n = 100 // on each machine
	}
	each(t, func(t *testing.T, s setup) {
		v := s.start(t, nil)
		v.up()
		addAddr(t)
		ping := exec.Command("ping", "-n", "-i", "0.02", guestAddr)
		if err := ping.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = ping.Process.Kill(); _ = ping.Wait() }()

		var use []way
		for _, w := range ways {
			if w.machine == s.machine && w.most < 10*time.Second || n > 10 && w.machine == s.machine {
				use = append(use, w)
			}
		}
		var first harness.Held
		var took time.Duration
		for i := range n {
			w := use[i%len(use)]
			v.read(v.plugDisk(w.bus), w)
			took += v.unplug("disk0", w.mode)
			v.gone(w, "[ -e /sys/block/vda ]")
			name := v.plugNIC(w.bus)
			v.sh("ping -c 1 -W 20 " + hostAddr)
			took += v.unplug("nic0", w.mode)
			v.gone(w, "[ -e /sys/class/net/"+name+" ]")
			if i == 3 { // by then, all that stays is there
				first = v.g.Holds(v.q, 256)
			}
		}
		last := v.g.Holds(v.q, 256)
		t.Logf("%d cycles, unplug %v in the mean; held after 4: %+v, after all: %+v", n, (took / time.Duration(2*n)).Round(time.Millisecond), first, last)
		if leak := last.Leaked(first); leak != "" {
			t.Error(leak)
		}
		if links, _ := filepath.Glob("/sys/class/net/" + tap); len(links) != 1 {
			t.Error("the TAP has gone with its device")
		}
		v.healthy()
	})
}
