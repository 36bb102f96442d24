package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"baton/tests/harness"
)

const (
	hostAddr, guestAddr = "10.0.0.1", "10.0.0.2"
	diskSerial          = "BATON-DEMO"

	mib      = 1 << 20
	diskSize = 128 * mib
	// The guest copies the first part of the disk, which the host has filled, to copyAt.
	copySize, copyAt = 32 * mib, 64 * mib
)

// A guest is a running baton whose serial port is a terminal, at which this program sits.
type guest struct {
	cmd   *exec.Cmd
	stdin io.Writer
	term  *terminal
	log   *harness.Log
	start time.Time
	done  chan error
}

// show runs the guest and checks what it does.
func show(ctx context.Context) error {
	for _, p := range []string{"ip", "ping"} {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("%w\nDebian has it in iproute2, iputils-ping", err)
		}
	}
	dir, err := os.MkdirTemp("", "baton-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, "disk.img")
	if err := makeDisk(disk); err != nil {
		return err
	}
	if err := makeTap(ctx); err != nil {
		return err
	}

	heading("The guest boots")
	g, err := start(ctx, disk)
	if err != nil {
		return err
	}
	defer g.kill()
	f, err := g.tour(ctx)
	if err != nil {
		return err
	}
	if err := compareDisk(disk); err != nil {
		return err
	}
	fmt.Printf("  its disk: the host finds the %d MiB that the guest copied, byte for byte\n", copySize/mib)

	heading("Figures")
	fmt.Printf("  time to userspace        %8.1f s     from the start of baton to the guest's first process\n", f.userspace.Seconds())
	fmt.Printf("  memory of baton          %8.1f MiB   beside the guest's RAM\n", float64(f.memory)/mib)
	fmt.Printf("  ping, median             %8.2f ms    host to guest over vhost-net; guest to host %.2f ms\n", f.pingIn, f.pingOut)
	fmt.Printf("  disk, sequential reads   %8.0f MB/s  virtio-blk, by dd in the guest\n", f.diskRate)
	return nil
}

// makeDisk makes a disk image with random bytes where the guest will read.
func makeDisk(name string) error {
	data := make([]byte, copySize)
	rand.Read(data)
	if err := os.WriteFile(name, data, 0o600); err != nil {
		return err
	}
	return os.Truncate(name, diskSize)
}

// compareDisk says whether the guest's copy is what the host had written.
func compareDisk(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	original, duplicate := make([]byte, copySize), make([]byte, copySize)
	if _, err := f.ReadAt(original, 0); err != nil {
		return err
	}
	if _, err := f.ReadAt(duplicate, copyAt); err != nil {
		return err
	}
	if !bytes.Equal(original, duplicate) {
		return errors.New("disk: what the guest copied is not what it read")
	}
	return nil
}

// makeTap makes the host's end of the guest's NIC.
func makeTap(ctx context.Context) error {
	ip := exec.CommandContext(ctx, "ip", "-batch", "-")
	ip.Stdin = strings.NewReader("tuntap add dev tap0 mode tap vnet_hdr\n" +
		"addr add " + hostAddr + "/24 dev tap0\n" +
		"link set tap0 up\n")
	if out, err := ip.CombinedOutput(); err != nil {
		return fmt.Errorf("make tap0: %w\n%s", err, out)
	}
	return nil
}

func start(ctx context.Context, disk string) (*guest, error) {
	args := []string{
		"-enable-kvm", "-name", "demo", "-m", "512", "-smp", "2", "-nodefaults", "-nographic", "-serial", "stdio",
		"-kernel", ".cache/images/vmlinuz", "-initrd", ".cache/images/demo.cpio",
		"-append", "console=ttyS0 loglevel=6 baton.ip=" + guestAddr + "/24",
		"-device", "pcie-root-port,id=rp0,chassis=1", "-device", "pcie-root-port,id=rp1,chassis=2",
		"-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no,vhost=on",
		"-device", "virtio-net-pci,netdev=net0,bus=rp0,mac=52:54:00:12:34:56",
		"-drive", "file=" + disk + ",format=raw,if=none,id=disk0",
		"-device", "virtio-blk-pci,drive=disk0,bus=rp1,serial=" + diskSerial,
	}
	fmt.Println("  $ " + commandLine("./baton", args))
	g := &guest{log: harness.NewLog(), term: &terminal{w: os.Stdout}, done: make(chan error, 1)}
	g.cmd = command(ctx, "./baton", args...)
	g.cmd.Stdout = io.MultiWriter(g.term, g.log)
	var err error
	if g.stdin, err = g.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	g.start = time.Now()
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		err := g.cmd.Wait()
		g.log.Close(fmt.Errorf("baton ended: %v", g.cmd.ProcessState))
		g.done <- err
	}()
	return g, nil
}

