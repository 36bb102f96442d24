// Package bench compares baton with QEMU: the same kernel, initrd, memory and virtio devices
// on the same host, one run of each in turn, so that what else the host does hits both.
//
//	TestLinux   for each run:  start ──> BATON-READY ──> memory ──> disk ──> network (subtests)
//	TestExits   a guest of a few instructions that only exits
//	TestGokvm   whether the other VMM in Go boots this kernel, and how fast
//
// A missed target is a line in the table, not a failed test: what fails is a measurement.
// `make bench` runs it, TestExits also on the machine's own KVM, and shows the tables. They
// are in the artifacts as table.txt and results.json.
package bench

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// ownMemory sums up what a process has for itself, in bytes: the private pages of its
// mappings in smaps (proc(5)), without the one that is the guest's RAM, known by being
// writable and of its size, or larger by what aligns it to huge pages.
func ownMemory(smaps io.Reader, guestRAM uint64) (private uint64, err error) {
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
