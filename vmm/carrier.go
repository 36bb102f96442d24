package vmm

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"baton/devices/pci"
	"baton/devices/steer"
	"baton/devices/vfio"
	virtionet "baton/devices/virtio/net"
)

// carrier has a guest's frames go by the half of a pair that the guest takes them from, and
// holds those that come while it takes them from neither. It acts on what the guest's driver
// does to the primary, at once, on the vCPU's thread that does it:
//
//	            bus master           vectors unmasked             probed             is to go
//	onStandby ─────────────> taking ──────────────────> serving ───────> onPrimary ──────────> asked ──────> pulled
//	    ^                       │                          │               │   ^      stays      │ │   pull    │
//	    │       MSI-X off       │         MSI-X off        │   MSI-X off   │   ├─────────────────┘ │ begins    │
//	    ├───────────────────────┴──────────────────────────┴───────────────┘   └─────────────── going          │
//	    │                                                                                MSI-X off │           │
//	    │                                   ejected, a driver comes back, or time is up            v           │
//	    ├─────────────────────────────────────────────────────────────────────────────────────── letting       │
//	    │                                   the slot is empty, or time is up                                   │
//	    └──────────────────────────────────────────────────────────────────────────────────────────────────────┘
//
//	taking     the VF has the MAC; the guest gets copies by the standby
//	serving    copies are held: what the guest sends may be lost, such as answers to what comes by the VF;
//	           for a second at most
//	onPrimary  what is held is sent to the VF; nothing goes to the standby's side, but for copies
//	           while Linux activates the VF's queue, which are sent to the VF as well: see settled
//	asked      copies go there, and are held; at a pull what is held is forgotten but for what may be
//	           in the primary's ring
//	going      the same is forgotten, and nothing goes to the VF; after a second it is asked again
//	letting    nothing goes to the VF, and all is held, for a tenth of a second at most
//	onStandby  what is held goes to the guest
//
// Linux drops what comes by the standby while it has a primary (net_failover, RX_HANDLER_EXACT), with or without
// carrier. It opens one, and so has a vector unmasked, before it takes it for that: until then it gets all by the
// standby, and from then on nothing may come by that. It sends by a primary that has
// a carrier, also before the queue of that throws nothing away, which is after the probe.
type carrier struct {
	m       *Machine
	standby string
	net     *virtionet.Net
	steerer *steer.Steerer

	mu      sync.Mutex
	primary string   // id of the one that there was last
	kick    func()   // raises its vectors
	vf      steer.VF // it, as its PF has it
	phase   phase
	plug    time.Time     // when the primary was plugged at whose slot the guest is; zero: it is at none
	slow    time.Duration // how long it was at the last one's
	since   time.Time     // when the old way ended, as far as is known; zero: it has not
	limit   *time.Timer   // releases what is held, unless something else has; nil: there is none
	last    []switched
}

// phase is where a carrier stands.
type phase uint8

const (
	onStandby phase = iota // the guest takes frames from the standby, but for a moment after a plug
	taking                 // its driver is about to take the primary
	serving                // it serves it, and its probe goes on
	onPrimary              // the guest takes frames from the primary
	asked                  // so it does, but is to let go of it
	going                  // it has begun to, and gets nothing by it meanwhile
	pulled                 // it was taken away by surprise: what is seen of it is not its driver's doing
	letting                // it has let go, and has not ejected it
)

// fast says whether the guest takes frames from the primary, as far as it knows.
func (p phase) fast() bool { return p >= serving && p <= pulled }

// switched is one change of the way, the data of FAILOVER_SWITCHED.
type switched struct {
	Primary string `json:"device-id,omitempty"`
	Standby string `json:"standby-id"`
	Point   string `json:"point"` // unplug, resume or plug
	To      string `json:"to"`    // standby or primary
	Outage  int64  `json:"outage-us"`
	Held    int64  `json:"held"`    // frames that came in that time and were handed on afterwards
	Dropped int64  `json:"dropped"` // and those for which there was no room, or that were too old
}

// lastSwitches is how many are remembered.
const lastSwitches = 8

// watch is how a function that may be a primary finds its carrier, from a vCPU's thread.
type watch struct{ carrier atomic.Pointer[carrier] }

