package vmm

import (
	"strings"
	"testing"

	virtionet "baton/devices/virtio/net"
)

// The cases of QEMU's tests/qtest/virtio-net-failover.c, by their names. The primary is a
// virtio-net as well, and the MACs differ, as there.

const (
	standby0 = "virtio-net-pci,netdev=hs0,id=standby0,bus=root0,mac=52:54:00:22:22:22,failover="
	primary0 = "virtio-net-pci,netdev=hs1,id=primary0,bus=root1,mac=52:54:00:11:11:11,failover_pair_id="
)

// startPair starts a machine with the cards that are not "".
func startPair(t *testing.T, standby, primary string, more ...string) *scripted {
	t.Helper()
	args := append(failoverNets(), more...)
	for _, d := range []string{standby, primary} {
		if d != "" {
			args = append(args, "-device", d)
		}
	}
	return startScripted(t, args...)
}

const negotiated0 = `{"device-id":"standby0"}`

func TestQtestParams(t *testing.T) {
	t.Run("error/id", func(t *testing.T) {
		s := startPair(t, standby0+"on", "")
		args := deviceArgs(primary0 + "standby0")
		delete(args, "id")
		s.fails("device_add", args, "Device with failover_pair_id needs to have id")
	})
	t.Run("error/pcie", func(t *testing.T) {
		args := append(failoverNets(), "-device", standby0+"on", "-device", strings.Replace(primary0, "bus=root1", "bus=pcie.0", 1)+"standby0")
		_, err := ParseArgs(append([]string{"-kernel", "x"}, args...))
		if err == nil || !strings.Contains(err.Error(), "Bus 'pcie.0' does not support hotplugging") {
			t.Error(err)
		}
	})
	t.Run("on", func(t *testing.T) {
		s := startPair(t, standby0+"on", primary0+"standby0")
		s.shown(true, false)
	})
	t.Run("on_mismatch", func(t *testing.T) {
		s := startPair(t, standby0+"on", primary0+"standby1")
		s.shown(true, true)
		s.probe("standby0").start(0)
		s.event("FAILOVER_NEGOTIATED", negotiated0)
		s.shown(true, true)
	})
	t.Run("off", func(t *testing.T) {
		s := startPair(t, standby0+"off", primary0+"standby0")
		s.shown(true, true)
		d := s.probe("standby0")
		if d.offered()&virtionet.FeatureStandby != 0 {
			t.Error("STANDBY is offered")
		}
		d.start(0)
		s.shown(true, true)
		if s.heard("FAILOVER_NEGOTIATED") {
			t.Error("FAILOVER_NEGOTIATED")
		}
	})
	t.Run("enabled", func(t *testing.T) {
		s := startPair(t, standby0+"on", primary0+"standby0")
		s.shown(true, false)
		s.probe("standby0").start(0)
		s.event("FAILOVER_NEGOTIATED", negotiated0)
		s.shown(true, true)
	})
	t.Run("guest_off", func(t *testing.T) {
		s := startPair(t, standby0+"on", primary0+"standby0")
		s.shown(true, false)
		s.probe("standby0").start(virtionet.FeatureStandby)
		s.shown(true, false)
		if s.heard("FAILOVER_NEGOTIATED") {
			t.Error("FAILOVER_NEGOTIATED")
		}
	})
}

// deviceArgs are the arguments of device_add for what -device takes.
func deviceArgs(option string) map[string]any {
	args := map[string]any{}
	for i, word := range strings.Split(option, ",") {
		key, value, _ := strings.Cut(word, "=")
		switch {
		case i == 0:
			args["driver"] = key
		case value == "on" || value == "off":
			args[key] = value == "on"
		default:
			args[key] = value
		}
	}
	return args
}

func TestQtestHotplug(t *testing.T) {
	t.Run("1", func(t *testing.T) {
		s := startPair(t, standby0+"on", "")
		s.probe("standby0").start(0)
		s.event("FAILOVER_NEGOTIATED", negotiated0)
		s.execute("device_add", deviceArgs(primary0+"standby0"))
		s.shown(true, true)
	})
	t.Run("1_reverse", func(t *testing.T) {
		s := startPair(t, "", primary0+"standby0")
		s.shown(false, true)
		s.execute("device_add", deviceArgs(standby0+"on"))
		s.shown(true, true)
		s.probe("standby0").start(0)
		s.event("FAILOVER_NEGOTIATED", negotiated0)
		s.shown(true, true)
	})
	t.Run("2", func(t *testing.T) {
		s := startPair(t, "", "")
		s.execute("device_add", deviceArgs(standby0+"on"))
		s.shown(true, false)
		s.probe("standby0").start(0)
		s.event("FAILOVER_NEGOTIATED", negotiated0)
		s.execute("device_add", deviceArgs(primary0+"standby0"))
		s.shown(true, true)
	})
	t.Run("2_reverse", func(t *testing.T) {
		s := startPair(t, "", "")
		s.execute("device_add", deviceArgs(primary0+"standby0"))
		s.shown(false, true)
		s.execute("device_add", deviceArgs(standby0+"on"))
		s.shown(true, true)
		s.probe("standby0").start(0)
		s.event("FAILOVER_NEGOTIATED", negotiated0)
		s.shown(true, true)
	})
}
