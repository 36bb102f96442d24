package migrate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"baton/kvm/guestmem"
	"baton/migrate/wire"
)

// block is what a sender takes at a time, in bytes: whole words of the bitmap.
const block = 1 << 20

// lookAhead is how much of a round, in bytes, is looked after at a time before it is read: see read. What the guest writes
// to it until then costs it nothing, and to do so for each block would interrupt it more often.
const lookAhead = 8 * block

// maxAhead is how many blocks that may be at most, where few of their pages are sent.
const maxAhead = 1024

// senders send the pages of one round after the other over all connections that carry RAM.
type senders struct {
	mem   *guestmem.Memory
	conns []*wire.Conn
	batch []*wire.Batch // for each
	limit limiter
	log   func(format string, args ...any)

	protectors []Protector      // to be told what is read; nil: the guest has been stopped
	touched    *guestmem.Bitmap // in the first round: pages that may be other than zeros
	pagemap    *guestmem.Pagemap

	mu         sync.Mutex
	ready      uint64        // blocks that may be read
	protecting time.Duration // in this round

	blocks    uint64        // of all regions
	next      atomic.Uint64 // block that no sender has taken
	failed    atomic.Bool   // one of the senders has: take no more
	remaining atomic.Int64  // bytes of the round that are not sent yet
	normal    atomic.Uint64 // pages
	zero      atomic.Uint64
}

func newSenders(m *guestmem.Memory, p Params, conns []*wire.Conn, direct bool) (*senders, error) {
	s := &senders{mem: m, conns: conns}
	c, err := wire.ParseCompression(p.MultifdCompression)
	if err != nil {
		return nil, err
	}
	s.batch = make([]*wire.Batch, len(conns))
	for i := range s.batch {
		if s.batch[i], err = wire.NewBatch(m, c, int(p.MultifdZstdLevel), p.ZeroPageDetection != "none"); err != nil {
			return nil, err
		}
		if direct && c == wire.None {
			s.batch[i].Direct()
		}
	}
	for _, r := range m.Regions() {
		s.blocks += (r.Size + block - 1) / block
	}
	return s, nil
}

// at is where up to n blocks from block i on, of one region, are in guest memory.
func (s *senders) at(i, n uint64) (gpa, size uint64) {
	for _, r := range s.mem.Regions() {
		blocks := (r.Size + block - 1) / block
		if i < blocks {
			return r.GPA + i*block, min(n*block, r.Size-i*block)
		}
		i -= blocks
	}
	return 0, 0
}

// read says that block i is to be read, and so may be those before it: what the guest writes to them from now on is
// for the next round, and what nobody has touched by now need not be read.
func (s *senders) read(i uint64, pages *guestmem.Bitmap) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.ready <= i {
		gpa, size := s.ahead(pages)
		begin := time.Now()
		for _, p := range s.protectors {
			if err := p.Protect(gpa, size); err != nil {
				return fmt.Errorf("dirty pages: %w", err)
			}
		}
		s.protecting += time.Since(begin)
		if s.touched != nil {
			if err := s.look(gpa, size); err != nil {
				s.log("all RAM has to be read: %v", err)
				for _, r := range s.mem.Regions() {
					s.touched.Set(r.GPA, r.Size)
				}
				s.touched = nil
			}
		}
		s.ready += (size + block - 1) / block
	}
	return nil
}

// ahead are the next blocks to look after, of one region, and no more than one call to the kernel should be for.
func (s *senders) ahead(pages *guestmem.Bitmap) (gpa, size uint64) {
	gpa, rest := s.at(s.ready, maxAhead)
	for found := uint64(0); size < rest && found < lookAhead; size = min(size+block, rest) {
		for _, n := range pages.RunsIn(gpa+size, min(block, rest-size)) {
			found += n
		}
	}
	return gpa, size
}

// look adds to touched what of size bytes at gpa somebody has touched.
func (s *senders) look(gpa, size uint64) (err error) {
	if s.pagemap == nil {
		if s.pagemap, err = guestmem.OpenPagemap(s.mem); err != nil {
			return err
		}
	}
	return s.pagemap.Touched(s.touched, gpa, size)
}

