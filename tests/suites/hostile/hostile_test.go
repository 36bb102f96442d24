// Package hostile shows that root in a stock Linux can do to the hardware what he likes:
// baton lives on, devices that he left alone work, those that he broke ask for a reset and
// work after it. What needs no driver and no vhost-net is done more thoroughly, and with
// all widths, in tests/l0.
package hostile

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	bootLimit = 2 * time.Minute
	limit     = time.Minute
)

// The machine: functions to be mistreated, some of which have to work afterwards and some
// only after a reset, and a disk to be left alone.
const (
	disk    = "0000:01:00.0"
	nic     = "0000:02:00.0"
	rng     = "0000:00:06.0"
	port    = "0000:00:03.0" // above lost
	lost    = "0000:03:00.0"
	goodOne = "0000:00:08.0"

	hostIP, guestIP = "10.68.0.1", "10.68.0.2"
)

// Offsets in a virtio function's BAR: VIRTIO 1.2, 4.1.4.3; the table is where baton has it.
const (
	driverFeatureSelect = 0x08
	driverFeature       = 0x0c
	deviceStatus        = 0x14
	queueSelect         = 0x16
	queueEnable         = 0x1c
	queueDesc           = 0x20
	queueDriver         = 0x28
	queueDevice         = 0x30
	notify              = 0x3000
	msixTable           = 0x4000

	needsReset = 0x40
)

type machine struct {
	*harness.Guest
	t    *testing.T
	ctx  context.Context
	sums map[string]string // of the disks
}

func TestHostileLinux(t *testing.T) {
	dir := t.TempDir()
	m := &machine{sums: map[string]string{}}
	files := map[string]string{}
	for i, function := range []string{goodOne, disk} {
		data := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{byte(i)}).Read(data)
		files[function] = filepath.Join(dir, fmt.Sprint("disk", i))
		if err := os.WriteFile(files[function], data, 0o600); err != nil {
			t.Fatal(err)
		}
		m.sums[function] = fmt.Sprintf("%x", sha256.Sum256(data))
	}
	up := filepath.Join(dir, "up")
	if err := os.WriteFile(up, []byte("#!/bin/sh -e\nip addr add "+hostIP+"/24 dev $1\nip link set $1 up\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	// Root may then touch what drivers use.
	m.Guest = harness.Start(t, harness.GuestConfig{Args: append(harness.Linux(t, "iomem=relaxed"), "-m", "512M", "-smp", "2",
		"-device", "pcie-root-port,id=r1,addr=1", "-device", "pcie-root-port,id=r2,addr=2",
		"-device", "pcie-root-port,id=r3,addr=3", "-device", "virtio-rng-pci,bus=r3",
		"-drive", "if=none,id=v,format=raw,file="+files[disk], "-device", "virtio-blk-pci,drive=v,bus=r1",
		"-netdev", "tap,id=n,ifname=hostile0,vhost=on,script="+up, "-device", "virtio-net-pci,netdev=n,bus=r2",
		"-device", "virtio-rng-pci,addr=6",
		"-drive", "if=none,id=g,format=raw,file="+files[goodOne], "-device", "virtio-blk-pci,drive=g,addr=8")})
	m.Output(harness.Context(t, bootLimit), "true")
	m.works(t, true)
	m.entropy(t)
	for _, tc := range []struct {
		name string
		do   func(*machine)
	}{
		{"BAR moves", (*machine).barMoves},
		{"widths", (*machine).widths},
		{"bad vectors", (*machine).badVectors},
		{"bad queues", (*machine).badQueues},
		{"config space", (*machine).configSpace},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.do(&machine{m.In(t), t, harness.Context(t, limit), m.sums})
			m.works(t, false)
		})
	}
	// All that is broken by now is whole again after a reset.
	t.Run("reset", func(t *testing.T) {
		g := m.In(t)
		// Not @reboot: the kernel gives what noise has hit a minute to come back first.
		g.Sh(harness.Context(t, limit), "(sleep 1; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 &")
		g.WaitEvent(harness.Context(t, limit), "RESET")
		g.Output(harness.Context(t, bootLimit), "true")
		m.works(t, true)
		m.entropy(t)
		g.Output(harness.Context(t, limit), "@poweroff")
		if code := g.Wait(harness.Context(t, limit)); code != 0 {
			t.Errorf("exit code %d", code)
		}
	})
	if text := m.Stderr.String(); strings.Contains(text, "goroutine") || strings.Contains(text, "crashed") {
		t.Errorf("stderr: %s", text)
	}
}

