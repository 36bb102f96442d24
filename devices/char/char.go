package char

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	bufferSize = 1 << 20     // bytes of output that wait for a slow peer
	drainTime  = time.Second // how long Close waits for what is in the buffer
)

// Options are what a Spec does not say.
type Options struct {
	// OnQuit, if set, makes Stdio recognise Ctrl-A as its escape character; it is called,
	// in the reader's goroutine, for Ctrl-A x. It must not close the port itself.
	OnQuit func()
}

// Port is an open character device. Its methods may be called by several goroutines at
// once, Read by one at a time.
type Port struct {
	name    string
	monitor *Monitor // nil unless shared with one
	dropped atomic.Uint64
	listen  net.Listener  // nil unless a server
	drained chan struct{} // closed when the writing goroutine has ended

	mu     sync.Mutex
	change sync.Cond          // of what follows
	peer   io.ReadWriteCloser // nil: nobody is there
	out    []byte
	closed bool
}

// Open opens what spec says. If that means to wait for a peer, ctx ends the wait.
func Open(ctx context.Context, spec Spec, o Options) (*Port, error) {
	p := &Port{name: string(spec.Kind), drained: make(chan struct{})}
	p.change.L = &p.mu
	if err := p.open(ctx, spec, o); err != nil {
		return nil, fmt.Errorf("open %s port: %w", spec.Kind, err)
	}
	go p.drain()
	if p.listen != nil {
		go p.accept()
	}
	return p, nil
}

func (p *Port) open(ctx context.Context, spec Spec, o Options) (err error) {
	switch spec.Kind {
	case None, Null:
	case Stdio:
		if p.peer, err = openStdio(); err == nil {
			p.shareStdio(spec.Monitor, o.OnQuit)
		}
	case File:
		p.peer, err = openFile(spec.Path)
	case Unix, TCP:
		if spec.Telnet {
			return errors.New("only a monitor speaks telnet\nuse tcp: instead")
		}
		if !spec.Server {
			p.peer, err = Dial(ctx, spec)
			return err
		}
		if p.listen, err = Listen(ctx, spec); err != nil {
			return err
		}
		p.name = p.listen.Addr().String()
		if spec.Wait {
			p.peer, err = AcceptFirst(ctx, p.listen)
		}
	default:
		err = errors.New("unknown kind")
	}
	return err
}

// Name is what the other side connects to, the address of a server; otherwise the kind.
func (p *Port) Name() string { return p.name }

// Dropped is how many bytes of output nobody took.
func (p *Port) Dropped() uint64 { return p.dropped.Load() }

// Read waits for input. It ends with io.EOF after Close, and not before: the end of a
// peer's input is not the end of the port.
func (p *Port) Read(b []byte) (int, error) {
	for {
		peer := p.wait(func() bool { return p.peer != nil })
		if peer == nil {
			return 0, io.EOF
		}
		n, err := peer.Read(b)
		if err != nil {
			p.hangUp(peer)
		}
		if n > 0 || len(b) == 0 {
			return n, nil
		}
	}
}

// wait waits until cond holds and returns the peer, or nil once the port is closed.
func (p *Port) wait(cond func() bool) io.ReadWriteCloser {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.closed && !cond() {
		p.change.Wait()
	}
	if p.closed {
		return nil
	}
	return p.peer
}

// Write never waits for the peer; it takes all of b or drops the part for which there is no
// room. It fails only after Close.
func (p *Port) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, io.ErrClosedPipe
	}
	n := 0
	if p.peer != nil {
		n = min(len(b), bufferSize-len(p.out))
	}
	p.out = append(p.out, b[:n]...)
	p.dropped.Add(uint64(len(b) - n))
	p.change.Broadcast()
	return len(b), nil
}

// Close gives the output that waits a moment to leave, then disconnects.
func (p *Port) Close() error {
	p.mu.Lock()
	closed := p.closed
	p.closed = true
	p.change.Broadcast()
	p.mu.Unlock()
	if closed {
		return nil
	}
	var err error
	if p.listen != nil {
		err = p.listen.Close()
	}
	select {
	case <-p.drained:
	case <-time.After(drainTime):
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.peer != nil {
		err = errors.Join(err, p.peer.Close())
	}
	return err
}

// drain hands the output to the peer.
func (p *Port) drain() {
	defer close(p.drained)
	p.mu.Lock()
	defer p.mu.Unlock()
	var spare []byte
	for {
		for len(p.out) == 0 && !p.closed {
			p.change.Wait()
		}
		if len(p.out) == 0 {
			return
		}
		batch, peer := p.out, p.peer
		p.out = spare[:0]
		p.mu.Unlock()
		n, err := peer.Write(batch)
		if err != nil {
			p.dropped.Add(uint64(len(batch) - n))
			p.hangUp(peer)
		}
		p.mu.Lock()
		spare = batch
	}
}

// hangUp forgets a peer that is gone, and what waits for it.
func (p *Port) hangUp(peer io.ReadWriteCloser) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.peer != peer || p.closed {
		return
	}
	p.peer = nil
	p.dropped.Add(uint64(len(p.out)))
	p.out = p.out[:0]
	p.change.Broadcast()
	peer.Close()
}

// sink is a peer that never says anything.
type sink struct {
	io.WriteCloser
	gone chan struct{}
}

func openFile(path string) (io.ReadWriteCloser, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	return &sink{f, make(chan struct{})}, nil
}

func (s *sink) Read([]byte) (int, error) {
	<-s.gone
	return 0, io.EOF
}

func (s *sink) Close() error {
	close(s.gone)
	return s.WriteCloser.Close()
}
