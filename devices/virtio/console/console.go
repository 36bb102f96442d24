// Package console is the virtio console device with several ports: Virtual I/O Device
// specification 1.2, section 5.3.
//
//	port.backend ── Read ──> input ──> receiveq worker ──> guest
//	             <─ Write ── output <── transmitq worker <── guest
//
//	control receiveq: PORT_ADD, CONSOLE_PORT, PORT_NAME, PORT_OPEN ──> guest
//	control transmitq: DEVICE_READY, PORT_READY, PORT_OPEN         <── guest
//
// The two goroutines of a port at its backend live as long as the device, the workers from
// Activate to Reset. Nothing is dropped in between: input waits until the guest has opened
// the port and given a buffer, output keeps the guest's buffer until the backend takes it.
package console

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"baton/devices/virtio"
)

// Feature bits: 5.3.3.
const featureMultiport = 1 << 1

// Control messages: 5.3.6.2.
const (
	messageSize = 8 // port, event, value; then the name

	eventDeviceReady = 0
	eventPortAdd     = 1
	eventPortReady   = 3
	eventConsolePort = 4
	eventPortOpen    = 6
	eventPortName    = 7
)

// Queues: 5.3.2.
const (
	queueReceive         = 0 // and queueTransmit: of port 0; of port n > 0 at 2n+2, 2n+3
	queueControlReceive  = 2
	queueControlTransmit = 3

	queueSize = 128
)

const (
	// MaxPorts is the number of ports that a device can have.
	MaxPorts = 31
	// chunk is what passes between a worker and a backend at a time, in bytes.
	chunk = 4096
	// queuedChunks is how many chunks a slow backend may have waiting before the guest has to.
	queuedChunks = 16
	// flushTime is what Close grants a backend that does not take its output.
	flushTime = time.Second
)

// Port is one port of the device.
type Port struct {
	// Number is the port's number, 0 to MaxPorts-1. Guests expect a console at 0.
	Number int
	// Console makes it a console (hvcN in Linux, QEMU's virtconsole) rather than a character
	// device (vportMpN, QEMU's virtserialport).
	Console bool
	// Name is what the guest finds the port by (/dev/virtio-ports/NAME); may be empty.
	Name string
	// Backend is the host's side; the device closes it. Read returns what the guest is to
	// get, Write takes what the guest has written; both may block.
	Backend io.ReadWriteCloser
}

// Device is a virtio console device.
type Device struct {
	ports   []*port // by number, nil where there is none
	space   [12]byte
	control *control
	workers []*virtio.Worker
}

// New returns a device with the ports, whose backends it owns from then on. On an error the
// backends stay the caller's.
func New(ports []Port) (*Device, error) {
	d := &Device{ports: make([]*port, 1)}
	for _, cfg := range ports {
		n := cfg.Number
		if n < 0 || n >= MaxPorts {
			return nil, fmt.Errorf("console port %d: not 0 to %d", n, MaxPorts-1)
		}
		for len(d.ports) <= n {
			d.ports = append(d.ports, nil)
		}
		for _, p := range d.ports {
			switch {
			case p == nil:
			case p.Number == n:
				return nil, fmt.Errorf("console port %d: defined twice", n)
			case p.Name != "" && p.Name == cfg.Name:
				return nil, fmt.Errorf("console port %d: its name %q is taken by port %d", n, cfg.Name, p.Number)
			}
		}
		d.ports[n] = newPort(cfg)
	}
	d.control = newControl(d.ports)
	for _, p := range d.ports {
		if p != nil {
			p.start()
		}
	}
	binary.LittleEndian.PutUint32(d.space[4:], uint32(len(d.ports))) // max_nr_ports: 5.3.4
	return d, nil
}

// Type implements [virtio.Device].
func (d *Device) Type() uint32 { return virtio.TypeConsole }

// Features implements [virtio.Device].
func (d *Device) Features() uint64 { return virtio.CoreFeatures | featureMultiport }

// QueueSizes implements [virtio.Device].
func (d *Device) QueueSizes() []uint16 {
	return slices.Repeat([]uint16{queueSize}, 2*len(d.ports)+2)
}

// ReadConfig implements [virtio.Device].
func (d *Device) ReadConfig(off uint64, p []byte) { virtio.CopyConfig(p, d.space[:], off) }

// Activate implements [virtio.Device].
func (d *Device) Activate(a virtio.Activation) error {
	for _, p := range d.ports {
		if p != nil {
			p.gate.set(a.Features&featureMultiport == 0) // with several ports the guest says when it is ready
		}
	}
	return d.Resume(a)
}

// Resume implements [virtio.Device].
func (d *Device) Resume(a virtio.Activation) error {
	run := func(i int, f func(*virtio.Worker, *virtio.Queue)) {
		if q := a.Queues[i]; q.Enabled {
			d.workers = append(d.workers, q.Go(a.Failed, func(w *virtio.Worker) { f(w, q) }))
		}
	}
	multiport := a.Features&featureMultiport != 0
	for n, p := range d.ports {
		if p == nil || n > 0 && !multiport {
			continue
		}
		i := queueReceive
		if n > 0 {
			i = 2*n + 2
		}
		run(i, p.receive)
		run(i+1, p.transmit)
	}
	if multiport {
		d.control.failed = a.Failed
		run(queueControlReceive, d.control.receive)
		run(queueControlTransmit, d.control.transmit)
	}
	return nil
}

// Reset implements [virtio.Device].
func (d *Device) Reset() {
	d.Pause()
	d.control.forget()
	for _, p := range d.ports {
		if p != nil {
			p.sent = 0
		}
	}
}

// Pause implements [virtio.Device].
func (d *Device) Pause() {
	for _, w := range d.workers {
		w.Stop()
	}
	d.workers = nil
}

// Close implements [virtio.Device]. Output that the backends have not taken yet gets a
// second to leave.
func (d *Device) Close() error {
	d.Reset()
	deadline := time.After(flushTime)
	var errs []error
	for _, p := range d.ports {
		if p != nil {
			errs = append(errs, p.close(deadline))
		}
	}
	return errors.Join(errs...)
}
