package net

import (
	"reflect"
	"strings"
	"testing"

	"baton/devices"
	"baton/devices/virtio"
	"baton/tests/virtiotest"
)

func TestState(t *testing.T) {
	config := Config{MAC: testMAC, MTU: 1400, Speed: 10000}
	make := func(t testing.TB) virtio.Device { n, _ := newFake(t, config, 4); return n }
	virtiotest.State(t, make, func(t testing.TB, f *virtiotest.Function) { setAll(t, f) })
}

// setAll has the driver use all of the control queue.
func setAll(t testing.TB, f *virtiotest.Function) {
	t.Helper()
	for _, c := range []struct {
		class, cmd byte
		data       []byte
	}{
		{0, 0, []byte{0}}, {0, 1, []byte{1}}, {0, 2, []byte{1}}, {0, 3, []byte{1}}, {0, 4, []byte{1}}, {0, 5, []byte{1}},
		{1, 0, append(append(append(le[uint32](1), 2, 0, 0, 0, 0, 1), le[uint32](2)...), 3, 0, 0, 0, 0, 1, 3, 0, 0, 0, 0, 2)},
		{1, 1, []byte{2, 0, 0, 0, 0, 9}}, {2, 0, le[uint16](4095)}, {4, 0, le[uint16](3)}, {5, 0, le[uint64](featureGuestCSUM | featureGuestTSO4)},
	} {
		if ack := control(f.Rings[len(f.Rings)-1], c.class, c.cmd, c.data); ack != 0 {
			t.Fatalf("command %d %d: ack %d", c.class, c.cmd, ack)
		}
	}
}

// The target's backend is set as the driver has set the source's, and serves as many pairs.
func TestMigrate(t *testing.T) {
	n, _ := newFake(t, Config{MAC: testMAC}, 4)
	src := virtiotest.NewFunction(t, n, virtiotest.Memory(t))
	src.Start(n.Features())
	setAll(t, src)
	if err := n.Announce(); err != nil {
		t.Fatal(err)
	}
	to, backend := newFake(t, Config{MAC: testMAC}, 4)
	dst := src.Migrate(to)
	if got := backend.take(); got != "offloads 0x82, pairs 3, start 0, start 1, start 2" {
		t.Error(got)
	}
	want := n.RxFilter()
	if got := to.RxFilter(); !reflect.DeepEqual(got, want) || got.MAC != (MAC{2, 0, 0, 0, 0, 9}) {
		t.Errorf("filter %+v, want %+v", got, want)
	}
	var status [2]byte
	if to.ReadConfig(configStatus, status[:]); status[0] != statusLinkUp|statusAnnounce {
		t.Errorf("status %#x", status)
	}
	dst.WaitConfig() // so that an announcement that was asked for is made
	ctrl := dst.Rings[len(dst.Rings)-1]
	if ack := ctrl.Do([][]byte{{3, 0}}, 1)[0]; ack != 0 {
		t.Errorf("announced: ack %d", ack)
	}
	if ack := control(ctrl, 4, 0, le[uint16](1)); ack != 0 || backend.take() != "pairs 1, stop 2, stop 1" {
		t.Errorf("one pair: ack %d", ack)
	}
	to.SetLink(false)
	third, backend := newFake(t, Config{MAC: testMAC}, 4)
	back := dst.Migrate(third)
	if got := backend.take(); got != "offloads 0x82, pairs 1" {
		t.Errorf("without link: %s", got)
	}
	third.SetLink(true)
	back.WaitConfig()
	if got := backend.take(); got != "discard, start 0" {
		t.Errorf("link up: %s", got)
	}
}

// A migration that fails: the source goes on as it was.
func TestPause(t *testing.T) {
	n, backend := newFake(t, Config{MAC: testMAC}, 2)
	f := virtiotest.NewFunction(t, n, virtiotest.Memory(t))
	f.Start(n.Features())
	if ack := control(f.Rings[4], 4, 0, le[uint16](2)); ack != 0 {
		t.Fatal(ack)
	}
	backend.take()
	for range 2 {
		if err := f.Quiesce(); err != nil {
			t.Fatal(err)
		}
		if got := backend.take(); got != "stop 1, stop 0" {
			t.Error(got)
		}
		if err := f.Unquiesce(); err != nil {
			t.Fatal(err)
		}
		if got := backend.take(); !strings.HasSuffix(got, "pairs 2, start 0, start 1") {
			t.Error(got)
		}
	}
	backend.failAt("start 1")
	_ = f.Quiesce()
	if err := f.Unquiesce(); err == nil || f.Status()&0x40 == 0 {
		t.Errorf("a backend that does not start: %v, status %#x", err, f.Status())
	}
	f.WaitConfig()
}

func TestStateErrors(t *testing.T) {
	n, _ := newFake(t, Config{MAC: testMAC, MTU: 1400}, 2)
	data, err := n.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	info := devices.StateInfo{ID: "pci/0000:00:02.0", Type: "virtio-net-pci", Version: 1, MinVersion: 1}
	for _, tt := range []struct {
		config Config
		want   string
	}{
		{Config{MTU: 1400, Queues: 1}, "MaxPairs: 2, here 1"},
		{Config{MTU: 1500}, "MTU: 1400, here 1500"},
		{Config{MTU: 1400, Speed: 10}, "Speed: 0, here 10"},
	} {
		other, _ := newFake(t, tt.config, 2)
		if err := other.LoadState(info, 1, data); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v", tt.config, err)
		}
	}
	for field, bad := range map[string]state{
		"Unicast, Multicast": {RxFilter: RxFilter{Multicast: make([]MAC, maxTableMACs+1)}},
		"Pairs":              {Pairs: 3},
		"Offloads":           {Offloads: 1 << 63},
	} {
		if bad.Pairs == 0 {
			bad.Pairs = 1
		}
		bad.MaxPairs, bad.MTU = 2, 1400
		data, err := devices.EncodeState(bad)
		if err != nil {
			t.Fatal(err)
		}
		other, _ := newFake(t, Config{MTU: 1400}, 2)
		if err := other.LoadState(info, 1, data); err == nil || !strings.Contains(err.Error(), ": "+field+": ") {
			t.Errorf("%s: %v", field, err)
		}
	}
	for want, bad := range map[string]any{
		"4 elements, not 6": struct {
			MAC []byte `cbor:"1,keyasint"`
		}{testMAC[:4]},
		"65 elements, not 64": struct {
			VLANs []uint64 `cbor:"17,keyasint"`
		}{make([]uint64, 65)},
	} {
		data, err := devices.EncodeState(bad)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.LoadState(info, 1, data); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func FuzzState(f *testing.F) {
	n, _ := newFake(f, Config{MAC: testMAC}, 4)
	data, err := n.SaveState()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	info := devices.StateInfo{ID: "pci/0000:00:02.0", Type: "virtio-net-pci", Version: 1, MinVersion: 1}
	f.Fuzz(func(t *testing.T, data []byte) {
		n, _ := newFake(t, Config{MAC: testMAC}, 4)
		if n.LoadState(info, 1, data) != nil {
			return
		}
		if err := n.Announce(); err != nil {
			t.Error(err)
		}
		if _, err := n.SaveState(); err != nil {
			t.Error(err)
		}
	})
}
