// Package failover has a stock Linux pair a VF, or a whole NIC, with virtio-net, lose the one and
// get it again, on its host and on the way to another, while its network is watched.
package failover

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	bootLimit = 3 * time.Minute
	limit     = time.Minute

	mac   = "52:54:00:99:00:03"
	world = "10.99.0.2" // the peer
	guest = "10.99.0.3"
)

// long is for a test that make test has no time for.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("BATON_LONG") == "" {
		t.Skip("takes minutes: with BATON_LONG=1, as in make test-long")
	}
}

// pairArgs are the options of a machine with a pair; primary is what -device takes, without
// its pair id.
func pairArgs(tap, qmp, primary string) []string {
	return []string{"-m", "256M", "-nodefaults",
		"-qmp", "unix:" + qmp + ",server=on,wait=off",
		"-device", "pcie-root-port,id=root1,chassis=1", "-device", "pcie-root-port,id=root2,chassis=2",
		"-netdev", "tap,id=hostnet1,ifname=" + tap + ",script=no,downscript=no,vhost=on",
		"-device", "virtio-net-pci,netdev=hostnet1,id=net1,mac=" + mac + ",bus=root2,failover=on",
		"-device", primary + ",id=hostdev0,bus=root1,failover_pair_id=net1"}
}

// waitState waits until the pair's state is that.
func waitState(q *harness.QMP, state string) {
	for {
		var e struct{ State string }
		if json.Unmarshal(q.WaitEvent("FAILOVER_STATE").Data, &e) == nil && e.State == state {
			return
		}
	}
}

// switched waits for the next change of the way of the guest's frames.
func switched(q *harness.QMP) (s struct {
	Point, To     string
	Outage        int64 `json:"outage-us"`
	Held, Dropped int64
}) {
	_ = json.Unmarshal(q.WaitEvent("FAILOVER_SWITCHED").Data, &s)
	return s
}

// TestSwitch takes the primary away and brings it back, without a migration.
func TestSwitch(t *testing.T) {
	peer := harness.NewPeer(t, world+"/24")
	pf := harness.PFs(t)[0]
	pf.CreateVFs(t, 1)
	harness.Tap(t, "tap0", 1)
	harness.Bridge(t, "br0", peer.Uplink, "tap0")
	qmp := filepath.Join(harness.Artifacts(t), "qmp")
	g := harness.Start(t, harness.GuestConfig{Args: append(harness.Linux(t), pairArgs("tap0", qmp, "vfio-pci,bind=auto,pool="+pf.Name)...)})
	ctx := harness.Context(t, bootLimit)
	q := harness.DialQMP(t, harness.Context(t, bootLimit+limit), qmp)
	g.Output(ctx, "true")
	g.Output(ctx, "@addr", "eth0", guest+"/24")
	t.Logf("to the primary: %+v", switched(q))
	waitState(q, "primary")
	peer.Ping(harness.Context(t, limit), guest)
	if links := g.Sh(ctx, "cd /sys/class/net; for i in *; do echo $i $(cat $i/address) $(basename $(readlink $i/device/driver) 2>/dev/null); done"); strings.Count(links, mac) != 3 {
		t.Errorf("interfaces of the guest:\n%s", links)
	}
	for _, way := range []string{"standby", "primary", "standby", "primary"} {
		pings := peer.Pinger(guest, 5*time.Millisecond)
		q.Do("failover-switch", map[string]any{"id": "net1", "to": way})
		s := switched(q)
		waitState(q, way)
		peer.Ping(harness.Context(t, limit), guest)
		if err := pings.Wait(harness.Context(t, limit), 60); err != nil { // what it has lost, or held, shows in these
			t.Fatal(err)
		}
		r := pings.Pings()
		pings.Stop()
		t.Logf("to the %s: %+v; %v", way, s, r)
		if s.To != way {
			t.Errorf("frames went to the %s", s.To)
		}
	}
	fmt.Println(g.Sh(ctx, "dmesg | grep -iE 'failover|eth|igbvf' | tail -30"))
}
