package virtiotest

import (
	"bytes"
	"math/bits"
	"testing"
	"time"

	"baton/devices/virtio"
)

// Run checks what every device owes its transport and its guest: offered features and
// sizes make sense, the configuration space bears any access, a reset is total and
// idempotent, and a device can be activated again after it. Make returns a new device; it is
// called several times.
func Run(t *testing.T, make func(testing.TB) virtio.Device) {
	t.Run("identity", func(t *testing.T) {
		dev := make(t)
		defer closeDevice(t, dev)
		if dev.Features()&virtio.FeatureVersion1 == 0 {
			t.Errorf("features %#x without VIRTIO_F_VERSION_1", dev.Features())
		}
		if len(dev.QueueSizes()) == 0 {
			t.Error("no queues")
		}
		for i, n := range dev.QueueSizes() {
			if bits.OnesCount16(n) != 1 || n > virtio.MaxQueueSize {
				t.Errorf("queue %d: size %d", i, n)
			}
		}
	})
	t.Run("config", func(t *testing.T) {
		dev := make(t)
		defer closeDevice(t, dev)
		for _, off := range []uint64{0, 1, 2, 3, 7, 11, 59, 60, 61, 0xffd, 0x1000, 1 << 32, 1<<64 - 8, 1<<64 - 1} {
			for _, n := range []int{0, 1, 2, 3, 4, 5, 7, 8, 16, 4096} {
				p := bytes.Repeat([]byte{0xa5}, n)
				q := bytes.Repeat([]byte{0x5a}, n)
				dev.ReadConfig(off, p)
				dev.ReadConfig(off, q)
				if !bytes.Equal(p, q) {
					t.Errorf("read %d at %#x does not fill the buffer: % x, % x", n, off, p, q)
				}
			}
		}
	})
	t.Run("reset", func(t *testing.T) {
		dev := make(t)
		within(t, "reset of a new device", dev.Reset)
		d := NewDriver(t, dev, dev.Features()) // closes it
		for range 3 {
			within(t, "reset", dev.Reset)
			within(t, "second reset", dev.Reset)
			d.Activate(dev.Features())
			for _, r := range d.Rings {
				r.Queue.Kick.Signal() // nothing there: a spurious one
			}
		}
		within(t, "reset", dev.Reset)
		assertQuiet(t, d)
	})
	t.Run("close while active", func(t *testing.T) {
		dev := make(t)
		NewDriver(t, dev, virtio.FeatureVersion1)
	})
	t.Run("no queue enabled", func(t *testing.T) {
		dev := make(t)
		defer closeDevice(t, dev)
		var queues []*virtio.Queue
		for i, n := range dev.QueueSizes() {
			q, err := virtio.NewQueue(uint16(i), n)
			if err != nil {
				t.Fatal(err)
			}
			defer q.Close()
			queues = append(queues, q)
		}
		// A device may refuse; it must not touch the queues.
		_ = dev.Activate(virtio.Activation{
			Mem: Memory(t), Features: dev.Features(), Queues: queues,
			ConfigChanged: func() {}, Failed: func(error) {},
		})
		within(t, "reset", dev.Reset)
	})
	t.Run("hostile rings", func(t *testing.T) {
		dev := make(t)
		d := NewDriver(t, dev, dev.Features())
		for _, r := range d.Rings {
			r.Desc(0, d.Alloc(64), 64, 1, 0) // a loop
			r.Offer(0)
			r.Queue.Kick.Signal()
		}
		if len(d.Rings) > 0 {
			_ = d.WaitFailure()
		}
		within(t, "reset", dev.Reset)
		d.Activate(dev.Features())
	})
}

func closeDevice(t *testing.T, dev virtio.Device) {
	t.Helper()
	if err := dev.Close(); err != nil {
		t.Error("close:", err)
	}
}

// assertQuiet fails when a device that was reset still does something to its rings.
func assertQuiet(t *testing.T, d *Driver) {
	t.Helper()
	for _, r := range d.Rings {
		r.Desc(0, d.Alloc(64), 64, 2, 0)
		r.Offer(0)
		r.Queue.Kick.Signal()
	}
	for _, r := range d.Rings {
		if _, _, ok := r.Poll(); ok {
			t.Errorf("queue %d: served after the reset", r.Index)
		}
	}
	if len(d.Failures) > 0 {
		t.Errorf("failed: %v", <-d.Failures)
	}
}

// within fails the test when f hangs.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(Patience):
		t.Fatalf("%s hangs", what)
	}
}
