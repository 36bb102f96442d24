// Package vfio passes functions of the host through to a stock Linux: a VF, whose driver in
// the guest is igbvf, and a whole NIC, an e1000e.
package vfio

import (
	"context"
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"baton/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	bootLimit = 2 * time.Minute
	limit     = time.Minute

	mac   = "52:54:00:88:00:03"
	world = "10.88.0.2" // the peer
	guest = "10.88.0.3"
	host  = "10.88.0.4" // the device's address when the host has it
)

// TestVF takes a VF from the host's driver to a guest, through a reboot, and back.
func TestVF(t *testing.T) {
	harness.QuietKernel(t)
	peer := harness.NewPeer(t, world+"/24")
	vf := harness.PFs(t)[0].CreateVFs(t, 1)[0]
	vf.SetMAC(t, mac)
	was := vf.Driver()

	g := harness.Start(t, harness.GuestConfig{Args: append(harness.Linux(t), "-m", "256M", "-smp", "2",
		"-device", "pcie-root-port,id=r", "-device", "vfio-pci,id=vf0,bus=r,bind=auto,host="+vf.PCI)})
	g.Output(harness.Context(t, bootLimit), "true")
	if d := vf.Driver(); d != "vfio-pci" {
		t.Errorf("the host's driver is %q while the guest has the VF", d)
	}
	refused(t, `IOMMU group \d+: device or resource busy: process \d+ \(baton\) has it`, baton(t, "host="+vf.PCI))
	n := &nic{g: g, driver: "igbvf", interrupt: "MSI", mac: mac, world: peer.Do, ping: func(ctx context.Context) { peer.Ping(ctx, guest) }}
	t.Run("traffic", n.traffic)
	t.Run("function", n.function)
	t.Run("lspci", func(t *testing.T) { lspci(t, g, "vf.txt") })
	t.Run("reboot", func(t *testing.T) { reboot(t, g) })
	t.Run("traffic after the reboot", n.traffic)
	t.Run("driver again", n.again)
	n.powerOff(t)

	if d := vf.Driver(); d != was || was == "" {
		t.Fatalf("driver %q after the end, %q before", d, was)
	}
	name := linkOf(t, vf.PCI)
	harness.Up(t, name)
	harness.Addr(t, name, host+"/24")
	peer.Ping(harness.Context(t, limit), host)
}

// TestVF61 has the older kernel in the guest, and the VF on the root bus.
func TestVF61(t *testing.T) {
	harness.QuietKernel(t)
	args := harness.Linux61(t)
	peer := harness.NewPeer(t, world+"/24")
	vf := harness.PFs(t)[0].CreateVFs(t, 1)[0]
	vf.SetMAC(t, mac)
	g := harness.Start(t, harness.GuestConfig{Args: append(args, "-m", "256M", "-device", "vfio-pci,id=vf0,bind=auto,host="+vf.PCI)})
	g.Output(harness.Context(t, bootLimit), "true")
	n := &nic{g: g, driver: "igbvf", interrupt: "MSI", mac: mac, world: peer.Do, ping: func(ctx context.Context) { peer.Ping(ctx, guest) }}
	t.Run("traffic", n.traffic)
	t.Run("function", n.function)
	t.Run("lspci", func(t *testing.T) { lspci(t, g, "vf-root-bus.txt") })
	t.Run("driver again", n.again)
	n.powerOff(t)
}

