package net

import (
	"errors"
	"sync"
	"time"

	"baton/devices"
	"baton/devices/tap"
	"baton/devices/virtio"

	"golang.org/x/sys/unix"
)

// Limits of what is held for one device.
const (
	// HoldFrames is how many frames are held; what comes after those is dropped.
	HoldFrames = 4096
	// HoldTime is how long a frame is held; then it is dropped.
	HoldTime  = 2 * time.Second
	holdBytes = 64 << 20
)

// holdTime is HoldTime but for tests, which a busy machine may interrupt.
var holdTime = HoldTime

// Held is what Release or TakeHeld say about frames that were held.
type Held struct {
	Frames  int           // held to the end
	Dropped int           // that there was no room for, or that waited for too long
	Longest time.Duration // that a frame waited
}

// holder keeps what the host sends on one queue, in place of the driver.
type holder struct {
	port
	done chan struct{}

	mu      sync.Mutex
	frames  [][]byte // with header
	came    []time.Time
	bytes   int
	dropped int
}

// hold begins to read a queue that nobody else reads; frames came before what that has.
func (h host) hold(queue int, frames [][]byte) (*holder, error) {
	stop, err := devices.NewEventFD()
	if err != nil {
		return nil, err
	}
	k := &holder{port: port{h.tap, queue, stop}, done: make(chan struct{})}
	for _, f := range frames {
		k.keep(f)
	}
	go k.run()
	return k, nil
}

func (k *holder) run() {
	defer close(k.done)
	buf := make([]byte, maxFrame)
	for {
		switch n, err := unix.Read(k.tap.FD(k.queue), buf); {
		case err == unix.EINTR:
		case err == unix.EAGAIN && k.wait(unix.POLLIN):
		case err != nil || n < tap.HeaderSize:
			return // stopped, or the TAP has gone, which its next user will say
		default:
			k.keep(append([]byte(nil), buf[:n]...))
		}
		if k.stopped() {
			return
		}
	}
}

