// Package boot shows that a stock Debian kernel runs on baton: what it finds, what time it
// is there, and every way in which it can end.
package boot

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"baton/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

var update = flag.Bool("update", false, "write testdata/lspci.golden")

const (
	bootLimit = 2 * time.Minute
	limit     = time.Minute // for what takes a second
)

// start starts a guest that runs the tests' image and waits until its agent answers.
func start(t *testing.T, args ...string) *harness.Guest {
	t.Helper()
	g := harness.Start(t, harness.GuestConfig{Args: args})
	g.Output(harness.Context(t, bootLimit), "true")
	return g
}

// ends checks exit code and reason of a VMM that is about to end.
func ends(t *testing.T, g *harness.Guest, reason string) {
	t.Helper()
	if code := g.Wait(harness.Context(t, limit)); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	e := g.WaitEvent(harness.Context(t, limit), "SHUTDOWN")
	if want := fmt.Sprintf(`"reason":%q`, reason); !strings.Contains(string(e.Data), want) {
		t.Errorf("SHUTDOWN %s, want %s", e.Data, want)
	}
}

// TestMachine boots one guest with everything, looks around in it, and takes it through a
// reboot, a panic and a power off.
func TestMachine(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	write(t, disk, make([]byte, 1<<20))
	sock, err := os.MkdirTemp("", "boot") // short enough for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sock) })
	qmp := filepath.Join(sock, "qmp")
	args := append(harness.Linux(t), "-qmp", "unix:"+qmp+",server=on,wait=off", "-enable-kvm", "-machine", "q35,kernel-irqchip=split", "-cpu", "host", "-nographic", "-nodefaults",
		"-name", "machine", "-m", "1G", "-smp", "4",
		"-device", "pcie-root-port,id=r1,chassis=1,addr=2.0,multifunction=on",
		"-device", "pcie-root-port,id=r2,chassis=2,addr=2.1,port=7",
		"-device", "pcie-root-port,id=r3,chassis=3",
		"-netdev", "tap,id=n0,vhost=on", "-device", "virtio-net-pci,netdev=n0,bus=r1",
		"-netdev", "tap,id=n1,vhost=off", "-device", "virtio-net-pci,netdev=n1,bus=r2",
		"-drive", "file="+disk+",format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,addr=8",
		"-device", "virtio-rng-pci")
	g := start(t, args...)
	clock := readClocks(t, g)
	ctx := harness.Context(t, 5*time.Minute)

	t.Run("processors", func(t *testing.T) { processors(t, g.In(t), 4) })
	t.Run("memory", func(t *testing.T) { memory(t, g.In(t), 1<<30) })
	t.Run("PCI tree", func(t *testing.T) { pciTree(t, ctx, g.In(t)) })
	t.Run("kernel log", func(t *testing.T) { kernelLog(t, ctx, g.In(t)) })
	t.Run("interrupts", func(t *testing.T) { interrupts(t, ctx, g.In(t)) })
	t.Run("entropy", func(t *testing.T) {
		g := g.In(t)
		if got := g.Sh(ctx, "cat /sys/class/misc/hw_random/rng_current; head -c 4096 /dev/hwrng | gzip | wc -c"); !regexp.MustCompile(`^virtio_rng\.0\n4[01]\d\d$`).MatchString(got) {
			t.Errorf("/dev/hwrng: %q", got)
		}
	})
	t.Run("clock", func(t *testing.T) { clocks(t, g.In(t), clock) })
	t.Run("reboot", func(t *testing.T) {
		g := g.In(t)
		reset := rebootBy(t, g, "@reboot")
		if want := `{"guest":true,"reason":"guest-reset"}`; string(reset.Data) != want {
			t.Errorf("RESET %s, want %s", reset.Data, want)
		}
		processors(t, g, 4)
		pciTree(t, ctx, g)
		kernelLog(t, ctx, g)
	})
	t.Run("panic", func(t *testing.T) {
		g := g.In(t)
		g.Output(ctx, "@modprobe", "pvpanic_mmio")
		reset := rebootBy(t, g, "@panic")
		panicked := g.WaitEvent(ctx, "GUEST_PANICKED")
		if panicked.Seq > reset.Seq {
			t.Error("the reset came before the panic's report")
		}
		if !regexp.MustCompile(`(?m)guest panicked\n  cpu \d: panic\n  rip 0xffffffff[0-9a-f]{8} [^#]*^  at rip: ee  out +%al,\(%dx\)$`).MatchString(g.Stderr.String()) {
			t.Errorf("report:\n%s", g.Stderr)
		}
	})
	t.Run("power button", func(t *testing.T) { powerButton(t, g.In(t), qmp) })
	t.Run("power off", func(t *testing.T) {
		g := g.In(t)
		g.Output(ctx, "@poweroff")
		ends(t, g, "guest-shutdown")
	})
}

