// Package hostcheck proves that the host under test is what the other suites take it for,
// and that the harness leaves it as it found it.
package hostcheck

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"baton/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	mac0 = "02:00:00:00:00:10"
	mac1 = "02:00:00:00:00:11"
)

func TestKVM(t *testing.T) {
	// KVM_GET_API_VERSION of linux/kvm.h
	const getAPIVersion, apiVersion = 0xae00, 12
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	v, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), getAPIVersion, 0)
	if errno != 0 || v != apiVersion {
		t.Errorf("API version %d, %v; want %d", v, errno, apiVersion)
	}
	modules, _ := filepath.Glob("/sys/module/kvm_*")
	for i, m := range modules {
		modules[i] = filepath.Base(m)
	}
	got := strings.Join(modules, " ")
	if harness.Nested() && got != "kvm_amd" && got != "kvm_intel" || strings.Contains(got, "kvm_pvm") {
		t.Errorf("KVM is of %q, want kvm_amd or kvm_intel", got)
	}
}

func TestDevicesOpen(t *testing.T) {
	for _, name := range []string{"/dev/vhost-net", "/dev/net/tun", "/dev/vfio/vfio"} {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Error(err)
			continue
		}
		f.Close()
	}
}

// links is what of the network a test must leave as it was.
func links(t *testing.T) (out []string) {
	all, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range all {
		a := l.Attrs()
		out = append(out, a.Name+" "+a.HardwareAddr.String()+" up="+strconv.FormatBool(a.Flags&net.FlagUp != 0))
	}
	return out
}

func TestVFs(t *testing.T) {
	before := links(t)
	for _, pf := range harness.PFs(t) {
		t.Run(pf.Name, func(t *testing.T) {
			vfs := pf.CreateVFs(t, 2)
			for i, vf := range vfs {
				mac := []string{mac0, mac1}[i]
				vf.SetMAC(t, mac)
				if got := vf.MAC(t); got != mac {
					t.Errorf("%s: MAC %s, want %s", vf.PCI, got, mac)
				}
				vf.BindVFIO(t)
				if got := vf.Driver(); got != "vfio-pci" {
					t.Errorf("%s: driver %q", vf.PCI, got)
				}
				group, members := vf.IOMMUGroup(t)
				if len(members) != 1 {
					t.Errorf("%s shares IOMMU group %d: %v", vf.PCI, group, members)
				}
				f, err := os.OpenFile("/dev/vfio/"+strconv.Itoa(group), os.O_RDWR, 0)
				if err != nil {
					t.Error(err)
				} else {
					f.Close()
				}
			}
		})
	}
	if d := cmp.Diff(before, links(t)); d != "" {
		t.Errorf("links changed (-before +after):\n%s", d)
	}
}

func TestPeerOnTheWire(t *testing.T) {
	before := links(t)
	t.Run("ping", func(t *testing.T) {
		p := harness.NewPeer(t, "10.77.0.2/24")
		harness.Up(t, p.Uplink)
		harness.Addr(t, p.Uplink, "10.77.0.1/24")
		p.Ping(harness.Context(t, time.Minute), "10.77.0.1")
	})
	if d := cmp.Diff(before, links(t)); d != "" {
		t.Errorf("links changed (-before +after):\n%s", d)
	}
}

func TestPeerThroughBridge(t *testing.T) {
	p := harness.NewVethPeer(t, "10.77.0.2/24")
	harness.Tap(t, "tap0", 2)
	harness.Bridge(t, "br0", p.Uplink, "tap0")
	harness.Addr(t, "br0", "10.77.0.1/24")
	p.Ping(harness.Context(t, 30*time.Second), "10.77.0.1")
}

func TestPackets(t *testing.T) {
	a, b := harness.NewPacketTap(t, "pkt0"), harness.NewPacketTap(t, "pkt1")
	harness.Bridge(t, "br0", a.Name, b.Name)
	ctx := harness.Context(t, 30*time.Second)
	harness.WaitCarrier(t, ctx, "br0")
	// 88b5 is the EtherType for local experiments (IEEE 802).
	frame := append(bytes.Repeat([]byte{0xff}, 6), 2, 0, 0, 0, 0, 0x10, 0x88, 0xb5)
	frame = append(frame, bytes.Repeat([]byte("wire"), 12)...)
	a.Send(frame)
	b.Receive(ctx, func(got []byte) bool { return bytes.Equal(got, frame) })
}
