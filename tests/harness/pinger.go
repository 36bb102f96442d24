package harness

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"baton/tests/nettool"
)

// A Pinger sends echo requests at a fixed pace and knows when each answer came: how long a
// guest was out of reach, and when.
type Pinger struct {
	stopped atomic.Bool
	done    sync.WaitGroup

	mu    sync.Mutex
	sent  []time.Time // by number
	heard []time.Time // zero: no answer

	awaited uint64        // see Wait
	answer  chan struct{} // closed when that request, or a later one, is answered; nil: nobody waits
}

// An Outage is a time without answers.
type Outage struct {
	From, To time.Time // of the last answer before it and the first one after it
	Lost     int       // requests that were sent in it and never answered
}

// Duration is its length.
func (o Outage) Duration() time.Duration { return o.To.Sub(o.From) }

// Pings is what a Pinger has seen.
type Pings struct {
	Sent, Lost int
	Outages    []Outage // of all times between two answers, the longest first
}

// Longest is the longest outage.
func (p Pings) Longest() Outage {
	if len(p.Outages) == 0 {
		return Outage{}
	}
	return p.Outages[0]
}

func (p Pings) String() string {
	o := p.Longest()
	return fmt.Sprintf("%d sent, %d lost, longest outage %v (%d lost)", p.Sent, p.Lost, o.Duration().Round(10*time.Microsecond), o.Lost)
}

// Pinger starts one in the peer's namespace, which ends with the test at the latest. The
// guest answers already.
func (p *Peer) Pinger(addr string, interval time.Duration) *Pinger {
	p.t.Helper()
	to, err := netip.ParseAddr(addr)
	must(p.t, "ping "+addr, err)
	var fd int
	must(p.t, "ping "+addr, p.Do(func() (err error) { fd, err = pingSocket(to.As4()); return err }))
	return newPinger(p.t, fd, interval)
}

// pingSocket is one for newPinger, which closes it.
func pingSocket(to [4]byte) (fd int, err error) {
	if fd, err = nettool.Socket(unix.SOCK_RAW, unix.IPPROTO_ICMP); err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to}); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("connect", err)
	}
	return fd, nil
}

func newPinger(t testing.TB, fd int, interval time.Duration) *Pinger {
	p := &Pinger{}
	p.done.Go(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer unix.Close(fd)
		p.run(uintptr(fd), interval)
	})
	t.Cleanup(func() { p.Stop() })
	return p
}

const (
	// pingID marks the requests as ours: identifier of RFC 792, and the beginning of the data.
	pingID = 0xba70
	// pingBurst is how many requests leave at once at most.
	pingBurst = 8
)

// run sends and hears until it is stopped, on one thread that waits in the kernel only, and not by Go's
// scheduler: on an emulated host, waking up a thousand times a second that way takes much of the CPUs that a
// migrating guest and its VMMs need, of which it is to be a witness.
func (p *Pinger) run(fd uintptr, interval time.Duration) {
	buf := make([]byte, 1500)
	for due, last := interval, time.Now(); !p.stopped.Load(); {
		// The number of requests follows the clock. But one that stood still does not catch up, which would
		// be a flood.
		now := time.Now()
		due, last = due+min(now.Sub(last), pingBurst*interval), now
		for ; due >= interval; due -= interval {
			p.send(fd)
		}
		readable(fd, interval-due)
		for {
			n, errno := syscallBytes(unix.SYS_READ, fd, buf)
			if errno != 0 { // there is no more
				break
			}
			p.hear(buf[:n], time.Now())
		}
	}
}

func (p *Pinger) send(fd uintptr) {
	p.mu.Lock()
	n := len(p.sent)
	p.sent, p.heard = append(p.sent, time.Now()), append(p.heard, time.Time{})
	p.mu.Unlock()
	m := make([]byte, 8+8) // type 8, code, checksum, identifier, sequence, number
	m[0] = 8
	binary.BigEndian.PutUint16(m[4:], pingID)
	binary.BigEndian.PutUint16(m[6:], uint16(n))
	binary.BigEndian.PutUint64(m[8:], uint64(n))
	sum := uint32(0)
	for i := 0; i < len(m); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(m[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(m[2:], ^uint16(sum+sum>>16))
	_, _ = syscallBytes(unix.SYS_WRITE, fd, m) // the guest may be away
}

// hear takes what has come, with its IP header.
func (p *Pinger) hear(b []byte, now time.Time) {
	if len(b) == 0 || len(b) < int(b[0]&15)*4+16 {
		return
	}
	b = b[int(b[0]&15)*4:]
	if b[0] != 0 || binary.BigEndian.Uint16(b[4:]) != pingID {
		return
	}
	i := binary.BigEndian.Uint64(b[8:])
	p.mu.Lock()
	defer p.mu.Unlock()
	if i < uint64(len(p.heard)) && p.heard[i].IsZero() {
		p.heard[i] = now
	}
	if p.answer != nil && i >= p.awaited {
		close(p.answer)
		p.answer = nil
	}
}

// Wait waits until a request has been answered that comes after the next n: by then those that are under
// way now are back, or lost. One may wait at a time.
func (p *Pinger) Wait(ctx context.Context, n int) error {
	answer := make(chan struct{})
	p.mu.Lock()
	p.awaited, p.answer = uint64(len(p.sent)+n), answer
	p.mu.Unlock()
	select {
	case <-answer:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("ping: no answer: %w", ctx.Err())
	}
}

// Pings returns what it has seen so far. Requests that are still under way, which are those after the
// last one that was answered, do not count.
func (p *Pinger) Pings() (r Pings) {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := len(p.heard)
	for last > 0 && p.heard[last-1].IsZero() {
		last--
	}
	var answers []time.Time
	var lost []time.Time
	for i := range last {
		if p.heard[i].IsZero() {
			lost = append(lost, p.sent[i])
		} else {
			answers = append(answers, p.heard[i])
		}
	}
	slices.SortFunc(answers, time.Time.Compare)
	r.Sent, r.Lost = last, len(lost)
	for i := 1; i < len(answers); i++ {
		o := Outage{From: answers[i-1], To: answers[i]}
		for _, at := range lost {
			if at.After(o.From) && at.Before(o.To) {
				o.Lost++
			}
		}
		r.Outages = append(r.Outages, o)
	}
	slices.SortStableFunc(r.Outages, func(a, b Outage) int { return int(b.Duration() - a.Duration()) })
	return r
}

// A Sample is a value at a time, in seconds since 1970.
type Sample struct{ At, Millis float64 }

// Series are the round trips in milliseconds by the time of the request, NaN for one without
// an answer.
func (p *Pinger) Series() (list []Sample) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, at := range p.sent {
		s := Sample{float64(at.UnixMicro()) / 1e6, math.NaN()}
		if !p.heard[i].IsZero() {
			s.Millis = float64(p.heard[i].Sub(at).Microseconds()) / 1000
		}
		list = append(list, s)
	}
	return list
}

// Stop ends it.
func (p *Pinger) Stop() {
	p.stopped.Store(true)
	p.done.Wait()
}
