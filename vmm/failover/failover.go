// Package failover decides what happens to the primary of a failover pair: the fast NIC
// that a guest has only while it also has the slow one, the standby, under the same MAC
// (VIRTIO 1.2, 5.1.3, VIRTIO_NET_F_STANDBY; Linux's net_failover). It knows neither
// devices nor networks: a [Host] does what a [Pair] decides.
//
//	          STANDBY acked            guest's driver has it
//	Hidden ────────────────> Plugging ───────────────────────> Primary
//	  ^  ^                    ^  │  ^                              │
//	  │  │ no longer acked    │  │  │ wanted back, or request      │ not wanted: migration,
//	  │  └────────────────────┼──┼──┼── withdrawn ──┐              │ maintenance, no STANDBY
//	  │                       │  │  │               │              v
//	  └──────────── Standby <─┼──┼──┴────────── Unplugging <───────┘
//	                   │      │  │ cannot be plugged         guest let go
//	                   └──────┘  v
//	      wanted           ^   Failed ── retried, later and later
//	                       └─────┘
//
// What is wanted is one thing, a primary that is plugged if the driver acked STANDBY and
// nobody wants it away, and every event leads towards it from wherever the pair is.
package failover

import (
	"errors"
	"fmt"
	"time"
)

// State says where the primary is.
type State string

// The states of a pair.
const (
	Hidden     State = "hidden"     // the guest's driver has not acked STANDBY: it is not shown the primary
	Plugging   State = "plugging"   // in its slot; no driver of the guest has taken it yet
	Primary    State = "primary"    // the guest's driver has it
	Unplugging State = "unplugging" // the guest was asked, or is being told, to let go
	Standby    State = "standby"    // the guest has let go, and runs on the standby
	Failed     State = "failed"     // it could not be plugged; that is tried again
)

// Mode is how a primary is taken away.
type Mode string

// The modes.
const (
	Cooperative Mode = "cooperative" // the guest is asked, and may refuse
	Surprise    Mode = "surprise"    // the device is gone, the guest is told so
	Auto        Mode = "auto"        // the first, and after the timeout the second
)

// Policy is what the user says about a pair.
type Policy struct {
	Unplug Mode
	// Timeout is how long a guest may take to let go; 0 is for ever.
	Timeout time.Duration
}

// Host does what a pair decides. Its methods are called by the pair's, and call none of them
// before they return; what they call later, they call as the pair's methods are called.
type Host interface {
	// Open makes the primary ready to be plugged: open, and the guest's RAM mapped for it,
	// which may take long. Done may be called at once. It does nothing if that is so.
	Open(done func(error))
	// Plug puts the open primary into its slot. Pair.Taken follows once a driver has it.
	Plug() error
	// Unplug has the guest let go of the primary, which Pair.Gone says. A surprise may
	// follow a request. Slot tells what the slot is doing about it.
	Unplug(surprise bool) error
	// Withdraw takes a request back; false if the guest has begun to act on it.
	Withdraw() bool
	// Close gives the primary, which is in no slot, back to the host, if it is open.
	Close()
	// After calls f later, unless it is stopped.
	After(d time.Duration, f func()) (stop func())
	// Changed hears of each new state, and why.
	Changed(from, to State, why error)
}

// Back-off of what is tried again, and how long a guest takes until it is worth a word.
const (
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
	patience   = 10 * time.Second
)

var errNotTaken = errors.New("no driver of the guest has taken it")

// ErrReturned is what [Pair.Leave] reports when somebody wanted the primary back first.
var ErrReturned = errors.New("the primary was wanted back")

// Pair is one standby with its primary. It is not safe for concurrent use.
type Pair struct {
	host   Host
	policy Policy

	state      State
	since      time.Time
	why        error // of Failed, or of a guest that let go unasked
	negotiated bool  // the driver has acked STANDBY
	away       bool  // somebody wants the guest on the standby
	release    bool  // give the primary back once the guest has let go
	taken      bool  // a driver has had it since it was plugged
	opening    bool
	asked      Mode // Cooperative or Surprise, while Unplugging
	retries    int

	left   []func(error) // who waits for the guest to let go
	back   []func(error) // who waits for the guest to have it
	cancel func()        // of the timer
}

