package vmm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"baton/devices/pci"
	virtionet "baton/devices/virtio/net"
	"baton/vmm/failover"
)

// failoverPair is a standby, a virtio-net-pci with failover=on, and its primary, either of
// which may be missing. It is failover.Host for its Pair. All of it is the main loop's.
type failoverPair struct {
	*failover.Pair
	m       *Machine
	standby string  // its id
	primary *Device // nil: there is none
	device  device  // the primary; fn is nil unless it is open
	plugged bool    // it is in its slot
	opening *opening
}

// opening is one attempt to open a primary, outside the main loop.
type opening struct {
	cancel context.CancelFunc
	done   []func(error)
}

// steering is what the steer= of a standby says.
type steering struct {
	off    bool
	script string // "": baton does it by itself
}

func parseSteer(text string) (s steering, err error) {
	script, isScript := strings.CutPrefix(text, "script=")
	switch {
	case text == "" || text == "auto":
	case text == "none":
		s.off = true
	case isScript && script != "":
		s.script = script
	default:
		err = fmt.Errorf("steer=%s: want auto, none or script=PATH", text)
	}
	return s, err
}

// isStandby says whether the device is one.
func (d *Device) isStandby() bool { return d.Driver == "virtio-net-pci" && d.Bool("failover") }

// policy is what the options of a primary say.
func (d *Device) policy() failover.Policy {
	return failover.Policy{
		Unplug:  failover.Mode(d.Text("failover-unplug")),
		Timeout: time.Duration(d.Uint("failover-unplug-timeout")) * time.Millisecond,
	}
}

// pairOf finds the pair with that standby.
func (m *Machine) pairOf(standby string) *failoverPair {
	for _, p := range m.pairs {
		if p.standby == standby {
			return p
		}
	}
	return nil
}

// pairWith finds the pair with that primary.
func (m *Machine) pairWith(primary string) *failoverPair {
	for _, p := range m.pairs {
		if p.primary != nil && p.primary.ID == primary {
			return p
		}
	}
	return nil
}

// addStandby makes a pair for a standby, which is to be plugged. A device that is there
// already and names it is its primary, where it is: it was an ordinary device until now.
func (m *Machine) addStandby(d *Device) {
	p := &failoverPair{m: m, standby: d.ID}
	p.Pair = failover.New(p, failover.Policy{})
	m.pairs = append(m.pairs, p)
	for _, other := range m.devices {
		if other.Text(pairID) == d.ID {
			p.take(other.Device)
			p.device, p.plugged = *other, true
			p.Adopt()
		}
	}
}

// take makes d the primary of a pair that has none.
func (p *failoverPair) take(d *Device) {
	status := p.Status()
	p.primary = d
	p.Pair = failover.New(p, d.policy())
	if status.Away {
		p.Hold()
	}
}

// addPrimary makes d, which is in the configuration and not made, the primary of the pair
// that it names, if there is one: then it is plugged when the guest can use it, and false
// says that it is an ordinary device. A pair that has a primary has it no longer.
func (m *Machine) addPrimary(d *Device) (bool, error) {
	p := m.pairOf(d.Text(pairID))
	if d.Text(pairID) == "" || p == nil {
		return false, nil
	}
	if p.primary != nil {
		return false, tooMany(p.standby, p.primary.ID, d.ID)
	}
	was := p.Status().Negotiated
	p.take(d)
	p.Negotiated(was)
	return true, nil
}

// negotiated is told that a standby's driver uses the device, with or without STANDBY. One
// that goes on, on another host perhaps, may have been here before.
func (m *Machine) negotiated(standby string, yes, goesOn bool) {
	p := m.pairOf(standby)
	if p == nil || goesOn && yes == p.Status().Negotiated {
		return
	}
	if yes {
		m.events.Publish("FAILOVER_NEGOTIATED", failoverEvent{standby})
	}
	p.Negotiated(yes)
}

// standbyActivated is what a standby's model calls; nil for other devices.
func (m *Machine) standbyActivated(d *Device) func(features uint64, goesOn bool) {
	if !d.isStandby() {
		return nil
	}
	id := d.ID
	return func(features uint64, goesOn bool) { // from a vCPU's thread
		boot := m.boots.Load()
		m.post(func() {
			if boot == m.boots.Load() {
				m.negotiated(id, features&virtionet.FeatureStandby != 0, goesOn)
			}
		})
	}
}

// resetPairs takes all primaries away: the guest that starts now may be another one.
func (m *Machine) resetPairs() error {
	var errs []error
	for _, p := range m.pairs {
		if p.plugged {
			errs = append(errs, p.pull())
		}
		p.Reset()
	}
	return errors.Join(errs...)
}

