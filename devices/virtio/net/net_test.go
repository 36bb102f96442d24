package net

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"baton/devices/vhost"
	"baton/devices/virtio"
	"baton/tests/virtiotest"
)

var testMAC = MAC{0x52, 0x54, 0, 0x12, 0x34, 0x56}

// fake is a backend that keeps a log and moves nothing.
type fake struct {
	pairs int

	mu   sync.Mutex
	log  []string
	fail string // the log entry at which to fail
}

func (f *fake) do(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := fmt.Sprintf(format, args...)
	f.log = append(f.log, e)
	if e == f.fail {
		return errors.New("fake: " + e)
	}
	return nil
}

func (f *fake) failAt(e string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = e
}

// take returns the log since the last call.
func (f *fake) take() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := strings.Join(f.log, ", ")
	f.log = nil
	return s
}

func (f *fake) Features() uint64                           { return virtio.CoreFeatures | featureMergeRX | guestOffloads }
func (f *fake) Pairs() int                                 { return f.pairs }
func (f *fake) Start(pair int, _ *virtio.Activation) error { return f.do("start %d", pair) }
func (f *fake) Detach(pair int) (*holder, error)           { return nil, f.do("detach %d", pair) }
func (f *fake) Attach(pair int, _ [][]byte, _ *virtio.Activation) error {
	return f.do("attach %d", pair)
}
func (f *fake) Stop(pair int) [][]byte            { _ = f.do("stop %d", pair); return nil }
func (f *fake) SetPairs(n int) error              { return f.do("pairs %d", n) }
func (f *fake) SetOffloads(features uint64) error { return f.do("offloads %#x", features) }
func (f *fake) Send(frame []byte) error           { return f.do("send %x", frame) }
func (f *fake) Name() string                      { return "fake" }
func (f *fake) Take(int) ([][]byte, int)          { _ = f.do("discard"); return nil, 0 }
func (f *fake) Close() error                      { return f.do("close") }
func (f *fake) SetLog(log *vhost.Log) error       { return f.do("log %v", log != nil) }

// newFake returns a device on a fake backend with the log empty.
func newFake(t testing.TB, c Config, pairs int) (*Net, *fake) {
	t.Helper()
	f := &fake{pairs: pairs}
	n, err := New(c, f)
	if err != nil {
		t.Fatal(err)
	}
	f.take()
	return n, f
}

func TestNewErrors(t *testing.T) {
	for _, tc := range []struct {
		config Config
		want   string
	}{
		{Config{Queues: 3}, "3 queue pairs, but the host's end has 2\nopen the TAP with queues=3"},
		{Config{Queues: -1}, "-1 queue pairs"},
		{Config{QueueSize: 100}, "queue size 100"},
		{Config{QueueSize: 2048}, "queue size 2048"},
		{Config{MTU: 67}, "MTU 67"},
	} {
		if _, err := New(tc.config, &fake{pairs: 2}); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v", tc.config, err)
		}
	}
}

func TestFeatures(t *testing.T) {
	always := (&fake{}).Features() | featureMAC | featureStatus | featureCtrlVQ | featureCtrlRX |
		featureCtrlRXExtra | featureCtrlVLAN | featureCtrlMAC | featureGuestOffloads | featureGuestAnnounce
	for _, tc := range []struct {
		config Config
		more   uint64
		queues []uint16
	}{
		{Config{Queues: 1}, 0, []uint16{256, 256, 64}},
		{Config{QueueSize: 1024}, 1 << 22, []uint16{1024, 1024, 1024, 1024, 64}},
		{Config{Queues: 1, MTU: 9000}, 1 << 3, []uint16{256, 256, 64}},
		{Config{Queues: 1, Standby: true}, 1 << 62, []uint16{256, 256, 64}},
		{Config{Queues: 1, Speed: 10000}, 1 << 63, []uint16{256, 256, 64}},
	} {
		n, _ := newFake(t, tc.config, 2)
		if got := n.Features(); got != always|tc.more {
			t.Errorf("%+v: features %#x, want %#x", tc.config, got, always|tc.more)
		}
		if got := n.QueueSizes(); !slices.Equal(got, tc.queues) {
			t.Errorf("%+v: queues %v, want %v", tc.config, got, tc.queues)
		}
	}
}

func TestConfig(t *testing.T) {
	n, _ := newFake(t, Config{MAC: testMAC, MTU: 1400, Speed: 25000}, 3)
	want := []byte{0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 3, 0, 0x78, 5, 0xa8, 0x61, 0, 0, 1, 0, 0, 0}
	got := make([]byte, len(want))
	n.ReadConfig(0, got)
	if !bytes.Equal(got, want) {
		t.Errorf("config % x, want % x", got, want)
	}
	n.SetLink(false)
	want[6] = 0
	if n.ReadConfig(0, got); !bytes.Equal(got, want) {
		t.Errorf("link down: config % x, want % x", got, want)
	}
	n.Reset()
	if n.ReadConfig(0, got); !bytes.Equal(got, want) {
		t.Errorf("a reset changed the link: % x", got)
	}
}

