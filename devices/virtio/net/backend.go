package net

import (
	"errors"
	"fmt"

	"baton/devices/tap"
	"baton/devices/vhost"
	"baton/devices/virtio"
)

// Backend moves frames between queue pairs and the host. Its methods are not called at the
// same time.
type Backend interface {
	// Features are those bits of 5.1.3 and of the core that the backend can serve.
	Features() uint64
	// Pairs is the greatest number of queue pairs.
	Pairs() int
	// Start serves a pair, from where its queues stand; after an error it does not.
	Start(pair int, a *virtio.Activation) error
	// Stop ends that. When it returns, the queues stand where a later Start continues, and
	// their memory is left alone; what comes from the host waits, as long as there is room. It
	// returns those frames of Attach that the driver has not got.
	Stop(pair int) (left [][]byte)
	// Detach ends receiving for a pair that is served, and returns who keeps what comes. Attach,
	// once that has ended, continues, with frames before all others. A pair that is detached
	// can be stopped.
	Detach(pair int) (*holder, error)
	Attach(pair int, frames [][]byte, a *virtio.Activation) error
	// SetPairs has the host spread what it sends over the first n pairs.
	SetPairs(n int) error
	// SetOffloads says, in feature bits, which unfinished frames the driver takes.
	SetOffloads(features uint64) error
	// SetLog has what the kernel writes to guest memory logged; nil ends it. What this process
	// writes is in guest memory's own log.
	SetLog(log *vhost.Log) error
	// Take returns what waits, up to a number of bytes, and throws the rest away: see tap.TAP.
	Take(limit int) (frames [][]byte, dropped int)
	// Name is the name of the host's end.
	Name() string
	// Send gives the host a frame, without header, as if the driver had sent it.
	Send(frame []byte) error
	Close() error
}

// host is what both backends do to the TAP.
type host struct{ tap *tap.TAP }

// Which offload of the TAP makes which feature possible, in each direction. The TAP takes
// whatever it can also be told to give.
var offloads = []struct {
	tap         tap.Offload
	guest, host uint64
}{
	{tap.CSUM, featureGuestCSUM, featureCSUM},
	{tap.TSO4, featureGuestTSO4, featureHostTSO4},
	{tap.TSO6, featureGuestTSO6, featureHostTSO6},
	{tap.TSOECN, featureGuestECN, featureHostECN},
	{tap.UFO, featureGuestUFO, featureHostUFO},
	{tap.USO4, featureGuestUSO4, featureHostUSO},
	{tap.USO6, featureGuestUSO6, featureHostUSO},
}

func (h host) Features() (f uint64) {
	for _, o := range offloads {
		if h.tap.Offloads()&o.tap != 0 {
			f |= o.guest | o.host
		}
	}
	return f
}

func (h host) Pairs() int { return h.tap.Queues() }

func (h host) SetPairs(n int) error { return h.tap.SetQueues(n) }

func (h host) SetOffloads(features uint64) error { return h.tap.SetOffload(offload(features)) }

// offload leaves out what the kernel refuses: segmentation without checksums, ECN without
// TSO, and one of the two of USO.
func offload(features uint64) (set tap.Offload) {
	for _, o := range offloads {
		if features&o.guest != 0 {
			set |= o.tap
		}
	}
	if set&(tap.TSO4|tap.TSO6) == 0 {
		set &^= tap.TSOECN
	}
	if both := tap.USO4 | tap.USO6; set&both != both {
		set &^= both
	}
	if set&tap.CSUM == 0 {
		return 0
	}
	return set
}

func (h host) Name() string { return h.tap.Name() }

func (h host) SetLog(*vhost.Log) error { return nil }

func (h host) Take(limit int) (frames [][]byte, dropped int) {
	for i := range h.tap.Queues() {
		list, more := h.tap.Take(i, limit)
		for _, f := range list {
			limit -= len(f)
		}
		frames, dropped = append(frames, list...), dropped+more
	}
	return frames, dropped
}

func (h host) Send(frame []byte) error { return h.tap.Send(frame) }

// vhostBackend has each pair served by a vhost-net instance.
type vhostBackend struct {
	host
	nets   []*vhost.Net
	queues [][]*virtio.Queue // receive and transmit of each pair that is served

	detached []bool    // of each pair: the receive queue stands where the queue says
	replays  []*replay // of each pair
}

// NewVhost returns a backend that leaves the frames to the kernel, with one instance of
// vhost-net for each queue of the TAP. It takes all of them, also when it fails.
func NewVhost(t *tap.TAP, nets []*vhost.Net) (Backend, error) {
	b := &vhostBackend{host{t}, nets, make([][]*virtio.Queue, len(nets)), make([]bool, len(nets)), make([]*replay, len(nets))}
	if len(nets) != t.Queues() {
		return nil, errors.Join(fmt.Errorf("vhost-net on TAP %s: %d instances for %d queues", t.Name(), len(nets), t.Queues()), b.Close())
	}
	return b, nil
}

func (b *vhostBackend) Features() uint64 {
	return b.host.Features() | b.nets[0].Features()&(virtio.CoreFeatures|featureMergeRX)
}

func (b *vhostBackend) Start(pair int, a *virtio.Activation) error {
	queues := a.Queues[2*pair:][:2]
	var rings [2]vhost.Vring
	for i, q := range queues {
		rings[i] = vhost.Vring{Size: q.Size, Base: q.Position(), Desc: q.Desc, Avail: q.Avail, Used: q.Used, Kick: q.Kick.FD(), Call: -1}
		if q.Call != nil {
			rings[i].Call = q.Call.EventFD()
		}
	}
	n := b.nets[pair]
	features := a.Features & n.Features() & (virtio.CoreFeatures | featureMergeRX)
	if err := n.Start(a.Mem, features, rings, b.tap.FD(pair), a.Failed); err != nil {
		return err
	}
	b.queues[pair], b.detached[pair] = queues, false
	return nil
}

func (b *vhostBackend) Stop(pair int) [][]byte {
	left := b.endReplay(pair)
	base, err := b.nets[pair].Stop()
	for i, q := range b.queues[pair] {
		if err == nil && (i > 0 || !b.detached[pair]) { // it does not fail on a device that was started
			q.Seek(base[i])
		}
	}
	return left
}

func (b *vhostBackend) SetLog(log *vhost.Log) error {
	for _, n := range b.nets {
		if err := n.SetLog(log); err != nil {
			return err
		}
	}
	return nil
}

func (b *vhostBackend) Close() error {
	var errs []error
	for _, n := range b.nets {
		errs = append(errs, n.Close())
	}
	return errors.Join(append(errs, b.tap.Close())...)
}
