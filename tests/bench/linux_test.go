package bench

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"baton/tests/harness"
)

const (
	guestMiB  = 256
	diskMiB   = 64
	tapName   = "bench0"
	hostAddr  = "10.77.0.1"
	guestAddr = "10.77.0.2"
	guestMAC  = "02:00:00:00:77:02"
	cmdline   = "console=ttyS0 quiet panic=-1"
)

// TestLinux measures all that a stock kernel shows.
func TestLinux(t *testing.T) {
	results.notef("guest: 1 vCPU, %d MiB, stock Debian kernel; disk on tmpfs, QEMU's with its default aio=threads; vhost-net", guestMiB)
	t.Run("start", func(t *testing.T) {
		for i := range runs {
			for n, c := range contenders(t, "host") {
				live(t, fmt.Sprintf("%s/%d", c.name, i+1), func(t testing.TB) { // each guest's undoing belongs to its own run
					scrub(t)
					l := startLinux(t, c, n)
					record(t, c, "start to guest userspace", "s", target{MaxRatio: 0.6}, l.started.Seconds())
					record(t, c, "memory of the VMM", "MiB", target{Max: 20, MaxRatio: 0.5}, vmmMemory(t, l.guest.PID()))
				})
			}
		}
	})
	takeTurns(t, "disk", 2*runs, startLinux, measureDisk)
	takeTurns(t, "network", 2*runs, startLinux, measureTCP)
}

// A linux is a guest with a disk and a NIC.
type linux struct {
	contender
	guest      *harness.Guest
	started    time.Duration // until its userspace ran
	host, addr string        // of the NIC: IPv4 addresses of the host and of the guest
	nettool    string
}

// startLinux starts the guest of the contender that has that number.
func startLinux(t testing.TB, c contender, n int) *linux {
	l := &linux{contender: c, host: fmt.Sprintf("10.77.%d.1", n), addr: fmt.Sprintf("10.77.%d.2", n), nettool: nettool(t)}
	ctx := harness.Context(t, 2*time.Minute)
	tap, mac := fmt.Sprintf("bench%d", n), fmt.Sprintf("02:00:00:00:77:%02x", n+2)
	harness.Tap(t, tap, 1)
	harness.Addr(t, tap, l.host+"/24")
	l.guest = harness.Start(t, harness.GuestConfig{VMM: c.vmm, Args: append(c.args[:len(c.args):len(c.args)],
		"-m", fmt.Sprint(guestMiB), "-smp", "1", "-no-reboot", // one that is reset has failed
		"-kernel", harness.Image(t, "vmlinuz"), "-initrd", harness.Image(t, "test.cpio"), "-append", cmdline,
		"-drive", "file="+tmpfsDisk(t)+",format=raw,if=none,id=d0,cache=writeback", "-device", "virtio-blk-pci,drive=d0",
		"-netdev", "tap,id=n0,ifname="+tap+",script=no,downscript=no,vhost=on", "-device", "virtio-net-pci,netdev=n0,mac="+mac,
	)})
	l.guest.WaitSerial(ctx, "^BATON-READY")
	l.started = time.Since(l.guest.Started())
	l.guest.Output(ctx, "@addr", mac, l.addr+"/24")
	l.guest.Output(ctx, "@tcp-serve", l.addr+":5001")
	startServer(t, l.host)
	return l
}

// A recorder takes what was measured.
type recorder func(name, unit string, goal target, value float64)

// takeTurns measures a guest of each VMM; both are there, so that nothing but the VMM changes
// from one turn to the next. The first turns are to warm up.
func takeTurns(t *testing.T, name string, turns int, start func(testing.TB, contender, int) *linux, measure func(context.Context, *linux, recorder) error) {
	turn := 0
	live(t, name, func(t testing.TB) {
		scrub(t)
		var guests []*linux
		for n, c := range contenders(t, "host") {
			guests = append(guests, start(t, c, n))
		}
		for warm := false; turn < turns; warm = true {
			var values []func()
			for _, l := range guests {
				err := measure(harness.Context(t, 30*time.Second), l, func(name, unit string, goal target, value float64) {
					values = append(values, func() { record(t, l.contender, name, unit, goal, value) })
				})
				if err != nil {
					t.Fatalf("%s: %v", l.name, err)
				}
			}
			if warm {
				for _, v := range values {
					v()
				}
				turn++
			}
			guests[0], guests[1] = guests[1], guests[0]
		}
	})
}

func measureDisk(ctx context.Context, l *linux, record recorder) error {
	goal := target{MinRatio: 0.9}
	one, err := readDisk(ctx, l, "4096", "random", 1)
	if err != nil {
		return err
	}
	record("disk, 4 KiB random reads", "IOPS", goal, one.IOPS)
	four, err := readDisk(ctx, l, "4096", "random", 4)
	if err != nil {
		return err
	}
	record("disk, 4 KiB random reads, 4 at once", "IOPS", goal, four.IOPS)
	large, err := readDisk(ctx, l, "1048576", "seq", 1)
	if err != nil {
		return err
	}
	record("disk, 1 MiB sequential reads", "MiB/s", goal, large.MiBPS)
	return nil
}

