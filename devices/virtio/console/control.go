package console

import (
	"encoding/binary"
	"fmt"
	"sync"

	"baton/devices/virtio"
)

// control is the pair of control queues: 5.3.6.2.
type control struct {
	ports  []*port
	failed func(error)

	mu       sync.Mutex
	messages [][]byte      // to the guest
	changed  chan struct{} // closed when messages has changed, then replaced
}

func newControl(ports []*port) *control {
	return &control{ports: ports, changed: make(chan struct{})}
}

// update changes the messages.
func (c *control) update(f func(messages [][]byte) [][]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.messages = f(c.messages)
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *control) forget() { c.update(func([][]byte) [][]byte { return nil }) }

// wait waits until the number of messages is as wanted, or stop is closed, and then is nil;
// else it is the messages.
func (c *control) wait(wanted func(n int) bool, stop <-chan struct{}) [][]byte {
	for {
		c.mu.Lock()
		messages, changed := c.messages, c.changed
		c.mu.Unlock()
		if wanted(len(messages)) {
			return append([][]byte{}, messages...)
		}
		select {
		case <-changed:
		case <-stop:
			return nil
		}
	}
}

// transmit takes the guest's messages. Those that make no sense are ignored. A guest that
// asks and does not take the answers makes only itself wait.
func (c *control) transmit(w *virtio.Worker, q *virtio.Queue) {
	for c.wait(func(n int) bool { return n < queueSize }, w.Stopping()) != nil {
		chain := w.Next()
		if chain == nil {
			return
		}
		var m [messageSize]byte
		n := chain.Read(m[:])
		if n == messageSize {
			answers := c.handle(m)
			c.update(func(all [][]byte) [][]byte { return append(all, answers...) })
		}
		q.Push(chain, 0)
	}
}

// handle returns the answers to one message.
func (c *control) handle(m [messageSize]byte) (answers [][]byte) {
	id := binary.LittleEndian.Uint32(m[:])
	event, value := binary.LittleEndian.Uint16(m[4:]), binary.LittleEndian.Uint16(m[6:])
	send := func(id int, event, value uint16, name string) {
		b := binary.LittleEndian.AppendUint32(nil, uint32(id))
		b = binary.LittleEndian.AppendUint16(b, event)
		b = binary.LittleEndian.AppendUint16(b, value)
		answers = append(answers, append(b, name...))
	}
	if event == eventDeviceReady && value == 1 {
		for n, p := range c.ports {
			if p != nil {
				send(n, eventPortAdd, 1, "")
			}
		}
		return answers
	}
	if uint64(id) >= uint64(len(c.ports)) || c.ports[id] == nil {
		return nil
	}
	p := c.ports[id]
	switch {
	case event == eventPortReady && value == 1:
		// In QEMU's order: the kind, the name, then that the host has it open.
		if p.Console {
			send(p.Number, eventConsolePort, 1, "")
		}
		if p.Name != "" {
			send(p.Number, eventPortName, 1, p.Name)
		}
		send(p.Number, eventPortOpen, 1, "")
	case event == eventPortOpen:
		p.gate.set(value != 0)
	}
	return answers
}

// receive gives the guest the messages for it.
func (c *control) receive(w *virtio.Worker, q *virtio.Queue) {
	for {
		messages := c.wait(func(n int) bool { return n > 0 }, w.Stopping())
		if messages == nil {
			return
		}
		chain := w.Next()
		if chain == nil {
			return
		}
		m := messages[0]
		n := chain.Write(m)
		c.update(func(all [][]byte) [][]byte { return all[1:] })
		q.Push(chain, uint32(n))
		if n < len(m) {
			c.failed(fmt.Errorf("queue %d: buffer of %d bytes for a control message of %d", q.Index, n, len(m)))
			return
		}
		q.Notify()
	}
}
