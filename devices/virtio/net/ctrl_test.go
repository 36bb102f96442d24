package net

import (
	"bytes"
	"reflect"
	"slices"
	"testing"

	"baton/devices/virtio"
)

var macs = func() (l []MAC) {
	for i := range byte(80) {
		l = append(l, MAC{2, 0, 0, 0, 0, i})
	}
	return l
}()

// table encodes one list of VIRTIO_NET_CTRL_MAC_TABLE_SET.
func table(macs []MAC) []byte {
	b := le(uint32(len(macs)))
	for _, m := range macs {
		b = append(b, m[:]...)
	}
	return b
}

// active returns a device whose commands can be called directly.
func active(t testing.TB) (*Net, *fake) {
	n, f := newFake(t, Config{MAC: testMAC}, 4)
	n.act = &virtio.Activation{Features: n.Features()}
	for i := range uint16(9) {
		n.act.Queues = append(n.act.Queues, &virtio.Queue{Index: i, Enabled: i < 6})
	}
	return n, f
}

func TestCommands(t *testing.T) {
	for _, tc := range []struct {
		name       string
		class, cmd byte
		data       []byte
		want       func(f *RxFilter) // nil: refused
		host       string
	}{
		{"promiscuous off", 0, 0, []byte{0}, func(f *RxFilter) { f.Promiscuous = false }, ""},
		{"all multicast", 0, 1, []byte{1}, func(f *RxFilter) { f.AllMulti = true }, ""},
		{"all unicast", 0, 2, []byte{1}, func(f *RxFilter) { f.AllUni = true }, ""},
		{"no multicast", 0, 3, []byte{1}, func(f *RxFilter) { f.NoMulti = true }, ""},
		{"no unicast", 0, 4, []byte{1}, func(f *RxFilter) { f.NoUni = true }, ""},
		{"no broadcast", 0, 5, []byte{1}, func(f *RxFilter) { f.NoBroadcast = true }, ""},
		{"no such receive mode", 0, 6, []byte{1}, nil, ""},
		{"neither on nor off", 0, 0, []byte{2}, nil, ""},
		{"no flag", 0, 0, nil, nil, ""},
		{"two flags", 0, 0, []byte{0, 0}, nil, ""},

		{"tables", 1, 0, slices.Concat(table(macs[:2]), table(macs[2:5])), func(f *RxFilter) { f.Unicast, f.Multicast = macs[:2], macs[2:5] }, ""},
		{"empty tables", 1, 0, slices.Concat(table(nil), table(nil)), func(*RxFilter) {}, ""},
		{"full tables", 1, 0, slices.Concat(table(macs[:60]), table(macs[:4])), func(f *RxFilter) { f.Unicast, f.Multicast = macs[:60], macs[:4] }, ""},
		{"unicast overflows", 1, 0, slices.Concat(table(macs[:65]), table(macs[:3])), func(f *RxFilter) { f.UnicastOverflow, f.Multicast = true, macs[:3] }, ""},
		{"multicast overflows", 1, 0, slices.Concat(table(macs[:60]), table(macs[:5])), func(f *RxFilter) { f.MulticastOverflow, f.Unicast = true, macs[:60] }, ""},
		{"one table", 1, 0, table(macs[:2]), nil, ""},
		{"half a table", 1, 0, slices.Concat(table(macs[:2]), table(macs[:2])[:10]), nil, ""},
		{"more than tables", 1, 0, slices.Concat(table(nil), table(nil), []byte{0}), nil, ""},
		{"endless table", 1, 0, slices.Concat(le(uint32(0xffffffff)), make([]byte, 100)), nil, ""},
		{"no table", 1, 0, nil, nil, ""},

		{"address", 1, 1, macs[7][:], func(f *RxFilter) { f.MAC = macs[7] }, ""},
		{"half an address", 1, 1, macs[7][:5], nil, ""},
		{"no such MAC command", 1, 2, macs[7][:], nil, ""},

		{"VLAN 4095", 2, 0, le[uint16](4095), func(f *RxFilter) { f.VLANs[63] = 1 << 63 }, ""},
		{"VLAN 65", 2, 0, le[uint16](65), func(f *RxFilter) { f.VLANs[1] = 2 }, ""},
		{"no VLAN 65", 2, 1, le[uint16](65), func(f *RxFilter) {}, ""},
		{"VLAN 4096", 2, 0, le[uint16](4096), nil, ""},
		{"no VLAN 4096", 2, 1, le[uint16](4096), nil, ""},
		{"half a VLAN", 2, 0, []byte{1}, nil, ""},

		{"announced", 3, 0, nil, func(*RxFilter) {}, ""},
		{"announced what", 3, 0, []byte{0}, nil, ""},
		{"no such announcement", 3, 1, nil, nil, ""},

		{"pairs", 4, 0, le[uint16](3), func(*RxFilter) {}, "start 0, start 1, start 2, pairs 3"},
		{"the same pairs", 4, 0, le[uint16](1), func(*RxFilter) {}, "start 0, pairs 1"},
		{"no pair", 4, 0, le[uint16](0), nil, ""},
		{"a pair that is not set up", 4, 0, le[uint16](4), nil, "start 0, start 1, start 2, stop 2, stop 1"},
		{"too many pairs", 4, 0, le[uint16](5), nil, ""},
		{"hash", 4, 1, make([]byte, 44), nil, ""}, // not offered

		{"offloads", 5, 0, le[uint64](featureGuestCSUM | featureGuestTSO4), func(*RxFilter) {}, "offloads 0x82"},
		{"no offloads", 5, 0, le[uint64](0), func(*RxFilter) {}, "offloads 0x0"},
		{"an offload that is none", 5, 0, le[uint64](featureHostTSO4), nil, ""},
		{"half of offloads", 5, 0, le[uint32](0), nil, ""},

		{"no such class", 6, 0, []byte{0}, nil, ""},
	} {
		for _, split := range []int{0, 1, 2, 3, 8} { // 2.7.4.2: the framing says nothing
			n, f := active(t)
			want := n.RxFilter()
			if tc.want != nil {
				tc.want(&want)
			}
			ok := n.command(&virtio.Chain{Out: cut(append([]byte{tc.class, tc.cmd}, tc.data...), split)})
			if ok != (tc.want != nil) {
				t.Errorf("%s in pieces of %d: accepted %v", tc.name, split, ok)
			}
			if got := n.RxFilter(); !reflect.DeepEqual(got, want) {
				t.Errorf("%s in pieces of %d:\n%+v, want\n%+v", tc.name, split, got, want)
			}
			if got := f.take(); got != tc.host {
				t.Errorf("%s in pieces of %d: the backend saw %q, want %q", tc.name, split, got, tc.host)
			}
		}
	}
}