// powerButton presses it; the guest sees a key.
func powerButton(t *testing.T, g *harness.Guest, qmp string) {
	ctx := harness.Context(t, limit)
	g.Output(ctx, "@modprobe", "evdev")
	// struct input_event: 16 bytes of time, then type 1 (EV_KEY), code 116 (KEY_POWER), value 1.
	read := make(chan string, 1)
	go func() {
		r, err := g.Run(ctx, "sh", "-c", "exec 3</dev/input/event0; echo >/tmp/open; head -c 24 <&3 | tail -c 8 | hexdump -e '4/2 \"%d \"'")
		if err != nil {
			read <- err.Error()
		}
		read <- strings.TrimSpace(r.Stdout + r.Stderr)
	}()
	g.Sh(ctx, "until [ -e /tmp/open ]; do :; done")
	harness.DialQMP(t, ctx, qmp).Do("system_powerdown", nil)
	if got := <-read; got != "1 116 1 0" {
		t.Errorf("the input device says %q", got)
	}
	g.WaitEvent(ctx, "POWERDOWN")
}

// rebootBy runs a verb after which the guest starts again, waits until it has, and returns
// the event.
func rebootBy(t *testing.T, g *harness.Guest, verb string) harness.Event {
	t.Helper()
	events, err := g.Events.Events()
	if err != nil {
		t.Fatal(err)
	}
	after := events[len(events)-1].Seq
	g.Output(harness.Context(t, limit), verb)
	reset, err := g.Events.WaitEvent(harness.Context(t, limit), after, "RESET", nil)
	if err != nil {
		t.Fatal(err)
	}
	g.Output(harness.Context(t, bootLimit), "true")
	if up := uptime(t, g); up > bootLimit {
		t.Errorf("the guest is up for %v: it did not start again", up)
	}
	return reset
}

func uptime(t *testing.T, g *harness.Guest) time.Duration {
	t.Helper()
	text := g.Output(harness.Context(t, limit), "@cat", "/proc/uptime")
	d, err := time.ParseDuration(strings.Fields(text)[0] + "s")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// processors checks that all are online and that each of them runs programs.
func processors(t *testing.T, g *harness.Guest, n int) {
	t.Helper()
	want := "0"
	if n > 1 {
		want = fmt.Sprintf("0-%d", n-1)
	}
	ctx := harness.Context(t, limit)
	if got := g.Sh(ctx, "cat /sys/devices/system/cpu/online"); got != want {
		t.Errorf("CPUs online: %s, want %s", got, want)
	}
	script := fmt.Sprintf("for c in $(seq 0 %d); do taskset -c $c cut -d' ' -f39 /proc/self/stat; done", n-1)
	for i, got := range strings.Fields(g.Sh(ctx, script)) {
		if got != strconv.Itoa(i) {
			t.Errorf("a program for CPU %d ran on %s", i, got)
		}
	}
}

// memory checks what the kernel says that it was given, in bytes, and what it can use.
func memory(t *testing.T, g *harness.Guest, want uint64) {
	t.Helper()
	out := g.Sh(harness.Context(t, limit), "grep -i 'System RAM' /proc/iomem; grep MemTotal /proc/meminfo")
	var ram, total uint64
	for line := range strings.Lines(out) {
		var from, to uint64
		if n, _ := fmt.Sscanf(strings.TrimSpace(line), "%x-%x : System RAM", &from, &to); n == 2 {
			ram += to + 1 - from
		}
		fmt.Sscanf(line, "MemTotal: %d kB", &total)
	}
	// The first page and what lies from 640 KiB to 1 MiB is not for Linux.
	if gap := want - ram; gap > 512<<10 {
		t.Errorf("System RAM is %d bytes, %d less than %d", ram, gap, want)
	}
	if usable := total << 10; usable < want*3/4-64<<20 || usable > want {
		t.Errorf("MemTotal is %d MiB of %d", usable>>20, want>>20)
	}
}

// pciTree compares with what was there when somebody looked at it.
func pciTree(t *testing.T, ctx context.Context, g *harness.Guest) {
	t.Helper()
	const golden = "testdata/lspci.golden"
	got := g.Output(ctx, "@lspci")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("PCI tree (-want +got):\n%s", d)
	}
}

