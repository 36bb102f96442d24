package nettool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Datagrams is a stream of numbered datagrams to somebody who does the same, and what became
// of the other one's.
type Datagrams struct {
	stop  chan struct{}
	comes chan struct{} // closed at the first that came
	done  sync.WaitGroup

	mu      sync.Mutex
	sent    uint64
	seen    []uint8 // how often each number came, less than 256 times
	some    int     // numbers that came
	first   uint64
	highest uint64
	result  DatagramResult
	last    time.Time
	begin   time.Time
	buckets []int // datagrams that came, by rateStep since begin
}

const (
	// beat is how often datagrams are sent and taken.
	beat = 10 * time.Millisecond
	// rateStep is the time over which Rate counts.
	rateStep = 20 * time.Millisecond
	size     = 64 // of a datagram, in bytes
	// segments are as many as Linux takes at a time (UDP_MAX_SEGMENTS).
	segments = 64
)

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

// StartDatagrams sends so many a second from the local address to the other, both of IPv4.
func StartDatagrams(local, to string, rate int) (*Datagrams, error) {
	from, err := address(local)
	if err != nil {
		return nil, err
	}
	dest, err := address(to)
	if err != nil {
		return nil, err
	}
	fd, err := Socket(unix.SOCK_DGRAM, 0)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.NewSyscallError("bind", unix.Bind(fd, from)), set(fd, unix.SOL_UDP, unix.UDP_GRO, 1), set(fd, unix.SOL_UDP, unix.UDP_SEGMENT, size), set(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("datagrams from %s: %w", local, err)
	}
	d := &Datagrams{stop: make(chan struct{}), comes: make(chan struct{})}
	d.done.Go(func() {
		defer unix.Close(fd)
		d.run(fd, dest, rate)
	})
	return d, nil
}

func address(s string) (*unix.SockaddrInet4, error) {
	a, err := netip.ParseAddrPort(s)
	if err == nil && !a.Addr().Is4() {
		err = errors.New("not IPv4")
	}
	if err != nil {
		return nil, fmt.Errorf("address %s: %w", s, err)
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}, nil
}

// run sends what is due at each beat, and takes what has come since the last one; the kernel says when. To
// wake up for each datagram would keep a slow guest busier than they do.
func (d *Datagrams) run(fd int, to unix.Sockaddr, rate int) {
	ticks := time.NewTicker(beat)
	defer ticks.Stop()
	last, due := time.Now(), 0.0
	packets, buf, control := make([]byte, 0, segments*size), make([]byte, 64<<10), make([]byte, 256)
	for {
		select {
		case now := <-ticks.C:
			// A guest that stood still does not catch up.
			due += min(now.Sub(last), 2*beat).Seconds() * float64(rate)
			last = now
		case <-d.stop:
			return
		}
		for due >= 1 {
			packets = packets[:0]
			d.mu.Lock()
			for ; due >= 1 && len(packets) < cap(packets); due-- {
				packets = packets[:len(packets)+size]
				binary.BigEndian.PutUint64(packets[len(packets)-size:], d.sent)
				d.sent++
			}
			d.mu.Unlock()
			_ = unix.Sendto(fd, packets, 0, to) // nobody may be there
		}
		for {
			n, m, _, _, err := unix.Recvmsg(fd, buf, control, 0)
			if err != nil { // there is no more
				break
			}
			at := came(control[:m])
			d.mu.Lock()
			for b := buf[:n]; len(b) >= size; b = b[size:] { // several may come as one
				d.take(binary.BigEndian.Uint64(b), at)
			}
			d.mu.Unlock()
		}
	}
}

// came is when the kernel had what came with this control message. It allocates nothing.
func came(control []byte) time.Time {
	for len(control) > 0 {
		h, data, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			break
		}
		if h.Level == unix.SOL_SOCKET && h.Type == unix.SO_TIMESTAMPNS && len(data) >= 16 {
			return time.Unix(int64(binary.NativeEndian.Uint64(data)), int64(binary.NativeEndian.Uint64(data[8:])))
		}
		control = rest
	}
	return time.Now()
}

// maxNumber is more than is sent in a test.
const maxNumber = 1 << 24

// take notes a datagram; mu is held.
func (d *Datagrams) take(number uint64, now time.Time) {
	if number >= maxNumber {
		return // it is not one of ours
	}
	r := &d.result
	if d.some == 0 {
		d.first, d.highest, d.last, d.begin = number, number, now, now
		close(d.comes)
	}
	i := int(max(now.Sub(d.begin), 0) / rateStep) // clocks can be set
	for len(d.buckets) <= i {
		d.buckets = append(d.buckets, 0)
	}
	d.buckets[i]++
	for uint64(len(d.seen)) <= number {
		d.seen = append(d.seen, 0)
	}
	r.Received++
	switch d.seen[number]++; {
	case d.seen[number] > 1:
		r.Doubled++
	default:
		if d.some++; number < d.highest {
			r.Reordered++
		}
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
	if d.some > 0 {
		r.Lost = int(d.highest-d.first) + 1 - d.some
	}
	return r
}

// Stop ends it.
func (d *Datagrams) Stop() DatagramResult {
	close(d.stop)
	d.done.Wait()
	return d.Result()
}

// Socket makes one of IPv4 that does not block and keeps what comes while nobody has time to read it: some MiB,
// as root may. Go's poller does not know of it, and so is not woken up by all that comes.
func Socket(kind, protocol int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := set(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20); err != nil && !errors.Is(err, unix.EPERM) { // a test that is not root's
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func set(fd, level, option, value int) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, level, option, value))
}