func TestContract(t *testing.T) {
	virtiotest.Run(t, func(t testing.TB) virtio.Device { return tapDevice(t, Config{MAC: testMAC}, 2) })
}

// TestLifecycle follows what the model asks of its backend.
func TestLifecycle(t *testing.T) {
	n, f := newFake(t, Config{MAC: testMAC}, 4)
	const reset = ", pairs 1, offloads 0x0"
	features := n.Features()
	offloads := fmt.Sprintf("offloads %#x, pairs 1", features&guestOffloads)
	expect := func(what, want string) {
		t.Helper()
		if got := f.take(); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	d := virtiotest.NewDriver(t, n, features)
	expect("activate", offloads+", start 0")
	ctrl := d.Rings[8]
	setPairs := func(k uint16) byte { return control(ctrl, 4, 0, le(k)) }

	if ack := setPairs(3); ack != 0 {
		t.Errorf("3 pairs: ack %d", ack)
	}
	expect("3 pairs", "start 1, start 2, pairs 3")
	if ack := setPairs(2); ack != 0 {
		t.Errorf("2 pairs: ack %d", ack)
	}
	expect("2 pairs", "pairs 2, stop 2")

	f.failAt("start 3")
	if ack := setPairs(4); ack != 1 {
		t.Errorf("4 pairs, which fails: ack %d", ack)
	}
	expect("4 pairs, which fails", "start 2, start 3, stop 2")
	f.failAt("pairs 4")
	if ack := setPairs(4); ack != 1 {
		t.Errorf("4 pairs, which the host refuses: ack %d", ack)
	}
	expect("4 pairs, which the host refuses", "start 2, start 3, pairs 4, stop 3, stop 2")

	n.SetLink(false)
	n.SetLink(false)
	<-d.Changes
	expect("link down", "stop 1, stop 0")
	if ack := setPairs(3); ack != 0 {
		t.Errorf("3 pairs without link: ack %d", ack)
	}
	expect("3 pairs without link", "pairs 3")
	n.SetLink(true)
	<-d.Changes
	expect("link up", "discard, start 0, start 1, start 2")
	if len(d.Changes) != 0 {
		t.Error("the driver was told of a change that was none")
	}

	n.SetLink(false)
	f.failAt("start 1")
	n.SetLink(true)
	if err := d.WaitFailure(); !strings.Contains(err.Error(), "start 1") {
		t.Error(err)
	}
	f.take()
	n.Reset()
	expect("reset", "stop 0"+reset)
	n.Reset()
	expect("second reset", reset[2:])

	// Without MQ the control queue follows the first pair: 5.1.2.
	f.failAt("")
	d.Activate(features &^ featureMQ)
	f.take()
	if ack := control(d.Rings[2], 0, 0, []byte{0}); ack != 0 {
		t.Errorf("promiscuous off: ack %d", ack)
	}
	if ack := control(d.Rings[2], 4, 0, le[uint16](2)); ack != 1 {
		t.Errorf("queue pairs without MQ: ack %d", ack)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	expect("close", "stop 0"+reset+", close")
}

func TestActivateErrors(t *testing.T) {
	n, f := newFake(t, Config{}, 1)
	d := virtiotest.NewDriver(t, n, n.Features())
	n.Reset()
	queues := []*virtio.Queue{d.Rings[0].Queue, d.Rings[1].Queue, d.Rings[2].Queue}
	act := virtio.Activation{Mem: d.Mem, Queues: queues, Features: virtio.FeatureVersion1 | featureGuestCSUM}
	for _, tc := range []struct {
		fail    string
		enabled bool
		want    string
	}{
		{"offloads 0x2", true, "fake: offloads"},
		{"start 0", true, "fake: start 0"},
		{"", false, "has not set up queue 1"},
	} {
		f.failAt(tc.fail)
		queues[1].Enabled = tc.enabled
		if err := n.Activate(act); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.want, err)
		}
		n.SetLink(false) // must not serve, nor tell the driver
		n.SetLink(true)
		n.Reset()
	}
	if strings.Contains(f.take(), "discard") {
		t.Error("a device that was not activated served its queues")
	}
}

func le[T uint16 | uint32 | uint64](v T) []byte {
	b := make([]byte, binary.Size(v))
	_, _ = binary.Encode(b, binary.LittleEndian, v)
	return b
}

// control sends a command in two buffers, and returns the ack.
func control(r *virtiotest.Ring, class, cmd byte, data []byte) byte {
	return r.Do([][]byte{{class, cmd}, data}, 1)[0]
}
