// Package steer moves a guest's MAC between the two ports of the host by which a failover pair
// is reached: the VF that is its primary and the TAP that is its standby.
//
//	                 ┌─ VF ──────────────────────> primary ─┐
//	wire ── PF ──────┤  the VF has the MAC                  ├─ guest
//	                 └─ bridge ──────── TAP ─────> standby ─┘
//	                    it has not; the bridge's entry says TAP
//
// The PF hands a frame to the VF that has its MAC as soon as its administrator says so, whether
// a driver serves the VF or not. While a guest lets go of a VF, or takes one, the PF has a
// filter for the MAC as well ([Both]): frames then go both ways, and what the one way loses waits
// on the other. It keeps that while the VF is without the MAC: that a PF is promiscuous, as a
// port of a bridge is, does not mean that it gets what no VF wants, as long as one of them, pulled
// from a guest that could not stop it, listens to more than its MAC.
package steer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Config says what is steered.
type Config struct {
	MAC net.HardwareAddr // the guest's
	TAP string           // interface of the standby
	// Script, if there is one, is run instead of anything that this package would do. Its
	// argument is the step; its environment has that as BATON_STEP, and BATON_MAC, BATON_TAP,
	// BATON_PF and BATON_VF, the latter two empty for a primary that is no VF.
	Script string
	Off    bool // do nothing
}

// VF is the primary as its PF has it. Without a PF it is another NIC, which is reached by a
// wire of its own and cannot be steered from here.
type VF struct {
	PF    string // interface of the PF
	Index int
}

// Step is where the guest's frames are to go; the names are what a script gets.
type Step string

// The steps.
const (
	Hide    Step = "hide"    // not to the VF, which baton has taken
	Both    Step = "both"    // to the VF, if it has the MAC, and to the TAP
	GiveMAC Step = "mac"     // the VF gets the MAC, which its driver is about to read
	Primary Step = "primary" // to the VF; the switch at the PF's wire, which need not be the bridge's, is told
	Standby Step = "standby" // to the TAP
	Gone    Step = "gone"    // the guest is on another host
	Return  Step = "return"  // baton gives the VF back, with the MAC that it had unless that is the guest's
)

// Steerer steers one pair.
type Steerer struct {
	c Config

	mu   sync.Mutex // held for a step
	copy string     // the PF that has a filter for the MAC, "" if none
	was  map[VF]net.HardwareAddr
}

// New returns a steerer, which has done nothing yet.
func New(c Config) *Steerer { return &Steerer{c: c} }

// Do carries out a step. What cannot be done is in the error; the rest of the step is done.
func (s *Steerer) Do(ctx context.Context, step Step, vf VF) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	switch {
	case s.c.Off:
	case s.c.Script != "":
		err = s.run(ctx, step, vf)
	default:
		err = s.netlink(step, vf)
	}
	if err != nil {
		return fmt.Errorf("steer %s to %s: %w", s.c.MAC, step, err)
	}
	return nil
}

func (s *Steerer) run(ctx context.Context, step Step, vf VF) error {
	cmd := exec.CommandContext(ctx, s.c.Script, string(step))
	index := ""
	if vf.PF != "" {
		index = strconv.Itoa(vf.Index)
	}
	cmd.Env = append(os.Environ(), "BATON_STEP="+string(step), "BATON_MAC="+s.c.MAC.String(), "BATON_TAP="+s.c.TAP, "BATON_PF="+vf.PF, "BATON_VF="+index)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("script %s: %w", s.c.Script, err)
	}
	return nil
}

func (s *Steerer) netlink(step Step, vf VF) error {
	switch step {
	case Hide:
		s.remember(vf)
		err := vf.setMAC(noMAC)
		if errors.Is(err, unix.EINVAL) { // there are PFs to which that is no MAC: it has another one
			err = nil
		}
		return err
	case Return:
		was, known := s.was[vf]
		delete(s.was, vf)
		if !known || bytes.Equal(was, s.c.MAC) || bytes.Equal(was, noMAC) {
			return nil // a VF that nobody serves must not have the guest's
		}
		return vf.setMAC(was)
	case Both:
		return s.copies(vf.PF)
	case GiveMAC:
		return vf.setMAC(s.c.MAC)
	case Primary:
		return errors.Join(vf.setMAC(s.c.MAC), s.entry(vf.PF), s.filter(""), s.announce(vf.PF))
	case Standby:
		return errors.Join(s.copies(vf.PF), vf.setMAC(noMAC))
	}
	return errors.Join(s.entry(""), s.filter(""))
}

