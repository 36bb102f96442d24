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
//	unplug   asked       copies to the standby's side, held: the primary still has them all
//	         begins      what is held so far is forgotten, but for what may be in its ring
//	         MSI-X off   to the standby
//	         ejects      what is held goes to the guest
//	         (a device that is pulled goes when its ring has been emptied; then its driver shows
//	         nothing: the slot does, when it is empty)
//	plug     in its slot frames are held for a moment
//	         bus master  the VF has the MAC; copies to the standby's side
//	         MSI-X on    which are held
//	         vectors     to the primary; what is held is sent there; kicks
//
// Linux drops what comes by the standby while a primary is registered (net_failover,
// RX_HANDLER_EXACT), with or without carrier, and takes nothing from a primary whose driver
// has not enabled it: between the two there is a while with neither.
type carrier struct {
	m       *Machine
	standby string
	net     *virtionet.Net
	steerer *steer.Steerer

	mu      sync.Mutex
	primary string    // id of the one that there was last
	kick    func()    // raises its vectors
	vf      steer.VF  // it, as its PF has it
	onFast  bool      // the guest takes frames from it
	priming bool      // its driver is about to
	asked   bool      // it is to let go of it
	lets    bool      // it has, and frames are still held
	pulled  bool      // it was taken away by surprise: what is seen of it is not its driver's doing
	since   time.Time // when the old way ended, as far as is known; zero: it has not
	until   time.Time // when frames that are held for its driver are released at the latest
	last    []switched
}

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
	switch {
	case c.pulled: // its driver lets go when it has noticed: see left
	case c.onFast && !u.Enabled:
		c.lettingGo()
		c.toStandby()
	case c.onFast && !u.Unmasked:
		c.lettingGo()
	case c.onFast:
		c.since = time.Time{} // it goes on
	case u.Unmasked:
		c.toPrimary()
	case u.Master || u.Enabled:
		c.prime()
		if u.Enabled {
			c.holdFor(driverTime)
		}
	case c.priming:
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
	if c.priming {
		return
	}
	c.priming = true
	c.do(steer.Both)
	c.do(steer.GiveMAC)
}

// How long frames are held at most for a guest that works at its primary's slot, and for its driver.
const (
	quietTime  = 300 * time.Millisecond
	driverTime = time.Second
)

// plugged is for a primary that is in its slot. A guest takes frames from the standby until its
// driver has the primary ready, but a busy one does not get on with that while it has them to see to.
func (c *carrier) plugged() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.onFast && !c.priming {
		c.holdFor(quietTime)
	}
}

// holdFor holds the standby's frames until the guest's driver has the primary, or for so long.
func (c *carrier) holdFor(limit time.Duration) {
	c.begun()
	c.warn(c.net.Hold())
	until := time.Now().Add(limit)
	c.until = until
	time.AfterFunc(limit, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.until.Equal(until) {
			return
		}
		c.release()
		if !c.priming {
			c.since = time.Time{}
		}
	})
}

// toPrimary is for a primary whose driver serves it.
func (c *carrier) toPrimary() {
	c.do(steer.Primary)
	frames, held, err := c.net.TakeHeld()
	c.warn(err)
	by := c.vf.PF
	if by == "" {
		by = c.steerer.Uplink()
	}
	sent := 0
	if by != "" {
		sent, err = steer.Send(by, frames)
		c.warn(err)
	}
	c.onFast, c.priming, c.lets, c.until = true, false, false, time.Time{}
	c.say("plug", "primary", sent, held.Dropped+held.Frames-sent)
	c.kicks(firstKick)
}

// The first kick of a primary's driver comes after that, each one half as long again after the one
// before, up to that.
const (
	firstKick = 25 * time.Millisecond
	lastKick  = time.Second
)

