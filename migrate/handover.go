package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"baton/migrate/wire"
)

// finishOneWay ends a stream to which there is no answer. The guest stays paused: what is in
// the file is its future, unless somebody decides otherwise.
func (s *Source) finishOneWay() error {
	if err := s.why(s.stream.Finish()); err != nil {
		return err
	}
	s.mu.Lock()
	cancelled := s.ctx.Err() != nil
	s.committed = !cancelled
	s.mu.Unlock()
	if cancelled {
		return context.Cause(s.ctx)
	}
	return nil
}

// release gives the disks' locks up, the last thing before the other side may take them.
func (s *Source) release() error {
	s.enter(SourceReleasing)
	s.released = true
	if err := s.m.ReleaseLocks(); err != nil {
		return fmt.Errorf("release the disks: %w", err)
	}
	return nil
}

// commit hands the guest over. After it was sent, only the target knows whose it is.
func (s *Source) commit() error {
	s.mu.Lock()
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		return context.Cause(s.ctx)
	}
	s.committed = true
	s.mu.Unlock()
	s.enter(SourceCommitting)
	begin := time.Now()
	err := s.main.Write(wire.TypeCommit, nil)
	if err == nil {
		_, err = s.expect(wire.TypeCommitted)
	} else {
		err = s.lost(err)
	}
	var no *refusal
	if err != nil && !errors.As(err, &no) {
		err = s.ask(err)
		no = nil
	}
	s.note(func(st *Stats) { st.Downtime.Commit, st.Downtime.Total = time.Since(begin), time.Since(s.stopped) })
	return err
}

// leave tells the target what it has to know, in the last frame, and closes. If the target does
// not show that it has read that, and may wait to be asked, it is told by asking it.
func (s *Source) leave(t wire.Type, v any, waits bool) {
	defer s.close()
	if s.stream.OneWay {
		return
	}
	heard := func() bool { // that it has read it
		for {
			select {
			case a := <-s.answers:
				if a.t == wire.TypeDone {
					return true
				}
			default:
				return false
			}
		}
	}
	read := func() bool { // to close first could throw the frame away
		if s.main.WriteLast(t, v, time.Second) != nil {
			return false
		}
		late := time.NewTimer(time.Second)
		defer late.Stop()
		select {
		case <-s.deaf:
		case <-late.C:
			return false
		}
		s.main.SetStall(time.Second, time.Second)
		for end := time.Now().Add(2 * time.Second); !heard(); { // who listened may have been interrupted
			if time.Now().After(end) || s.readAnswer() != nil {
				return false
			}
		}
		return true
	}
	if read() || !waits || !s.o.Address.Again() {
		return
	}
	for wait := 50 * time.Millisecond; wait < 10*time.Second; wait *= 2 {
		_, confirmed, err := s.askOnce(context.Background(), s.o.Address)
		if confirmed || errors.Is(err, unix.ECONNREFUSED) {
			return
		}
		time.Sleep(wait)
	}
}

// ask asks the target until it answers, or somebody decides. It returns nil if the guest is
// the target's.
func (s *Source) ask(cause error) error {
	defer close(s.settled)
	s.enterAs(SourceAsking, SourceAsking.Status(), fmt.Errorf("the target may have the guest: %w\nit is asked until it answers; migrate-recover asks elsewhere or decides", cause))
	s.log("%v", s.Stats().Err)
	address := s.o.Address
	wait := 50 * time.Millisecond
	for {
		answered := make(chan error, 1)
		runs := false // valid when it has answered
		ctx, cancel := context.WithCancel(context.Background())
		go func(a wire.Address) {
			err := fmt.Errorf("%s: cannot be asked", a)
			if a.Again() {
				var confirmed bool
				runs, confirmed, err = s.askOnce(ctx, a)
				s.unsure.Store(err == nil && !confirmed)
			}
			answered <- err
		}(address)
		var retry <-chan time.Time
	waiting:
		for {
			select {
			case err := <-answered:
				if err == nil {
					cancel()
					s.forget()
					if runs {
						return nil
					}
					return fmt.Errorf("the target does not have the guest: %w", cause)
				}
				s.log("the target does not answer: %v", err)
				retry = time.After(wait)
				wait = min(2*wait, 2*time.Second)
			case <-retry:
				break waiting
			case address = <-s.asked:
				wait = 50 * time.Millisecond
				break waiting
			case run := <-s.decide:
				cancel()
				s.forget()
				s.log("decided by hand: the guest runs here: %v", run)
				if run {
					return fmt.Errorf("decided by hand: %w", cause)
				}
				return nil
			}
		}
		cancel()
	}
}

// forget takes back why the target had to be asked.
func (s *Source) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = nil
}

// askOnce asks whether the target runs the guest; after the answer it is certain. Confirmed says that
// the target, which waits for that, knows that it is.
func (s *Source) askOnce(ctx context.Context, a wire.Address) (runs, confirmed bool, err error) {
	st, err := s.dial(ctx, a)
	if err != nil {
		return false, false, err
	}
	c := wire.NewConn(st.ReadWriteCloser)
	defer c.Close()
	defer context.AfterFunc(ctx, c.Interrupt)()
	stall := s.stall()
	c.SetStall(stall, stall)
	if err := c.Begin(wire.TypeAsk, wire.Ask{Session: s.session}); err != nil {
		return false, false, err
	}
	if err := c.ReadPreamble(); err != nil {
		return false, false, err
	}
	h, err := c.ReadHeader()
	if err != nil {
		return false, false, err
	}
	if h.Type == wire.TypeRefuse {
		var r wire.Reason
		return false, false, errors.Join(c.ReadMessage(h, &r), &refusal{r.Err()})
	}
	var answer wire.Answer
	if h.Type != wire.TypeAnswer {
		return false, false, fmt.Errorf("%w: %s to a question", wire.ErrCorrupt, h.Type)
	}
	if err := c.ReadMessage(h, &answer); err != nil {
		return false, false, err
	}
	_ = c.Write(wire.TypeDone, nil)
	h, err = c.ReadHeader()
	return answer.Runs, err == nil && h.Type == wire.TypeDone, nil
}

// giveUp lets the guest go on here, then undoes what was done, and says why.
func (s *Source) giveUp(why error) error {
	final, status := SourceFailed, StatusFailing
	if errors.Is(why, ErrCancelled) {
		final, status = SourceCancelled, StatusCancelling
	}
	last := s.now()
	s.enterAs(SourceUndoing, status, nil)
	s.cancel(why)
	locks := error(nil)
	if s.offered || s.released {
		locks = s.m.TakeLocks()
	}
	if s.paused {
		err := locks
		if err == nil {
			err = s.m.Resume(s.running)
		}
		if err != nil {
			final = SourceFailed
			why = fmt.Errorf("%w\nthe guest stays paused: %w", why, err)
		}
	} else if locks != nil {
		s.log("take the disks' locks back: %v", locks)
	}
	var no *refusal
	switch {
	case s.main == nil:
	case s.committed && errors.As(why, &no): // the target waits to hear that this is known
		go s.leave(wire.TypeDone, nil, true)
	default:
		go s.leave(wire.TypeAbort, wire.NewReason(why), last >= SourceFinishing && last < SourceCommitting || s.unsure.Load())
	}
	s.m.Throttle(0)
	for _, d := range s.watched {
		if err := d.Stop(); err != nil {
			s.log("dirty pages: %v", err)
		}
	}
	for _, undo := range slices.Backward(s.undos) {
		undo()
	}
	s.enterAs(final, final.Status(), why)
	return why
}

func (s *Source) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		_ = c.Close()
	}
}