func (k *holder) stopped() bool {
	fds := []unix.PollFd{{Fd: int32(k.stop.FD()), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

func (k *holder) keep(frame []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.expire()
	if len(k.frames) == HoldFrames || k.bytes+len(frame) > holdBytes {
		k.dropped++
		return
	}
	k.frames, k.came = append(k.frames, frame), append(k.came, time.Now())
	k.bytes += len(frame)
}

// expire drops what has waited for too long; mu is held.
func (k *holder) expire() { k.dropped += k.drop(time.Now().Add(-holdTime)) }

// drop drops what came before a time, and says how much it was; mu is held.
func (k *holder) drop(before time.Time) (n int) {
	for n < len(k.frames) && k.came[n].Before(before) {
		k.bytes -= len(k.frames[n])
		n++
	}
	k.frames, k.came = k.frames[n:], k.came[n:]
	return n
}

// end stops to read and returns the frames.
func (k *holder) end() [][]byte {
	k.stop.Signal()
	<-k.done
	_ = k.stop.Close()
	k.expire()
	return k.frames
}

func (k *holder) forget(before time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.drop(before)
	k.dropped = 0
}

// Hold has frames for the driver wait until Release or TakeHeld. What the driver sends is sent
// meanwhile. It does nothing while the device is not served, or frames are held already.
func (n *Net) Hold() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.held != nil || n.running == 0 {
		return nil
	}
	for i := range n.running {
		k, err := n.backend.Detach(i)
		if err != nil {
			return errors.Join(err, n.release(nil))
		}
		n.held = append(n.held, k)
	}
	return nil
}

// Forget throws away what has been held since before a time: the driver got it in another way.
func (n *Net) Forget(before time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, k := range n.held {
		k.forget(before)
	}
}

// Release ends Hold; the driver gets what was held, in order, and then what comes.
func (n *Net) Release() (Held, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.holding()
	return h, n.release((*holder).end)
}

// TakeHeld ends Hold; the caller gets what was held, each frame with its header, the driver
// what comes.
func (n *Net) TakeHeld() (frames [][]byte, h Held, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h = n.holding()
	err = n.release(func(k *holder) [][]byte {
		frames = append(frames, k.end()...)
		return nil
	})
	return frames, h, err
}

// TakeWaiting returns what has come for the driver of a device that is not served, each frame
// with its header, at most so many bytes; the rest is thrown away and counted.
func (n *Net) TakeWaiting(limit int) (frames [][]byte, dropped int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.running > 0 {
		return nil, 0
	}
	for i, f := range n.waiting {
		if limit -= len(f); limit < 0 {
			dropped = len(n.waiting) - i
			break
		}
		frames = append(frames, f)
	}
	n.waiting = nil
	list, more := n.backend.Take(max(limit, 0))
	return append(frames, list...), dropped + more
}

// giveWaiting gives the driver what it had not got when the device stopped, before what has come
// since; mu is held.
func (n *Net) giveWaiting() error {
	k, err := n.backend.Detach(0)
	if err != nil {
		return err
	}
	frames := append(n.waiting, k.end()...)
	n.waiting = nil
	return n.backend.Attach(0, frames, n.act)
}

// Interface is the name of the host's end.
func (n *Net) Interface() string { return n.backend.Name() }

// holding sums up; mu is held.
func (n *Net) holding() (h Held) {
	for _, k := range n.held {
		k.mu.Lock()
		k.expire()
		h.Frames += len(k.frames)
		h.Dropped += k.dropped
		if len(k.frames) > 0 {
			h.Longest = max(h.Longest, time.Since(k.came[0]))
		}
		k.mu.Unlock()
	}
	return h
}

// release continues with all pairs that are held; mu is held. Frames ends a holder and says
// what the driver gets; nil: nothing.
func (n *Net) release(frames func(*holder) [][]byte) error {
	var errs []error
	for i, k := range n.held {
		var list [][]byte
		if frames != nil {
			list = frames(k)
		} else {
			k.end()
		}
		errs = append(errs, n.backend.Attach(i, list, n.act))
	}
	n.held = nil
	return errors.Join(errs...)
}

// stopHolding ends Hold where the device stops; what was held waits. Mu is held.
func (n *Net) stopHolding() {
	for _, k := range n.held {
		n.waiting = append(n.waiting, k.end()...)
	}
	n.held = nil
}

// Detach implements [Backend].
func (b *tapBackend) Detach(i int) (*holder, error) {
	p := &b.pairs[i]
	p.rxStop.Signal()
	p.rx.Stop()
	p.rx = nil
	return b.hold(i, p.receiver.frames)
}

// Attach implements [Backend].
func (b *tapBackend) Attach(i int, frames [][]byte, a *virtio.Activation) error {
	p := &b.pairs[i]
	stop, err := devices.NewEventFD()
	if err != nil {
		return err
	}
	_ = p.rxStop.Close()
	p.rxStop = stop
	r := newReceiver(port{b.tap, i, stop}, a, frames)
	p.receiver, p.rx = r, r.q.Go(a.Failed, r.run)
	return nil
}

// Detach implements [Backend].
func (b *vhostBackend) Detach(i int) (*holder, error) {
	left, q := b.endReplay(i), b.queues[i][0]
	if !b.detached[i] { // else vhost-net has not gone on since, and stands where it did
		base, err := b.nets[i].StopRing(0)
		if err != nil {
			return nil, err
		}
		q.Seek(base)
	}
	k, err := b.hold(i, left)
	if b.detached[i] = err == nil; err != nil {
		return nil, errors.Join(err, b.nets[i].StartRing(0, q.Position(), b.tap.FD(i)))
	}
	return k, nil
}

// Attach implements [Backend].
func (b *vhostBackend) Attach(i int, frames [][]byte, a *virtio.Activation) error {
	q := b.queues[i][0]
	if len(frames) == 0 {
		b.detached[i] = false
		return b.nets[i].StartRing(0, q.Position(), b.tap.FD(i))
	}
	stop, err := devices.NewEventFD()
	if err != nil {
		return err
	}
	r := newReceiver(port{b.tap, i, stop}, a, frames)
	r.last = true
	p := &replay{receiver: r, stop: stop, attached: make(chan bool, 1)}
	p.w = q.Go(a.Failed, func(w *virtio.Worker) {
		r.run(w)
		ok := len(r.frames) == 0
		if ok {
			if err := b.nets[i].StartRing(0, q.Position(), b.tap.FD(i)); err != nil {
				a.Failed(err)
			}
		}
		p.attached <- ok
	})
	b.replays[i] = p
	return nil
}

// replay gives the driver frames that were held, before vhost-net goes on.
type replay struct {
	receiver *receiver
	w        *virtio.Worker
	stop     *devices.EventFD
	attached chan bool // holds one at the end: whether vhost-net goes on
}

// endReplay breaks off one that is under way, and returns what the driver has not got.
func (b *vhostBackend) endReplay(i int) [][]byte {
	p := b.replays[i]
	if p == nil {
		return nil
	}
	b.replays[i] = nil
	p.stop.Signal()
	p.w.Stop()
	b.detached[i] = !<-p.attached
	_ = p.stop.Close()
	return p.receiver.frames
}