// lookedAtAll ends the first round.
func (s *senders) lookedAtAll() {
	s.touched = nil
	if s.pagemap != nil {
		_ = s.pagemap.Close()
		s.pagemap = nil
	}
}

// send sends the pages of a set as round n, until a time if that is not zero. Rate is the limit in bytes per second, 0 for none. It
// returns the bytes of guest memory that went over the wire as pages, and the part of the time
// in which the limit did not make it wait.
func (s *senders) send(ctx context.Context, n int, pages *guestmem.Bitmap, until time.Time, rate func() uint64) (bytes uint64, busy time.Duration, err error) {
	s.next.Store(0)
	s.ready, s.protecting = 0, 0
	for _, b := range s.batch {
		b.Touched(s.touched)
	}
	s.failed.Store(false)
	s.remaining.Store(int64(pages.Count() * guestmem.PageSize))
	begin, normal := time.Now(), s.normal.Load()
	waited := s.limit.waited.Load()
	errs := make([]error, len(s.conns))
	var wg sync.WaitGroup
	for i := range s.conns {
		wg.Go(func() {
			if errs[i] = s.worker(ctx, s.conns[i], s.batch[i], pages, until, rate); errs[i] == nil {
				errs[i] = s.conns[i].Write(wire.TypeRound, wire.Round{Number: n})
			}
			if errs[i] != nil {
				s.failed.Store(true)
			}
		})
	}
	wg.Wait()
	busy = time.Since(begin) - time.Duration(s.limit.waited.Load()-waited)/time.Duration(len(s.conns))
	return (s.normal.Load() - normal) * guestmem.PageSize, max(busy, time.Microsecond), errors.Join(errs...)
}

// worker sends blocks until there is none. It does not fill a batch while the one before is written: the guest and the
// target want CPUs as well, and for more at once there are channels.
func (s *senders) worker(ctx context.Context, c *wire.Conn, b *wire.Batch, pages *guestmem.Bitmap, until time.Time, rate func() uint64) error {
	for !s.failed.Load() && (until.IsZero() || time.Now().Before(until)) {
		i := s.next.Add(1) - 1
		if i >= s.blocks {
			break
		}
		if err := s.read(i, pages); err != nil {
			return err
		}
		for gpa, n := range pages.RunsIn(s.at(i, 1)) {
			for n > 0 {
				took, err := b.Add(gpa, n)
				if err != nil {
					return err
				}
				gpa, n = gpa+took, n-took
				if n > 0 || b.Full() {
					if err := s.write(ctx, c, b, rate); err != nil {
						return err
					}
				}
			}
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
	}
	return s.write(ctx, c, b, rate)
}

// write writes a batch, and waits until the next may follow.
func (s *senders) write(ctx context.Context, c *wire.Conn, b *wire.Batch, rate func() uint64) error {
	normal, zero := b.Pages()
	before := c.Sent()
	if err := b.Send(c); err != nil {
		return err
	}
	s.normal.Add(normal)
	s.zero.Add(zero)
	s.remaining.Add(-int64((normal + zero) * guestmem.PageSize))
	return s.limit.wait(ctx, c.Sent()-before, rate())
}

// unsent adds to b what the round that was cut short has left.
func (s *senders) unsent(pages, b *guestmem.Bitmap) {
	for i := s.next.Load(); i < s.blocks; i++ {
		for gpa, n := range pages.RunsIn(s.at(i, 1)) {
			b.Set(gpa, n)
		}
	}
}

// limiter spaces what is sent.
type limiter struct {
	mu     sync.Mutex
	next   time.Time
	waited atomic.Int64 // nanoseconds, of all senders together
}

// slack is how far one may be behind and catch up.
const slack = 20 * time.Millisecond

// wait returns when n more bytes may follow those that were sent.
func (l *limiter) wait(ctx context.Context, n, rate uint64) error {
	if rate == 0 || n == 0 {
		return nil
	}
	l.mu.Lock()
	now := time.Now()
	if early := now.Add(-slack); l.next.Before(early) {
		l.next = early
	}
	l.next = l.next.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	d := l.next.Sub(now)
	l.mu.Unlock()
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		l.waited.Add(int64(time.Since(now)))
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