// TestNIC passes a whole NIC through, which has no FLR and no 64-bit BARs.
func TestNIC(t *testing.T) {
	harness.QuietKernel(t)
	n := startNIC(t, harness.Linux(t), "rombar=0", "true")
	n.interrupt = "MSI"
	t.Run("traffic", n.traffic)
	t.Run("function", n.function)
	t.Run("lspci", func(t *testing.T) { lspci(t, n.g, "nic.txt") })
	t.Run("reboot", func(t *testing.T) {
		reboot(t, n.g)
		n.g.Output(harness.Context(t, limit), "@modprobe", "e1000e")
	})
	t.Run("traffic after the reboot", n.traffic)
	t.Run("driver again", n.again)
	t.Run("out and in", func(t *testing.T) {
		unplug(t, n.q, "nic0", "")
		if d, err := os.Readlink("/sys/bus/pci/devices/" + n.pci + "/driver"); filepath.Base(d) != "e1000e" {
			t.Errorf("driver %q after DEVICE_DELETED (%v)", d, err)
		}
		n.q.Do("device_add", map[string]any{"driver": "vfio-pci", "id": "nic0", "bus": "r", "bind": "auto", "host": n.pci})
		n.g.Output(harness.Context(t, limit), "@carrier", n.mac)
		n.traffic(t)
	})
	n.powerOff(t)

	peer := harness.NewPeer(t, host+"/24") // by the same NIC
	if out, err := peer.Run(harness.Context(t, limit), "ping", "-n", "-c", "1", "-w", "3600", "-i", "0.2", world); err != nil {
		t.Error(err, out)
	}
}

// TestINTx has a guest that uses no MSI of either kind for the NIC. It also shows the option ROM.
func TestINTx(t *testing.T) {
	harness.QuietKernel(t)
	n := startNIC(t, harness.Linux61(t), "rombar=1", "for d in /sys/bus/pci/devices/*; do grep -q 0x10d3 $d/device && echo 0 >$d/msi_bus; done; true")
	n.interrupt = "IO-APIC"
	t.Run("traffic", n.traffic)
	t.Run("lspci", func(t *testing.T) { lspci(t, n.g, "nic.txt") })
	t.Run("ROM", func(t *testing.T) {
		ctx := harness.Context(t, limit)
		dir := "/sys/class/net/" + n.name + "/device/"
		if got := n.g.Sh(ctx, "cd "+dir+"; echo 1 >rom; sha256sum <rom; echo 0 >rom"); !strings.HasPrefix(got, n.rom) {
			t.Errorf("the guest reads %s, the host %s", got, n.rom)
		}
	})
	t.Run("driver again", n.again)
	unplug(t, n.q, "nic0", "surprise")
	n.powerOff(t)
}

// startNIC gives the nested host's e1000e to a guest, which runs a script before its driver.
func startNIC(t *testing.T, args []string, options, before string) *nic {
	t.Helper()
	if !harness.Nested() {
		t.Skip("needs the nested host's e1000e")
	}
	drivers, _ := filepath.Glob("/sys/bus/pci/drivers/e1000e/0000:*")
	if len(drivers) != 1 {
		t.Fatalf("e1000e: %q", drivers)
	}
	pci := filepath.Base(drivers[0])
	address, err := os.ReadFile("/sys/class/net/" + linkOf(t, pci) + "/address")
	if err != nil {
		t.Fatal(err)
	}
	pf := harness.PFs(t)[0].Name
	harness.Up(t, pf)
	harness.Addr(t, pf, world+"/24")

	rom, err := readROM(pci)
	if err != nil {
		t.Fatal(err)
	}
	sock := socket(t)
	g := harness.Start(t, harness.GuestConfig{Args: append(args, "-m", "256M", "-qmp", "unix:"+sock+",server=on,wait=off",
		"-device", "pcie-root-port,id=r", "-device", "vfio-pci,id=nic0,bus=r,bind=auto,sysfsdev=/sys/bus/pci/devices/"+pci+","+options)})
	g.Sh(harness.Context(t, bootLimit), before)
	g.Output(harness.Context(t, limit), "@modprobe", "e1000e")
	q := harness.DialQMP(t, harness.Context(t, 10*time.Minute), sock)
	return &nic{g: g, q: q, pci: pci, driver: "e1000e", mac: strings.TrimSpace(string(address)), pin: true, rom: rom,
		world: func(f func() error) error { return f() },
		ping: func(ctx context.Context) {
			if out, err := exec.CommandContext(ctx, "ping", "-n", "-c", "1", "-w", "3600", "-i", "0.2", guest).CombinedOutput(); err != nil {
				t.Fatalf("ping: %v\n%s", err, out)
			}
		}}
}