var noMAC = make(net.HardwareAddr, 6)

// remember notes the MAC of a VF before it is changed.
func (s *Steerer) remember(vf VF) {
	pf, err := netlink.LinkByName(vf.PF)
	if vf.PF == "" || err != nil {
		return
	}
	for _, info := range pf.Attrs().Vfs {
		if info.ID == vf.Index {
			if s.was == nil {
				s.was = map[VF]net.HardwareAddr{}
			}
			s.was[vf] = info.Mac
		}
	}
}

// port is an interface of which only its index is known: to be told more of a PF takes milliseconds,
// for it has to ask its device.
func port(name string) (netlink.Link, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr)
	}
	if err != nil {
		return nil, err
	}
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: name, Index: int(ifr.Uint32())}}, nil
}

// setMAC tells the PF which MAC the VF has; all zero: none.
func (vf VF) setMAC(mac net.HardwareAddr) error {
	if vf.PF == "" {
		return nil
	}
	pf, err := port(vf.PF)
	if err == nil {
		err = netlink.LinkSetVfHardwareAddr(pf, vf.Index, mac)
	}
	if err != nil {
		return fmt.Errorf("give VF %d of %s the MAC %s: %w", vf.Index, vf.PF, mac, err)
	}
	return nil
}

// Resets says whether the PF is known to reset a VF when it is told its MAC, which takes it from its driver.
func (vf VF) Resets() bool {
	driver, _ := os.Readlink(filepath.Join("/sys/class/net", vf.PF, "device/driver"))
	return slices.Contains([]string{"i40e", "ice"}, filepath.Base(driver))
}

// copies has what the PF named pf does not hand to a VF alone go to the TAP, unless that is so.
func (s *Steerer) copies(pf string) error {
	if pf != "" && s.copy == pf {
		return nil
	}
	return errors.Join(s.entry(s.c.TAP), s.filter(pf))
}

// filter has the PF named pf take frames for the MAC itself, and no other one; "" is none.
func (s *Steerer) filter(pf string) (err error) {
	if s.copy == pf {
		return nil
	}
	change := func(name string, how func(*netlink.Neigh) error) error {
		link, err := port(name)
		if err == nil {
			err = how(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT, HardwareAddr: s.c.MAC})
		}
		if err != nil {
			return fmt.Errorf("filter of %s: %w", name, err)
		}
		return nil
	}
	if s.copy != "" {
		err = change(s.copy, netlink.NeighDel)
		s.copy = ""
	}
	if pf != "" {
		if aerr := change(pf, netlink.NeighAdd); aerr == nil || errors.Is(aerr, unix.EEXIST) {
			s.copy = pf
		} else {
			err = errors.Join(err, aerr)
		}
	}
	return err
}

// entry has the TAP's bridge, if it has one, forward frames for the MAC to a port; to where it
// learns that the MAC is, if the port is "" or none of this bridge's.
func (s *Steerer) entry(port string) error {
	tap, err := netlink.LinkByName(s.c.TAP)
	if err != nil {
		return fmt.Errorf("find %s: %w", s.c.TAP, err)
	}
	bridge := tap.Attrs().MasterIndex
	if bridge == 0 {
		return nil
	}
	to := 0
	if port == s.c.TAP {
		to = tap.Attrs().Index
	} else if port != "" {
		link, err := netlink.LinkByName(port)
		if err != nil {
			return fmt.Errorf("find %s: %w", port, err)
		}
		if link.Attrs().MasterIndex == bridge {
			to = link.Attrs().Index
		}
	}
	if to != 0 {
		if err := netlink.NeighSet(s.forward(to)); err != nil {
			return fmt.Errorf("forward to %s: %w", port, err)
		}
		return nil
	}
	// It may be at any port: what is not there cannot be deleted.
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if l.Attrs().MasterIndex == bridge {
			if err := netlink.NeighDel(s.forward(l.Attrs().Index)); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("forget the port %s: %w", l.Attrs().Name, err)
			}
		}
	}
	return nil
}

// forward is an entry that neither ages nor moves to a port by which the MAC is seen: a guest sends
// by its standby until its primary has a carrier, and there are NICs that hand a broadcast of their
// PF back to it, such as the RARP that has just told where the guest is.
func (s *Steerer) forward(port int) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: port, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER | netlink.NTF_STICKY, State: netlink.NUD_NOARP, HardwareAddr: s.c.MAC}
}
