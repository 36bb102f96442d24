package bench

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

// TestLinux measures all that a stock kernel shows, in one life of the guest.
func TestLinux(t *testing.T) {
	disk := tmpfsDisk(t)
	harness.Tap(t, tapName, 1)
	harness.Addr(t, tapName, hostAddr+"/24")
	results.notef("guest: 1 vCPU, %d MiB, stock Debian kernel; disk on tmpfs, QEMU's with its default aio=threads; vhost-net", guestMiB)
	for i := range runs {
		for _, c := range contenders(t, "host") {
			// Each guest's undoing belongs to its own run.
			t.Run(fmt.Sprintf("%s/%d", c.name, i+1), func(t *testing.T) { measureLinux(t, c, disk) })
		}
	}
}

// measureLinux measures one life of a guest. Its parts are subtests, so that -run can pick one:
// TestLinux//1/disk is the disk's in the first run of each VMM.
func measureLinux(t *testing.T, c contender, disk string) {
	scrub(t)
	g := harness.Start(t, harness.GuestConfig{VMM: c.vmm, Args: append(c.args[:len(c.args):len(c.args)],
		"-m", fmt.Sprint(guestMiB), "-smp", "1", "-no-reboot", // one that is reset has failed
		"-kernel", harness.Image(t, "vmlinuz"), "-initrd", harness.Image(t, "test.cpio"), "-append", cmdline,
		"-drive", "file="+disk+",format=raw,if=none,id=d0,cache=writeback", "-device", "virtio-blk-pci,drive=d0",
		"-netdev", "tap,id=n0,ifname="+tapName+",script=no,downscript=no,vhost=on", "-device", "virtio-net-pci,netdev=n0,mac="+guestMAC,
	)})
	ctx := harness.Context(t, 2*time.Minute)
	g.WaitSerial(ctx, "^BATON-READY")
	started := time.Since(g.Started())
	g.Output(ctx, "@addr", guestMAC, guestAddr+"/24")

	t.Run("start", func(t *testing.T) {
		record(t, c, "start to guest userspace", "s", target{MaxRatio: 0.6}, started.Seconds())
	})
	t.Run("memory", func(t *testing.T) {
		record(t, c, "memory of the VMM", "MiB", target{Max: 20, MaxRatio: 0.5}, vmmMemory(t, g.PID()))
	})
	t.Run("disk", func(t *testing.T) { measureDisk(t, ctx, c, g.In(t)) })
	t.Run("network", func(t *testing.T) { measureTCP(t, ctx, c, g.In(t)) })
	if n := strings.Count(g.Serial.String(), "BATON-READY"); n != 1 || g.Events.Len() > 0 && strings.Contains(g.Events.String(), `"RESET"`) {
		t.Errorf("the guest started %d times, or was reset", n)
	}
}

func measureDisk(t *testing.T, ctx context.Context, c contender, g *harness.Guest) {
	goal := target{MinRatio: 0.9}
	record(t, c, "disk, 4 KiB random reads", "IOPS", goal, readDisk(t, ctx, g, "4096", "random", 1).IOPS)
	record(t, c, "disk, 4 KiB random reads, 4 at once", "IOPS", goal, readDisk(t, ctx, g, "4096", "random", 4).IOPS)
	record(t, c, "disk, 1 MiB sequential reads", "MiB/s", goal, readDisk(t, ctx, g, "1048576", "seq", 1).MiBPS)
}

func measureTCP(t *testing.T, ctx context.Context, c contender, g *harness.Guest) {
	g.Output(ctx, "@tcp-serve", guestAddr+":5001")
	startServer(t)
	for _, streams := range []string{"1", "4"} {
		to, err := exec.CommandContext(ctx, nettool(t), "send", guestAddr+":5001", streams, "2").CombinedOutput()
		if err != nil {
			t.Fatalf("send to the guest: %v\n%s", err, to)
		}
		record(t, c, "TCP to the guest, streams: "+streams, "Mbit/s", target{MinRatio: 0.95}, throughput(t, string(to)))
		from := g.Output(ctx, "@tcp-send", hostAddr+":5001", streams, "2")
		record(t, c, "TCP from the guest, streams: "+streams, "Mbit/s", target{MinRatio: 0.95}, throughput(t, from))
	}
}

// scrub overwrites the nested host's free memory. Its emulator keeps what it translated of the
// code of earlier guests, and pays for that, seconds in all, when the pages are written
// again: here, and not while the next guest starts.
func scrub(t *testing.T) {
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
func occupy(t *testing.T, n int) (free func()) {
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
func vmmMemory(t *testing.T, pid int) float64 {
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
func throughput(t *testing.T, out string) float64 {
	var r struct {
		MbitPS float64 `json:"mbit_s"`
	}
	decode(t, out, &r)
	return r.MbitPS
}

type diskResult struct {
	IOPS  float64 `json:"iops"`
	MiBPS float64 `json:"mib_s"`
}

// readDisk lets that many readers in the guest read for 2 s, past its page cache.
func readDisk(t *testing.T, ctx context.Context, g *harness.Guest, size, order string, readers int) (sum diskResult) {
	type answer struct {
		harness.Result
		error
	}
	answers := make(chan answer, readers)
	for range readers {
		go func() {
			r, err := g.Run(ctx, "@blkread", "/dev/vda", size, "0", order, "2")
			answers <- answer{r, err}
		}()
	}
	for range readers {
		a := <-answers
		if a.error != nil {
			t.Fatal(a.error)
		}
		var r diskResult
		decode(t, a.Stdout, &r)
		sum.IOPS += r.IOPS
		sum.MiBPS += r.MiBPS
	}
	return sum
}

func decode(t *testing.T, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
}

// tmpfsDisk makes a disk image that no real disk stands behind.
func tmpfsDisk(t *testing.T) string {
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
func startServer(t *testing.T) {
	server := exec.Command(nettool(t), "serve", hostAddr+":5001")
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

func nettool(t *testing.T) string { return tool(t, "nettool") }

// tool returns the path of a program that `make bench` builds.
func tool(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(os.Getenv(harness.EnvRepo), ".cache", "bin", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v\n`make bench` builds it", err)
	}
	return path
}