// readROM is the hash of a function's option ROM.
func readROM(pci string) (string, error) {
	file := "/sys/bus/pci/devices/" + pci + "/rom"
	if err := os.WriteFile(file, []byte("1"), 0); err != nil {
		return "", err
	}
	b, err := os.ReadFile(file)
	return fmt.Sprintf("%x", sha256.Sum256(b)), errors.Join(err, os.WriteFile(file, []byte("0"), 0))
}

// linkOf is the interface of a PCI function.
func linkOf(t *testing.T, pci string) string {
	t.Helper()
	links, _ := filepath.Glob("/sys/bus/pci/devices/" + pci + "/net/*")
	if len(links) != 1 {
		t.Fatalf("interfaces of %s: %q", pci, links)
	}
	return filepath.Base(links[0])
}

// TestRefused has everything that can be wrong with the host, which must stay as it was.
func TestRefused(t *testing.T) {
	harness.QuietKernel(t)
	vf := harness.PFs(t)[0].CreateVFs(t, 1)[0]
	was := vf.Driver()
	refused(t, `there is no such PCI function\n *`, baton(t, "host=7f:1f.7"))
	refused(t, `its driver is "igbvf", not vfio-pci\n *bind=auto `, baton(t, "host="+vf.PCI))
	args := baton(t, "bind=auto,host="+vf.PCI).Args
	refused(t, `VFIO locks all of the guest's RAM: 131072 KiB, but the limit is 1024 KiB\n *ulimit -l 131072 `,
		exec.Command("sh", append([]string{"-c", `ulimit -l 1024; exec setpriv --bounding-set=-ipc_lock "$0" "$@"`}, args...)...))
	if d := vf.Driver(); d != was {
		t.Errorf("driver %q, was %q", d, was)
	}
}

// TestSharedGroup wants one function of a chipset whose others the host uses.
func TestSharedGroup(t *testing.T) {
	if !harness.Nested() {
		t.Skip("needs the nested host's chipset")
	}
	harness.QuietKernel(t)
	const sata, smbus = "0000:00:1f.2", "0000:00:1f.3"
	if out, err := exec.Command("modprobe", "ahci").CombinedOutput(); err != nil {
		t.Fatalf("modprobe: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("modprobe", "-r", "ahci").CombinedOutput(); err != nil {
			t.Errorf("modprobe -r: %v\n%s", err, out)
		}
	})
	refused(t, `IOMMU group \d+ is not viable: `+sata+` by ahci\n *what is in one group`, baton(t, "bind=auto,host="+smbus))
	if _, err := os.Readlink("/sys/bus/pci/devices/" + smbus + "/driver"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it had no driver, but now: %v", err)
	}
}

// TestKilled: what a baton could not give back, the next one does.
func TestKilled(t *testing.T) {
	harness.QuietKernel(t)
	vf := harness.PFs(t)[0].CreateVFs(t, 1)[0]
	was := vf.Driver()
	g := harness.Start(t, harness.GuestConfig{NoAgent: true, Args: append(harness.Linux(t),
		"-device", "vfio-pci,bind=auto,host="+vf.PCI)})
	g.WaitEvent(harness.Context(t, limit), "RESUME")
	g.Kill()
	if d := vf.Driver(); d != "vfio-pci" {
		t.Errorf("driver %q after the kill", d)
	}
	refused(t, vf.PCI+` was left bound to vfio-pci; gave it back`, baton(t, "host=7f:1f.7"))
	if d := vf.Driver(); d != was || was == "" {
		t.Errorf("driver %q, was %q", d, was)
	}
}

