// Package rng is the virtio entropy device: Virtual I/O Device specification 1.2,
// section 5.4. It fills the guest's buffers from the host's getrandom.
package rng

import (
	"baton/devices/virtio"

	"golang.org/x/sys/unix"
)

const (
	queueSize = 64
	// maxRequest bounds the work of one request in bytes; the driver asks again for more.
	maxRequest = 64 << 10
)

// Device is a virtio entropy device.
type Device struct {
	virtio.Stateless
	worker *virtio.Worker
}

// New returns a device.
func New() *Device { return new(Device) }

// Type implements [virtio.Device].
func (d *Device) Type() uint32 { return virtio.TypeEntropy }

// Features implements [virtio.Device].
func (d *Device) Features() uint64 { return virtio.CoreFeatures }

// QueueSizes implements [virtio.Device].
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// ReadConfig implements [virtio.Device]; there is no configuration space.
func (d *Device) ReadConfig(_ uint64, p []byte) { clear(p) }

// Activate implements [virtio.Device].
func (d *Device) Activate(a virtio.Activation) error {
	if q := a.Queues[0]; q.Enabled {
		d.worker = q.Go(a.Failed, func(w *virtio.Worker) { serve(w, q) })
	}
	return nil
}

func serve(w *virtio.Worker, q *virtio.Queue) {
	for c := w.Next(); c != nil; c = w.Next() {
		written := 0
		for _, b := range c.In {
			written += fill(b[:min(len(b), maxRequest-written)])
		}
		q.Push(c, uint32(written))
	}
}

// fill fills b and returns how much it was. Long reads may be interrupted.
func fill(b []byte) (n int) {
	for n < len(b) {
		k, err := unix.Getrandom(b[n:], 0)
		if err != nil && err != unix.EINTR {
			break
		}
		n += max(k, 0)
	}
	return n
}

// Reset implements [virtio.Device].
func (d *Device) Reset() {
	if d.worker != nil {
		d.worker.Stop()
		d.worker = nil
	}
}

// Pause implements [virtio.Device].
func (d *Device) Pause() { d.Reset() }

// Resume implements [virtio.Device].
func (d *Device) Resume(a virtio.Activation) error { return d.Activate(a) }

// Close implements [virtio.Device].
func (d *Device) Close() error { d.Reset(); return nil }
