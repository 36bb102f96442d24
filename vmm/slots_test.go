package vmm

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"baton/boot"
	"baton/devices/chipset"
	"baton/devices/pci"
	"baton/tests/tiny"
)

// startSlots is a machine with three empty slots, a netdev and a disk.
func startSlots(t *testing.T, more ...string) *scripted {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-netdev", fmt.Sprintf("tap,id=n,ifname=sl%d,script=no", os.Getpid()), "-blockdev", "file,node-name=d,filename=" + disk}
	for i := range 3 {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=root%d,addr=%d.0,chassis=%d", i, i+1, i+1))
	}
	return startScripted(t, append(args, more...)...)
}

// The guest's side of the slots: see pci.SlotBlock.

func (s *scripted) wantSlotEvent(want uint32) {
	s.t.Helper()
	if port, code := s.slotEvent(); port<<8|code != want {
		s.t.Fatalf("event %d of slot %d, want %#x", code, port, want)
	}
}

func (s *scripted) ost(port, event, status byte) {
	s.Machine.ports.Write(chipset.SlotPort+8, []byte{port, status, event, 0})
}

func (s *scripted) slotState(bus string) (state string) {
	s.do(func() { state = s.slotOf(&Device{Bus: bus}).State().String() })
	return state
}

func (s *scripted) refused(command string, args map[string]any, words ...string) {
	s.t.Helper()
	_, err := s.command(command, args)
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			s.t.Errorf("%s %v: %v; want %q", command, args, err, w)
		}
	}
}

func nicArgs(more ...any) map[string]any {
	args := map[string]any{"driver": "virtio-net-pci", "id": "nic0", "netdev": "n"}
	for i := 0; i < len(more); i += 2 {
		args[more[i].(string)] = more[i+1]
	}
	return args
}

const deleted0 = `{"device":"nic0","path":"/machine/peripheral/nic0"}`

func TestDeviceDel(t *testing.T) {
	s := startSlots(t)
	for range 3 {
		s.execute("device_add", nicArgs("mq", false, "host_mtu", 1400, "bus", "root1"))
		s.wantSlotEvent(0x202)
		s.ost(2, 1, 0)
		if got := s.slotState("root1"); got != "present" || !s.visible("nic0") {
			t.Fatalf("slot is %s", got)
		}
		s.probe("nic0").start(0)
		s.execute("device_del", map[string]any{"id": "nic0"})
		s.refused("device_del", map[string]any{"id": "nic0"}, "Device nic0 is already in the process of unplug")
		s.wantSlotEvent(0x203)
		s.eject(2)
		s.event("DEVICE_DELETED", deleted0)
		if got := s.slotState("root1"); got != "empty" || s.visible("nic0") {
			t.Fatalf("slot is %s", got)
		}
		s.refused("device_del", map[string]any{"id": "nic0"}, "Device 'nic0' not found")
	}
	s.execute("device_add", map[string]any{"driver": "virtio-blk-pci", "drive": "d", "id": "disk"})
	s.execute("device_del", map[string]any{"id": "/machine/peripheral/disk", "mode": "surprise"})
	s.event("DEVICE_DELETED", `{"device":"disk","path":"/machine/peripheral/disk"}`)
	if got := s.slotState("root0"); got != "draining" {
		t.Errorf("slot is %s before the guest has noticed", got)
	}
	s.execute("netdev_del", map[string]any{"id": "n"}) // it outlived its device
}

