package vmm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"baton/devices/steer"
	virtionet "baton/devices/virtio/net"
	"baton/migrate"
	"baton/migrate/wire"
	"baton/vmm/failover"
)

// preparers are what has to be done before the guest leaves: nothing of it is sent while it has
// a primary.
func (m *Machine) preparers() []migrate.Preparer {
	if len(m.pairs) == 0 {
		return nil
	}
	return []migrate.Preparer{primariesLeave{m}}
}

// hooks are what else has to be done when a guest comes.
func (m *Machine) hooks() []migrate.Hook {
	if len(m.pairs) == 0 {
		return nil
	}
	return []migrate.Hook{primariesCome{m}}
}

// unplugPrimaries tells which primaries the guest is about to be asked for, as QEMU does before it
// says that the migration waits for that.
func (m *Machine) unplugPrimaries() {
	for _, p := range m.pairs {
		if !p.Status().Away && p.InSlot() {
			m.events.Publish("UNPLUG_PRIMARY", failoverEvent{p.primary.ID})
		}
	}
}

// primariesLeave takes all primaries away from a guest that is to move. It implements
// migrate.Preparer.
type primariesLeave struct{ m *Machine }

// Prepare implements migrate.Preparer.
func (l primariesLeave) Prepare(ctx context.Context) (undo func(), err error) {
	var taken []*failoverPair // and not away before
	left := make(chan error)
	waits := 0
	err = l.m.call(func() {
		for _, p := range l.m.pairs {
			if p.Status().Away {
				continue
			}
			taken = append(taken, p)
			waits++
			name := p.standby
			if p.primary != nil {
				name = p.primary.ID
			}
			p.Leave(false, func(err error) {
				if err != nil {
					err = fmt.Errorf("unplug primary %s: %w", name, err)
				}
				go func() { // it may be told before anybody waits, or when nobody does any more
					select {
					case left <- err:
					case <-ctx.Done():
					}
				}()
			})
		}
	})
	for ; waits > 0 && err == nil; waits-- {
		select {
		case err = <-left:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	undo = func() {
		_ = l.m.call(func() {
			for _, p := range taken {
				p.Return(nil)
			}
		})
	}
	return undo, err
}

// primariesCome has the primaries of a guest that comes ready before it does, and plugs them
// once it runs. It implements migrate.Hook.
type primariesCome struct{ m *Machine }

// Reserve implements migrate.Hook.
func (c primariesCome) Reserve(ctx context.Context) (undo func(), err error) {
	undo = func() {
		_ = c.m.call(func() {
			for _, p := range c.m.pairs {
				p.Release()
			}
		})
	}
	opened := make(chan error)
	waits := 0
	err = c.m.call(func() {
		for _, p := range c.m.pairs {
			p.Hold()
			if p.primary == nil {
				continue
			}
			waits++
			required := p.primary.Text("failover-primary") == "require"
			p.Reserve(func(err error) {
				if err != nil && !required {
					p.Changed(failover.Hidden, failover.Hidden, fmt.Errorf("the guest will do without it for a while: %w", err))
					err = nil
				}
				go func() {
					select {
					case opened <- err:
					case <-ctx.Done():
					}
				}()
			})
		}
	})
	var errs []error
	for ; waits > 0 && err == nil; waits-- {
		select {
		case e := <-opened:
			errs = append(errs, e)
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	return undo, errors.Join(append(errs, err)...)
}

// AfterResume implements migrate.Hook.
func (c primariesCome) AfterResume() {
	_ = c.m.call(func() {
		for _, p := range c.m.pairs {
			p.Return(nil)
		}
	})
}

// guestComes is told that the source has stopped the guest, whose state arrives now: what
// comes for it from now on waits here.
func (m *Machine) guestComes() {
	for _, p := range m.pairs {
		if p.carrier != nil && !p.coming {
			p.coming = true
			p.carrier.arrives()
		}
	}
}

// guestCame is told that it runs here, after it has stood still for that long.
func (m *Machine) guestCame(stopped time.Duration) {
	for _, p := range m.pairs {
		if p.coming {
			p.coming = false
			p.carrier.resumed(stopped)
		}
	}
}

// takeLate returns what has come for the guest's network cards since it was stopped: it runs
// elsewhere, and has told the network so.
func (m *Machine) takeLate() (list []migrate.Late) {
	room := wire.MaxLate
	for _, n := range m.networkCards() {
		frames, dropped := n.TakeWaiting(room)
		if more := len(frames) - virtionet.HoldFrames; more > 0 {
			frames, dropped = frames[:virtionet.HoldFrames], dropped+more
		}
		for _, f := range frames {
			room -= len(f)
		}
		if len(frames)+dropped > 0 {
			m.log.Info("migration: frames came when the guest had left", "card", n.Device, "sent after it", len(frames), "dropped", dropped)
			list = append(list, migrate.Late{Name: n.netName(), Frames: frames, Dropped: dropped})
		}
	}
	return list
}

// giveLate gives the guest what takeLate returned where it was before.
func (m *Machine) giveLate(list []migrate.Late) {
	for _, l := range list {
		for _, n := range m.networkCards() {
			if n.netName() != l.Name {
				continue
			}
			sent, err := steer.Send(n.Interface(), l.Frames)
			if err != nil {
				m.log.Warn(fmt.Sprintf("frames that came to the source: %v", err))
			}
			l.Dropped += len(l.Frames) - sent
			m.log.Info("migration: frames that came to the source", "card", n.Device, "given to the guest", sent, "dropped", l.Dropped)
			if p := m.pairOf(n.ID); p != nil && p.carrier != nil {
				p.carrier.late(sent, l.Dropped)
			}
		}
	}
}

// guestLeft is told that it runs elsewhere: its primaries are free.
func (m *Machine) guestLeft() {
	for _, p := range m.pairs {
		if p.carrier != nil {
			p.carrier.gone()
		}
		p.Release()
	}
}

// guestStays is told that it goes on here although it has left.
func (m *Machine) guestStays() {
	for _, p := range m.pairs {
		p.Return(nil)
	}
}