func measureTCP(ctx context.Context, l *linux, record recorder) error {
	for _, streams := range []string{"1", "4"} {
		to, err := exec.CommandContext(ctx, l.nettool, "send", l.addr+":5001", streams, "1").CombinedOutput()
		if err != nil {
			return fmt.Errorf("send to the guest: %w: %s", err, to)
		}
		mbit, err := throughput(string(to))
		if err != nil {
			return err
		}
		record("TCP to the guest, streams: "+streams, "Mbit/s", target{MinRatio: 0.95}, mbit)
		from, err := l.guest.Run(ctx, "@tcp-send", l.host+":5001", streams, "1")
		if err == nil {
			mbit, err = throughput(from.Stdout)
		}
		if err != nil {
			return fmt.Errorf("send from the guest: %w: %s", err, from.Stderr)
		}
		record("TCP from the guest, streams: "+streams, "Mbit/s", target{MinRatio: 0.95}, mbit)
	}
	return nil
}

// scrub overwrites the nested host's free memory. Its emulator keeps what it translated of the
// code of earlier guests, and pays for that, seconds in all, when the pages are written
// again: here, and not while the next guest starts.
func scrub(t testing.TB) {
	if !harness.Nested() {
		return
	}
	const reserve = 128 << 20
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	free := int(info.Freeram) * int(info.Unit)
	if free <= reserve {
		t.Fatalf("only %d bytes are free", free)
	}
	occupy(t, free-reserve)()
}

// occupy takes memory, in bytes, and writes to it. What it returns gives it back.
func occupy(t testing.TB, n int) (free func()) {
	memory, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	for _, advice := range []int{unix.MADV_HUGEPAGE, unix.MADV_POPULATE_WRITE} {
		if err := unix.Madvise(memory, advice); err != nil {
			t.Errorf("advice %d: %v", advice, err)
		}
	}
	return func() {
		if err := unix.Munmap(memory); err != nil {
			t.Error(err)
		}
	}
}

// vmmMemory returns what the process has for itself, in MiB.
func vmmMemory(t testing.TB, pid int) float64 {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := harness.OwnMemory(f, guestMiB<<20)
	if err != nil {
		t.Fatal(err)
	}
	return float64(n) / (1 << 20)
}

// throughput returns what nettool measured, in Mbit/s.
func throughput(out string) (float64, error) {
	var r struct {
		MbitPS float64 `json:"mbit_s"`
	}
	err := json.Unmarshal([]byte(out), &r)
	return r.MbitPS, err
}

func decode(t testing.TB, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
}

type diskResult struct {
	IOPS  float64 `json:"iops"`
	MiBPS float64 `json:"mib_s"`
}

// readDisk lets that many readers in the guest read for a second, past its page cache.
func readDisk(ctx context.Context, l *linux, size, order string, readers int) (sum diskResult, err error) {
	type answer struct {
		harness.Result
		error
	}
	answers := make(chan answer, readers)
	for range readers {
		go func() {
			r, err := l.guest.Run(ctx, "@blkread", "/dev/vda", size, "0", order, "1")
			answers <- answer{r, err}
		}()
	}
	for range readers {
		a := <-answers
		var r diskResult
		if a.error == nil {
			a.error = json.Unmarshal([]byte(a.Stdout), &r)
		}
		err = errors.Join(err, a.error)
		sum.IOPS += r.IOPS
		sum.MiBPS += r.MiBPS
	}
	return sum, err
}

// tmpfsDisk makes a disk image that no real disk stands behind.
func tmpfsDisk(t testing.TB) string {
	const dir = "/dev/shm"
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		t.Fatalf("%s is no tmpfs: %v", dir, err)
	}
	f, err := os.CreateTemp(dir, "bench-disk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(f.Name()) })
	defer f.Close()
	block := make([]byte, 1<<20)
	for range diskMiB {
		rand.Read(block) // no holes
		if _, err := f.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	return f.Name()
}

// startServer runs the host's receiver of TCP streams until the test ends.
func startServer(t testing.TB, addr string) {
	server := exec.Command(nettool(t), "serve", addr+":5001")
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Process.Kill(); server.Wait() })
	if _, err := out.Read(make([]byte, 64)); err != nil { // its address: it listens
		t.Fatalf("nettool: %v", err)
	}
}

func nettool(t testing.TB) string { return tool(t, "nettool") }

// tool returns the path of a program that `make bench` builds.
func tool(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(os.Getenv(harness.EnvRepo), ".cache", "bin", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v\n`make bench` builds it", err)
	}
	return path
}
