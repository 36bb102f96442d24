package nettool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Datagrams is a stream of numbered datagrams to somebody who does the same, and what became
// of the other one's.
type Datagrams struct {
	conn  *net.UDPConn
	stop  chan struct{}
	comes chan struct{} // closed at the first that came
	done  sync.WaitGroup

	mu      sync.Mutex
	sent    uint64
	seen    map[uint64]int // how often each number came
	first   uint64
	highest uint64
	result  DatagramResult
	last    time.Time
	begin   time.Time
	buckets []int // datagrams that came, by rateStep since begin
}

// rateStep is the time over which Rate counts.
const rateStep = 20 * time.Millisecond

// Wait waits until datagrams come.
func (d *Datagrams) Wait(ctx context.Context) error {
	select {
	case <-d.comes:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("datagrams: none has come: %w", ctx.Err())
	}
}

// Rate is how many came a second, over time in seconds since 1970.
func (d *Datagrams) Rate() iter.Seq2[float64, float64] {
	return func(yield func(at, rate float64) bool) {
		d.mu.Lock()
		defer d.mu.Unlock()
		for i, n := range d.buckets {
			at := d.begin.Add(time.Duration(i) * rateStep)
			if !yield(float64(at.UnixMicro())/1e6, float64(n)/rateStep.Seconds()) {
				return
			}
		}
	}
}

// DatagramResult is what came. Numbers between the first and the highest that did not are lost.
type DatagramResult struct {
	Sent      uint64 `json:"sent"`
	Received  int    `json:"received"`
	Lost      int    `json:"lost"`
	Doubled   int    `json:"doubled"`
	Reordered int    `json:"reordered"`
	GapMicros int64  `json:"gap_us"` // the longest between two that came
}

// StartDatagrams sends so many a second from the local address to the other.
func StartDatagrams(local, to string, rate int) (*Datagrams, error) {
	from, err := net.ResolveUDPAddr("udp", local)
	if err != nil {
		return nil, err
	}
	dest, err := net.ResolveUDPAddr("udp", to)
	if err != nil {
		return nil, err
	}
	conn, err := net.ListenUDP("udp", from)
	if err != nil {
		return nil, err
	}
	if err := Roomy(conn); err != nil {
		conn.Close()
		return nil, err
	}
	d := &Datagrams{conn: conn, stop: make(chan struct{}), comes: make(chan struct{}), seen: map[uint64]int{}}
	d.done.Go(func() { d.send(dest, rate) })
	d.done.Go(d.receive)
	return d, nil
}

func (d *Datagrams) send(to *net.UDPAddr, rate int) {
	ticks := time.NewTicker(time.Millisecond)
	defer ticks.Stop()
	last, due := time.Now(), 0.0
	packet := make([]byte, 64)
	for {
		select {
		case now := <-ticks.C:
			// A guest that stood still does not catch up.
			due += min(now.Sub(last).Seconds(), 0.02) * float64(rate)
			last = now
		case <-d.stop:
			return
		}
		for ; due >= 1; due-- {
			d.mu.Lock()
			binary.BigEndian.PutUint64(packet, d.sent)
			d.sent++
			d.mu.Unlock()
			_, _ = d.conn.WriteToUDP(packet, to) // nobody may be there
		}
	}
}

func (d *Datagrams) receive() {
	buf := make([]byte, 128)
	for {
		n, _, err := d.conn.ReadFromUDP(buf)
		now := time.Now()
		select {
		case <-d.stop:
			return
		default:
		}
		if err == nil && n >= 8 {
			d.take(binary.BigEndian.Uint64(buf), now)
		}
	}
}

func (d *Datagrams) take(number uint64, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &d.result
	if len(d.seen) == 0 {
		d.first, d.highest, d.last, d.begin = number, number, now, now
		close(d.comes)
	}
	for i := int(now.Sub(d.begin) / rateStep); len(d.buckets) <= i; {
		d.buckets = append(d.buckets, 0)
	}
	d.buckets[now.Sub(d.begin)/rateStep]++
	d.seen[number]++
	r.Received++
	switch {
	case d.seen[number] > 1:
		r.Doubled++
	case number < d.highest:
		r.Reordered++
	}
	d.first, d.highest = min(d.first, number), max(d.highest, number)
	r.GapMicros = max(r.GapMicros, now.Sub(d.last).Microseconds())
	d.last = now
}

// Result is what came until now.
func (d *Datagrams) Result() DatagramResult {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.result
	r.Sent = d.sent
	if len(d.seen) > 0 {
		r.Lost = int(d.highest-d.first) + 1 - len(d.seen)
	}
	return r
}

// Stop ends it.
func (d *Datagrams) Stop() DatagramResult {
	close(d.stop)
	d.conn.Close()
	d.done.Wait()
	return d.Result()
}

// Roomy has a socket keep what comes while nobody has time to read it: some MiB, as root may.
func Roomy(conn syscall.Conn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) })
	if err == unix.EPERM { // a test that is not root's
		err = nil
	}
	return errors.Join(cerr, err)
}