// commandLine is what one would type, a line for each option that starts something new.
func commandLine(program string, args []string) string {
	var b strings.Builder
	b.WriteString(program)
	for _, a := range args {
		switch {
		case slices.Contains([]string{"-kernel", "-append", "-device", "-netdev", "-drive"}, a):
			b.WriteString(" \\\n        ")
		default:
			b.WriteString(" ")
		}
		if strings.Contains(a, " ") {
			a = `"` + a + `"`
		}
		b.WriteString(a)
	}
	return b.String()
}

// kill ends baton if it has not ended.
func (g *guest) kill() {
	g.cmd.Process.Kill()
	<-g.done
}

// figures are what the tour measures.
type figures struct {
	userspace       time.Duration
	memory          int64   // bytes
	pingIn, pingOut float64 // ms
	diskRate        float64 // MB/s
}

// tour goes through the guest, from its boot to its end.
func (g *guest) tour(ctx context.Context) (f figures, err error) {
	if _, err = g.wait(ctx, 0, 90*time.Second, `BATON-READY`); err != nil {
		return f, fmt.Errorf("boot: %w", err)
	}
	f.userspace = time.Since(g.start)
	m, err := g.wait(ctx, 0, 30*time.Second, `(?s)\A(.*?)`+prompt)
	if err != nil {
		return f, fmt.Errorf("boot: %w", err)
	}
	if err := checkTree(m[1]); err != nil {
		return f, err
	}

	heading("Its disk: serial number, reads, and a copy that the host compares")
	out, err := g.typeLine(ctx, "echo $(cat /sys/block/vda/serial)")
	if err != nil {
		return f, err
	}
	if !slices.Contains(strings.Split(out, "\n"), diskSerial) {
		return f, fmt.Errorf("disk: the guest does not see its serial number, %s", diskSerial)
	}
	if out, err = g.typeLine(ctx, fmt.Sprintf("dd if=/dev/vda of=/dev/null bs=1M count=%d", copySize/mib)); err != nil {
		return f, err
	}
	if f.diskRate, err = number(out, `copied, .* s, ([0-9.]+) MB/s`); err != nil {
		return f, fmt.Errorf("disk: %w", err)
	}
	if _, err = g.typeLine(ctx, fmt.Sprintf("dd if=/dev/vda of=/dev/vda bs=1M count=%d seek=%d", copySize/mib, copyAt/mib)); err != nil {
		return f, err
	}

	heading("The host pings the guest, the guest pings the host")
	if f.pingIn, err = g.pingFromHost(ctx); err != nil {
		return f, err
	}
	if out, err = g.typeLine(ctx, "ping -c 5 -i 200 "+hostAddr); err != nil {
		return f, err
	}
	if f.pingOut, err = medianPing(out, 5); err != nil {
		return f, fmt.Errorf("ping from the guest: %w", err)
	}
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", g.cmd.Process.Pid))
	if err != nil {
		return f, err
	}
	if f.memory, err = ownMemory(string(smaps)); err != nil {
		return f, err
	}

	heading("The guest turns itself off")
	g.term.forget()
	if _, err := io.WriteString(g.stdin, "exit\n"); err != nil {
		return f, err
	}
	select {
	case err := <-g.done:
		g.done <- nil
		g.term.newline()
		if err != nil {
			return f, fmt.Errorf("baton: %w after the guest's power off", err)
		}
	case <-time.After(30 * time.Second):
		return f, errors.New("the guest has not turned itself off in 30 s")
	case <-ctx.Done():
		return f, ctx.Err()
	}
	fmt.Println("  baton ended with exit code 0")
	return f, nil
}

