package hotplug

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// held is what a baton holds of the host.
type held struct {
	files, mappings, threads int
	resident                 int // KiB
}

func holds(t *testing.T, pid int) (h held) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", pid)
	files, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile(proc + "maps")
	if err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	field := func(name string) int {
		m := regexp.MustCompile(name + `:\s+(\d+)`).FindSubmatch(status)
		n, _ := strconv.Atoi(string(m[1]))
		return n
	}
	// RAM is the guest's business.
	return held{len(files), strings.Count(string(maps), "\n"), field("Threads"), field("RssAnon")}
}

// TestCycles plugs and unplugs under traffic, by all ways of a machine in turn, and counts what
// baton holds: 20 times in all, or 200 times with BATON_LONG.
func TestCycles(t *testing.T) {
	n := 10
	if os.Getenv("BATON_LONG") != "" {
		n = 100 // on each machine
	}
	each(t, func(t *testing.T, machine string) {
		v := start(t, []string{"-machine", machine})
		v.up()
		addAddr(t)
		ping := exec.Command("ping", "-n", "-i", "0.02", guestAddr)
		if err := ping.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = ping.Process.Kill(); _ = ping.Wait() }()

		var use []way
		for _, w := range ways {
			if w.machine == machine && w.most < 10*time.Second || n > 10 && w.machine == machine {
				use = append(use, w)
			}
		}
		var first held
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
				first = holds(t, v.g.PID())
			}
		}
		last := holds(t, v.g.PID())
		t.Logf("%d cycles, unplug %v in the mean; held after 4: %+v, after all: %+v", n, (took / time.Duration(2*n)).Round(time.Millisecond), first, last)
		if last.files > first.files || last.mappings > first.mappings+8 || last.threads > first.threads+4 || last.resident > first.resident+16<<10 {
			t.Errorf("something leaks: %+v, then %+v", first, last)
		}
		if links, _ := filepath.Glob("/sys/class/net/" + tap); len(links) != 1 {
			t.Error("the TAP has gone with its device")
		}
		v.healthy()
	})
}
