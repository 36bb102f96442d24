package failover

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// fake is a host that remembers what it was told, and a clock that stands still.
type fake struct {
	log     []string
	timers  []*timer
	openErr error
	plugErr error
	askErr  error
	begun   bool // the guest has begun to eject: nothing can be withdrawn
	slow    bool // opened, which is kept, has to be called
	opened  func(error)
}

type timer struct {
	d time.Duration
	f func()
}

func (f *fake) say(format string, args ...any) { f.log = append(f.log, fmt.Sprintf(format, args...)) }

func (f *fake) Open(done func(error)) {
	f.say("open")
	if f.opened = done; !f.slow {
		done(f.openErr)
	}
}
func (f *fake) Plug() error { f.say("plug"); return f.plugErr }
func (f *fake) Close()      { f.say("close") }
func (f *fake) Unplug(surprise bool) error {
	f.say("unplug %v", surprise)
	return f.askErr
}
func (f *fake) Withdraw() bool { f.say("withdraw %v", !f.begun); return !f.begun }
func (f *fake) After(d time.Duration, fn func()) func() {
	t := &timer{d, fn}
	f.timers = append(f.timers, t)
	return func() { f.timers = slices.DeleteFunc(f.timers, func(o *timer) bool { return o == t }) }
}
func (f *fake) Changed(from, to State, why error) {
	if why != nil {
		f.say("%s>%s: %v", from, to, why)
	} else {
		f.say("%s>%s", from, to)
	}
}

// expire ends the only timer.
func (f *fake) expire(t *testing.T, want time.Duration) {
	t.Helper()
	if len(f.timers) != 1 || f.timers[0].d != want {
		t.Fatalf("timers %v, want one of %v", f.timers, want)
	}
	now := f.timers[0]
	f.timers = nil
	now.f()
}

func (f *fake) heard(t *testing.T, want ...string) {
	t.Helper()
	if got := strings.Join(f.log, "; "); got != strings.Join(want, "; ") {
		t.Fatalf("got  %s\nwant %s", got, strings.Join(want, "; "))
	}
	f.log = nil
}

// primary returns a pair whose primary the guest has.
func primary(t *testing.T, policy Policy) (*fake, *Pair) {
	t.Helper()
	f := &fake{}
	p := New(f, policy)
	p.Negotiated(true)
	p.Taken()
	f.heard(t, "open", "hidden>plugging", "plug", "plugging>primary")
	return f, p
}

// waiter remembers what it was told.
type waiter struct {
	n   int
	err error
}

func (w *waiter) done(err error) { w.n++; w.err = err }

func (w *waiter) heard(t *testing.T, n int, want string) {
	t.Helper()
	got := ""
	if w.err != nil {
		got = w.err.Error()
	}
	if w.n != n || got != want {
		t.Fatalf("told %d times, last %q; want %d, %q", w.n, got, n, want)
	}
}

func TestNegotiate(t *testing.T) {
	f := &fake{}
	p := New(f, Policy{})
	p.Negotiated(false)
	f.heard(t, "close")
	p.Negotiated(true)
	p.Negotiated(true) // a driver that was loaded again
	f.heard(t, "open", "hidden>plugging", "plug")
	p.Taken()
	f.heard(t, "plugging>primary")
	p.Negotiated(false) // one that cannot do it
	f.heard(t, "primary>unplugging", "unplug false")
	p.Gone()
	f.heard(t, "unplugging>standby", "standby>hidden", "close")
}

func TestReset(t *testing.T) {
	f, p := primary(t, Policy{})
	p.Reset()
	f.heard(t, "primary>hidden")
	p.Negotiated(true)
	f.heard(t, "open", "hidden>plugging", "plug")
}

func TestNotTaken(t *testing.T) {
	f := &fake{}
	p := New(f, Policy{})
	p.Negotiated(true)
	f.log = nil
	f.expire(t, patience)
	f.heard(t, "plugging>plugging: "+errNotTaken.Error())
	p.Taken()
	f.heard(t, "plugging>primary")
}