// The shell's prompt, at the start of a line.
const prompt = `^\$ `

// wait waits for a pattern in what the guest says after the position from.
func (g *guest) wait(ctx context.Context, from int, limit time.Duration, pattern string) ([]string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("nothing for %v", limit))
	defer cancel()
	m, err := g.log.Wait(ctx, from, pattern)
	if err != nil {
		g.term.newline()
	}
	return m, err
}

// typeLine types a command at the guest's shell and returns what comes before the next prompt.
func (g *guest) typeLine(ctx context.Context, line string) (string, error) {
	from := g.log.Len()
	if _, err := io.WriteString(g.stdin, line+"\n"); err != nil {
		return "", err
	}
	m, err := g.wait(ctx, from, 30*time.Second, `(?s)\A(.*?)`+prompt)
	if err != nil {
		return "", fmt.Errorf("%s: %w", line, err)
	}
	return m[1], nil
}

// checkTree looks for two root ports with a virtio function, driven, below each.
func checkTree(boot string) error {
	pairs := regexp.MustCompile(`(?m)^\S+ class 060400 .* pcieport\n +\S+ class \w+ id 1af4:\w+ virtio-pci$`).FindAllString(boot, -1)
	if len(pairs) != 2 {
		return fmt.Errorf("PCIe: %d root ports with a virtio device below, want 2", len(pairs))
	}
	return nil
}

// pingFromHost pings the guest and shows it.
func (g *guest) pingFromHost(ctx context.Context) (float64, error) {
	const count = 5
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var out bytes.Buffer
	fmt.Printf("  host  │ $ ping -c %d -i 0.2 %s\n", count, guestAddr)
	cmd := command(ctx, "ping", "-n", "-c", strconv.Itoa(count), "-i", "0.2", guestAddr)
	cmd.Stdout = io.MultiWriter(&terminal{w: os.Stdout, name: "host"}, &out)
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("ping from the host: %w", err)
	}
	return medianPing(out.String(), count)
}

var pingTime = regexp.MustCompile(`time=([0-9.]+) ?([mµ]?s)\b`)

// medianPing returns the median, in milliseconds, of the times in what ping printed.
func medianPing(out string, want int) (float64, error) {
	var ms []float64
	for _, m := range pingTime.FindAllStringSubmatch(out, -1) {
		d, err := time.ParseDuration(m[1] + m[2])
		if err != nil {
			return 0, err
		}
		ms = append(ms, float64(d)/1e6)
	}
	if len(ms) != want {
		return 0, fmt.Errorf("%d answers to %d pings", len(ms), want)
	}
	slices.Sort(ms)
	return ms[len(ms)/2], nil
}

// number returns the number that the pattern's group matches.
func number(text, pattern string) (float64, error) {
	m := regexp.MustCompile(pattern).FindStringSubmatch(text)
	if m == nil {
		return 0, fmt.Errorf("no %q in what the guest printed", pattern)
	}
	return strconv.ParseFloat(m[1], 64)
}

// A mapping in smaps (proc_pid_smaps(5)): its resident pages, and those of them that only
// this process has, in KiB.
var mapping = regexp.MustCompile(`(?m)^Rss: +(\d+) kB\n(?:\w+: .*\n)*?Private_Clean: +(\d+) kB\nPrivate_Dirty: +(\d+) kB$`)

// ownMemory returns the bytes that a process has for itself, without its largest mapping,
// which is the guest's RAM.
func ownMemory(smaps string) (total int64, err error) {
	var guestRAM, largest int64
	for _, m := range mapping.FindAllStringSubmatch(smaps, -1) {
		var kib [3]int64
		for i := range kib {
			if kib[i], err = strconv.ParseInt(m[i+1], 10, 64); err != nil {
				return 0, err
			}
		}
		private := kib[1] + kib[2]
		total += private
		if kib[0] > largest {
			largest, guestRAM = kib[0], private
		}
	}
	if largest == 0 {
		return 0, errors.New("smaps: no mapping in it")
	}
	return (total - guestRAM) << 10, nil
}

func heading(text string) { fmt.Printf("\n── %s\n", text) }
