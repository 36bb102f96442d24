// Package vfio passes functions of the host through to a stock Linux: a VF, whose driver in
// the guest is igbvf, and a whole NIC, an e1000e.
package vfio

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
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
	quietKernel(t)
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
	n := &nic{g: g, peer: peer, driver: "igbvf", mac: mac}
	t.Run("traffic", n.traffic)
	t.Run("function", n.function)
	t.Run("reboot", func(t *testing.T) { reboot(t, g) })
	t.Run("traffic after the reboot", n.traffic)
	t.Run("driver again", n.again)

	g.Output(harness.Context(t, limit), "@poweroff")
	if code := g.Wait(harness.Context(t, limit)); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if d := vf.Driver(); d != was || was == "" {
		t.Fatalf("driver %q after the end, %q before", d, was)
	}
	usable(t, peer, vf.PCI)
}

// usable uses the device on the host.
func usable(t *testing.T, peer *harness.Peer, pci string) {
	t.Helper()
	links, _ := filepath.Glob("/sys/bus/pci/devices/" + pci + "/net/*")
	if len(links) != 1 {
		t.Fatalf("interfaces of %s: %q", pci, links)
	}
	name := filepath.Base(links[0])
	harness.Up(t, name)
	harness.Addr(t, name, host+"/24")
	peer.Ping(harness.Context(t, limit), host)
}

// A nic is the guest's view of the device.
type nic struct {
	g           *harness.Guest
	peer        *harness.Peer
	driver, mac string
	name        string
}

// traffic crosses the wire both ways, and is announced by MSI-X.
func (n *nic) traffic(t *testing.T) {
	ctx := harness.Context(t, limit)
	n.name = strings.TrimSpace(n.g.Output(ctx, "@addr", n.mac, guest+"/24"))
	if d := n.g.Sh(ctx, "basename $(readlink /sys/class/net/"+n.name+"/device/driver)"); d != n.driver {
		t.Fatalf("driver %q, want %q", d, n.driver)
	}
	n.peer.Ping(ctx, guest)
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

// interrupts counts the device's MSI-X interrupts in the guest.
func (n *nic) interrupts(t *testing.T, ctx context.Context) (sum int) {
	t.Helper()
	text := n.g.Output(ctx, "@cat", "/proc/interrupts")
	for line := range strings.Lines(text) {
		if !strings.Contains(line, "MSI-X") && !strings.Contains(line, "MSIX") || !strings.Contains(line, n.name) {
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
		t.Fatalf("no MSI-X interrupts of %s:\n%s", n.name, text)
	}
	return sum
}

const tcpBytes = 4 << 20

func (n *nic) fromGuest(t *testing.T, ctx context.Context) (sent, received string) {
	var l net.Listener
	err := n.peer.Do(func() (err error) {
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
	err := n.peer.Do(dial)
	for errors.Is(err, unix.ECONNREFUSED) && ctx.Err() == nil { // nobody listens yet
		err = n.peer.Do(dial)
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
	tree := n.g.Output(ctx, "@lspci")
	t.Log(tree)
	dir := "/sys/class/net/" + n.name + "/device"
	if got := n.g.Sh(ctx, "cat "+dir+"/irq"); got != "0" {
		t.Errorf("irq %s, but there is no INTx", got)
	}
	if got := n.g.Sh(ctx, "cd "+dir+"; ls -d sriov_totalvfs reset 2>/dev/null || true"); got != "reset" {
		t.Errorf("files %q: want reset and no SR-IOV", got)
	}
	n.g.Sh(ctx, "echo 1 >"+dir+"/reset")
	n.peer.Ping(ctx, guest)
}

// again unbinds and binds the guest's driver.
func (n *nic) again(t *testing.T) {
	ctx := harness.Context(t, limit)
	n.g.Sh(ctx, "d=$(readlink -f /sys/class/net/"+n.name+"/device); cd /sys/bus/pci/drivers/"+n.driver+"; echo ${d##*/} >unbind; echo ${d##*/} >bind")
	n.name = strings.TrimSpace(n.g.Output(ctx, "@addr", n.mac, guest+"/24"))
	n.peer.Ping(ctx, guest)
}

// reboot takes the guest through a reset of the machine.
func reboot(t *testing.T, g *harness.Guest) {
	t.Helper()
	g.Output(harness.Context(t, limit), "@reboot")
	g.WaitEvent(harness.Context(t, limit), "RESET")
	g.Output(harness.Context(t, bootLimit), "true")
}

// quietKernel fails the test if the host's kernel complains while it runs.
func quietKernel(t *testing.T) {
	t.Helper()
	mark := fmt.Sprintf("%s starts at %d", t.Name(), time.Now().UnixNano())
	if err := os.WriteFile("/dev/kmsg", []byte(mark), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		buf := make([]byte, 4<<20)
		n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buf)
		_, text, found := strings.Cut(string(buf[:max(n, 0)]), mark)
		if err != nil || !found {
			t.Fatalf("read the kernel log: %v", err)
		}
		for _, line := range regexp.MustCompile(`.*(?:WARNING:|BUG:|Oops|Call Trace|DMAR:.*[Ff]ault|vfio.*(?i:fail|error|invalid|timed out)|irq \d+: nobody cared).*`).FindAllString(text, -1) {
			t.Errorf("the host's kernel: %s", line)
		}
		if t.Failed() {
			t.Logf("the host's kernel log:\n%s", text)
		}
	})
}
