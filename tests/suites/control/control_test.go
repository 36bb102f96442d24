// Package control shows the command line of the patch series that brought failover to QEMU,
// with a stock Linux, and who controls a machine: a person at a real telnet, QMP, baton's
// own clients.
package control

import (
	"context"
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
	limit     = 90 * time.Second
)

// patchSeries is what it says, but for the memory, a raw image of a name of its own, and
// what boots: QEMU's would have been firmware and the image.
const patchSeries = `-enable-kvm -m 512 -smp 3
 -machine q35,kernel-irqchip=split -cpu host
 -k fr
 -serial stdio
 -net none
 -qmp unix:/tmp/qmp.socket,server,nowait
 -monitor telnet:127.0.0.1:5555,server,nowait
 -device pcie-root-port,id=root0,multifunction=on,chassis=0,addr=0xa
 -device pcie-root-port,id=root1,bus=pcie.0,chassis=1
 -device pcie-root-port,id=root2,bus=pcie.0,chassis=2
 -netdev tap,script=/root/bin/bridge.sh,downscript=no,id=hostnet1,vhost=on
 -device virtio-net-pci,netdev=hostnet1,id=net1,mac=52:54:00:6f:55:cc,bus=root2,failover=on`

const mac = "52:54:00:6f:55:cc"

const buttons = `awk '/ACPI:Ged/ { n = 0; for (i = 2; i <= 4; i++) n += $i; print n }' /proc/interrupts`

// client is a program that someone sits at, or a script: lines in, lines out.
type client struct {
	*harness.Log
	t  *testing.T
	in *os.File
}

func talk(t *testing.T, name string, args ...string) *client {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := &client{harness.NewLog(), t, w}
	cmd := exec.Command(name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = r, c, c
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir()) // for their histories
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	ended := make(chan struct{})
	go func() { c.Close(cmd.Wait()); close(ended) }()
	t.Cleanup(func() { w.Close(); cmd.Process.Kill(); <-ended })
	return c
}

func (c *client) see(from int, pattern string) {
	c.t.Helper()
	if _, err := c.Wait(harness.Context(c.t, limit), from, pattern); err != nil {
		c.t.Fatalf("want %s: %v; it shows %q", pattern, err, c.String())
	}
}

func (c *client) ask(line, pattern string) {
	c.t.Helper()
	from := c.Len()
	if _, err := c.in.WriteString(line + "\n"); err != nil {
		c.t.Fatal(err)
	}
	c.see(from, pattern)
}

// until runs the script in the guest until it prints want.
func until(ctx context.Context, t *testing.T, g *harness.Guest, script, want string) {
	t.Helper()
	g.Sh(ctx, `for i in $(seq 200); do [ "$(`+script+`)" = "`+want+`" ] && exit 0; sleep 0.1; done
		grep . /sys/class/net/*/carrier /sys/class/net/*/address; cat /proc/interrupts; exit 1`)
}

