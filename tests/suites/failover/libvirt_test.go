package failover

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/journey"
)

// TestLibvirt has the cases of tp-libvirt, libvirt's own tests, by their names
// (libvirt/tests/src/sriov/failover), with what virsh does to the domain done by QMP:
// hostdev_interface and hostdev_device, two spellings of the domain's XML, are one thing here,
// and so are save and managedsave. Their with_postcopy has none here: baton has no post-copy.
func TestLibvirt(t *testing.T) {
	long(t)
	way := journey.Way{Name: "libvirt"}
	ctx := harness.Context(t, 5*time.Minute)
	w := journey.NewWorld(t)
	m := w.Boot(ctx, way)
	// ok is what these tests check after all that they do: three interfaces, and a network.
	ok := func(t *testing.T) {
		t.Helper()
		answers(ctx, t, w, m)
		if n := interfaces(ctx, m); n != 3 {
			t.Errorf("%d interfaces", n)
		}
	}
	t.Run("sriov_failover_at_dt_hostdev", func(t *testing.T) {
		ok(t)
		m.QMP.Do("device_del", map[string]any{"id": "hostdev0"})
		m.QMP.WaitEvent("DEVICE_DELETED")
		if n := interfaces(ctx, m); n != 2 {
			t.Errorf("%d interfaces without the hostdev", n)
		}
		w.Peer.Ping(ctx, journey.GuestIP)
		m.QMP.Do("device_add", map[string]any{"driver": "vfio-pci", "id": "hostdev0", "bus": "root1", "bind": "auto",
			"pool": w.Hosts[0].PF.Name, "failover_pair_id": "net1"})
		ok(t)
	})
	t.Run("sriov_failover_lifecycle/suspend_resume", func(t *testing.T) {
		m.QMP.Do("stop", nil)
		m.QMP.Do("cont", nil)
		ok(t)
	})
	t.Run("sriov_failover_lifecycle/reboot", func(t *testing.T) {
		if _, err := m.Run(ctx, "@reboot"); err != nil {
			t.Fatal(err)
		}
		m.WaitEvent(ctx, "RESET")
		m.Output(ctx, "@addr", "eth0", journey.GuestIP+"/24")
		ok(t)
	})
	t.Run("sriov_failover_abort_migration", func(t *testing.T) {
		to := w.Start(ctx, way, 1, true)
		defer to.Kill()
		seen := len(m.Log.Events())
		m.QMP.Do("migrate-set-parameters", map[string]any{"max-bandwidth": 4 << 20})
		m.QMP.Do("migrate", map[string]any{"uri": to.URI})
		m.Log.WaitStatusAfter(ctx, seen, "active")
		m.QMP.Do("migrate_cancel", nil)
		if s := m.Log.WaitStatusAfter(ctx, seen, "completed", "failed", "cancelled"); s != "cancelled" {
			t.Errorf("the migration %s", s)
		}
		m.QMP.Do("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 30})
		ok(t)
	})
	// One way, and the way back, as they do.
	for _, name := range []string{"sriov_failover_migration/with_precopy", "sriov_failover_migration/with_precopy, back"} {
		t.Run(name, func(t *testing.T) {
			to := w.Start(ctx, way, 1-m.Host, true)
			pings := w.Peer.Pinger(journey.GuestIP, 100*time.Millisecond)
			seen := len(m.Log.Events())
			m.QMP.Do("migrate", map[string]any{"uri": to.URI})
			if s := m.Log.WaitStatusAfter(ctx, seen, "completed", "failed"); s != "completed" {
				t.Fatalf("the migration %s: %s", s, m.QMP.Do("query-migrate", nil))
			}
			m.QMP.Do("quit", nil)
			m.Wait(ctx)
			m = to
			ok(t)
			p := pings.Pings()
			pings.Stop()
			t.Log(p)
			if p.Longest().Duration() > 3*time.Second { // ping says then that the host is unreachable
				t.Error("the guest was unreachable")
			}
			// While the VF is in use nothing goes by the bridge: their tcpdump on br0.
			was := received(t, w.Hosts[m.Host].TAP)
			for range 20 {
				w.Peer.Ping(ctx, journey.GuestIP)
			}
			if n := received(t, w.Hosts[m.Host].TAP) - was; n > 5 {
				t.Errorf("%d frames of the guest's came by %s", n, w.Hosts[m.Host].TAP)
			}
		})
	}
	t.Run("sriov_failover_lifecycle/save_restore", func(t *testing.T) {
		file := "file:" + filepath.Join(t.TempDir(), "saved")
		seen := len(m.Log.Events())
		m.QMP.Do("migrate", map[string]any{"uri": file})
		if s := m.Log.WaitStatusAfter(ctx, seen, "completed", "failed"); s != "completed" {
			t.Fatalf("saving %s: %s", s, m.QMP.Do("query-migrate", nil))
		}
		m.QMP.Do("quit", nil)
		m.Wait(ctx)
		m = w.Restore(ctx, way, m.Host, file)
		ok(t)
	})
}

// interfaces is how many with the pair's MAC the guest has.
func interfaces(ctx context.Context, m *journey.Machine) int {
	return strings.Count(m.Sh(ctx, "cat /sys/class/net/*/address"), journey.GuestMAC)
}

// received is how many frames the guest has sent by a TAP.
func received(t *testing.T, tap string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/sys/class/net/%s/statistics/rx_packets", tap))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