// Silence and refusals.
func TestDeviceDelFails(t *testing.T) {
	s := startSlots(t)
	s.execute("device_add", nicArgs("bus", "root0"))
	s.wantSlotEvent(0x102)
	s.ost(1, 1, 0)

	s.execute("device_del", map[string]any{"id": "nic0", "deadline": 1})
	got := s.event("DEVICE_UNPLUG_GUEST_ERROR", "")
	if want := `{"device":"nic0","path":"/machine/peripheral/nic0","reason":"unplug virtio-net-pci nic0: the guest did not let go of it within 1ms","bus":"root0","slot-state":"requested"}`; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	s.wantSlotEvent(0) // withdrawn

	s.execute("device_del", map[string]any{"id": "nic0", "deadline": 60_000})
	s.wantSlotEvent(0x103)
	s.ost(1, 3, 0x82)
	if got := s.event("DEVICE_UNPLUG_GUEST_ERROR", ""); !strings.Contains(got, "it is busy in the guest") {
		t.Error(got)
	}

	// The guest has begun, and takes longer than we wait.
	s.execute("device_del", map[string]any{"id": "nic0", "deadline": 300})
	s.wantSlotEvent(0x103)
	if got := s.event("DEVICE_UNPLUG_GUEST_ERROR", ""); !strings.Contains(got, `"slot-state":"busy"`) {
		t.Error(got)
	}
	s.execute("device_del", map[string]any{"id": "nic0"}) // a reminder
	s.wantSlotEvent(0x103)
	s.eject(1)
	s.event("DEVICE_DELETED", deleted0)

	// The guest's own idea, also while its last word is on its way.
	s.execute("device_add", nicArgs())
	s.eject(1)
	s.event("DEVICE_DELETED", deleted0)
}

// What is asked of a guest that does not run waits for it.
func TestDeviceDelPaused(t *testing.T) {
	s := startSlots(t)
	s.execute("stop", nil)
	s.execute("device_add", nicArgs())
	s.execute("device_del", map[string]any{"id": "nic0", "deadline": 1})
	time.AfterFunc(50*time.Millisecond, func() { s.post(func() { s.events.Publish("TEST", nil) }) })
	s.event("TEST", "")
	if s.heard("DEVICE_UNPLUG_GUEST_ERROR") || s.slotState("root0") != "requested" {
		t.Errorf("a guest that does not run has missed a deadline; the slot is %s", s.slotState("root0"))
	}
	s.execute("device_del", map[string]any{"id": "nic0", "mode": "surprise"})
	s.event("DEVICE_DELETED", deleted0)
	if s.State() != StatePaused {
		t.Errorf("state %s", s.State())
	}
}

// A guest that has not run has nothing to be asked; one that restarts forgets what it was
// asked, and keeps the rest.
func TestDeviceDelAndReset(t *testing.T) {
	s := startSlots(t)
	s.execute("stop", nil)
	s.execute("system_reset", nil)
	s.execute("device_add", nicArgs())
	if got := s.slotState("root0"); got != "present" {
		t.Errorf("slot is %s", got)
	}
	s.execute("device_del", map[string]any{"id": "nic0"})
	s.event("DEVICE_DELETED", deleted0)

	s.execute("cont", nil)
	s.execute("device_add", nicArgs())
	s.execute("device_add", map[string]any{"driver": "virtio-blk-pci", "drive": "d", "id": "disk"})
	s.wantSlotEvent(0x102)
	s.execute("device_del", map[string]any{"id": "nic0"})
	s.execute("system_reset", nil)
	s.event("DEVICE_DELETED", deleted0)
	s.wantSlotEvent(0)
	if a, b := s.slotState("root0"), s.slotState("root1"); a != "empty" || b != "present" {
		t.Errorf("slots are %s and %s", a, b)
	}
	s.execute("device_add", nicArgs())
}