// kicks raises the primary's interrupts a few times. Linux registers a NIC, and with it begins to
// use a primary, while the driver's probe goes on: igbvf says only at the end of that that it has
// no carrier, forgets so that it has just had one, and looks again when its mailbox interrupts, or
// in two seconds. To be interrupted for nothing is nothing to a driver.
func (c *carrier) kicks(after time.Duration) {
	time.AfterFunc(after, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.onFast || c.pulled {
			return
		}
		if c.kick(); after < lastKick {
			c.kicks(after * 3 / 2)
		}
	})
}

// toStandby is for a primary whose driver has let go of it. A guest that has been asked to has
// not done with that: see plugged.
func (c *carrier) toStandby() {
	c.begun()
	c.do(steer.Standby)
	c.warn(c.net.Announce())
	c.onFast, c.priming, c.pulled, c.lets = false, false, false, true
	if c.asked {
		c.holdFor(quietTime)
	} else {
		c.release()
	}
}

// release gives the guest what is held, and if that was for a primary that it has let go of, says so.
func (c *carrier) release() {
	held, err := c.net.Release()
	c.warn(err)
	if c.until = (time.Time{}); c.lets {
		c.lets, c.asked = false, false
		c.say("unplug", "standby", held.Frames, held.Dropped)
	}
}

// say tells of a change of the way, which ends now.
func (c *carrier) say(point, to string, held, dropped int) {
	s := switched{c.primary, c.standby, point, to, 0, int64(held), int64(dropped)}
	if !c.since.IsZero() {
		s.Outage = time.Since(c.since).Microseconds()
	}
	c.since = time.Time{}
	if c.last = append(c.last, s); len(c.last) > lastSwitches {
		c.last = c.last[1:]
	}
	c.m.log.Info("failover: frames go another way", "standby", c.standby, "primary", c.primary, "point", point, "to", to,
		"outage", time.Duration(s.Outage)*time.Microsecond, "held", held, "dropped", dropped)
	c.m.events.Publish("FAILOVER_SWITCHED", s)
}

// leaving says that the guest is about to be asked to let go of the primary, or to lose it. False
// says that it does not take frames from it.
func (c *carrier) leaving() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.onFast {
		c.asked = true
		c.warn(c.net.Hold())
		c.do(steer.Both)
	}
	return c.onFast
}

// pull says that it loses it now.
func (c *carrier) pull() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.onFast {
		c.pulled = true
		c.begun()
		c.net.Forget(c.since.Add(-ringTime))
	}
}

// begins says that the guest is about to let go.
func (c *carrier) begins() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.onFast {
		c.lettingGo()
	}
}

// lettingGo is for a primary from which its driver has taken all frames until now.
func (c *carrier) lettingGo() {
	if c.since.IsZero() {
		c.since = time.Now()
		c.net.Forget(c.since.Add(-ringTime))
	}
}

// ringTime is for how long a frame may lie in the primary's receive ring: its driver throws
// away what is there when it lets go. What it has not is doubled, which costs less. DrainTime is
// for how long one that is to be pulled is left to its driver once copies are held: for what came
// before that, and the answers.
const (
	ringTime  = 25 * time.Millisecond
	drainTime = 2 * ringTime
)

// stays says that the guest keeps the primary: it had all frames.
func (c *carrier) stays() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.onFast {
		return
	}
	c.do(steer.Primary)
	_, _, err := c.net.TakeHeld()
	c.warn(err)
	c.asked, c.pulled, c.since = false, false, time.Time{}
}

// left says that the guest has let go, for a driver that did not say so.
func (c *carrier) left() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asked = false; c.onFast || c.priming {
		c.toStandby()
	} else if c.lets {
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
	c.say("resume", "standby", 0, 0)
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
	c.do(steer.Gone)
	c.onFast, c.priming, c.asked, c.lets, c.pulled, c.since, c.until = false, false, false, false, false, time.Time{}, time.Time{}
}

// switches are the last changes of the way.
func (c *carrier) switches() []switched {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]switched{}, c.last...)
}