// New returns a hidden pair.
func New(h Host, p Policy) *Pair {
	return &Pair{host: h, policy: p, state: Hidden, since: time.Now(), cancel: func() {}}
}

// Status is what a pair is doing.
type Status struct {
	State      State
	Since      time.Time
	Why        error // may be nil
	Negotiated bool
	Away       bool
	Asked      Mode // while Unplugging
	Retries    int  // while Failed
}

// Status returns it.
func (p *Pair) Status() Status {
	s := Status{State: p.state, Since: p.since, Why: p.why, Negotiated: p.negotiated, Away: p.away}
	if p.state == Unplugging {
		s.Asked = p.asked
	}
	if p.state == Failed {
		s.Retries = p.retries
	}
	return s
}

// InSlot says whether the guest can see the primary.
func (p *Pair) InSlot() bool {
	return p.state == Plugging || p.state == Primary || p.state == Unplugging
}

func (p *Pair) enter(s State, why error) {
	from := p.state
	p.cancel()
	p.cancel = func() {}
	p.state, p.since, p.why = s, time.Now(), why
	p.host.Changed(from, s, why)
}

// after starts the timer of the state.
func (p *Pair) after(d time.Duration, f func()) {
	p.cancel()
	p.cancel = p.host.After(d, f)
}

func finish(waiters *[]func(error), err error) {
	list := *waiters
	*waiters = nil
	for _, f := range list {
		f(err)
	}
}

// Adopt is for a primary that was in its slot before there was a standby: it stays.
func (p *Pair) Adopt() {
	p.negotiated, p.taken = true, true
	p.enter(Primary, nil)
}

// Negotiated says whether the standby's driver, which now serves it, has acked STANDBY.
func (p *Pair) Negotiated(yes bool) {
	p.negotiated = yes
	p.settle()
}

// Inform tells a new pair what the one before it knew.
func (p *Pair) Inform(negotiated, away bool) { p.negotiated, p.away = negotiated, away }

// Cancel ends a pair whose primary has gone for good: why is for those who wait for it.
func (p *Pair) Cancel(why error) {
	p.cancel()
	finish(&p.left, nil)
	finish(&p.back, why)
}

// Refused says that the guest does not let go of the primary; of one that is wanted back, that it
// has agreed.
func (p *Pair) Refused(why error) {
	switch {
	case p.state != Unplugging:
	case p.negotiated && !p.away:
		p.settle()
	case p.policy.Unplug == Auto && p.asked == Cooperative:
		p.unplug(true)
	default:
		p.refused(why)
	}
}

// Hold has the guest stay on the standby until Return: it came from elsewhere, or is
// about to.
func (p *Pair) Hold() { p.away = true }

// Reserve opens the primary, so that to plug it later is quick and cannot fail for want of
// it. Done, which may come at once, hears how it went.
func (p *Pair) Reserve(done func(error)) { p.host.Open(done) }

// Release gives the primary back to the host if it is in no slot.
func (p *Pair) Release() {
	if !p.InSlot() {
		p.host.Close()
	}
}

// Leave takes the primary away from the guest until Return, and with release gives it back
// to the host then. Done, which may come at once, hears that the guest has let go, or why
// it has not: then the primary stays, or comes back.
func (p *Pair) Leave(release bool, done func(error)) {
	p.away = true
	p.release = p.release || release
	if !p.InSlot() {
		p.settle()
		done(nil)
		return
	}
	p.left = append(p.left, done)
	p.settle()
}

// Return gives the guest its primary, if its driver wants one. Done, which may be nil,
// hears when it has it, or that it could not be plugged, which is tried again.
func (p *Pair) Return(done func(error)) {
	p.away, p.release, p.retries = false, false, 0
	switch {
	case done == nil:
	case p.state == Primary && p.negotiated:
		defer done(nil)
	case !p.negotiated:
		defer done(errors.New("the guest's driver has not acked VIRTIO_NET_F_STANDBY"))
	default:
		p.back = append(p.back, done)
	}
	p.settle()
	finish(&p.left, ErrReturned)
}