func TestDeviceAddFails(t *testing.T) {
	s := startSlots(t, "-device", "virtio-rng-pci,id=rng0", "-device", "virtio-rng-pci,id=rng1,bus=root2")
	add := func(args map[string]any, words ...string) { t.Helper(); s.refused("device_add", args, words...) }
	add(map[string]any{"driver": "nonsense"}, "'nonsense' is not a valid device model name")
	add(nicArgs("id", "rng0"), "Duplicate device ID 'rng0'")
	add(nicArgs("mq", "off"), "Invalid parameter type for 'mq', expected: boolean")
	add(nicArgs("host_mtu", "1400"), "Invalid parameter type for 'host_mtu', expected: integer")
	add(nicArgs("netdev", 1), "Invalid parameter type for 'netdev', expected: string")
	add(nicArgs("bus", "nowhere"), "Bus 'nowhere' not found")
	add(nicArgs("bus", "pcie.0"), "Bus 'pcie.0' does not support hotplugging")
	add(map[string]any{"driver": "pcie-root-port"}, "Bus 'pcie.0' does not support hotplugging")
	add(map[string]any{"driver": "virtserialport", "chardev": "c"}, "Device 'virtserialport' does not support hotplugging")
	add(nicArgs("addr", "1"), "a slot takes a device at 00.0")
	add(nicArgs("netdev", "x"), `unknown netdev "x"`)
	add(map[string]any{"driver": "virtio-net-pci"}, "netdev= is missing")
	add(nicArgs("bus", "root2"), "virtio-rng-pci rng1 is there")
	add(nicArgs("colour", "red"), "Property 'virtio-net-pci.colour' not found")
	s.refused("device_del", map[string]any{"id": "rng0"}, "Bus 'pcie.0' does not support hotplugging")
	s.refused("device_del", map[string]any{"id": "root0"}, "Bus 'pcie.0' does not support hotplugging")
	s.refused("device_del", map[string]any{"id": "rng1", "mode": "gentle"}, "Parameter 'mode' does not accept value 'gentle'")
	s.refused("device_del", map[string]any{"id": "rng1", "deadline": 0}, "'deadline' expects milliseconds")

	s.execute("device_add", nicArgs())
	s.execute("device_add", map[string]any{"driver": "virtio-blk-pci", "drive": "d"})
	add(map[string]any{"driver": "virtio-rng-pci"},
		"every slot is taken: root0: virtio-net-pci nic0 (plugging), root1: virtio-blk-pci (plugging), root2: virtio-rng-pci rng1 (present)")
	if n := strings.Count(s.execute("query-pci", nil), `"state":"plugging"`); n != 2 {
		t.Errorf("%d slots plug", n)
	}

	// Cold devices go as well.
	s.execute("device_del", map[string]any{"id": "rng1"})
	s.wantSlotEvent(0x102)
	s.wantSlotEvent(0x202)
	s.wantSlotEvent(0x303)
	s.eject(3)
	s.event("DEVICE_DELETED", `{"device":"rng1","path":"/machine/peripheral/rng1"}`)
	s.execute("human-monitor-command", map[string]any{"command-line": "device_add virtio-rng-pci,id=rng1,event_idx=off"})
	if got := s.execute("human-monitor-command", map[string]any{"command-line": "info pci"}); strings.Count(got, "slot 3: plugging") != 1 {
		t.Error(got)
	}
	s.execute("human-monitor-command", map[string]any{"command-line": "device_del rng1 surprise"})
	s.event("DEVICE_DELETED", `{"device":"rng1","path":"/machine/peripheral/rng1"}`)
}

func TestSlotStates(t *testing.T) {
	if n := len(slotState("").Values()); n != int(pci.SlotDraining)+1 {
		t.Errorf("%d states", n)
	}
}

func TestBlockdevs(t *testing.T) {
	s := startSlots(t)
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s.refused("blockdev-add", map[string]any{"driver": "file", "node-name": "d", "filename": file}, "Duplicate nodes with node-name='d'")
	s.refused("blockdev-add", map[string]any{"driver": "file", "node-name": "e", "filename": file + "x"}, "no such file")
	s.refused("blockdev-add", map[string]any{"driver": "qcow2", "node-name": "e"}, "there is no driver qcow2")
	s.execute("blockdev-add", map[string]any{"driver": "raw", "node-name": "e", "read-only": true, "file": map[string]any{"driver": "file", "filename": file}})
	s.execute("device_add", map[string]any{"driver": "virtio-blk-pci", "drive": "e", "id": "disk"})
	s.refused("device_add", map[string]any{"driver": "virtio-blk-pci", "drive": "e"}, "virtio-blk-pci disk uses it already")
	if got := s.execute("query-block", nil); !strings.Contains(got, file) {
		t.Error(got)
	}
	s.refused("blockdev-del", map[string]any{"node-name": "e"}, "Node e is in use")
	s.eject(1)
	s.event("DEVICE_DELETED", "")
	s.execute("blockdev-del", map[string]any{"node-name": "e"})
	s.refused("blockdev-del", map[string]any{"node-name": "e"}, "Failed to find node with node-name='e'")
}

