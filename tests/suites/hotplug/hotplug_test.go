// Package hotplug plugs devices into the slots of a stock Linux that runs, and unplugs them, by
// every way that there is, under traffic.
package hotplug

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	bootLimit = 2 * time.Minute
	limit     = 90 * time.Second

	hostAddr  = "10.77.0.1"
	guestAddr = "10.77.0.2"
	mac       = "52:54:00:00:77:01"
	tap       = "bat77"
)

// A vm is a guest with three empty slots, of root ports r1 to r3 (r3 without a button), and with
// a TAP and a disk that no device uses.
type vm struct {
	*testing.T
	g *harness.Guest
	q *harness.QMP
}

// startLinux boots a guest with these options. It returns as soon as baton listens.
func startLinux(t *testing.T, args []string) *vm {
	t.Helper()
	harness.QuietKernel(t)
	dir, err := os.MkdirTemp("", "hotplug") // short enough for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "qmp")
	args = append(args, "-m", "256M", "-smp", "2", "-qmp", "unix:"+sock+",server=on,wait=off",
		"-device", "pcie-root-port,id=r1,chassis=1", "-device", "pcie-root-port,id=r2,chassis=2",
		"-device", "pcie-root-port,id=r3,chassis=3,attention-button=off",
		"-netdev", "tap,id=n,script=no,downscript=no,ifname="+tap, "-blockdev", "file,node-name=d,filename="+disk)
	g := harness.Start(t, harness.GuestConfig{Args: args})
	t.Cleanup(func() {
		if t.Failed() {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			r, err := g.Run(ctx, "sh", "-c", "grep -v ' 0 *0 *[A-Z][a-z]' /proc/interrupts; ls -l /sys/bus/pci/slots /sys/bus/pci/devices; dmesg | tail -n 40")
			t.Logf("the guest: %v\n%s", err, r.Stdout)
		}
	})
	return &vm{t, g, harness.DialQMP(t, harness.Context(t, time.Hour), sock)}
}

// up waits until the guest is.
func (v *vm) up() { v.Helper(); v.g.Output(harness.Context(v, bootLimit), "true") }

func (v *vm) sh(script string) string { v.Helper(); return v.g.Sh(harness.Context(v, limit), script) }

// plugDisk plugs the disk into a slot and returns its name in the guest, once it is there.
func (v *vm) plugDisk(bus string) string {
	v.Helper()
	v.q.Do("device_add", map[string]any{"driver": "virtio-blk-pci", "id": "disk0", "drive": "d", "bus": bus})
	return v.sh("until [ -b /dev/vda ]; do sleep 0.02; done; echo vda")
}

// plugNIC plugs the NIC into a slot, and gives both ends their addresses.
func (v *vm) plugNIC(bus string) (name string) {
	v.Helper()
	v.q.Do("device_add", map[string]any{"driver": "virtio-net-pci", "id": "nic0", "netdev": "n", "mac": mac, "bus": bus})
	v.sh("until grep -qs " + mac + " /sys/class/net/*/address; do sleep 0.02; done")
	return strings.TrimSpace(v.g.Output(harness.Context(v, limit), "@addr", mac, guestAddr+"/24"))
}

// unplug has a device go and returns how long that took.
func (v *vm) unplug(id, mode string) time.Duration {
	v.Helper()
	start := time.Now()
	v.q.Do("device_del", map[string]any{"id": id, "mode": mode})
	if data := v.end("DEVICE_DELETED"); data.Device != id || data.Path != "/machine/peripheral/"+id {
		v.Errorf("DEVICE_DELETED: %+v", data)
	}
	return time.Since(start)
}

type unplugged struct {
	Device, Path, Reason, Bus string
	Slot                      string `json:"slot-state"`
}

