package harness

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// An Echo is a TCP connection to somebody who sends back what comes (the agent's @tcp-echo):
// numbered chunks go both ways all the time.
type Echo struct {
	conn net.Conn
	stop chan struct{}
	done sync.WaitGroup

	mu     sync.Mutex
	result EchoResult
	last   time.Time
}

// EchoResult is what came back.
type EchoResult struct {
	Chunks uint32
	Stall  time.Duration // the longest time in which nothing came back
	Err    error         // the connection has ended, or something else came back than was sent
}

const (
	echoChunk = 1 << 10
	echoPace  = 50 * time.Millisecond
)

// Echo connects from the peer's namespace.
func (p *Peer) Echo(addr string) (*Echo, error) {
	var conn net.Conn
	if err := p.Do(func() (err error) { conn, err = net.DialTimeout("tcp", addr, 10*time.Second); return err }); err != nil {
		return nil, err
	}
	return newEcho(conn), nil
}

func newEcho(conn net.Conn) *Echo {
	e := &Echo{conn: conn, stop: make(chan struct{}), last: time.Now()}
	e.done.Go(e.send)
	e.done.Go(e.receive)
	return e
}

func (e *Echo) send() {
	ticks := time.NewTicker(echoPace)
	defer ticks.Stop()
	chunk := make([]byte, echoChunk)
	for n := uint32(0); ; n++ {
		for i := 0; i < len(chunk); i += 4 {
			binary.BigEndian.PutUint32(chunk[i:], n)
		}
		if _, err := e.conn.Write(chunk); err != nil {
			e.fail(err)
			return
		}
		select {
		case <-ticks.C:
		case <-e.stop:
			return
		}
	}
}

func (e *Echo) receive() {
	chunk := make([]byte, echoChunk)
	for n := uint32(0); ; n++ {
		if _, err := io.ReadFull(e.conn, chunk); err != nil {
			e.fail(err)
			return
		}
		for i := 0; i < len(chunk); i += 4 {
			if got := binary.BigEndian.Uint32(chunk[i:]); got != n {
				e.fail(fmt.Errorf("chunk %d came back as %d", n, got))
				return
			}
		}
		now := time.Now()
		e.mu.Lock()
		e.result.Chunks++
		e.result.Stall = max(e.result.Stall, now.Sub(e.last))
		e.last = now
		e.mu.Unlock()
	}
}

func (e *Echo) fail(err error) {
	select {
	case <-e.stop: // it is over
		return
	default:
	}
	e.conn.Close() // what comes after is worth nothing
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.result.Err == nil {
		e.result.Err = err
	}
}

// Stop ends it.
func (e *Echo) Stop() EchoResult {
	e.mu.Lock()
	if silent := time.Since(e.last); silent > e.result.Stall {
		e.result.Stall = silent
	}
	e.mu.Unlock()
	close(e.stop)
	e.conn.Close()
	e.done.Wait()
	return e.result
}
