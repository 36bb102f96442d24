package console

import (
	"sync"
	"time"

	"baton/devices/virtio"
)

// port is a port and its goroutines.
type port struct {
	Port
	gate   gate
	input  chan []byte // from the backend; closed at its end
	output chan []byte // to the backend
	rest   []byte      // of the last input, what the guest has had no buffer for
	sent   int         // bytes of the chain that transmit is at, which the backend has
	taken  chan struct{}
	closed chan struct{}
}

func newPort(cfg Port) *port {
	return &port{
		Port:   cfg,
		gate:   gate{ch: make(chan struct{})},
		input:  make(chan []byte),
		output: make(chan []byte, queuedChunks),
		taken:  make(chan struct{}),
		closed: make(chan struct{}),
	}
}

// start begins to serve the backend.
func (p *port) start() {
	go p.readBackend()
	go p.writeBackend()
}

// readBackend waits with each piece of input until the guest has taken it.
func (p *port) readBackend() {
	defer close(p.input)
	for {
		b := make([]byte, chunk)
		n, err := p.Backend.Read(b)
		if n > 0 {
			select {
			case p.input <- b[:n]:
			case <-p.closed:
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (p *port) writeBackend() {
	defer close(p.taken)
	for b := range p.output {
		_, _ = p.Backend.Write(b) // a peer that is gone must not end the guest's port
	}
}

// close writes what is left, until the deadline, and closes the backend.
func (p *port) close(deadline <-chan time.Time) error {
	close(p.closed)
	close(p.output)
	select {
	case <-p.taken:
	case <-deadline:
	}
	return p.Backend.Close()
}

// transmit passes on what the guest writes, which waits for a slow backend.
func (p *port) transmit(w *virtio.Worker, q *virtio.Queue) {
	for c := w.Next(); c != nil; c = w.Next() {
		c.Out = virtio.Skip(c.Out, p.sent)
		for left := int(c.OutLen()); left > 0; {
			b := make([]byte, min(left, chunk))
			left -= c.Read(b)
			select {
			case p.output <- b:
				p.sent += len(b)
			case <-w.Stopping():
				// Who continues takes the chain again. Seek forgets what is not notified.
				q.Notify()
				q.Seek(q.Position() - 1)
				return
			}
		}
		p.sent = 0
		q.Push(c, 0)
	}
}

// receive passes on what the backend says while the guest has the port open.
func (p *port) receive(w *virtio.Worker, q *virtio.Queue) {
	for {
		if len(p.rest) == 0 {
			select {
			case b, ok := <-p.input:
				if !ok {
					return // the backend has no more to say
				}
				p.rest = b
			case <-w.Stopping():
				return
			}
		}
		select {
		case <-p.gate.opened():
		case <-w.Stopping():
			return
		}
		c := w.Next()
		if c == nil {
			return
		}
		n := c.Write(p.rest)
		p.rest = p.rest[n:]
		q.Push(c, uint32(n))
		q.Notify()
	}
}

// gate is whether the guest has the port open, as something to wait for.
type gate struct {
	mu sync.Mutex
	ch chan struct{} // closed while the port is open
}

// opened is closed while the port is open.
func (g *gate) opened() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ch
}

func (g *gate) set(open bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.ch:
		if !open {
			g.ch = make(chan struct{})
		}
	default:
		if open {
			close(g.ch)
		}
	}
}

func (g *gate) isOpen() bool {
	select {
	case <-g.opened():
		return true
	default:
		return false
	}
}