// A vCPU uses a disk without a pause while that is pulled and plugged: it never reaches what was
// freed (CVE-2014-3471), and nothing that the disk held stays.
func TestSurpriseUnderAccess(t *testing.T) {
	const port, fn, bar = boot.ECAMBase + 1<<15, boot.ECAMBase + 1<<20, 0xd000_0000
	loop := slices.Concat(
		tiny.Write(port+0x04, 2, 6), tiny.Write(port+0x20, 4, bar|bar>>16), // the window: PCIe 7.5.1.3.8
		tiny.Write(fn+0x10, 4, bar), tiny.Write(fn+0x14, 4, 0), tiny.Write(fn+0x04, 2, 6),
		tiny.Write(bar+drvStatus, 1, 0), tiny.Write(bar+drvStatus, 1, 3), tiny.Read(bar+drvFeature, 4),
		tiny.Write(bar+0x3000, 2, 0), tiny.Read(bar+0x2000, 4), tiny.Write(bar+0x4000, 4, 0xfee0_0000), tiny.Read(fn, 4))
	loop = append(loop, 0xe9) // jmp to its beginning
	loop = binary.LittleEndian.AppendUint32(loop, -uint32(len(loop)+4))
	s := startSlots(t, "-kernel", tiny.Kernel(t, loop))
	files := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	before, routes := files(), s.irq.text()
	for i := range 200 {
		s.execute("device_add", map[string]any{"driver": "virtio-blk-pci", "drive": "d", "id": "disk", "bus": "root0"})
		for s.slotState("root0") != "present" { // the guest has enabled it
		}
		mode := []string{"surprise", "cooperative"}[i&1]
		s.execute("device_del", map[string]any{"id": "disk", "mode": mode})
		for {
			port, code := s.slotEvent()
			if port == 1 && code == 2 {
				s.ost(1, 1, 0)
			} else if port == 1 && code == 3 {
				s.eject(1)
			} else if s.heardSince("DEVICE_DELETED") && s.slotState("root0") == "empty" {
				break
			}
		}
		s.event("DEVICE_DELETED", "")
	}
	if now := files(); now > before {
		t.Errorf("%d files before, %d after", before, now)
	}
	if now := s.irq.text(); now != routes {
		t.Errorf("interrupts before\n%safter\n%s", routes, now)
	}
	if s.State() != StateRunning {
		t.Errorf("the guest is %s", s.State())
	}
}

// heardSince says whether there is an event of that name that nobody has waited for.
func (s *scripted) heardSince(name string) bool {
	events, _, _ := s.events.Poll(max(s.seq[name], 1))
	return slices.ContainsFunc(events, func(e Event) bool { return e.Name == name })
}

// KVM has to know of a level-triggered pin as long as an EOI may come: also while it is masked.
func TestPinRoutes(t *testing.T) {
	s := startSlots(t)
	rte := func(low uint32) {
		s.write(boot.IOAPICAddr, 4, 0x10+2*chipset.GEDPin)
		s.write(boot.IOAPICAddr+0x10, 4, low)
	}
	const level, masked, vector = 1 << 15, 1 << 16, 0x41
	for _, c := range []struct {
		low  uint32
		want bool
	}{{vector, false}, {vector | level, true}, {vector | level | masked, true}, {vector | masked, false}, {vector | level, true}, {masked, false}} {
		rte(c.low)
		s.irq.mu.Lock()
		m, ok := s.irq.routes[chipset.GEDPin]
		s.irq.mu.Unlock()
		if ok != c.want || ok && m.Data != vector|level {
			t.Errorf("entry %#x: route %+v %v, want %v", c.low, m, ok, c.want)
		}
	}
}