// complaint is how kernel messages look that say that something is wrong with the machine,
// whatever their level.
var complaint = regexp.MustCompile(`(?i)BUG:|WARNING|\[Firmware|can't claim|no compatible|can't assign|failed|error|unsupported|\binvalid\b|timed? ?out|stuck|not responding|broken|lockup|call trace`)

// harmless are messages that match but are about nothing of baton's.
var harmless = regexp.MustCompile(strings.Join([]string{
	`amd_pstate: the _CPC object is not present`, // no frequencies to set, as in every VM
	`RAS: Correctable Errors collector initialized`,
	`DMI not present or invalid`, // there is no SMBIOS
	`hrtimer: interrupt took`,    // of a nested host that is busy
	`ACPI: Early table checksum verification disabled`,
}, "|"))

// kernelLog checks that the kernel found nothing to complain about.
func kernelLog(t *testing.T, ctx context.Context, g *harness.Guest) {
	t.Helper()
	for line := range strings.Lines(g.Output(ctx, "@dmesg")) {
		var level int
		fmt.Sscanf(line, "<%d>", &level)
		const warning = 4
		if (level%8 <= warning || complaint.MatchString(line)) && !harmless.MatchString(line) {
			t.Errorf("kernel: %s", line)
		}
	}
}

var interruptLine = regexp.MustCompile(`(?m)^ *\d+:((?: +\d+)+) +(\S+) +\S+ +(\S.*)$`)

// interrupts checks that devices use MSI-X, and that their interrupts arrive.
func interrupts(t *testing.T, ctx context.Context, g *harness.Guest) {
	t.Helper()
	g.Output(ctx, "@blkread", "/dev/vda", "4096", "16", "random", "10")
	g.Sh(ctx, "head -c 64 /dev/hwrng >/dev/null")
	text := g.Output(ctx, "@cat", "/proc/interrupts")
	counts := map[string]int{}
	for _, m := range interruptLine.FindAllStringSubmatch(text, -1) {
		sum := 0
		for _, n := range strings.Fields(m[1]) {
			v, _ := strconv.Atoi(n)
			sum += v
		}
		name := strings.TrimSpace(m[3])
		counts[name] += sum
		if strings.HasPrefix(name, "virtio") && !strings.HasPrefix(m[2], "PCI-MSIX-") {
			t.Errorf("%s is an interrupt of %s", name, m[2])
		}
	}
	for _, pattern := range []string{`^virtio\d-req\.0$`, `^virtio\d-input$`, `^virtio\d-output$`} {
		n := 0
		for name, count := range counts {
			if regexp.MustCompile(pattern).MatchString(name) {
				n += count
			}
		}
		if n == 0 {
			t.Errorf("no interrupts of %s in\n%s", pattern, text)
		}
	}
}

// A reading is the guest's clock, and the host's before and after.
type reading struct {
	before, after time.Time
	guest         time.Duration
}

func readClocks(t *testing.T, g *harness.Guest) (r reading) {
	t.Helper()
	r.before = time.Now()
	r.guest = uptime(t, g)
	r.after = time.Now()
	return r
}

// clocks checks the guest's against the host's since an earlier reading.
func clocks(t *testing.T, g *harness.Guest, first reading) {
	ctx := harness.Context(t, limit)
	source := strings.Fields(g.Sh(ctx, "cd /sys/devices/system/clocksource/clocksource0; cat current_clocksource available_clocksource; grep -c nonstop_tsc /proc/cpuinfo || true"))
	invariant := source[len(source)-1] != "0"
	if !slices.Contains(source[1:], "kvm-clock") || source[0] != "kvm-clock" && !(invariant && source[0] == "tsc") {
		t.Errorf("clock sources, the current one first: %q", source)
	}

	// The RTC, and what the kernel made of it when it started.
	from := time.Now().Unix()
	var rtc, now int64
	text := g.Sh(ctx, "cat /sys/class/rtc/rtc0/since_epoch; date +%s")
	to := time.Now().Unix()
	if _, err := fmt.Sscan(text, &rtc, &now); err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]int64{"RTC": rtc, "wall clock": now} {
		if v < from-2 || v > to+2 { // seconds
			t.Errorf("the guest's %s is at %d, the host's was at %d to %d", name, v, from, to)
		}
	}

	last := readClocks(t, g)
	elapsed := last.guest - first.guest
	least, most := last.before.Sub(first.after), last.after.Sub(first.before)
	slack := most/500 + 20*time.Millisecond // /proc/uptime counts in 10 ms
	if elapsed < least-slack || elapsed > most+slack {
		t.Errorf("the guest's clock went on by %v while the host's did by %v to %v", elapsed, least, most)
	}
	t.Logf("guest: %v, host: %v to %v", elapsed, least, most)
}

