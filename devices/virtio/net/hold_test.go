package net

import (
	"bytes"
	"testing"
	"time"

	"baton/devices/virtio"
	"baton/tests/taptest"
	"baton/tests/virtiotest"
)

func init() { holdTime = time.Hour }

// number sends frames n to m-1.
func number(host *taptest.Socket, n, m int) {
	for i := n; i < m; i++ {
		host.Send(taptest.Frame(byte(i), 100))
	}
}

// waitHeld waits until that many frames are held.
func waitHeld(t *testing.T, n *Net, want int) {
	t.Helper()
	for {
		n.mu.Lock()
		h := n.holding()
		n.mu.Unlock()
		if h.Frames+h.Dropped >= want {
			return
		}
		if t.Context().Err() != nil {
			t.Fatal("frames are missing")
		}
	}
}

// expect receives frames n to m-1, in that order, putting up new buffers.
func expect(t *testing.T, rx *virtiotest.Ring, n, m int) {
	t.Helper()
	for i := n; i < m; i++ {
		if _, got := receive(t, rx); !bytes.Equal(got, taptest.Frame(byte(i), 100)) {
			t.Fatalf("frame %d: received % x", i, got[:min(20, len(got))])
		}
		rx.Add(nil, 1526)
		rx.Kick()
	}
}

// What is held comes in order, before what comes later, and more than the driver has buffers.
func TestHold(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		n := dev.(vectors).Net
		d := virtiotest.NewDriver(t, dev, virtio.CoreFeatures|featureMergeRX)
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		rx, tx := d.Rings[0], d.Rings[1]
		for range 16 {
			rx.Add(nil, 1526)
		}
		rx.Kick()
		number(host, 0, 3)
		expect(t, rx, 0, 3)
		for round := range 3 {
			if err := n.Hold(); err != nil {
				t.Fatal(err)
			}
			number(host, 50, 60)
			waitHeld(t, n, 10)
			n.Forget(time.Now())
			number(host, 3, 100)
			waitHeld(t, n, 97)
			transmit(tx, make([]byte, 12), taptest.Frame(1, 100)) // is not held
			host.Recv()
			if _, _, ok := rx.Poll(); ok {
				t.Fatal("a frame came that should be held")
			}
			h, err := n.Release()
			if err != nil || h.Frames != 97 || h.Dropped != 0 || h.Longest <= 0 {
				t.Fatalf("round %d: %+v, %v", round, h, err)
			}
			number(host, 100, 110)
			expect(t, rx, 3, 110)
		}
	})
}

func TestTakeHeld(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		n := dev.(vectors).Net
		d := virtiotest.NewDriver(t, dev, virtio.CoreFeatures)
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		rx := d.Rings[0]
		rx.Add(nil, 1526)
		rx.Kick()
		if err := n.Hold(); err != nil {
			t.Fatal(err)
		}
		number(host, 0, 5)
		waitHeld(t, n, 5)
		frames, h, err := n.TakeHeld()
		if err != nil || h.Frames != 5 || len(frames) != 5 || !bytes.Equal(frames[4][12:], taptest.Frame(4, 100)) {
			t.Fatalf("%d frames, %+v, %v", len(frames), h, err)
		}
		number(host, 5, 7)
		expect(t, rx, 5, 7)
	})
}

// Frames that the driver has no buffers for when they are held again come in the end, in order.
func TestHoldAgain(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		n := dev.(vectors).Net
		d := virtiotest.NewDriver(t, dev, virtio.CoreFeatures|featureMergeRX)
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		rx := d.Rings[0]
		for range 4 {
			rx.Add(nil, 1526)
		}
		rx.Kick()
		for range 3 {
			if err := n.Hold(); err != nil {
				t.Fatal(err)
			}
			number(host, 0, 20)
			waitHeld(t, n, 20)
			if _, err := n.Release(); err != nil {
				t.Fatal(err)
			}
			expect(t, rx, 0, 3) // it is under way
			if err := n.Hold(); err != nil {
				t.Fatal(err)
			}
			number(host, 20, 30)
			waitHeld(t, n, 10+20-3-4-3) // the driver has buffers for some more
			if _, err := n.Release(); err != nil {
				t.Fatal(err)
			}
			expect(t, rx, 3, 30)
		}
	})
}

