package migrate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"baton/kvm/guestmem"
	"baton/migrate/wire"
)

// ErrCancelled is the cause when somebody has cancelled the migration.
var ErrCancelled = errors.New("the migration was cancelled")

// engine is what both sides have in common: where they are, and who is told.
type engine struct {
	o      Options
	ctx    context.Context // of the attempt; its cause is why it ends
	cancel context.CancelCauseFunc

	tell sync.Mutex // held while Events runs, so that events keep their order

	mu     sync.Mutex // of what follows
	params Params
	state  State
	status Status
	err    error
	begun  time.Time
	ended  time.Time
	stats  Stats // what is not counted elsewhere
}

func (e *engine) init(o Options, idle State) {
	e.o, e.params, e.state, e.status = o, o.Params, idle, idle.Status()
	e.ctx, e.cancel = context.WithCancelCause(context.Background())
}

// enter goes to a state and tells so.
func (e *engine) enter(s State) { e.enterAs(s, s.Status(), nil) }

func (e *engine) enterAs(s State, status Status, err error) {
	e.tell.Lock()
	defer e.tell.Unlock()
	e.mu.Lock()
	if e.begun.IsZero() {
		e.begun = time.Now()
	}
	if s.Final() {
		e.ended = time.Now()
	}
	e.state, e.status = s, status
	if err != nil {
		e.err = err
	}
	e.mu.Unlock()
	if e.o.Events != nil {
		e.o.Events(Event{State: s, Status: status, Err: err})
	}
}

// event tells what is no change of state.
func (e *engine) event(pass int, format string, args ...any) {
	e.tell.Lock()
	defer e.tell.Unlock()
	if e.o.Events == nil {
		return
	}
	ev := Event{State: e.now(), Pass: pass}
	e.mu.Lock()
	ev.Status = e.status
	e.mu.Unlock()
	if format != "" {
		ev.Log = fmt.Sprintf(format, args...)
	}
	e.o.Events(ev)
}

func (e *engine) log(format string, args ...any) { e.event(0, format, args...) }

func (e *engine) now() State {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state
}

func (e *engine) settings() Params {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.params
}

func (e *engine) stall() time.Duration {
	return time.Duration(e.settings().StallTimeout) * time.Millisecond
}

// note changes the statistics.
func (e *engine) note(f func(*Stats)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f(&e.stats)
}

// snapshot is what both sides know without counting.
func (e *engine) snapshot(m *guestmem.Memory) Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.stats
	s.State, s.Status, s.Owner, s.Err = e.state, e.status, e.state.Owner(), e.err
	s.TLS = e.o.TLS != nil
	switch {
	case e.begun.IsZero():
	case e.ended.IsZero():
		s.TotalTime = time.Since(e.begun)
	default:
		s.TotalTime = e.ended.Sub(e.begun)
	}
	s.RAM.Total, s.RAM.PageSize = m.Size(), guestmem.PageSize
	return s
}

// why is the cause of an error: that which ended the attempt, if something did.
func (e *engine) why(err error) error {
	if cause := context.Cause(e.ctx); cause != nil {
		return cause
	}
	return err
}

// stayAlive sends signs of life on connections until ctx ends, each often enough for a peer
// that gives up after so much silence.
func stayAlive(ctx context.Context, stall time.Duration, conns ...*wire.Conn) {
	tick := time.NewTicker(max(stall/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			for _, c := range conns {
				_ = c.Write(wire.TypeAlive, nil) // the reader notices
			}
		case <-ctx.Done():
			return
		}
	}
}