// Open is failover.Host.
func (p *failoverPair) Open(done func(error)) {
	switch {
	case p.primary == nil:
		done(errors.New("there is none"))
	case p.device.fn != nil:
		done(nil)
	case p.opening != nil:
		p.opening.done = append(p.opening.done, done)
	case p.primary.Driver == "vfio-pci":
		p.reserve(done)
	default: // what does not take long
		b := builder{Machine: p.m, ctx: context.Background()}
		dev, err := b.make(p.primary)
		if err == nil {
			p.device = *dev
		}
		done(err)
	}
}

// reserve opens a function of the host, which may take seconds.
func (p *failoverPair) reserve(done func(error)) {
	ctx, cancel := context.WithCancel(context.Background())
	o := &opening{cancel, []func(error){done}}
	p.opening = o
	primary := p.primary
	go func() {
		f, err := p.m.reserve(ctx, primary)
		p.m.post(func() {
			cancel()
			if p.opening != o && err == nil {
				err = errors.Join(errors.New("called off"), f.Close())
			}
			if p.opening == o {
				if p.opening = nil; err == nil && f.Config().Uint16(pciClassCode) != classEthernet {
					err = errors.Join(errNoEthernet, f.Close())
				}
				if err == nil {
					p.device = device{Device: primary, fn: f}
				}
			}
			for _, done := range o.done {
				done(err)
			}
		})
	}()
}

// Close is failover.Host.
func (p *failoverPair) Close() {
	if o := p.opening; o != nil {
		p.opening = nil
		o.cancel()
	}
	fn := p.device.fn
	if fn == nil || p.plugged {
		return
	}
	p.device = device{}
	p.m.closing.Go(func() { // to unpin the guest's RAM may take long
		if err := fn.Close(); err != nil {
			p.m.log.Warn("close primary: " + err.Error())
		}
	})
}

// closePairs gives back all primaries of a machine that does not run.
func (m *Machine) closePairs() error {
	var errs []error
	for _, p := range m.pairs {
		if p.opening != nil {
			p.opening.cancel()
		}
		if p.device.fn != nil && !p.plugged { // else it is among the devices
			errs = append(errs, p.device.fn.Close())
		}
	}
	m.closing.Wait()
	return errors.Join(errs...)
}

// Plug is failover.Host.
func (p *failoverPair) Plug() error {
	if err := p.m.plugIn(&p.device); err != nil {
		return err
	}
	p.plugged = true
	p.m.devices = append(p.m.devices, &p.device)
	return nil
}

// pull takes the primary off the bus of a guest that does not run.
func (p *failoverPair) pull() error {
	p.plugged = false
	p.m.dropDevice(p.device.fn)
	p.m.slotOf(p.primary).Take()
	return nil
}

// Unplug is failover.Host.
func (p *failoverPair) Unplug(surprise bool) error {
	return fmt.Errorf("%s cannot be unplugged", p.primary)
}

// Withdraw is failover.Host.
func (p *failoverPair) Withdraw() bool { return true }

// After is failover.Host.
func (p *failoverPair) After(d time.Duration, f func()) (stop func()) {
	stopped := false // the main loop's
	t := time.AfterFunc(d, func() {
		p.m.post(func() {
			if !stopped {
				f()
			}
		})
	})
	return func() { stopped = true; t.Stop() }
}

// classEthernet is base class and sub-class of a network card: PCI Code and ID Assignment 1.3.
const classEthernet = 0x0200

// errNoEthernet has QEMU's words.
var errNoEthernet = errors.New("failover primary device is not an Ethernet device")

// What the events say.
type (
	failoverEvent struct {
		Device string `json:"device-id"`
	}
	failoverState struct {
		Device  string         `json:"device-id"`
		Standby string         `json:"standby-id"`
		From    failover.State `json:"from"`
		State   failover.State `json:"state"`
		Reason  string         `json:"reason,omitempty"`
	}
)

// Changed is failover.Host.
func (p *failoverPair) Changed(from, to failover.State, why error) {
	if p.primary == nil {
		return
	}
	e := failoverState{Device: p.primary.ID, Standby: p.standby, From: from, State: to}
	level := p.m.log.Info
	if why != nil {
		e.Reason = why.Error()
		level = p.m.log.Warn
	}
	level("failover", "primary", p.primary.ID, "standby", p.standby, "from", from, "to", to, "reason", cmp.Or(e.Reason, "-"))
	p.m.events.Publish("FAILOVER_STATE", e)
}

// dropDevice forgets a device that has left its bus.
func (m *Machine) dropDevice(fn pci.Function) {
	for i, d := range m.devices {
		if d.fn == fn {
			m.devices = append(m.devices[:i:i], m.devices[i+1:]...)
			return
		}
	}
}

// sinceMS is how many milliseconds have passed.
func sinceMS(t time.Time) int64 { return time.Since(t).Milliseconds() }