// attachStandby gives the pair of a standby that was made its carrier.
func (m *Machine) attachStandby(d *device) {
	p, card := m.pairOf(d.ID), d.model.(*virtionet.Net)
	if p == nil {
		return
	}
	mac, _ := d.MAC()
	s, _ := parseSteer(d.Text("steer"))
	p.carrier = &carrier{m: m, standby: d.ID, net: card, steerer: steer.New(steer.Config{
		MAC: net.HardwareAddr(mac[:]), TAP: card.Interface(), Script: s.script, Off: s.off,
	})}
	if err := p.carrier.steerer.Room(virtionet.HoldFrames); err != nil {
		m.log.Warn(err.Error())
	}
	if p.device != nil {
		p.carrier.watch(p.device)
	}
}

// watch makes d the primary whose driver is watched.
func (c *carrier) watch(d *device) {
	vf, kick := steer.VF{}, func() {}
	if f, ok := d.fn.(*vfio.Function); ok {
		kick = f.Kick
		if pf, index, err := vfio.Parent(f.Host()); err == nil {
			vf = steer.VF{PF: pf, Index: index}
		}
	}
	c.mu.Lock()
	c.primary, c.vf, c.kick = d.ID, vf, kick
	c.mu.Unlock()
	d.watch.carrier.Store(c)
}

// used is told by a primary's configuration space what its driver does.
func (c *carrier) used(u pci.Use) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase == letting && (u.Master || u.Enabled) { // another driver, before it was ejected
		c.release()
	}
	switch fast := c.phase.fast(); {
	case c.phase == pulled: // its driver lets go when it has noticed: see left
	case fast && !u.Enabled:
		c.lettingGo()
		c.toStandby()
	case fast && !u.Unmasked:
		c.lettingGo()
	case fast:
		if c.phase != going {
			c.since = time.Time{} // it goes on
		}
	case u.Unmasked && !c.plug.IsZero():
		c.prime()
		c.phase = serving
		c.holdFor(driverTime, c.toPrimary)
	case u.Unmasked:
		c.toPrimary()
	case u.Master || u.Enabled:
		c.prime()
	case c.phase == taking:
		c.toStandby()
	}
}

// do carries out a step; what cannot be done costs frames, not the guest.
func (c *carrier) do(step steer.Step) {
	if err := c.steerer.Do(context.Background(), step, c.vf); err != nil {
		c.m.log.Warn(err.Error())
	}
}

func (c *carrier) warn(err error) {
	if err != nil {
		c.m.log.Warn(fmt.Sprintf("frames of %s: %v", c.standby, err))
	}
}

func (c *carrier) begun() {
	if c.since.IsZero() {
		c.since = time.Now()
	}
}

// prime is for a primary whose driver begins to look at it: it reads the MAC.
func (c *carrier) prime() {
	if c.phase == taking {
		return
	}
	c.phase = taking
	c.do(steer.Both)
	c.do(steer.GiveMAC)
}

// How long frames are held at most for a guest's driver to end its probe once that serves the primary, or to let go,
// and for a guest to eject a primary that it has let go of: a busy one does not get on with that while it has frames to
// see to.
const (
	driverTime = time.Second
	ejectTime  = 100 * time.Millisecond
)

// plugged is for a primary that is in its slot. A guest takes frames from the standby until its
// driver has the primary ready.
func (c *carrier) plugged() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.plug = time.Now()
}

// holdFor holds the standby's frames for so long, and then does something else, unless that has been done.
func (c *carrier) holdFor(limit time.Duration, then func()) {
	c.begun()
	c.warn(c.net.Hold())
	c.until(limit, then)
}

// toPrimary is for a primary whose driver serves it, and has been probed.
func (c *carrier) toPrimary() {
	outage := c.ended()
	c.phase = onPrimary
	if c.plug.IsZero() {
		c.settled()
	}
	c.handOver(func(handed, dropped int) {
		c.say("plug", "primary", outage, handed, dropped)
		if c.phase == onPrimary {
			c.has()
		}
	})
}