// The smallest machine, with a kernel that was unpacked before, and its console in a file.
func TestSmall(t *testing.T) {
	dir := t.TempDir()
	vmlinux := filepath.Join(dir, "vmlinux")
	_, _, elf := unpack(t)
	write(t, vmlinux, elf)
	console, pidfile := filepath.Join(dir, "console"), filepath.Join(dir, "pid")
	args := harness.Linux(t)
	args[slices.Index(args, "-kernel")+1] = vmlinux
	g := start(t, append(args, "-m", "128M", "-serial", "file:"+console, "-pidfile", pidfile, "-D", filepath.Join(dir, "log"))...)
	processors(t, g, 1)
	memory(t, g, 128<<20)
	kernelLog(t, harness.Context(t, limit), g)
	if text, err := os.ReadFile(console); err != nil || !strings.Contains(string(text), "BATON-READY") {
		t.Errorf("the console's file has %q (%v)", text, err)
	}
	g.Signal(syscall.SIGTERM)
	ends(t, g, "host-signal")
	if _, err := os.Stat(pidfile); err == nil {
		t.Error("the pidfile was left behind")
	}
}

// More memory than fits below 4 GiB, and more vCPUs than the host has processors.
func TestLarge(t *testing.T) {
	g := start(t, append(harness.Linux(t), "-m", "5G", "-smp", "8")...)
	processors(t, g, 8)
	memory(t, g, 5<<30)
	ctx := harness.Context(t, limit)
	kernelLog(t, ctx, g)
	iomem := g.Output(ctx, "@cat", "/proc/iomem")
	if !regexp.MustCompile(`(?m)^100000000-18fffffff : System RAM`).MatchString(iomem) {
		t.Errorf("/proc/iomem:\n%s", iomem)
	}
	// The kernel has filled memory from the top: its page tables, and each CPU's data.
	dmesg := g.Output(ctx, "@dmesg")
	var node uint64
	if m := regexp.MustCompile(`NODE_DATA\(0\) allocated \[mem 0x([0-9a-f]+)-`).FindStringSubmatch(dmesg); m != nil {
		node, _ = strconv.ParseUint(m[1], 16, 64)
	}
	if node < 1<<32 {
		t.Errorf("the kernel put nothing above 4 GiB:\n%s", dmesg)
	}
	g.Sh(ctx, "head -c 33554432 /dev/urandom >/tmp/a; cp /tmp/a /tmp/b; cmp /tmp/a /tmp/b")
	g.Signal(syscall.SIGINT)
	ends(t, g, "host-signal")
}

// Linux can reset the machine by a triple fault. It is told apart from a reset that the
// guest asked for, and -no-reboot ends there. The kernel is packed another way, too.
func TestTripleFault(t *testing.T) {
	kernel := filepath.Join(t.TempDir(), "bzImage")
	repackLZ4(t, kernel)
	args := harness.Linux(t, "reboot=t")
	args[slices.Index(args, "-kernel")+1] = kernel
	g := harness.Start(t, harness.GuestConfig{Args: append(args, "-no-reboot", "-m", "256M"), TripleFault: true})
	g.Output(harness.Context(t, bootLimit), "true")
	g.Output(harness.Context(t, limit), "@reboot")
	ends(t, g, "guest-reset")
	report := `(?m)guest triple fault\n  cpu 0: triple fault\n(  KVM on AMD has reset this vCPU: its registers are lost|  rip 0x[0-9a-f]+ [^#]*^  at rip: .*int3)$`
	if !regexp.MustCompile(report).MatchString(g.Stderr.String()) {
		t.Errorf("report:\n%s", g.Stderr)
	}
	var events []string
	all, err := g.Events.Events()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		events = append(events, e.Name)
	}
	if got, _ := json.Marshal(events); string(got) != `["RESUME","SHUTDOWN"]` {
		t.Errorf("events %s", got)
	}
}
