package l0

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"baton/tests/harness"
	"baton/tests/taptest"
	"baton/tests/tiny"
)

// startNIC starts a machine with a root port, a NIC behind it and a disk.
func startNIC(t *testing.T, args ...string) (*harness.Guest, *harness.QMP, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a TAP takes root")
	}
	tap := fmt.Sprintf("l0q%d", os.Getpid())
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	g, q := startQMP(t, tiny.Kernel(t, tiny.Halt), append(args,
		"-device", "pcie-root-port,id=root1,chassis=1", "-device", "pcie-root-port,id=root2,chassis=2",
		"-netdev", "tap,id=hostnet1,ifname="+tap, "-device", "virtio-net-pci,netdev=hostnet1,id=net1,mac=52:54:00:6f:55:cc,bus=root2,failover=on",
		"-blockdev", "file,node-name=d,filename="+disk, "-device", "virtio-blk-pci,drive=d,id=d0")...)
	return g, q, tap
}

func TestQMPDevices(t *testing.T) {
	_, q, tap := startNIC(t)
	get := func(path, property string) map[string]string {
		return map[string]string{"path": path, "property": property}
	}
	for _, c := range []struct {
		command string
		args    any
		want    string // of a result, or of an error
	}{
		{"qom-get", get("/machine/peripheral/net1", "mac"), `"52:54:00:6f:55:cc"`},
		{"qom-get", get("net1", "type"), `"virtio-net-pci"`},
		{"qom-get", get("/machine/peripheral/net1", "nosuch"), "GenericError: Property 'virtio-net-pci.nosuch' not found"},
		{"qom-get", get("/machine/peripheral/root1", "mac"), "GenericError: Property 'pcie-root-port.mac' not found"},
		{"qom-get", get("/machine/peripheral/nosuch", "mac"), "DeviceNotFound: Device '/machine/peripheral/nosuch' not found"},
		{"qom-list", map[string]string{"path": "/machine/peripheral"}, `[{"name":"type","type":"string"},{"name":"root1","type":"child<pcie-root-port>"},` +
			`{"name":"root2","type":"child<pcie-root-port>"},{"name":"d0","type":"child<virtio-blk-pci>"},{"name":"net1","type":"child<virtio-net-pci>"}]`},
		{"qom-list", map[string]string{"path": "/nosuch"}, "DeviceNotFound: Device '/nosuch' not found"},
		{"query-rx-filter", map[string]string{"name": "net1"}, `[{"name":"net1","promiscuous":true,"multicast":"normal","unicast":"normal","vlan":"all",` +
			`"broadcast-allowed":true,"multicast-overflow":false,"unicast-overflow":false,"main-mac":"52:54:00:6f:55:cc","vlan-table":[],"unicast-table":[],"multicast-table":[]}]`},
		{"query-rx-filter", map[string]string{"name": "d0"}, "GenericError: invalid net client name: d0"},
		{"set_link", map[string]any{"name": "net1", "up": false}, `{}`},
		{"set_link", map[string]any{"name": "hostnet1", "up": true}, `{}`},
		{"set_link", map[string]any{"name": "d0", "up": true}, "DeviceNotFound: Device 'd0' not found"},

		{"netdev_add", map[string]any{"type": "tap", "id": "n2", "ifname": tap + "b"}, `{}`},
		{"netdev_add", map[string]any{"type": "tap", "id": "n2"}, "GenericError: Duplicate ID 'n2'"},
		{"netdev_add", map[string]any{"type": "tap", "id": "net 2"}, "GenericError: Parameter 'id' expects an identifier"},
		{"netdev_add", map[string]any{"type": "foo", "id": "n3"}, "GenericError: Parameter 'type' does not accept value 'foo'"},
		{"netdev_add", map[string]any{"type": "tap", "id": "n3", "vhost": "on"}, "GenericError: Invalid parameter type for 'vhost', expected: boolean"},
		{"netdev_add", map[string]any{"type": "tap", "id": "n3", "queues": 99}, "GenericError: netdev n3: queues=99: want 1 to 16"},
		{"netdev_add", map[string]any{"type": "tap", "id": "n3", "ifname": "lo"}, "GenericError: open TAP lo: an interface of this name exists (device) and is no TAP\ntake another name"},
		{"netdev_del", map[string]any{"id": "hostnet1"}, "GenericError: Netdev 'hostnet1' is in use"},
		{"netdev_del", map[string]any{"id": "n2"}, `{}`},
		{"netdev_del", map[string]any{"id": "n2"}, "DeviceNotFound: Device 'n2' not found"},
		{"netdev_add", map[string]any{"type": "tap", "id": "n2", "ifname": tap + "b", "script": "no"}, `{}`},
	} {
		r, err := q.Execute(c.command, c.args)
		got := string(r)
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s %v:\n%s, want\n%s", c.command, c.args, got, c.want)
		}
	}
	if _, err := net.InterfaceByName(tap + "b"); err != nil {
		t.Errorf("netdev_add made no TAP: %v", err)
	}
	q.Do("quit", nil)
	q.WaitEnd()
}

func TestQMPPCI(t *testing.T) {
	_, q, _ := startNIC(t)
	type dev struct {
		Slot   int
		QdevID string                `json:"qdev_id"`
		Class  struct{ Desc string } `json:"class_info"`
		Bridge *struct {
			Bus     struct{ Secondary int }
			Devices []dev
		} `json:"pci_bridge"`
		Regions []struct {
			Type          string
			Address, Size int64
		}
	}
	var buses []struct {
		Bus     int
		Devices []dev
	}
	if err := json.Unmarshal(q.Do("query-pci", nil), &buses); err != nil {
		t.Fatal(err)
	}
	var show func(devices []dev) string
	show = func(devices []dev) string {
		var list []string
		for _, d := range devices {
			s := fmt.Sprintf("%d %s %s", d.Slot, d.QdevID, d.Class.Desc)
			if d.Bridge != nil {
				s += fmt.Sprintf(" [%d: %s]", d.Bridge.Bus.Secondary, show(d.Bridge.Devices))
			}
			for _, r := range d.Regions {
				if r.Type != "memory" || r.Address != -1 && (r.Address <= 0 || r.Address%r.Size != 0) {
					t.Errorf("%s: region %+v", d.QdevID, r)
				}
			}
			list = append(list, s)
		}
		return strings.Join(list, ", ")
	}
	want := "0  Host bridge, 1 root1 PCI bridge [1: ], 2 root2 PCI bridge [2: 0 net1 Ethernet controller], 3 d0 SCSI controller"
	if got := show(buses[0].Devices); len(buses) != 1 || got != want {
		t.Errorf("%d buses: %s", len(buses), got)
	}
}

// announce-self sends RARP requests, as often as it is asked to, where there is a link.
func TestQMPAnnounce(t *testing.T) {
	_, q, tap := startNIC(t)
	const rarp = 0x8035
	wire := taptest.NewSocket(t, tap, rarp, false)
	args := map[string]any{"initial": 1, "max": 2, "rounds": 3, "step": 1}
	q.Do("announce-self", args)
	for range 3 {
		if f := wire.Recv(); fmt.Sprintf("%x", f[6:12]) != "5254006f55cc" || fmt.Sprintf("%x", f[:6]) != "ffffffffffff" {
			t.Fatalf("announced % x", f)
		}
	}
	fails(t, q, "announce-self", map[string]any{"initial": 1, "max": 2, "rounds": 3}, "GenericError: Parameter 'step' is missing")
}