// handOver sends what is held to the primary, and then says what became of it.
func (c *carrier) handOver(done func(handed, dropped int)) {
	c.limit = nil
	c.do(steer.Primary)
	frames, held, err := c.net.TakeHeld()
	c.warn(err)
	by := c.vf.PF
	if by == "" {
		by = c.steerer.Uplink()
	}
	go func() {
		sent := 0
		if by != "" {
			sent, err = steer.SendPaced(by, frames, c.goesOn)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.warn(err)
		done(sent, held.Dropped+held.Frames-sent)
	}()
}

// goesOn says whether the guest still takes frames from the primary that it has.
func (c *carrier) goesOn() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.phase.fast() && c.phase != going
}

// has tells the pair that the guest has the primary.
func (c *carrier) has() {
	c.m.post(func() {
		if p := c.m.pairOf(c.standby); p != nil && p.plugged {
			p.Taken()
		}
	})
}

// present says that the guest is done with the slot that its primary is in.
func (c *carrier) present() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.plug.IsZero() {
		c.plug, c.slow = time.Time{}, time.Since(c.plug)
	}
	switch c.phase {
	case serving:
		c.toPrimary()
	case onPrimary:
		c.settled()
	}
}

// settleTime is what a guest is given to do what its driver's probe has left: Linux deactivates
// the queue of a primary without a carrier, which waits for all other CPUs. KickTime is what it is at least
// given to activate the queue of one that has a carrier: until then it throws away what it sends by that. A busy
// one, which has taken long to deal with its slot, takes longer for that as well.
const (
	settleTime = 300 * time.Millisecond
	kickTime   = 400 * time.Millisecond
)

// settled raises the vectors of a primary whose driver has been probed. Linux registers a NIC, and
// with it begins to use a primary, while the probe goes on: igbvf says only at the end of that that
// it has no carrier, forgets so that it has just had one, and looks again when its mailbox
// interrupts, or in two seconds. To be interrupted for nothing is nothing to a driver. What comes
// meanwhile comes to it once more.
func (c *carrier) settled() {
	kick := min(max(kickTime, c.slow/4), virtionet.HoldTime/2)
	time.AfterFunc(settleTime, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.phase != onPrimary {
			return
		}
		c.do(steer.Both)
		c.warn(c.net.Hold())
		c.kick()
		c.until(kick, func() { c.handOver(func(int, int) {}) })
	})
}

// until has f done after so long, unless something else has ended what is held.
func (c *carrier) until(limit time.Duration, f func()) {
	var t *time.Timer
	t = time.AfterFunc(limit, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.limit == t {
			f()
		}
	})
	c.limit = t
}

// toStandby is for a primary whose driver has let go of it. A guest that has been asked to has
// not done with that: see ejectTime.
func (c *carrier) toStandby() {
	c.begun()
	was := c.phase
	if was != going {
		c.do(steer.Standby)
	}
	c.warn(c.net.Announce())
	if c.phase = letting; was == asked || was == going {
		c.holdFor(ejectTime, c.release)
	} else {
		c.release()
	}
}

// release gives the guest what is held, and if that was for a primary that it has let go of, says so.
func (c *carrier) release() {
	held, err := c.net.Release()
	c.warn(err)
	if c.limit = nil; c.phase == letting {
		c.phase = onStandby
		c.say("unplug", "standby", c.ended(), held.Frames, held.Dropped)
	}
}

// ended says how long the guest had neither way, which is over now.
func (c *carrier) ended() (outage time.Duration) {
	if !c.since.IsZero() {
		outage = time.Since(c.since)
	}
	c.since = time.Time{}
	return outage
}

// say tells of a change of the way.
func (c *carrier) say(point, to string, outage time.Duration, held, dropped int) {
	s := switched{c.primary, c.standby, point, to, outage.Microseconds(), int64(held), int64(dropped)}
	if c.last = append(c.last, s); len(c.last) > lastSwitches {
		c.last = c.last[1:]
	}
	c.m.log.Info("failover: frames go another way", "standby", c.standby, "primary", c.primary, "point", point, "to", to,
		"outage", outage.Truncate(time.Microsecond), "held", held, "dropped", dropped)
	c.m.events.Publish("FAILOVER_SWITCHED", s)
}