// entropy checks the device that moves: what it is told while it is elsewhere is lost to it.
func (m *machine) entropy(t *testing.T) {
	t.Helper()
	m.In(t).Sh(harness.Context(t, limit), "echo virtio_rng.0 >/sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng >/dev/null")
}

// works checks the disk that was left alone, or everything that has to work.
func (m *machine) works(t *testing.T, all bool) {
	t.Helper()
	g, ctx := m.In(t), harness.Context(t, limit)
	functions := []string{goodOne}
	if all {
		functions = append(functions, disk)
	}
	for _, function := range functions {
		got := g.Sh(ctx, "echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/$(ls "+file(function, "virtio*/block")+") | cut -d' ' -f1")
		if got != m.sums[function] {
			t.Errorf("disk %s has the sum %s, want %s", function, got, m.sums[function])
		}
	}
	if !all {
		return
	}
	g.Output(ctx, "@addr", "eth0", guestIP+"/24")
	g.Sh(ctx, "ping -c 2 -W 20 "+hostIP)
}

// do runs a script whose commands may fail: the hardware is not what it was.
func (m *machine) do(script string) string {
	m.t.Helper()
	r, err := m.Run(m.ctx, "sh", "-c", script)
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.TrimSpace(r.Stdout)
}

func file(function, name string) string { return "/sys/bus/pci/devices/" + function + "/" + name }

// bar is where a function's BAR 0 was put.
func (m *machine) bar(function string) uint64 {
	m.t.Helper()
	var at uint64
	if _, err := fmt.Sscanf(m.Sh(m.ctx, "head -n 1 "+file(function, "resource")), "0x%x", &at); err != nil {
		m.t.Fatal(err)
	}
	return at
}

// setBAR returns a command that writes BAR 0.
func setBAR(function string, at uint64) string {
	var bytes strings.Builder
	for i := range 8 {
		fmt.Fprintf(&bytes, `\x%02x`, byte(at>>(8*i)))
	}
	return "printf '" + bytes.String() + "' | dd of=" + file(function, "config") + " bs=4 seek=4 conv=notrunc 2>/dev/null\n"
}

// poke and peek are commands that access physical memory with a width in bits.
func poke(at uint64, width int, v uint64) string {
	return fmt.Sprintf("devmem %#x %d %#x\n", at, width, v)
}

func peek(at uint64, width int) string { return fmt.Sprintf("devmem %#x %d\n", at, width) }

// unbind returns a command that takes a virtio device from its driver, and bind one that
// gives it back.
func unbind(function string) string {
	return "cd " + file(function, "virtio*") + " && { basename $PWD >/tmp/name; readlink -f driver >/tmp/driver; cat /tmp/name >$(cat /tmp/driver)/unbind; }\n"
}

const bind = "cat /tmp/name >$(cat /tmp/driver)/bind\n"

// barMoves puts a BAR over everything else and uses it there.
func (m *machine) barMoves() {
	was := m.bar(rng)
	for name, to := range map[string]uint64{
		"RAM":           0x200_0000,
		"the good disk": m.bar(goodOne),
		"its registers": m.bar(goodOne) - 0x4000,
		"the port's":    m.bar(port),
		"ECAM":          0xb000_0000,
		"the IOAPIC":    0xfec0_0000,
		"the LAPICs":    0xfee0_0000,
		"the top":       0xffff_ffff_ffff_8000,
		"nothing":       0,
	} {
		m.do(setBAR(rng, to))
		m.do(peek(m.bar(goodOne), 32) + peek(was, 32))
		if name == "the top" || name == "nothing" {
			continue
		}
		m.do(peek(to, 8) + peek(to+deviceStatus, 8))
	}
	m.do(setBAR(rng, was))
	if got := m.do(peek(was+deviceStatus, 8)); got != "0x0F" {
		m.t.Errorf("after its return the entropy device has the status %s, want 0x0F", got)
	}
}

// widths accesses registers with widths that they do not have, and across their ends.
func (m *machine) widths() {
	var script strings.Builder
	victim := m.bar(disk)
	for _, at := range []uint64{victim, victim + deviceStatus, victim + queueDesc, victim + 0x35, victim + 0xffe, victim + 0x1000, victim + 0x2003, victim + 0x2ffd,
		victim + notify + 1, victim + msixTable + 2, victim + msixTable + 0x7fe, 0xfec0_0000, 0xfec0_0001, 0xfec0_000e, 0xfec0_0013, 0xfec0_0ffd} {
		for _, width := range []int{8, 16, 32, 64} {
			script.WriteString(peek(at, width))
		}
	}
	for _, at := range []uint64{victim + queueSelect + 1, victim + 0x1001, victim + 0x2001, victim + notify + 2, 0xfec0_0003} {
		for _, width := range []int{8, 16, 32, 64} {
			script.WriteString(poke(at, width, 0x1122_3344_5566_7788))
		}
	}
	m.do(script.String() + "dd if=/dev/port bs=1 skip=1000 count=2400 of=/dev/null")
}