func TestPatchSeries(t *testing.T) {
	peer := harness.NewPeer(t, "10.88.0.2/24")
	harness.Bridge(t, "br0", peer.Uplink)
	vf := harness.PFs(t)[0].CreateVFs(t, 1)[0]
	// The script's place is part of the command line.
	if err := os.MkdirAll("/root/bin", 0o755); err != nil {
		t.Fatal(err)
	}
	const script = "/root/bin/bridge.sh"
	if err := os.WriteFile(script, []byte("#!/bin/sh\nip link set $1 master br0 && ip link set $1 up\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(script) })
	image := filepath.Join(t.TempDir(), "rhel-guest-image.raw")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}

	g := harness.Start(t, harness.GuestConfig{Args: append(append(strings.Fields(patchSeries), harness.Linux(t)...), image)})
	boot := harness.Context(t, bootLimit)
	g.WaitEvent(boot, "RESUME")
	events := exec.Command(harness.Baton(t), "events", "/tmp/qmp.socket")
	heard := harness.NewLog()
	events.Stdout = heard
	if err := events.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { events.Process.Kill() })
	carrier := "cat /sys/class/net/" + strings.TrimSpace(g.Output(boot, "@addr", mac, "10.88.0.3/24")) + "/carrier"
	if n := strings.Count(g.Stderr.String(), "\n"); n != 1 || !strings.Contains(g.Stderr.String(), "-k fr") {
		t.Errorf("stderr: %s", g.Stderr)
	}
	ctx := harness.Context(t, 3*limit)
	peer.Ping(ctx, "10.88.0.3")

	q := harness.DialQMP(t, harness.Context(t, 3*limit), "/tmp/qmp.socket")
	c := talk(t, "telnet", "127.0.0.1", "5555")
	c.see(0, `\(qemu\) $`)
	c.ask("info status", `VM status: running`)
	c.ask("info network", `net1: type=nic,model=virtio-net-pci,macaddr=`+mac+`\n \\ hostnet1: type=tap,.*vhost=on`)
	c.ask("info pci", `id "net1"\n(.*\n)*  Bus  0, device  10, function 0:\n(.*\n)*      id "root0"\n`)
	c.ask("info block", `rhel-guest-image.raw \(raw\)`)
	c.ask("info cpus", `CPU #2: thread_id=\d`)

	c.ask("stop", `\(qemu\) $`)
	q.WaitEvent("STOP")
	c.ask("info status", `VM status: paused`)
	c.ask("cont", `\(qemu\) $`)
	q.WaitEvent("RESUME")

	until(ctx, t, g, carrier, "1")
	c.ask("set_link net1 off", `\(qemu\) $`)
	until(ctx, t, g, carrier, "0")
	out, err := exec.Command(harness.Baton(t), "monitor", "/tmp/qmp.socket", "set_link net1 on").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("baton monitor: %v: %s", err, out)
	}
	until(ctx, t, g, carrier, "1")
	peer.Ping(ctx, "10.88.0.3")

	// The series goes on: "then the primary device can be hotplugged via".
	const cards = "cat /sys/class/net/*/address | grep -c " + mac // failover master, standby, primary
	until(ctx, t, g, cards, "2")
	vf.SetMAC(t, mac) // from now on the NIC sends what is for the guest to the VF
	vf.BindVFIO(t)
	c.ask("device_add vfio-pci,host="+strings.TrimPrefix(vf.PCI, "0000:")+",id=hostdev0,bus=root1,standby=net1", `\(qemu\) $`)
	until(ctx, t, g, cards, "3")
	c.ask("info pci", `Ethernet controller: PCI device 8086:10ca\n(.*\n)*      id "hostdev0"\n`)
	peer.Ping(ctx, "10.88.0.3")
	c.ask("device_del hostdev0", `\(qemu\) $`)
	q.WaitEvent("DEVICE_DELETED")
	until(ctx, t, g, cards, "2")

	before := g.Sh(ctx, buttons)
	c.ask("system_powerdown", `\(qemu\) $`)
	q.WaitEvent("POWERDOWN")
	n, err := strconv.Atoi(before)
	if err != nil {
		t.Fatal(err)
	}
	until(ctx, t, g, buttons, strconv.Itoa(n+1))

	g.Output(ctx, "@poweroff")
	if code := g.Wait(ctx); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if err := events.Wait(); err != nil {
		t.Error(err)
	}
	var names []string
	for line := range strings.Lines(heard.String()) {
		names = append(names, strings.Fields(line)[1])
	}
	if got := strings.Join(names, " "); !strings.Contains(got, "STOP RESUME") || !strings.HasSuffix(got, "POWERDOWN SHUTDOWN") {
		t.Errorf("events: %s", heard)
	}
	if _, err := os.Lstat("/tmp/qmp.socket"); err == nil {
		t.Error("the socket is left behind")
	}
}

// An image of QEMU's own format is one error, which says so.
func TestQCOW2(t *testing.T) {
	image := filepath.Join(t.TempDir(), "rhel-guest-image-8.0-1781.x86_64.qcow2")
	if err := os.WriteFile(image, append([]byte("QFI\xfb\x00\x00\x00\x03"), make([]byte, 504)...), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(harness.Baton(t), "-kernel", harness.Image(t, "vmlinuz"), "-net", "none", image)
	out, err := cmd.CombinedOutput()
	if err == nil || strings.Count(string(out), "baton: ") != 1 || !strings.Contains(string(out), "is a qcow2 image") {
		t.Errorf("%v: %s", err, out)
	}
}