func TestLeaveAndReturn(t *testing.T) {
	f, p := primary(t, Policy{Timeout: time.Second})
	var left, again, back waiter
	p.Leave(false, left.done)
	p.Leave(false, again.done)
	left.heard(t, 0, "")
	f.heard(t, "primary>unplugging", "unplug false")
	p.Gone()
	left.heard(t, 1, "")
	again.heard(t, 1, "")
	f.heard(t, "unplugging>standby")
	p.Negotiated(true) // does not bring it back
	p.Leave(true, left.done)
	left.heard(t, 2, "")
	f.heard(t, "close")
	p.Return(back.done)
	f.heard(t, "open", "standby>plugging", "plug")
	back.heard(t, 0, "")
	p.Taken()
	back.heard(t, 1, "")
	if len(f.timers) != 0 {
		t.Errorf("timers %v", f.timers)
	}
}

func TestRelease(t *testing.T) {
	f, p := primary(t, Policy{})
	p.Leave(true, func(error) {})
	f.log = nil
	p.Gone()
	f.heard(t, "unplugging>standby", "close")
}

// A request that nobody wants any more is withdrawn, or followed by a plug.
func TestChangeOfMind(t *testing.T) {
	for _, begun := range []bool{false, true} {
		f, p := primary(t, Policy{Timeout: time.Second})
		f.begun = begun
		var left, back waiter
		p.Leave(false, left.done)
		f.log = nil
		p.Return(back.done)
		left.heard(t, 1, ErrReturned.Error())
		if !begun {
			f.heard(t, "withdraw true", "unplugging>primary")
			back.heard(t, 1, "")
			continue
		}
		back.heard(t, 0, "")
		f.heard(t, "withdraw false")
		p.Gone()
		f.heard(t, "unplugging>standby", "open", "standby>plugging", "plug")
		p.Taken()
		back.heard(t, 1, "")
	}
}

func TestSilentGuest(t *testing.T) {
	const late = "the guest has not let go of it in 2s"
	t.Run("cooperative", func(t *testing.T) {
		f, p := primary(t, Policy{Cooperative, 2 * time.Second})
		var left waiter
		p.Leave(false, left.done)
		f.log = nil
		f.expire(t, 2*time.Second)
		f.heard(t, "withdraw true", "unplugging>primary: "+late)
		left.heard(t, 1, late)
		p.Leave(false, left.done) // a second try
		p.Gone()
		left.heard(t, 2, "")
	})
	t.Run("busy", func(t *testing.T) { // it has begun, but does not end
		f, p := primary(t, Policy{Cooperative, 2 * time.Second})
		f.begun = true
		var left waiter
		p.Leave(false, left.done)
		f.log = nil
		f.expire(t, 2*time.Second)
		f.heard(t, "withdraw false")
		left.heard(t, 1, late)
		if s := p.Status(); s.State != Unplugging || s.Why.Error() != late {
			t.Errorf("%+v", s)
		}
		p.Gone()
		f.heard(t, "unplugging>standby", "open", "standby>plugging", "plug")
	})
	t.Run("auto", func(t *testing.T) {
		f, p := primary(t, Policy{Auto, 2 * time.Second})
		var left waiter
		p.Leave(false, left.done)
		f.log = nil
		f.expire(t, 2*time.Second)
		f.heard(t, "unplug true")
		left.heard(t, 0, "")
		if s := p.Status(); s.Asked != Surprise {
			t.Errorf("%+v", s)
		}
		p.Gone()
		left.heard(t, 1, "")
	})
	t.Run("surprise", func(t *testing.T) {
		f, p := primary(t, Policy{Surprise, 2 * time.Second})
		p.Leave(false, func(error) {})
		f.heard(t, "primary>unplugging", "unplug true")
	})
}

func TestRefused(t *testing.T) {
	f, p := primary(t, Policy{Auto, time.Second})
	f.askErr = errors.New("the slot is blinking")
	var left waiter
	p.Leave(false, left.done)
	f.heard(t, "primary>unplugging", "unplug false", "withdraw true", "unplugging>primary: the slot is blinking")
	left.heard(t, 1, "the slot is blinking")
	if len(f.timers) != 0 {
		t.Errorf("timers %v", f.timers)
	}
}

