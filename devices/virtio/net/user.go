package net

import (
	"encoding/binary"
	"errors"
	"fmt"

	"baton/devices"
	"baton/devices/tap"
	"baton/devices/virtio"

	"golang.org/x/sys/unix"
)

const (
	// maxFrame is the longest frame with its header: 64 KiB of GSO payload and what
	// precedes it.
	maxFrame = 68 << 10
	// maxVector is what one readv takes, IOV_MAX.
	maxVector = 1024
	// notifyEvery is how many frames a burst from the host gives the driver at once.
	notifyEvery = 16
	// Where num_buffers lies in struct virtio_net_hdr: 5.1.6.
	headerBuffers = 10
)

// tapBackend copies frames in userspace, with one system call each, between the TAP and the
// guest's buffers.
type tapBackend struct {
	host
	pairs []pair
}

type pair struct {
	rxStop, txStop *devices.EventFD // readable: end waiting for the TAP
	rx, tx         *virtio.Worker   // rx is nil while the pair is detached
	receiver       *receiver
}

// NewTAP returns a backend that needs nothing but the TAP, which it takes.
func NewTAP(t *tap.TAP) Backend {
	return &tapBackend{host{t}, make([]pair, t.Queues())}
}

func (b *tapBackend) Features() uint64 {
	return b.host.Features() | virtio.CoreFeatures | featureMergeRX
}

func (b *tapBackend) Start(i int, a *virtio.Activation) error {
	rxStop, err := devices.NewEventFD()
	if err != nil {
		return err
	}
	txStop, err := devices.NewEventFD()
	if err != nil {
		return errors.Join(err, rxStop.Close())
	}
	rx := newReceiver(port{b.tap, i, rxStop}, a, nil)
	tx := &transmitter{port: port{b.tap, i, txStop}, q: a.Queues[2*i+1]}
	b.pairs[i] = pair{rxStop, txStop, rx.q.Go(a.Failed, rx.run), tx.q.Go(a.Failed, tx.run), rx}
	return nil
}

func (b *tapBackend) Stop(i int) (left [][]byte) {
	p := &b.pairs[i]
	p.rxStop.Signal()
	p.txStop.Signal()
	if p.rx != nil {
		p.rx.Stop()
		left = p.receiver.frames
	}
	p.tx.Stop()
	_, _ = p.rxStop.Close(), p.txStop.Close()
	return left
}

func (b *tapBackend) Close() error { return b.tap.Close() }

// port is one queue of the TAP and what ends waiting for it.
type port struct {
	tap   *tap.TAP
	queue int
	stop  *devices.EventFD
}

// wait blocks until the TAP is ready for events. It is false when the pair is to stop.
func (p *port) wait(events int16) bool {
	fds := [2]unix.PollFd{{Fd: int32(p.tap.FD(p.queue)), Events: events}, {Fd: int32(p.stop.FD()), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds[:], -1); err != unix.EINTR {
			return err == nil && fds[1].Revents == 0
		}
	}
}

func appendVector(v []unix.Iovec, bufs [][]byte) []unix.Iovec {
	for _, b := range bufs {
		v = append(v, unix.Iovec{Base: &b[0], Len: uint64(len(b))})
	}
	return v
}

// transmitter sends what the driver queues: 5.1.6.2.
type transmitter struct {
	port
	q   *virtio.Queue
	vec []unix.Iovec
}

func (t *transmitter) run(w *virtio.Worker) {
	for c := w.Next(); c != nil; c = w.Next() {
		if t.vec = appendVector(t.vec[:0], c.Out); len(t.vec) > 0 {
			t.send()
		}
		t.q.Push(c, 0)
	}
}

// send writes the frame in vec. One that the kernel refuses is lost, as on any wire.
func (t *transmitter) send() {
	for {
		switch _, err := t.tap.Writev(t.queue, t.vec); {
		case err == unix.EINTR:
		case err == unix.EAGAIN && t.wait(unix.POLLOUT):
		default:
			return
		}
	}
}

// receiver fills the driver's buffers: 5.1.6.3 and 5.1.6.4. How long a frame is turns out
// only when it is read. So chains for the longest one are taken in advance, if the driver
// has put up as many, and behind them a buffer of our own catches the rest.
type receiver struct {
	port
	q      *virtio.Queue
	merge  bool // VIRTIO_NET_F_MRG_RXBUF: a frame may span chains
	failed func(error)
	frames [][]byte // that come before those of the TAP, and are not delivered
	last   bool     // they are all

	chains  []*virtio.Chain // taken and empty
	sizes   []uint32        // their lengths
	room    int             // sum of sizes
	vec     []unix.Iovec
	spare   []byte
	written []uint32
}

