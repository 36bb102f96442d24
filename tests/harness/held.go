package harness

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// Held is what a baton holds of its host: files, of these eventfds and VFIO's, mappings of files of
// devices, mappings in all, threads, memory of its own in KiB, and in KVM message routes and memory
// slots.
type Held struct{ Files, EventFDs, VFIO, Devices, Mappings, Threads, OwnKiB, Routes, Slots int }

// Holds counts what the guest's baton holds; guestMiB is the size of the guest's RAM, q its monitor.
func (g *Guest) Holds(q *QMP, guestMiB uint64) (h Held) {
	g.t.Helper()
	dir := fmt.Sprintf("/proc/%d/", g.PID())
	links, err := filepath.Glob(dir + "fd/*")
	must(g.t, "files", err)
	for _, l := range links {
		target, err := os.Readlink(l)
		if err != nil {
			continue // closed just now
		}
		h.Files++
		switch {
		case target == "anon_inode:[eventfd]":
			h.EventFDs++
		case strings.Contains(target, "vfio"):
			h.VFIO++
		}
	}
	maps, err := os.ReadFile(dir + "maps")
	must(g.t, "mappings", err)
	h.Mappings = strings.Count(string(maps), "\n")
	h.Devices = len(regexp.MustCompile(`(?m)^.*(vfio|kvm).*$`).FindAll(maps, -1))
	threads, err := os.ReadDir(dir + "task")
	must(g.t, "threads", err)
	h.Threads = len(threads)
	smaps, err := os.Open(dir + "smaps")
	must(g.t, "memory", err)
	defer smaps.Close()
	own, err := OwnMemory(smaps, guestMiB<<20)
	must(g.t, "memory", err)
	h.OwnKiB = int(own >> 10)
	h.Slots = strings.Count(q.Human("info mtree"), ": slot ")
	h.Routes = strings.Count(q.Human("info irq"), "gsi ")
	return h
}

// Leaked says what has come to stay since then, "" if it is nothing. Go's own mappings, threads and
// heap come and go a little.
func (h Held) Leaked(since Held) string {
	spare := since
	spare.Mappings += 8
	spare.Threads += 4
	spare.OwnKiB += 16 << 10
	if h.Files > spare.Files || h.EventFDs > spare.EventFDs || h.VFIO > spare.VFIO || h.Devices > spare.Devices || h.Mappings > spare.Mappings ||
		h.Threads > spare.Threads || h.OwnKiB > spare.OwnKiB || h.Routes > spare.Routes || h.Slots > spare.Slots {
		return fmt.Sprintf("held is %+v, was %+v", h, since)
	}
	return ""
}

// OwnMemory sums up what a process has for itself, in bytes: the private pages of its
// mappings in smaps (proc(5)), without the one that is the guest's RAM, known by being
// writable and of its size, or larger by what aligns it to huge pages.
func OwnMemory(smaps io.Reader, guestRAM uint64) (private uint64, err error) {
	const kib = 1 << 10
	const alignment = 2 << 20
	writable, isGuest, guests := false, false, 0
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) >= 5 && len(f[1]) == 4 && strings.Contains(f[3], ":") {
			writable = strings.HasPrefix(f[1], "rw") // a new mapping: address, mode, offset, device
			continue
		}
		key, rest, _ := strings.Cut(lines.Text(), ":")
		var value uint64
		if field, _, ok := strings.Cut(strings.TrimSpace(rest), " kB"); ok {
			if value, err = strconv.ParseUint(field, 10, 64); err != nil {
				return 0, fmt.Errorf("smaps: %s: %w", key, err)
			}
		}
		switch key {
		case "Size":
			if isGuest = writable && value*kib >= guestRAM && value*kib <= guestRAM+alignment; isGuest {
				guests++
			}
		case "Private_Clean", "Private_Dirty":
			if !isGuest {
				private += value * kib
			}
		}
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	if guests != 1 {
		return 0, fmt.Errorf("smaps: %d mappings have the size of the guest's RAM", guests)
	}
	return private, nil
}