// end waits for the end of an unplug, which has to be this one.
func (v *vm) end(event string) (data unplugged) {
	v.Helper()
	e := v.q.WaitEvent("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
	if err := json.Unmarshal(e.Data, &data); err != nil || e.Event != event {
		v.Fatalf("%s %s, want %s", e.Event, e.Data, event)
	}
	return data
}

// slot is the state of a port's slot, by query-pci.
func (v *vm) slot(bus string) string {
	v.Helper()
	var buses []struct {
		Devices []struct {
			ID     string `json:"qdev_id"`
			Bridge struct {
				Slot struct{ State string } `json:"x-slot"`
			} `json:"pci_bridge"`
		}
	}
	if err := json.Unmarshal(v.q.Do("query-pci", nil), &buses); err != nil {
		v.Fatal(err)
	}
	for _, d := range buses[0].Devices {
		if d.ID == bus {
			return d.Bridge.Slot.State
		}
	}
	v.Fatalf("no root port %s", bus)
	return ""
}

// healthy checks that neither kernel has anything to complain about, and turns the guest off.
func (v *vm) healthy() {
	v.Helper()
	text := v.g.Output(harness.Context(v, limit), "@dmesg")
	for _, line := range regexp.MustCompile(`.*(?:BUG:|WARNING:|Oops|Call Trace|AER:|no space for|can't assign|failed to assign|hung|stall).*`).FindAllString(text, -1) {
		v.Errorf("the guest's kernel: %s", line)
	}
	v.g.Output(harness.Context(v, limit), "@poweroff")
	if code := v.g.Wait(harness.Context(v, limit)); code != 0 {
		v.Errorf("exit code %d", code)
	}
}

// A way to unplug: from a slot of a machine.
type way struct {
	name, bus, mode string
	told            bool // that the device has gone, while it works or not
	machine         string
	most            time.Duration // that the guest may need, in the nested host
}

var ways = []way{
	{"ACPI", "r1", "cooperative", false, acpi, 5 * time.Second},
	{"ACPI, surprise", "r2", "surprise", true, acpi, 5 * time.Second},
	{"native, button", "r1", "cooperative", false, native, 15 * time.Second},
	{"native, no button", "r3", "cooperative", true, native, 5 * time.Second},
	{"native, surprise", "r2", "surprise", true, native, 5 * time.Second},
}

// TestWays plugs a disk and a NIC and unplugs them under traffic, by every way, twice.
func TestWays(t *testing.T)   { testWays(t, func(t *testing.T) []string { return harness.Linux(t) }) }
func TestWays61(t *testing.T) { testWays(t, func(t *testing.T) []string { return harness.Linux61(t) }) }

func testWays(t *testing.T, linux func(*testing.T) []string) {
	for _, machine := range []string{acpi, native} {
		t.Run(machine, func(t *testing.T) {
			v := startLinux(t, append(linux(t), "-machine", machine))
			v.up()
			addAddr(t)
			for _, w := range ways {
				if w.machine == machine {
					for i := range 2 {
						v.disk(t, w, i)
						v.nic(t, w, i)
					}
				}
			}
			v.healthy()
		})
	}
}

// In is the vm for a subtest.
func (v *vm) In(t *testing.T) *vm { return &vm{t, v.g.In(t), v.q} }

func (v *vm) disk(t *testing.T, w way, i int) {
	t.Run(fmt.Sprintf("%s, disk %d", w.name, i), func(t *testing.T) {
		v := v.In(t)
		start := time.Now()
		name := v.plugDisk(w.bus)
		plugged := time.Since(start)
		v.read(name, w)
		if s := v.slot(w.bus); s != "present" {
			t.Errorf("slot is %s", s)
		}
		took := v.unplug("disk0", w.mode)
		v.gone(w, "[ -e /sys/block/"+name+" ]")
		t.Logf("plug to the disk in the guest %v, unplug %v", plugged.Round(time.Millisecond), took.Round(time.Millisecond))
		if took > w.most {
			t.Errorf("unplug took %v", took)
		}
	})
}

// read has the guest read a disk until that is unplugged, and returns once it does. One of which
// it will be told that it has gone it reads before: Linux's virtio_blk waits for ever for a request that has left with the
// device, and whoever plugs waits with it (see "virtio_blk: Fix disk deletion hang on device
// surprise removal", May 2025). A NIC has no such trouble.
func (v *vm) read(name string, w way) {
	v.Helper()
	if w.told {
		v.sh("dd if=/dev/" + name + " of=/dev/null bs=64k count=64 2>/dev/null")
		return
	}
	// What dd writes says that it is done for the first time.
	v.sh("rm -f /tmp/dd; (while dd if=/dev/" + name + " of=/dev/null bs=64k count=64 iflag=direct; do :; done) >/tmp/dd 2>&1 & until [ -s /tmp/dd ]; do sleep 0.02; done")
}

func (v *vm) nic(t *testing.T, w way, i int) {
	t.Run(fmt.Sprintf("%s, NIC %d", w.name, i), func(t *testing.T) {
		v := v.In(t)
		start := time.Now()
		name := v.plugNIC(w.bus)
		plugged := time.Since(start)
		ping := exec.CommandContext(harness.Context(t, limit), "ping", "-n", "-i", "0.02", guestAddr)
		if err := ping.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { ping.Process.Kill(); _ = ping.Wait() }()
		v.sh("ping -c 3 -i 0.1 -W 20 " + hostAddr)
		took := v.unplug("nic0", w.mode)
		v.gone(w, "[ -e /sys/class/net/"+name+" ]")
		t.Logf("plug to an address in the guest %v, unplug %v", plugged.Round(time.Millisecond), took.Round(time.Millisecond))
		if took > w.most {
			t.Errorf("unplug took %v", took)
		}
	})
}

// gone waits until the guest has let go and its slot is empty again.
func (v *vm) gone(w way, there string) {
	v.Helper()
	v.sh("while " + there + "; do sleep 0.02; done")
	start, s := time.Now(), "" // the guest's last word follows at once
	for s != "empty" && time.Since(start) < limit {
		s = v.slot(w.bus)
	}
	if s != "empty" {
		v.Fatalf("slot is %s after the unplug", s)
	}
}

func addAddr(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("sh", "-ec", "ip addr add "+hostAddr+"/24 dev "+tap+"; ip link set "+tap+" up").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
