package hotplug

import (
	"os"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
)

const (
	acpi   = "q35"
	native = "q35,native-hotplug=on"
)

// A setup is the machine and the Linux of a test.
type setup struct {
	machine string
	linux   func(t testing.TB, words ...string) []string
}

// each runs a test on both machines, or those named; with BATON_LONG with the older Linux, too.
func each(t *testing.T, f func(t *testing.T, s setup), machines ...string) {
	if machines == nil {
		machines = []string{acpi, native}
	}
	for _, m := range machines {
		t.Run(m, func(t *testing.T) { f(t, setup{m, harness.Linux}) })
		if os.Getenv("BATON_LONG") != "" {
			t.Run(m+", Linux 6.1", func(t *testing.T) { f(t, setup{m, harness.Linux61}) })
		}
	}
}

// start boots a guest; options are added to the command line, words to the kernel's. It returns
// as soon as baton listens.
func (s setup) start(t *testing.T, options []string, words ...string) *vm {
	t.Helper()
	return startLinux(t, append(append(s.linux(t, words...), "-machine", s.machine), options...))
}

// Plugged before the first instruction, before Linux looks for devices, while it does and
// afterwards: everything is there in the end, and can go.
func TestPlugDuringBoot(t *testing.T) {
	each(t, func(t *testing.T, s setup) {
		v := s.start(t, []string{"-S",
			"-device", "pcie-root-port,id=r4,chassis=4,attention-button=off", "-device", "pcie-root-port,id=r5,chassis=5"}, "ignore_loglevel")
		rng := func(bus string) {
			t.Helper()
			v.q.Do("device_add", map[string]any{"driver": "virtio-rng-pci", "id": "rng" + bus, "bus": bus})
		}
		v.q.Do("device_add", map[string]any{"driver": "virtio-blk-pci", "id": "disk0", "drive": "d", "bus": "r1"})
		rng("r5")
		if d := v.unplug("rngr5", "cooperative"); d > time.Second { // nobody has to be asked
			t.Errorf("unplug from a guest that has not run: %v", d)
		}
		v.q.Do("cont", nil)
		v.g.WaitSerial(harness.Context(t, bootLimit), `Linux version`)
		rng("r2")
		v.g.WaitSerial(harness.Context(t, bootLimit), `PCI host bridge to bus 0000:00`)
		rng("r3")
		v.g.WaitSerial(harness.Context(t, bootLimit), `NET: Registered`)
		rng("r4")
		v.q.Do("device_del", map[string]any{"id": "rngr2"})
		v.up()
		if data := v.end("DEVICE_DELETED"); data.Device != "rngr2" {
			t.Errorf("%+v has gone, not rngr2", data)
		}
		v.sh("until [ -b /dev/vda ] && [ $(ls /sys/bus/virtio/drivers/virtio_rng | grep -c virtio) = 2 ]; do sleep 0.1; done")
		for _, id := range []string{"disk0", "rngr3", "rngr4"} {
			t.Logf("%s: unplug %v", id, v.unplug(id, "cooperative").Round(time.Millisecond))
		}
		v.sh("! ls /sys/block/vda /sys/bus/virtio/drivers/virtio_rng/virtio* 2>/dev/null")
		v.healthy()
	})
}

// A reset keeps what was plugged, and ends what was being unplugged.
func TestReboot(t *testing.T) {
	each(t, func(t *testing.T, s setup) {
		v := s.start(t, nil)
		v.up()
		v.plugDisk("r1")
		v.plugNIC("r2")
		reboot := func() {
			t.Helper()
			v.g.Output(harness.Context(t, limit), "@reboot")
			v.q.WaitEvent("RESET")
			v.up()
		}
		reboot()
		if names := v.sh("until [ -b /dev/vda ]; do sleep 0.02; done; ls /sys/block /sys/class/net"); !strings.Contains(names, "vda") {
			t.Errorf("no disk after the reboot: %s", names)
		}
		v.sh("dd if=/dev/vda of=/dev/null bs=64k count=16")

		// The guest is told while it goes down, or not at all.
		v.g.Output(harness.Context(t, limit), "@reboot")
		v.q.Do("device_del", map[string]any{"id": "nic0"})
		v.end("DEVICE_DELETED")
		v.up()
		if s := v.slot("r2"); s != "empty" {
			t.Errorf("slot is %s", s)
		}
		// Asked and reset at once.
		v.q.Do("device_del", map[string]any{"id": "disk0"})
		v.q.Do("system_reset", nil)
		v.end("DEVICE_DELETED")
		v.up()
		v.sh("! ls /sys/block/vda 2>/dev/null")
		v.plugDisk("r1")
		v.unplug("disk0", "cooperative")
		v.healthy()
	})
}