// No more is held than there is room for.
func TestHoldLimit(t *testing.T) {
	n := tapDevice(t, Config{MAC: testMAC}, 1).(vectors)
	virtiotest.NewDriver(t, n, virtio.CoreFeatures)
	host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
	if err := n.Hold(); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < HoldFrames+100; i += 100 {
		number(host, 0, 100)
		waitHeld(t, n.Net, i+100)
	}
	if _, h, err := n.TakeHeld(); err != nil || h.Frames != HoldFrames || h.Dropped == 0 {
		t.Errorf("%+v, %v", h, err)
	}
}

// A device that stops while frames are held starts again as ever.
func TestStopWhileHolding(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		n := dev.(vectors).Net
		d := virtiotest.NewDriver(t, dev, virtio.CoreFeatures)
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		stop := map[string]func(){
			"reset": func() { n.Reset(); d.Activate(virtio.CoreFeatures) },
			"link":  func() { n.SetLink(false); n.SetLink(true) },
			"release": func() { // a driver without buffers
				if _, err := n.Release(); err != nil {
					t.Error(err)
				}
				n.Reset()
				d.Activate(virtio.CoreFeatures)
			},
		}
		for name, f := range stop {
			if err := n.Hold(); err != nil {
				t.Fatal(name, err)
			}
			number(host, 0, 5)
			waitHeld(t, n, 5)
			f()
			rx := d.Rings[0]
			for range 16 {
				rx.Add(nil, 1526)
			}
			rx.Kick()
			if name != "link" { // else they would be held in the next turn, too
				number(host, 5, 7)
				expect(t, rx, 5, 7)
			}
			n.Reset()
			d.Activate(virtio.CoreFeatures)
		}
	})
	t.Run("inactive", func(t *testing.T) {
		n, _ := newFake(t, Config{}, 1)
		if err := n.Hold(); err != nil {
			t.Error(err)
		}
		if h, err := n.Release(); err != nil || h != (Held{}) {
			t.Error(h, err)
		}
	})
}

// What is held, or waits for buffers, when a device stops is there when it goes on, or for who
// takes it.
func TestWaiting(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		n := dev.(vectors).Net
		d := virtiotest.NewDriver(t, dev, virtio.CoreFeatures|featureMergeRX)
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		rx := d.Rings[0]
		act := *n.act
		hold := func() {
			t.Helper()
			if err := n.Hold(); err != nil {
				t.Fatal(err)
			}
			number(host, 0, 10)
			waitHeld(t, n, 10)
		}
		goOn := func() {
			t.Helper()
			n.Pause()
			if err := n.Resume(act); err != nil {
				t.Fatal(err)
			}
		}
		hold()
		goOn()
		n.Pause() // no buffers have been put up
		number(host, 10, 12)
		if err := n.Resume(act); err != nil {
			t.Fatal(err)
		}
		for range 16 {
			rx.Add(nil, 1526)
		}
		rx.Kick()
		expect(t, rx, 0, 12)
		hold()
		n.Pause()
		number(host, 10, 12)
		frames, dropped := n.TakeWaiting(1 << 20)
		if len(frames) != 12 || dropped != 0 || !bytes.Equal(frames[11][12:], taptest.Frame(11, 100)) {
			t.Errorf("%d frames, %d dropped", len(frames), dropped)
		}
		if err := n.Resume(act); err != nil {
			t.Fatal(err)
		}
		hold()
		n.Pause()
		if frames, dropped := n.TakeWaiting(300); len(frames) != 2 || dropped != 8 {
			t.Errorf("%d frames, %d dropped", len(frames), dropped)
		}
	})
}

// A frame that has waited for too long is of no use.
func TestHoldTime(t *testing.T) {
	k := &holder{}
	k.keep(make([]byte, 60))
	k.keep(make([]byte, 60))
	k.came[0] = k.came[0].Add(-2 * holdTime)
	k.keep(make([]byte, 60))
	if len(k.frames) != 2 || k.dropped != 1 || k.bytes != 120 {
		t.Errorf("%d frames of %d bytes, %d dropped", len(k.frames), k.bytes, k.dropped)
	}
}