// A guest that has begun when the primary is wanted back, and does not go on, keeps it.
func TestRefusedInTheEnd(t *testing.T) {
	f, p := primary(t, Policy{Auto, time.Second})
	p.Leave(false, func(error) {})
	f.begun = true
	p.Return(nil)
	f.heard(t, "primary>unplugging", "unplug false", "withdraw false")
	f.begun = false
	p.Refused(errors.New("the slot is turned on"))
	f.heard(t, "withdraw true", "unplugging>primary")
	if len(f.timers) != 0 {
		t.Errorf("timers %v", f.timers)
	}
}

func TestRetry(t *testing.T) {
	f := &fake{openErr: errors.New("group busy")}
	p := New(f, Policy{})
	var back waiter
	p.Negotiated(true)
	f.heard(t, "open", "hidden>failed: group busy")
	for _, d := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		f.expire(t, d*time.Second)
		f.heard(t, "open", "failed>failed: group busy")
	}
	if s := p.Status(); s.Retries != 8 || s.Why == nil {
		t.Errorf("%+v", s)
	}
	p.Retry()
	f.heard(t, "open", "failed>failed: group busy")
	p.Return(back.done)
	back.heard(t, 1, "group busy")
	f.log, f.openErr, f.plugErr = nil, nil, errors.New("no room")
	f.expire(t, time.Second)
	f.heard(t, "open", "failed>plugging", "plug", "plugging>failed: no room")
	f.plugErr = nil
	f.expire(t, 2*time.Second)
	f.heard(t, "open", "failed>plugging", "plug")
	p.Taken()
	if s := p.Status(); s.State != Primary || s.Retries != 0 {
		t.Errorf("%+v", s)
	}
}

// What is retried stops to be when it is not wanted any more.
func TestNoRetry(t *testing.T) {
	f := &fake{openErr: errors.New("group busy")}
	p := New(f, Policy{})
	p.Negotiated(true)
	p.Negotiated(false)
	if len(f.timers) != 0 || p.Status().State != Hidden {
		t.Errorf("timers %v, %+v", f.timers, p.Status())
	}
}

func TestGuestEjects(t *testing.T) {
	f, p := primary(t, Policy{})
	p.Gone()
	f.heard(t, "primary>standby: the guest has ejected it")
	p.Gone() // told twice
	f.heard(t)
	p.Return(nil)
	f.heard(t, "open", "standby>plugging", "plug")
}

// A migration's target opens it early and plugs it once the guest runs.
func TestTarget(t *testing.T) {
	f := &fake{}
	p := New(f, Policy{})
	p.Hold()
	var reserved waiter
	p.Reserve(reserved.done)
	reserved.heard(t, 1, "")
	p.Negotiated(true)
	f.heard(t, "open")
	p.Return(nil)
	f.heard(t, "open", "hidden>plugging", "plug")
	p.Release() // not what is in its slot
	f.heard(t)
}

func TestReturnWithoutDriver(t *testing.T) {
	p := New(&fake{}, Policy{})
	var back waiter
	p.Return(back.done)
	back.heard(t, 1, "the guest's driver has not acked VIRTIO_NET_F_STANDBY")
}

func TestAdopt(t *testing.T) {
	f := &fake{}
	p := New(f, Policy{})
	p.Adopt()
	p.Negotiated(true)
	f.heard(t, "hidden>primary")
}

// To open a primary may take long, and what is wanted may change meanwhile.
func TestSlowOpen(t *testing.T) {
	f := &fake{slow: true}
	p := New(f, Policy{})
	p.Negotiated(true)
	p.Negotiated(true)
	f.heard(t, "open")
	var left waiter
	p.Leave(true, left.done)
	left.heard(t, 1, "")
	f.heard(t, "close")
	f.opened(errors.New("called off"))
	f.heard(t, "close")
	p.Return(nil)
	p.Release()
	f.heard(t, "open", "close")
	f.opened(nil)
	f.heard(t, "hidden>plugging", "plug")
}