// A guest that does not listen is waited for until the deadline.
func TestDeaf(t *testing.T) {
	each(t, func(t *testing.T, s setup) {
		v := s.start(t, nil, map[string]string{acpi: "acpiphp.disable=1", native: "pcie_ports=compat"}[s.machine])
		v.up()
		v.q.Do("device_add", map[string]any{"driver": "virtio-blk-pci", "id": "disk0", "drive": "d", "bus": "r1"})
		v.sh("echo 1 >/sys/bus/pci/rescan; until [ -b /dev/vda ]; do sleep 0.02; done; dd if=/dev/vda of=/dev/null bs=64k count=16")
		if s := v.slot("r1"); s != "present" {
			t.Errorf("slot is %s once the guest has found the device by itself", s)
		}
		v.q.Do("device_del", map[string]any{"id": "disk0", "deadline": 1500})
		data := v.end("DEVICE_UNPLUG_GUEST_ERROR")
		asked := map[string]string{acpi: "busy", native: "requested"}[s.machine] // ACPI's methods take the event, and find no driver
		if data.Device != "disk0" || data.Bus != "r1" || !strings.Contains(data.Reason, "within 1.5s") || data.Slot != asked {
			t.Errorf("DEVICE_UNPLUG_GUEST_ERROR %+v", data)
		}
		v.sh("dd if=/dev/vda of=/dev/null bs=64k count=16")
		v.unplug("disk0", "surprise")
		if s := v.slot("r1"); s != "draining" {
			t.Errorf("slot is %s while the guest does not know", s)
		}
		v.sh("echo 1 >$(readlink -f /sys/block/vda/device/..)/remove; while [ -e /sys/block/vda ]; do sleep 0.02; done")
		v.healthy()
	})
}

// A guest that is paused is asked once it runs.
func TestPaused(t *testing.T) {
	each(t, func(t *testing.T, s setup) {
		v := s.start(t, nil)
		v.up()
		v.plugDisk("r1")
		v.q.Do("stop", nil)
		v.q.Do("device_del", map[string]any{"id": "disk0"})
		if s := v.slot("r1"); s != "requested" {
			t.Errorf("slot is %s", s)
		}
		v.q.Do("cont", nil)
		v.end("DEVICE_DELETED")

		v.read(v.plugDisk("r1"), way{told: true})
		v.q.Do("stop", nil)
		v.unplug("disk0", "surprise")
		v.q.Do("cont", nil)
		v.gone(way{bus: "r1"}, "[ -e /sys/block/vda ]")
		v.healthy()
	})
}

// A guest unplugs by itself, by the slot's file; one that only forgets a device has not ejected it.
func TestGuestEjects(t *testing.T) {
	each(t, func(t *testing.T, s setup) {
		v := s.start(t, nil)
		v.up()
		v.plugDisk("r1")
		v.sh("echo 0 >/sys/bus/pci/slots/1/power")
		if data := v.end("DEVICE_DELETED"); data.Device != "disk0" {
			t.Errorf("%+v has gone", data)
		}
		v.plugDisk("r1")
		v.sh("echo 1 >$(readlink -f /sys/block/vda/device/..)/remove")
		if s := v.slot("r1"); s != "present" {
			t.Errorf("slot is %s", s)
		}
		v.sh("echo 1 >/sys/bus/pci/rescan; until [ -b /dev/vda ]; do sleep 0.02; done")
		v.unplug("disk0", "cooperative")
		v.healthy()
	})
}

// While the indicator blinks, nobody presses.
func TestBlinks(t *testing.T) {
	each(t, func(t *testing.T, s setup) {
		v := s.start(t, nil)
		v.up()
		for range 3 {
			v.q.Do("device_add", map[string]any{"driver": "virtio-blk-pci", "id": "disk0", "drive": "d", "bus": "r1"})
			t.Logf("plugged and asked at once: %v", v.unplug("disk0", "cooperative"))
		}
		v.plugDisk("r1")
		v.q.Do("device_del", map[string]any{"id": "disk0", "deadline": 2000}) // within the 5 s of the button
		if _, err := v.q.Execute("device_del", map[string]any{"id": "disk0"}); err == nil || !strings.Contains(err.Error(), "Device disk0 is already in the process of unplug") {
			t.Errorf("a second device_del: %v", err)
		}
		data := v.end("DEVICE_UNPLUG_GUEST_ERROR")
		if data.Slot != "busy" {
			t.Errorf("%+v", data)
		}
		state, since := "", time.Now() // the second press has cancelled the first one
		for state != "present" && time.Since(since) < limit {
			state = v.slot("r1")
		}
		if state != "present" {
			t.Fatalf("slot is %s", state)
		}
		v.sh("dd if=/dev/vda of=/dev/null bs=64k count=16")
		v.unplug("disk0", "cooperative")
		v.healthy()
	}, native)
}