// Retry tries now what has failed.
func (p *Pair) Retry() {
	if p.state == Failed {
		p.settle()
	}
}

// Taken says that a driver of the guest has the primary.
func (p *Pair) Taken() {
	p.taken, p.retries = true, 0
	if p.state == Plugging {
		p.enter(Primary, nil)
		finish(&p.back, nil)
	}
}

// inSlot is the state of a primary that stays where it is.
func (p *Pair) inSlot(why error) {
	if !p.taken {
		p.enter(Plugging, why)
		return
	}
	p.enter(Primary, why)
	finish(&p.back, nil)
}

// Gone says that the guest has let go of the primary, asked or not.
func (p *Pair) Gone() {
	if !p.InSlot() {
		return
	}
	var why error
	if p.state != Unplugging {
		p.away = true
		why = errors.New("the guest has ejected it")
	}
	p.enter(Standby, why)
	finish(&p.left, nil)
	p.settle()
}

// Reset says that the machine was reset: the primary is off its slot, and the guest is
// another one, perhaps.
func (p *Pair) Reset() {
	p.negotiated = false
	if p.state != Hidden {
		p.enter(Hidden, nil)
	}
	finish(&p.left, nil)
	finish(&p.back, errors.New("the machine was reset"))
}

// settle goes on towards what is wanted.
func (p *Pair) settle() {
	want := p.negotiated && !p.away
	switch p.state {
	case Hidden, Standby, Failed:
		if want {
			p.plug()
		} else if !p.negotiated {
			p.hide()
		} else if p.release {
			p.host.Close()
		}
	case Plugging, Primary:
		if !want {
			p.unplug(p.policy.Unplug == Surprise)
		}
	case Unplugging:
		// If it cannot be withdrawn, it is plugged again once the guest has let go.
		if want && p.host.Withdraw() {
			p.inSlot(nil)
		}
	}
}

func (p *Pair) hide() {
	if p.state != Hidden {
		p.enter(Hidden, nil)
	}
	p.host.Close()
}

func (p *Pair) plug() {
	if p.opening {
		return
	}
	p.opening = true
	p.host.Open(func(err error) {
		p.opening = false
		switch {
		case p.InSlot(): // adopted meanwhile
		case !p.negotiated || p.away:
			p.settle()
		case err != nil:
			p.failed(err)
		default:
			p.taken = false
			p.enter(Plugging, nil)
			if err := p.host.Plug(); err != nil {
				p.failed(err)
				return
			}
			p.after(patience, func() { p.enter(Plugging, errNotTaken) })
		}
	})
}

func (p *Pair) failed(err error) {
	wait := min(firstRetry<<min(p.retries, 10), lastRetry)
	p.retries++
	p.enter(Failed, err)
	p.after(wait, p.settle)
	finish(&p.back, err)
}

func (p *Pair) unplug(surprise bool) {
	p.asked = Cooperative
	if surprise {
		p.asked = Surprise
	}
	if p.state != Unplugging {
		p.enter(Unplugging, nil)
	}
	if err := p.host.Unplug(surprise); err != nil {
		p.refused(err)
		return
	}
	p.cancel()
	if surprise {
		return // which a guest cannot refuse
	}
	if p.state == Unplugging && p.policy.Timeout > 0 {
		p.after(p.policy.Timeout, p.overdue)
	}
}

// overdue is the deadline of a guest that does not let go.
func (p *Pair) overdue() {
	if p.policy.Unplug == Auto && p.asked == Cooperative {
		p.unplug(true)
		return
	}
	p.refused(fmt.Errorf("the guest has not let go of it in %v", p.policy.Timeout))
}

// refused ends an unplug that does not happen: the primary stays. If the guest lets go
// after all, it gets it again.
func (p *Pair) refused(err error) {
	if !p.negotiated {
		return // it would be shown what it must not have: wait on
	}
	p.away, p.release = false, false
	if p.host.Withdraw() {
		p.inSlot(err)
	} else {
		p.why = err
	}
	finish(&p.left, err)
}