func newReceiver(p port, a *virtio.Activation, frames [][]byte) *receiver {
	return &receiver{
		port: p, q: a.Queues[2*p.queue], merge: a.Features&featureMergeRX != 0, failed: a.Failed, frames: frames, spare: make([]byte, maxFrame),
	}
}

func (r *receiver) run(w *virtio.Worker) {
	// Who continues takes the empty chains again. Seek forgets what is not notified.
	defer func() {
		r.q.Notify()
		r.q.Seek(r.q.Position() - uint16(len(r.chains)))
	}()
	for burst := 0; len(r.frames) > 0 || !r.last; {
		if len(r.chains) == 0 && !r.take(w.Next()) {
			return
		}
		for r.merge && r.room < maxFrame && r.more() {
			if c, err := r.q.Pop(); err != nil || !r.take(c) {
				break
			}
		}
		direct := r.vector()
		n, err := r.read(&direct)
		switch err {
		case nil:
			if !r.deliver(w, n, direct) {
				return
			}
			if len(r.frames) > 0 {
				r.frames = r.frames[1:]
			}
			if burst++; burst%notifyEvery == 0 {
				r.q.Notify()
			}
		case unix.EINTR:
		case unix.EAGAIN:
			if r.q.Notify(); !r.wait(unix.POLLIN) {
				return
			}
		default:
			r.failed(fmt.Errorf("read TAP %s: %w", r.tap.Name(), err))
			return
		}
	}
}

// read gets the next frame. One that was held is in spare only.
func (r *receiver) read(direct *int) (n int, err error) {
	if len(r.frames) == 0 {
		return r.tap.Readv(r.queue, r.vec)
	}
	*direct = 0
	return copy(r.spare, r.frames[0]), nil
}

// more says whether the driver can have put up further chains.
func (r *receiver) more() bool { return len(r.chains) < int(r.q.Size) }

// take adds a chain, if there is one.
func (r *receiver) take(c *virtio.Chain) bool {
	if c == nil {
		return false
	}
	size := c.InLen()
	r.chains, r.sizes, r.room = append(r.chains, c), append(r.sizes, size), r.room+int(size)
	return true
}

// vector prepares readv, and returns how many bytes of it are the driver's.
func (r *receiver) vector() (direct int) {
	r.vec = r.vec[:0]
	for i, c := range r.chains {
		if len(r.vec)+len(c.In) >= maxVector {
			break // spare is long enough for the rest
		}
		r.vec = appendVector(r.vec, c.In)
		direct += int(r.sizes[i])
	}
	r.vec = append(r.vec, unix.Iovec{Base: &r.spare[0], Len: uint64(len(r.spare))})
	return direct
}

// deliver hands on a frame of n bytes, of which those beyond direct are in spare. A frame
// that does not fit is dropped. It is false when the worker was stopped.
func (r *receiver) deliver(w *virtio.Worker, n, direct int) bool {
	for r.merge && r.room < n && r.more() {
		if !r.take(w.Next()) {
			return false
		}
	}
	if r.room < n || n-direct >= len(r.spare) { // the latter may have lost its end
		return true
	}
	if n > direct {
		r.scatter(direct, r.spare[:n-direct])
	}
	r.written = r.written[:0]
	for left, i := n, 0; left > 0; i++ {
		size := min(left, int(r.sizes[i]))
		r.written = append(r.written, uint32(size))
		left -= size
		r.room -= int(r.sizes[i])
	}
	k := len(r.written)
	var buffers [2]byte
	binary.LittleEndian.PutUint16(buffers[:], uint16(k))
	r.scatter(headerBuffers, buffers[:])
	r.q.PushAll(r.chains[:k], r.written)
	r.chains = append(r.chains[:0], r.chains[k:]...)
	r.sizes = append(r.sizes[:0], r.sizes[k:]...)
	return true
}

// scatter copies p into the chains, at off bytes from the beginning of the first.
func (r *receiver) scatter(off int, p []byte) {
	for _, c := range r.chains {
		for _, b := range c.In {
			if off >= len(b) {
				off -= len(b)
				continue
			}
			if p = p[copy(b[off:], p):]; len(p) == 0 {
				return
			}
			off = 0
		}
	}
}