// cut divides b into pieces of n bytes, 0 for one piece.
func cut(b []byte, n int) [][]byte {
	if n == 0 {
		return [][]byte{b}
	}
	return slices.Collect(slices.Chunk(b, n))
}

// TestCommandsNotNegotiated sends each command to a device whose driver has accepted nothing.
func TestCommandsNotNegotiated(t *testing.T) {
	n, f := active(t)
	n.act.Features = virtio.FeatureVersion1
	before := n.RxFilter()
	for _, cmd := range [][]byte{
		{0, 0, 0}, {0, 1, 1}, {0, 2, 1}, {0, 3, 1}, {0, 4, 1}, {0, 5, 1},
		slices.Concat([]byte{1, 0}, table(nil), table(nil)),
		append([]byte{1, 1}, macs[0][:]...),
		{2, 0, 1, 0}, {2, 1, 1, 0}, {3, 0}, {4, 0, 1, 0}, {5, 0, 0, 0, 0, 0, 0, 0, 0, 0},
	} {
		if n.command(&virtio.Chain{Out: [][]byte{cmd}}) {
			t.Errorf("command % x: accepted", cmd)
		}
	}
	if !reflect.DeepEqual(n.RxFilter(), before) || f.take() != "" {
		t.Error("a refused command had an effect")
	}
}

// TestReset forgets what the driver has set.
func TestReset(t *testing.T) {
	n, _ := active(t)
	before := n.RxFilter()
	n.command(&virtio.Chain{Out: [][]byte{append([]byte{1, 1}, macs[1][:]...)}})
	n.command(&virtio.Chain{Out: [][]byte{{2, 0, 1, 0}}})
	var mac [6]byte
	if n.ReadConfig(0, mac[:]); mac != macs[1] {
		t.Errorf("the configuration has MAC %x, want %x", mac, macs[1])
	}
	n.Reset()
	if !reflect.DeepEqual(n.RxFilter(), before) {
		t.Errorf("filter %+v, want %+v", n.RxFilter(), before)
	}
	if n.ReadConfig(0, mac[:]); mac != testMAC {
		t.Errorf("the configuration has MAC %x, want %x", mac, testMAC)
	}
}

func FuzzControl(f *testing.F) {
	f.Add([]byte{0, 0, 1}, byte(0))
	f.Add(slices.Concat([]byte{1, 0}, table(macs[:3]), table(macs[:70])), byte(3))
	f.Add(slices.Concat([]byte{1, 1}, macs[0][:]), byte(1))
	f.Add([]byte{2, 0, 0xff, 0x0f}, byte(0))
	f.Add([]byte{4, 0, 4, 0}, byte(2))
	f.Add(slices.Concat([]byte{5, 0}, le[uint64](featureGuestCSUM)), byte(0))
	f.Fuzz(func(t *testing.T, data []byte, split byte) {
		n, _ := active(t)
		before := n.RxFilter()
		ok := n.command(&virtio.Chain{Out: cut(bytes.Clone(data), int(split))})
		got := n.RxFilter()
		if !ok && !reflect.DeepEqual(got, before) {
			t.Error("a refused command had an effect")
		}
		if len(got.Unicast)+len(got.Multicast) > maxTableMACs {
			t.Errorf("%d and %d addresses", len(got.Unicast), len(got.Multicast))
		}
		if n.pairs < 1 || n.pairs > 3 || n.running > n.pairs {
			t.Errorf("%d pairs in use, %d served", n.pairs, n.running)
		}
	})
}
