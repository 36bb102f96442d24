package migrate

import (
	"context"
	"fmt"
	"time"

	"baton/kvm/guestmem"
	"baton/migrate/wire"
)

// sync adds to b what was written since the last time.
func (s *Source) sync(b *guestmem.Bitmap) error {
	for _, d := range s.watched {
		if err := d.Sync(b); err != nil {
			return fmt.Errorf("dirty pages: %w", err)
		}
	}
	s.note(func(st *Stats) { st.RAM.DirtySync++ })
	return nil
}

// round sends s.sending, or what of it can be sent until a time, if that is not zero.
func (s *Source) round(n int, until time.Time, rate func() uint64) (bytes uint64, busy time.Duration, err error) {
	s.event(n, "")
	if bytes, busy, err = s.senders.send(s.ctx, n, s.sending, until, rate); err != nil {
		return 0, 0, s.lost(err)
	}
	if s.ram[0] != s.main {
		if err := s.main.Write(wire.TypeRound, wire.Round{Number: n}); err != nil {
			return 0, 0, s.lost(err)
		}
	}
	return bytes, busy, nil
}

// arrived waits until the target has all of a round, but for what it asks for again.
func (s *Source) arrived(n int) (again []wire.Region, err error) {
	if s.stream.OneWay {
		return nil, nil
	}
	a, err := s.expect(wire.TypeRound)
	if err == nil && a.round != n {
		err = fmt.Errorf("%w: round %d, not %d, from the target", wire.ErrCorrupt, a.round, n)
	}
	return a.again, err
}

// precopy goes over RAM, again and again, until the policy says that the rest is for the stop;
// that is in s.sending then.
func (s *Source) precopy() error {
	s.enter(SourceSending)
	mem := s.m.Memory()
	senders, err := newSenders(mem, s.settings(), s.ram, s.direct)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.senders = senders
	s.mu.Unlock()
	s.sending, s.dirty = guestmem.NewBitmap(mem), guestmem.NewBitmap(mem)
	for _, d := range s.m.DirtySources() {
		if err := d.Start(); err != nil {
			return fmt.Errorf("dirty pages: %w", err)
		}
		s.watched = append(s.watched, d)
		if p, ok := d.(Protector); ok {
			senders.protectors = append(senders.protectors, p)
		}
	}
	for _, r := range mem.Regions() {
		s.sending.Set(r.GPA, r.Size)
	}
	begin := time.Now()
	senders.touched, senders.log = guestmem.NewBitmap(mem), s.log
	s.note(func(st *Stats) { st.RAM.DirtySync = 1 })
	// The stop has two exchanges with the target, which take as long whatever there is of RAM.
	overhead := min(2*s.answered, time.Duration(s.settings().DowntimeLimit)*time.Millisecond/10)
	sample := Sample{AutoConverge: s.o.Capabilities.Has(CapAutoConverge), Overhead: overhead}
	synced := begin
	for n := 1; ; n++ {
		start := time.Now()
		until := time.Time{} // a round may take longer than is left of the limit
		if limit := s.settings().LimitTime; limit > 0 {
			until = begin.Add(time.Duration(limit) * time.Millisecond)
		}
		bytes, busy, err := s.round(n, until, func() uint64 { return s.settings().MaxBandwidth })
		senders.lookedAtAll()
		if err != nil {
			return err
		}
		sent := time.Now()
		again, err := s.arrived(n) // what is on its way then is no part of the stop
		if err != nil {
			return err
		}
		busy += time.Since(sent)
		s.dirty.Clear()
		look := time.Now()
		if err := s.sync(s.dirty); err != nil {
			return err
		}
		if len(again) > 0 {
			s.log("round %d: RAM at %d places has changed on its way, the first at %#x, and is sent again", n, len(again), again[0].GPA)
		}
		for _, r := range again {
			s.dirty.Set(r.GPA, r.Size)
		}
		now := time.Now()
		period := now.Sub(synced)
		synced = now
		got := s.dirty.Count() * guestmem.PageSize
		senders.unsent(s.sending, s.dirty)
		s.sending, s.dirty = s.dirty, s.sending

		sample.Params = s.settings()
		sample.Round, sample.Elapsed, sample.Sent = n, now.Sub(begin), bytes
		sample.Remaining = s.sending.Count() * guestmem.PageSize
		sample.DirtyRate = float64(got) / period.Seconds() // a Protector's pages are watched for half of that, on average
		// A short round that is slower has shown what it takes besides.
		if rate := float64(bytes) / busy.Seconds(); bytes >= 4*block || rate >= sample.Bandwidth {
			sample.Bandwidth = rate
		} else {
			sample.Overhead = busy - time.Duration(float64(bytes)/sample.Bandwidth*float64(time.Second))
		}
		if got > bytes/100*sample.Params.ThrottleTriggerThreshold {
			sample.HighDirty++
		}
		d := s.o.Policy(sample)
		senders.remaining.Store(int64(sample.Remaining))
		s.note(func(st *Stats) {
			st.ExpectedDowntime, st.Throttle = d.ExpectedDowntime, d.Throttle
			st.RAM.DirtyRate = uint64(sample.DirtyRate / guestmem.PageSize)
		})
		s.log("round %d: %s in %s (%s/s), then %s dirty (%s/s, found in %s), stop would take %s: %s", n, size(float64(bytes)),
			look.Sub(start).Round(time.Millisecond), size(sample.Bandwidth), size(float64(sample.Remaining)),
			size(sample.DirtyRate), (now.Sub(look) + senders.protecting).Round(time.Microsecond), d.ExpectedDowntime.Round(time.Millisecond/10), orElse(d.Reason, "next round"))
		if err := context.Cause(s.ctx); err != nil {
			return err
		}
		switch d.Action {
		case Switch:
			return nil
		case GiveUp:
			return fmt.Errorf("%s", d.Reason)
		}
		if d.Throttle != sample.Throttle {
			sample.Throttle, sample.HighDirty = d.Throttle, 0
			s.m.Throttle(d.Throttle)
		}
	}
}

// size is a number of bytes for people.
func size(n float64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.2f GiB", n/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", n/(1<<20))
	}
	return fmt.Sprintf("%.0f KiB", n/(1<<10))
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