// badVectors has interrupts sent with messages that mean nothing, by vhost-net, while
// frames come.
func (m *machine) badVectors() {
	table := m.bar(nic) + msixTable
	save, restore := "", ""
	for i := range uint64(3) {
		for word := range uint64(4) {
			at := table + 16*i + 4*word
			save += fmt.Sprintf("w%d_%d=$(devmem %#x 32)\n", i, word, at)
			restore += fmt.Sprintf("devmem %#x 32 $w%d_%d\n", at, i, word)
		}
	}
	script := save
	for _, message := range []struct{ high, low, data uint64 }{
		{0, 0, 0},                            // no LAPIC's address
		{0xffff_ffff, 0xffff_fffc, 0xffff},   // no address at all
		{0, 0x200_0000, 0x4041},              // RAM
		{0, 0xfee0_0000, 0x0005},             // a vector for exceptions
		{0, 0xfee0_0000, 0x0341},             // reserved
		{0, 0xfee0_0000, 0x0700},             // ExtINT
		{0x1_2345, 0xfeef_f000, 0xffff_0041}, // a CPU that is not there, bits that mean nothing
	} {
		for i := range uint64(3) {
			script += poke(table+16*i, 32, message.low) + poke(table+16*i+4, 32, message.high) + poke(table+16*i+8, 32, message.data) + poke(table+16*i+12, 32, 0)
		}
	}
	flood := exec.CommandContext(m.ctx, "ping", "-n", "-q", "-i", "0.02", guestIP)
	if err := flood.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.do(script + restore)
	flood.Process.Kill()
	flood.Wait()
	m.do("ping -c 3 -W 20 " + hostIP) // whatever was missed, the next frame comes
}

// badQueues has devices started on queues that cannot be, and takes them back.
func (m *machine) badQueues() {
	for _, function := range []string{disk, nic} {
		at := m.bar(function)
		m.do(unbind(function))
		for name, queue := range map[string][3]uint64{
			"outside of RAM":  {0x4000_0000, 0x4001_0000, 0x4002_0000},
			"at the very end": {0xffff_ffff_ffff_fff0, 0xffff_ffff_ffff_fffe, 0xffff_ffff_ffff_fffc},
			"not aligned":     {0x100_0001, 0x101_0001, 0x102_0001},
			"over ECAM":       {0xb000_0000, 0xb000_1000, 0xb000_2000},
		} {
			script := poke(at+deviceStatus, 8, 0) + poke(at+deviceStatus, 8, 1) + poke(at+deviceStatus, 8, 3) +
				poke(at+driverFeatureSelect, 32, 1) + poke(at+driverFeature, 32, 1) + poke(at+deviceStatus, 8, 0xb)
			for i := range uint64(2) {
				script += poke(at+queueSelect, 16, i)
				for area, addr := range queue {
					reg := at + queueDesc + 8*uint64(area)
					script += poke(reg, 32, addr&0xffff_ffff) + poke(reg+4, 32, addr>>32)
				}
				script += poke(at+queueEnable, 16, 1)
			}
			script += poke(at+deviceStatus, 8, 0xf) + poke(at+notify, 16, 0) + peek(at+deviceStatus, 8)
			got := m.do(script)
			status, err := strconv.ParseUint(strings.TrimPrefix(got, "0x"), 16, 8)
			if err != nil || status&needsReset == 0 {
				m.t.Errorf("%s: queues %s: the device's status is %q, want it to ask for a reset", function, name, got)
			}
		}
		m.do(poke(at+deviceStatus, 8, 0) + bind) // a driver expects a device that is reset
	}
	m.works(m.t, true)
}

// configSpace writes noise to every register, in several widths, of an endpoint, a bridge
// and what is behind it.
func (m *machine) configSpace() {
	for _, function := range []string{rng, port, lost} {
		config := file(function, "config")
		m.do("for bs in 1 2 3 4; do dd if=/dev/urandom of=" + config + " bs=$bs count=$((256 / bs)) conv=notrunc; dd if=" + config + " of=/dev/null bs=$bs count=$((256 / bs)); done\n" +
			"dd if=/dev/urandom of=" + config + " bs=4096 conv=notrunc")
	}
}