// baton is a command for a guest with the device.
func baton(t *testing.T, device string) *exec.Cmd {
	args := append(harness.Linux(t), "-nographic", "-device", "vfio-pci,"+device)
	return exec.Command(harness.Baton(t), args...)
}

// refused runs a command that has to fail with a message of that pattern.
func refused(t *testing.T, pattern string, cmd *exec.Cmd) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if !errors.As(err, new(*exec.ExitError)) || !regexp.MustCompile(pattern).Match(out) {
		t.Errorf("%v: %v, want %q\n%s", cmd.Args[len(cmd.Args)-1], err, pattern, out)
	}
}

// A nic is the guest's view of the device.
type nic struct {
	g           *harness.Guest
	driver, mac string
	interrupt   string // how /proc/interrupts calls its kind
	pin         bool   // it has INTx
	q           *harness.QMP
	pci, rom    string // its address on the host, and the hash of its option ROM
	name        string
	world       func(f func() error) error // runs f at the other end of the wire
	ping        func(ctx context.Context)  // the guest, from there
}

// traffic crosses the wire both ways, and is announced by interrupts of the right kind.
func (n *nic) traffic(t *testing.T) {
	ctx := harness.Context(t, limit)
	n.name = strings.TrimSpace(n.g.Output(ctx, "@addr", n.mac, guest+"/24"))
	if d := n.g.Sh(ctx, "basename $(readlink /sys/class/net/"+n.name+"/device/driver)"); d != n.driver {
		t.Fatalf("driver %q, want %q", d, n.driver)
	}
	n.ping(ctx)
	before := n.interrupts(t, ctx)
	n.g.Sh(ctx, "ping -c 5 -i 0.2 -W 20 -s 1400 "+world)
	if after := n.interrupts(t, ctx); after < before+5 {
		t.Errorf("%d interrupts before five pings, %d after", before, after)
	}
	sent, received := n.fromGuest(t, ctx)
	if sent != received {
		t.Errorf("TCP from the guest: sent %s, received %s", sent, received)
	}
	if sent, received = n.toGuest(t, ctx); sent != received {
		t.Errorf("TCP to the guest: sent %s, received %s", sent, received)
	}
}

// interrupts counts the device's interrupts in the guest.
func (n *nic) interrupts(t *testing.T, ctx context.Context) (sum int) {
	t.Helper()
	text := n.g.Output(ctx, "@cat", "/proc/interrupts")
	for line := range strings.Lines(text) {
		if !strings.Contains(line, n.interrupt) || !strings.Contains(line, n.name) {
			continue
		}
		for _, word := range strings.Fields(line)[1:] {
			count, err := strconv.Atoi(word)
			if err != nil {
				break
			}
			sum += count
		}
	}
	if sum == 0 {
		t.Fatalf("no %s interrupts of %s:\n%s", n.interrupt, n.name, text)
	}
	return sum
}

const tcpBytes = 4 << 20

func (n *nic) fromGuest(t *testing.T, ctx context.Context) (sent, received string) {
	var l net.Listener
	err := n.world(func() (err error) {
		l, err = net.Listen("tcp4", world+":0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			got <- err.Error()
			return
		}
		defer conn.Close()
		h := sha256.New()
		if _, err := io.Copy(h, conn); err != nil {
			got <- err.Error()
		}
		got <- fmt.Sprintf("%x", h.Sum(nil))
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	sent = n.g.Sh(ctx, fmt.Sprintf("head -c %d /dev/urandom >/tmp/noise; nc %s %s </tmp/noise; sha256sum </tmp/noise | cut -d' ' -f1; rm /tmp/noise", tcpBytes, world, port))
	return sent, <-got
}

func (n *nic) toGuest(t *testing.T, ctx context.Context) (sent, received string) {
	got := make(chan string, 1)
	go func() {
		r, err := n.g.Run(ctx, "sh", "-c", "nc -l -p 5001 </dev/null | sha256sum | cut -d' ' -f1")
		if err != nil {
			got <- err.Error()
		}
		got <- strings.TrimSpace(r.Stdout)
	}()
	var conn net.Conn
	dial := func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp4", guest+":5001")
		return err
	}
	err := n.world(dial)
	for errors.Is(err, unix.ECONNREFUSED) && ctx.Err() == nil { // nobody listens yet
		err = n.world(dial)
	}
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, tcpBytes)
	rand.NewChaCha8([32]byte{}).Read(noise)
	_, err = conn.Write(noise)
	if err := errors.Join(err, conn.Close()); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(noise)), <-got
}