// leaving has the guest asked to let go of the primary, or says that it is about to lose it: then
// ask is nil. What has to be done for that takes less time than the guest does to hear of it. False
// says that the guest does not take frames from the primary.
func (c *carrier) leaving(ask func() error) (fast bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ask != nil {
		err = ask()
	}
	if err == nil && (c.phase == onPrimary || c.phase == serving) {
		c.phase, c.limit = asked, nil
		c.warn(c.net.Hold())
		c.do(steer.Both)
	}
	return c.phase.fast(), err
}

// begins says that the guest is about to let go. What would come by the primary from now on is answered in vain, if
// at all, and keeps a busy guest from getting on with that. One that does not get on gets it in the end.
func (c *carrier) begins() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.phase.fast() {
		return
	}
	c.lettingGo()
	if c.phase != asked || c.vf.Resets() {
		return
	}
	c.phase = going
	c.warn(c.net.Hold()) // if it is not, after the same before
	c.do(steer.Standby)
	c.until(driverTime, func() {
		c.phase, c.since = asked, time.Time{}
		c.handOver(func(int, int) {
			if c.phase == asked {
				c.warn(c.net.Hold())
				c.do(steer.Both)
			}
		})
	})
}

// lettingGo is for a primary from which its driver has taken all frames until now.
func (c *carrier) lettingGo() {
	if c.since.IsZero() {
		c.since = time.Now()
		c.net.Forget(c.since.Add(-ringTime))
	}
}

// pull says that it loses it now.
func (c *carrier) pull() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase.fast() {
		c.phase, c.limit = pulled, nil
		c.warn(c.net.Hold()) // if they are not: see begins
		c.do(steer.Both)
		c.begun()
		c.net.Forget(c.since.Add(-drainTime))
	}
}

// ringTime is for how long a frame may lie in the primary's receive ring: its driver throws
// away what is there when it lets go. What it has not is doubled, which costs less. DrainTime is
// for how long one that is to be pulled is left to its driver once copies are held: for what came
// before that, and the answers. A busy one still finds frames in its ring when it is pulled, and
// answers them in vain.
const (
	ringTime  = 25 * time.Millisecond
	drainTime = 200 * time.Millisecond
)

// stays says that the guest keeps the primary: it had all frames, unless it had begun to let go.
func (c *carrier) stays() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.phase.fast() {
		return
	}
	if c.phase != going {
		c.net.Forget(time.Now())
	}
	c.phase, c.since = onPrimary, time.Time{}
	c.handOver(func(int, int) {
		if c.phase == onPrimary {
			c.has()
		}
	})
}

// left says that the guest has let go, for a driver that did not say so.
func (c *carrier) left() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase != onStandby && c.phase != letting {
		c.toStandby()
	}
	if c.phase == letting {
		c.release()
	}
}

// hide has the PF keep frames from a VF that is open and not in use. Where that cannot be done, the
// guest's MAC could not be given to it, either.
func (c *carrier) hide(d *device) error {
	c.watch(d)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.steerer.Do(context.Background(), steer.Hide, c.vf)
}

// returns gives the PF's VF back as it was.
func (c *carrier) returns() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.do(steer.Return)
}

// arrives says that a guest that comes from another host has been stopped there: what comes
// for it from now on waits here.
func (c *carrier) arrives() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begun()
	c.do(steer.Standby)
	c.net.TakeWaiting(0) // the guest had that there
}

// resumed says that the guest goes on, on the standby. It has stood still for that long; 0: as
// long as was seen from here.
func (c *carrier) resumed(stopped time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if stopped > 0 {
		c.since = time.Now().Add(-stopped)
	}
	c.say("resume", "standby", c.ended(), 0, 0)
}

// late says what came for the guest where it was before, and is handed on only now.
func (c *carrier) late(held, dropped int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.last {
		if s := &c.last[len(c.last)-1-i]; s.Point == "resume" {
			s.Held, s.Dropped = int64(held), int64(dropped)
			return
		}
	}
}

// gone says that the guest is on another host, or has ended.
func (c *carrier) gone() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase == going { // or its standby is, and it keeps the primary
		c.do(steer.GiveMAC)
	}
	c.do(steer.Gone)
	c.phase, c.plug, c.since, c.limit = onStandby, time.Time{}, time.Time{}, nil
}

// switches are the last changes of the way.
func (c *carrier) switches() []switched {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]switched{}, c.last...)
}
