package vmm

import (
	"maps"

	"baton/vmm/failover"
	"baton/vmm/qmp"
)

type (
	// switchTarget is a half of a pair.
	switchTarget string

	switchArgs struct {
		ID   string       `json:"id"` // of the standby, or of the primary
		To   switchTarget `json:"to"`
		Host *string      `json:"host"` // to primary: from now on this function of the host
		Pool *string      `json:"pool"` // to primary: from now on any free VF of this PF, or of these: PF+PF
	}

	// pairInfo is a pair as query-failover and query-pci show it.
	pairInfo struct {
		Standby    string         `json:"standby-id"`
		Primary    *string        `json:"primary-id,omitempty"` // no primary: there is none
		State      failover.State `json:"state"`
		Negotiated bool           `json:"negotiated"`       // the guest's driver has acked STANDBY
		Open       bool           `json:"open"`             // baton holds the primary
		Away       bool           `json:"away"`             // the guest is to do without it
		For        int64          `json:"ms"`               // in this state
		Unplug     *string        `json:"unplug,omitempty"` // how the guest is made to let go just now
		Slot       *slotState     `json:"slot,omitempty"`   // of the primary's port
		Reason     *string        `json:"reason,omitempty"`
		Retries    int64          `json:"retries"`
		Switches   []switched     `json:"switches"` // the last ones
	}
)

// Values is qmp.Enum.
func (switchTarget) Values() []string { return []string{"standby", "primary"} }

func (m *Machine) failoverCommands() []qmp.Command {
	return []qmp.Command{
		qmp.Query("query-failover", m.pairInfos),
		qmp.Act("failover-switch", m.failoverSwitch),
	}
}

func (m *Machine) pairInfos() []pairInfo {
	list := []pairInfo{}
	for _, p := range m.pairs {
		list = append(list, p.info())
	}
	return list
}

func (p *failoverPair) info() pairInfo {
	s := p.Status()
	i := pairInfo{
		Standby: p.standby, State: s.State, Negotiated: s.Negotiated, Open: p.device != nil, Away: s.Away,
		For: sinceMS(s.Since), Retries: int64(s.Retries), Switches: []switched{},
	}
	if p.carrier != nil {
		i.Switches = p.carrier.switches()
	}
	if p.primary != nil {
		i.Primary = &p.primary.ID
		if slot := p.m.slotOf(p.primary); slot != nil {
			state := slotState(slot.State().String())
			i.Slot = &state
		}
	}
	if s.Asked != "" {
		i.Unplug = (*string)(&s.Asked)
	}
	if s.Why != nil {
		why := s.Why.Error()
		i.Reason = &why
	}
	return i
}

// failoverSwitch takes a primary away, or brings it back, perhaps another one. It begins to:
// FAILOVER_STATE and query-failover say how it goes.
func (m *Machine) failoverSwitch(a switchArgs) error {
	p := m.pairOf(a.ID)
	if p == nil {
		p = m.pairWith(a.ID)
	}
	switch {
	case p == nil:
		return qmp.NoDevice(a.ID)
	case p.primary == nil:
		return qmp.Errorf("Device '%s' has no primary", p.standby)
	case a.To == "standby" && (a.Host != nil || a.Pool != nil):
		return qmp.Errorf("Parameters 'host' and 'pool' are for a switch to the primary")
	case a.To == "standby":
		p.Leave(true, func(error) {}) // FAILOVER_STATE says why not
		return nil
	}
	if a.Host != nil || a.Pool != nil {
		if err := p.replace(a.Host, a.Pool); err != nil {
			return err
		}
	}
	p.Return(nil)
	return nil
}

// replace makes another function of the host the primary, which must not be in its slot.
func (p *failoverPair) replace(host, pool *string) error {
	d := *p.primary
	d.Props = maps.Clone(d.Props)
	for _, key := range []string{"host", "sysfsdev", "pool"} {
		delete(d.Props, key)
	}
	if host != nil {
		d.set("host", *host)
	}
	if pool != nil {
		d.set("pool", *pool)
	}
	switch _, err := d.hostFunction(); {
	case d.Driver != "vfio-pci":
		return qmp.Errorf("Device '%s' is no function of the host", d.ID)
	case p.InSlot():
		return qmp.Errorf("Device '%s' is in use: switch to the standby first", d.ID)
	case err != nil:
		return err
	}
	p.Close()
	p.primary = &d
	return nil
}
