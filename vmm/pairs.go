package vmm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"baton/devices/pci"
	virtionet "baton/devices/virtio/net"
	"baton/vmm/failover"

	"golang.org/x/sys/unix"
)

// failoverPair is a standby, a virtio-net-pci with failover=on, and its primary, either of
// which may be missing. It is failover.Host for its Pair. All of it is the main loop's.
type failoverPair struct {
	*failover.Pair
	m       *Machine
	standby string  // its id
	primary *Device // nil: there is none
	device  *device // the primary, while it is open
	plugged bool    // it is in its slot
	asking  bool    // the guest is to let go of it, and the pair waits for that
	leaving bool    // it was taken away by surprise, which the guest may not have noticed
	waiting func()  // stops the wait for that, or for its ring to be emptied before
	coming  bool    // a guest is coming, which its source has stopped
	opening *opening
	closing bool          // what was the primary is being closed
	later   []func(error) // who wants it open after that
	carrier *carrier      // nil until there is a standby
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

// blinkTime is how long a guest waits for a second press of the attention button: PCIe 6.7.1.5.
const blinkTime = 5 * time.Second

// policy is what the options of a primary say. That its slot blinks is not the guest's delay.
func (m *Machine) policy(d *Device) failover.Policy {
	p := failover.Policy{
		Unplug:  failover.Mode(d.Text("failover-unplug")),
		Timeout: time.Duration(d.Uint("failover-unplug-timeout")) * time.Millisecond,
	}
	port := find(m.cfg.Devices, func(o *Device) bool { return o.ID == d.Bus })
	if p.Timeout > 0 && m.cfg.Machine.NativeHotplug && port != nil && port.Bool("attention-button") {
		p.Timeout += blinkTime
	}
	return p
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

// isPrimary says whether it is the primary of a pair, of which the guest lets go before it moves.
func (m *Machine) isPrimary(fn pci.Function) bool {
	return slices.ContainsFunc(m.pairs, func(p *failoverPair) bool { return p.device != nil && p.device.fn == fn })
}

// addStandby makes a pair for a standby, which is to be plugged. A device that is there
// already and names it is its primary, where it is: it was an ordinary device until now.
func (m *Machine) addStandby(d *Device) {
	p := m.pairOf(d.ID)
	if p == nil { // else it was here before, and its primary is hidden
		p = &failoverPair{m: m, standby: d.ID}
		p.Pair = failover.New(p, failover.Policy{})
		m.pairs = append(m.pairs, p)
	}
	for _, other := range m.devices {
		if other.Text(pairID) == d.ID && p.primary == nil {
			p.take(other.Device)
			p.device, p.plugged = other, true
			p.Adopt()
		}
	}
}

// take makes d the primary of a pair that has none.
func (p *failoverPair) take(d *Device) {
	p.primary = d
	p.renew(p.m.policy(d))
}

// renew begins the pair anew, with what is known of the guest.
func (p *failoverPair) renew(policy failover.Policy) {
	was := p.Status()
	p.Cancel(errors.New("the pair has another primary")) // or its retries would work on that one
	p.Pair = failover.New(p, policy)
	p.Inform(was.Negotiated, was.Away)
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
	p.take(d)
	p.Negotiated(p.Status().Negotiated)
	return true, nil
}

// removePrimary deletes a primary that the guest is not shown; false if there is none.
func (m *Machine) removePrimary(id string) bool {
	p := m.pairWith(id)
	if p == nil || p.plugged {
		return false
	}
	d := p.primary
	p.Close()
	p.forget()
	m.deleted(d)
	return true
}

// leavePair is told of a device that is being deleted, which has left its slot.
func (m *Machine) leavePair(id string) {
	if p := m.pairWith(id); p != nil {
		p.device, p.plugged = nil, false
		p.forget()
	}
	p := m.pairOf(id)
	switch {
	case p == nil:
	case p.primary == nil || p.plugged: // which is an ordinary device from now on
		m.pairs = slices.DeleteFunc(m.pairs, func(o *failoverPair) bool { return o == p })
	default: // it stays hidden, for a standby that may come
		p.Negotiated(false)
	}
	if p != nil && p.carrier != nil { // there is nothing to steer any more
		if p.device != nil {
			p.device.watch.carrier.Store(nil)
		}
		p.carrier.gone()
		p.carrier = nil
	}
}

// forget makes the pair one without a primary.
func (p *failoverPair) forget() {
	p.Cancel(errors.New("the primary was deleted"))
	p.stopWaiting()
	p.primary, p.asking, p.leaving = nil, false, false
	p.renew(failover.Policy{})
}

// negotiated is told that a standby's driver uses the device, with or without STANDBY. One
// that goes on, on another host perhaps, may have been here before.
func (m *Machine) negotiated(standby string, yes, goesOn bool) {
	p := m.pairOf(standby)
	if p == nil || goesOn && yes == p.Status().Negotiated {
		return
	}
	if goesOn && m.State() == StateInMigrate {
		p.Hold()
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
func (m *Machine) resetPairs() {
	for _, p := range m.pairs {
		if p.plugged {
			if slot := m.slotOf(p.primary); slot.RequestUnplug(pci.Surprise) == nil {
				slot.Settle()
			}
		}
		p.Reset()
	}
}

// Open is failover.Host.
func (p *failoverPair) Open(done func(error)) {
	switch {
	case p.primary == nil:
		done(errors.New("there is none"))
	case p.device != nil:
		done(nil)
	case p.closing:
		p.later = append(p.later, done)
	case p.opening != nil:
		p.opening.done = append(p.opening.done, done)
	case p.primary.Driver == "vfio-pci":
		p.reserve(done)
	default: // what does not take long
		b := builder{Machine: p.m, ctx: context.Background()}
		dev, err := b.make(p.primary)
		if err == nil {
			err = p.opened(dev)
		}
		done(err)
	}
}

// reserve opens a function of the host, which may take seconds.
func (p *failoverPair) reserve(done func(error)) {
	ctx, cancel := context.WithCancel(context.Background())
	o := &opening{cancel, []func(error){done}}
	p.opening = o
	primary, early := p.primary, p.m.State() == StateInMigrate
	p.m.closing.Go(func() {
		if early { // RAM is cleared and pinned, for a guest that is not here yet: others of this host go first
			runtime.LockOSThread() // the thread ends with this
			_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
		}
		f, err := p.m.reserve(ctx, primary)
		p.m.post(func() {
			cancel()
			switch {
			case err != nil:
			case p.opening != o:
				err = errors.Join(errors.New("called off"), f.Close())
			case f.Config().Uint16(pciClassCode) != classEthernet:
				err = errors.Join(errNoEthernet, f.Close())
			default:
				d := &device{Device: primary, fn: f}
				p.m.observe(d)
				err = p.opened(d)
			}
			if p.opening == o {
				p.opening = nil
			}
			for _, done := range o.done {
				done(err)
			}
		})
	})
}

// opened is told of the primary once it is open. One that cannot be steered is closed: a guest
// would not know it for its standby's half without the MAC.
func (p *failoverPair) opened(d *device) error {
	p.device = d
	if p.carrier == nil {
		return nil
	}
	err := p.carrier.hide(d)
	if err != nil {
		p.Close()
		err = fmt.Errorf("%w\nsteer=none for %s leaves that to somebody else", err, p.standby)
	}
	return err
}

// observe has the carrier follow what a driver does to a device that may be a primary.
func (m *Machine) observe(d *device) {
	d.fn.Config().OnUse(func(u pci.Use) { // on a vCPU's thread
		if c := d.watch.carrier.Load(); c != nil {
			c.used(u)
		}
	})
}

// Close is failover.Host.
func (p *failoverPair) Close() {
	if o := p.opening; o != nil {
		p.opening = nil
		o.cancel()
	}
	later := p.later
	p.later = nil
	for _, done := range later {
		done(errors.New("called off"))
	}
	d := p.device
	if d == nil || p.plugged {
		return
	}
	p.device, p.closing = nil, true
	if p.carrier != nil {
		p.carrier.returns()
	}
	p.m.closing.Go(func() { // to unpin the guest's RAM may take long
		if err := d.fn.Close(); err != nil {
			p.m.log.Warn(fmt.Sprintf("close %s: %v", d.Device, err))
		}
		p.m.post(p.closed)
	})
}

// closed opens what had to wait for that.
func (p *failoverPair) closed() {
	later := p.later
	p.closing, p.later = false, nil
	for _, done := range later {
		p.Open(done)
	}
}

// closePairs gives back all primaries of a machine that does not run.
func (m *Machine) closePairs() error {
	var errs []error
	for _, p := range m.pairs {
		if p.opening != nil {
			p.opening.cancel()
		}
	}
	m.closing.Wait()
	m.runPosted() // what was opened until now
	for _, p := range m.pairs {
		if p.device != nil && !p.plugged { // else it is among the devices
			errs = append(errs, p.device.fn.Close())
		}
		if p.carrier != nil {
			p.carrier.gone()
			p.carrier.returns()
		}
	}
	return errors.Join(errs...)
}

// Plug is failover.Host.
func (p *failoverPair) Plug() error {
	if err := p.m.plugIn(p.device); err != nil {
		return err
	}
	p.plugged = true
	p.m.devices = append(p.m.devices, p.device)
	if p.carrier != nil {
		p.carrier.plugged()
	}
	return nil
}

// Unplug is failover.Host.
func (p *failoverPair) Unplug(surprise bool) error {
	ask := func() error { return p.unplug(surprise) }
	switch {
	case p.carrier == nil:
		return ask()
	case !surprise:
		_, err := p.carrier.leaving(ask)
		return err
	}
	if fast, _ := p.carrier.leaving(nil); !fast || p.m.State() != StateRunning {
		return ask()
	}
	p.waiting = p.After(drainTime, func() {
		p.waiting = nil
		if err := ask(); err != nil {
			p.Refused(err)
		}
	})
	return nil
}

func (p *failoverPair) unplug(surprise bool) error {
	mode := pci.Cooperative
	if surprise {
		mode = pci.Surprise
	}
	first := !p.asking
	p.asking, p.leaving = true, surprise
	if surprise && p.carrier != nil {
		p.carrier.pull()
	}
	err := p.m.unplug(p.primary.ID, mode, noDeadline, func(err error) {
		switch {
		case !first || !p.asking:
		case err == nil:
			p.ejected()
		default:
			p.asking = false
			p.Refused(err)
		}
	})
	if err != nil {
		p.asking = false
	}
	return err
}

// noDeadline is for what has a deadline of its own.
const noDeadline = 365 * 24 * time.Hour

// Withdraw is failover.Host.
func (p *failoverPair) Withdraw() bool {
	if !p.plugged || p.device.unplug != nil && p.device.unplug.del {
		return false
	}
	slot := p.m.slotOf(p.primary)
	refused := slot.State() == pci.SlotPresent || slot.State() == pci.SlotPlugging // by the guest
	if !refused && !slot.Withdraw() {
		return false
	}
	p.stopWaiting()
	p.asking = false
	if p.device.unplug != nil {
		p.device.finishUnplug(failover.ErrReturned)
	}
	if p.carrier != nil {
		p.carrier.stays()
	}
	return true
}

// ejected says that the primary is off its bus. A guest that was surprised goes on with its
// driver's removal, and only then takes frames from the standby.
func (p *failoverPair) ejected() {
	p.plugged, p.asking = false, false
	p.m.dropDevice(p.device.fn)
	if p.leaving && p.m.slotOf(p.primary).State() == pci.SlotDraining && p.m.State() == StateRunning {
		p.waiting = p.After(noticeTime, p.gone)
		return
	}
	p.gone()
}

// noticeTime is how long a guest may take to notice that its device has gone, and to have its driver
// removed, until when it would drop frames that came by the standby: they are held as long as any are.
const noticeTime = 5 * time.Second

func (p *failoverPair) stopWaiting() {
	if p.waiting != nil {
		p.waiting()
		p.waiting = nil
	}
}

func (p *failoverPair) gone() {
	p.stopWaiting()
	p.leaving = false
	if p.carrier != nil && p.InSlot() {
		p.carrier.left()
	}
	p.Gone()
}

// slotChanged is told of the states of the primary's slot.
func (p *failoverPair) slotChanged(state pci.SlotState) {
	switch {
	case state == pci.SlotBusy && p.carrier != nil && !p.m.cfg.Machine.NativeHotplug: // there it only blinks
		p.carrier.begins()
	case state == pci.SlotPresent && p.carrier != nil:
		p.carrier.present()
	case state == pci.SlotEmpty && p.waiting != nil:
		p.gone()
	case state == pci.SlotEmpty: // which a plug may have failed for
		p.Retry()
	}
}

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