// function looks at what the guest sees in the configuration space.
func (n *nic) function(t *testing.T) {
	ctx := harness.Context(t, limit)
	dir := "/sys/class/net/" + n.name + "/device"
	if got := n.g.Sh(ctx, "cat "+dir+"/irq"); (got != "0") != n.pin {
		t.Errorf("irq %s, with an interrupt pin: %v", got, n.pin)
	}
	if got := n.g.Sh(ctx, "cd "+dir+"; ls -d sriov_totalvfs reset 2>/dev/null || true"); got != "reset" {
		t.Errorf("files %q: want reset and no SR-IOV", got)
	}
}

//go:embed testdata
var testdata embed.FS

// lspci has this host's lspci show the guest's PCI functions, by their configuration spaces.
func lspci(t *testing.T, g *harness.Guest, golden string) {
	t.Helper()
	dump := g.Sh(harness.Context(t, limit), `cd /sys/bus/pci/devices; for f in *; do echo "$f x"; hexdump -v -e '"%03_ax:" 16/1 " %02x" "\n"' $f/config; echo; done`)
	file := filepath.Join(t.TempDir(), "dump")
	if err := os.WriteFile(file, []byte(dump+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := exec.Command("lspci", "-F", file, "-vvt").CombinedOutput()
	if err != nil {
		t.Fatalf("lspci: %v\n%s\n%s", err, got, dump)
	}
	if want, err := testdata.ReadFile("testdata/" + golden); err != nil || string(want) != string(got) {
		t.Errorf("testdata/%s is (%v)\n%s\nbut now it is\n%s", golden, err, want, got)
	}
}

// again takes the guest's driver away, resets the function, and gives the driver back.
func (n *nic) again(t *testing.T) {
	ctx := harness.Context(t, limit)
	n.g.Sh(ctx, "d=$(readlink -f /sys/class/net/"+n.name+"/device); cd /sys/bus/pci/drivers/"+n.driver+"; echo ${d##*/} >unbind; echo 1 >$d/reset; echo ${d##*/} >bind")
	n.name = strings.TrimSpace(n.g.Output(ctx, "@addr", n.mac, guest+"/24"))
	n.ping(ctx)
}

// powerOff ends the guest, which must have nothing to complain about.
func (n *nic) powerOff(t *testing.T) {
	t.Helper()
	complaint := regexp.MustCompile(`.*(?:BUG:|WARNING:|Oops|AER:|not ready|` + n.driver + `.*(?i:fail|error|hang|timeout)).*`)
	for _, bad := range complaint.FindAllString(n.g.Output(harness.Context(t, limit), "@dmesg"), -1) {
		if n.interrupt != "IO-APIC" || !strings.Contains(bad, "Failed to initialize MSI") { // as it was told
			t.Errorf("the guest's kernel: %s", bad)
		}
	}
	n.g.Output(harness.Context(t, limit), "@poweroff")
	if code := n.g.Wait(harness.Context(t, limit)); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if text := n.g.Stderr.String(); strings.Contains(text, "impaired") {
		t.Errorf("baton: %s", text)
	}
}

// reboot takes the guest through a reset of the machine.
func reboot(t *testing.T, g *harness.Guest) {
	t.Helper()
	g.Output(harness.Context(t, limit), "@reboot")
	g.WaitEvent(harness.Context(t, limit), "RESET")
	g.Output(harness.Context(t, bootLimit), "true")
}
