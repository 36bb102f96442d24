package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	virtionet "baton/devices/virtio/net"
	"baton/vmm/qmp"
)

// nics is what the machine knows of its network besides the devices.
type nics struct {
	mu   sync.Mutex
	idle map[string]virtionet.Backend // of netdevs that no device uses, by id
	told map[string]bool              // NICs whose change of filter nobody has asked about yet
}

// borrow returns the backend of a netdev, which is opened with its first device and stays open
// when that has gone.
func (n *nics) borrow(ctx context.Context, spec *Netdev) (virtionet.Backend, error) {
	backend := n.take(spec.ID)
	if backend == nil {
		var err error
		if backend, err = netBackend(ctx, spec); err != nil {
			return nil, err
		}
	}
	return &borrowed{backend, spec.ID, n}, nil
}

// openNetdevs opens those that no device uses yet.
func (m *Machine) openNetdevs(ctx context.Context) error {
	var errs []error
	for i := range m.cfg.Netdevs {
		n := &m.cfg.Netdevs[i]
		if slices.ContainsFunc(m.cfg.Devices, func(d Device) bool { return d.Text("netdev") == n.ID }) {
			continue
		}
		backend, err := netBackend(ctx, n)
		if err != nil {
			errs = append(errs, fmt.Errorf("netdev %s: %w", n.ID, err))
			continue
		}
		m.nics.giveBack(n.ID, backend)
	}
	return errors.Join(errs...)
}

// take returns the backend of a netdev that no device uses, nil if it has none.
func (n *nics) take(id string) virtionet.Backend {
	n.mu.Lock()
	defer n.mu.Unlock()
	b := n.idle[id]
	delete(n.idle, id)
	return b
}

func (n *nics) giveBack(id string, b virtionet.Backend) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.idle == nil {
		n.idle = map[string]virtionet.Backend{}
	}
	n.idle[id] = b
}

// close closes the backends that no device uses.
func (n *nics) close() (err error) {
	for _, b := range n.idle {
		err = errors.Join(err, b.Close())
	}
	n.idle = nil
	return err
}

// borrowed is a netdev's backend in the hands of a device.
type borrowed struct {
	virtionet.Backend
	id   string
	nics *nics
}

// Close gives it back.
func (b *borrowed) Close() error {
	b.nics.giveBack(b.id, b.Backend)
	return nil
}

// netName is what QMP calls a NIC.
func (d *Device) netName() string {
	if d.ID == "" {
		return d.Driver + "." + d.Addr
	}
	return d.ID
}

type filterEvent struct {
	Name string `json:"name"`
	Path string `json:"path"`
}

// changed tells clients, once until they ask, that a driver has changed its filter.
func (n *nics) changed(name string, events *EventBus) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.told[name] {
		if n.told == nil {
			n.told = map[string]bool{}
		}
		n.told[name] = true
		events.Publish("NIC_RX_FILTER_CHANGED", filterEvent{name, peripheral + "/" + name + "/virtio-backend"})
	}
}

// nic is a network device that there is.
type nic struct {
	*Device
	*virtionet.Net
}

func (m *Machine) networkCards() (list []nic) {
	for _, d := range m.devices {
		if model, ok := d.model.(*virtionet.Net); ok {
			list = append(list, nic{d.Device, model})
		}
	}
	return list
}

type (
	netdevType string
	netdevArgs struct {
		Type       netdevType `json:"type"`
		ID         string     `json:"id"`
		IfName     *string    `json:"ifname,omitempty"`
		Script     *string    `json:"script,omitempty"`
		DownScript *string    `json:"downscript,omitempty"`
		VHost      *bool      `json:"vhost,omitempty"`
		Queues     *int64     `json:"queues,omitempty"`
		FD         *string    `json:"fd,omitempty"`
		FDs        *string    `json:"fds,omitempty"`
	}
	idArgs struct {
		ID string `json:"id"`
	}
	linkArgs struct {
		Name string `json:"name"`
		Up   bool   `json:"up"`
	}
	filterArgs struct {
		Name *string `json:"name"`
	}
	announceArgs struct {
		Initial    int64    `json:"initial"` // milliseconds
		Max        int64    `json:"max"`
		Rounds     int64    `json:"rounds"`
		Step       int64    `json:"step"`
		Interfaces []string `json:"interfaces,omitempty"`
		ID         *string  `json:"id"`
	}
)

func (netdevType) Values() []string { return []string{"tap"} }

func (m *Machine) netCommands(ctx context.Context) []qmp.Command {
	return []qmp.Command{
		qmp.Act("netdev_add", func(a netdevArgs) error { return m.netdevAdd(ctx, a) }),
		qmp.Act("netdev_del", func(a idArgs) error { return m.netdevDel(a.ID) }),
		qmp.Act("set_link", m.setLink),
		qmp.Act("announce-self", func(a announceArgs) error { go m.announce(ctx, a); return nil }),
		qmp.New("query-rx-filter", m.rxFilters),
	}
}

// netdevAdd makes a netdev, which waits for a device to use it.
func (m *Machine) netdevAdd(ctx context.Context, a netdevArgs) error {
	switch {
	case !wellFormedID.MatchString(a.ID):
		return qmp.Errorf("Parameter 'id' expects an identifier")
	case m.cfg.Netdev(a.ID) != nil:
		return qmp.Errorf("Duplicate ID '%s'", a.ID)
	}
	text, err := json.Marshal(a)
	if err != nil {
		return err
	}
	p := parser{cfg: &Config{}}
	_, vals, _, err := parseObject(string(text), "type", netdevKinds)
	if err != nil {
		return err
	}
	if err := p.addNetdev(string(a.Type), vals); err != nil {
		return err
	}
	var bad problems
	if p.cfg.validateBackends(&bad); len(bad) > 0 {
		return bad[0]
	}
	backend, err := netBackend(ctx, &p.cfg.Netdevs[0])
	if err != nil {
		return err
	}
	m.cfg.Netdevs = append(m.cfg.Netdevs, p.cfg.Netdevs[0])
	m.nics.giveBack(a.ID, backend)
	return nil
}

func (m *Machine) netdevDel(id string) error {
	switch {
	case m.cfg.Netdev(id) == nil:
		return qmp.NoDevice(id)
	case slices.ContainsFunc(m.cfg.Devices, func(d Device) bool { return d.Text("netdev") == id }):
		return qmp.Errorf("Netdev '%s' is in use", id)
	}
	m.cfg.Netdevs = slices.DeleteFunc(slices.Clone(m.cfg.Netdevs), func(n Netdev) bool { return n.ID == id })
	if backend := m.nics.take(id); backend != nil {
		return backend.Close()
	}
	return nil
}

// setLink takes the id of a NIC or of its netdev.
func (m *Machine) setLink(a linkArgs) error {
	for _, n := range m.networkCards() {
		if n.netName() == a.Name || n.Text("netdev") == a.Name {
			n.SetLink(a.Up)
			return nil
		}
	}
	return qmp.NoDevice(a.Name)
}

// announce tells the network where the guest is, in rounds that get further apart.
func (m *Machine) announce(ctx context.Context, a announceArgs) {
	wait := min(max(0, a.Initial), a.Max)
	for range a.Rounds {
		if err := m.call(func() { m.announceOnce(a.Interfaces) }); err != nil {
			return
		}
		select {
		case <-time.After(time.Duration(wait) * time.Millisecond):
		case <-ctx.Done():
			return
		}
		wait = min(max(0, wait+a.Step), a.Max)
	}
}

// announceOnce is a round of announce; no interfaces are all.
func (m *Machine) announceOnce(interfaces []string) {
	for _, n := range m.networkCards() {
		if interfaces == nil || slices.Contains(interfaces, n.netName()) {
			if err := n.Announce(); err != nil {
				m.log.Warn(fmt.Sprintf("announce %s: %v", n.Device, err))
			}
		}
	}
}

// rxFilter is QEMU's RxFilterInfo.
type rxFilter struct {
	Name              string   `json:"name"`
	Promiscuous       bool     `json:"promiscuous"`
	Multicast         rxState  `json:"multicast"`
	Unicast           rxState  `json:"unicast"`
	VLAN              rxState  `json:"vlan"`
	Broadcast         bool     `json:"broadcast-allowed"`
	MulticastOverflow bool     `json:"multicast-overflow"`
	UnicastOverflow   bool     `json:"unicast-overflow"`
	MAC               string   `json:"main-mac"`
	VLANs             []int64  `json:"vlan-table"`
	UnicastTable      []string `json:"unicast-table"`
	MulticastTable    []string `json:"multicast-table"`
}

type rxState string

func (rxState) Values() []string { return []string{"normal", "none", "all"} }

func receiveState(all, none bool) rxState {
	switch {
	case all:
		return "all"
	case none:
		return "none"
	}
	return "normal"
}

// rxFilters is query-rx-filter. Who asks is told of the next change.
func (m *Machine) rxFilters(a filterArgs) (list []rxFilter, err error) {
	m.nics.mu.Lock()
	defer m.nics.mu.Unlock()
	for _, n := range m.networkCards() {
		if a.Name != nil && *a.Name != n.netName() {
			continue
		}
		delete(m.nics.told, n.netName())
		f := n.RxFilter()
		vlans := []int64{}
		for v := range 64 * len(f.VLANs) {
			if f.VLANs[v/64]>>(v%64)&1 != 0 {
				vlans = append(vlans, int64(v))
			}
		}
		list = append(list, rxFilter{
			Name: n.netName(), Promiscuous: f.Promiscuous, Broadcast: !f.NoBroadcast,
			Multicast: receiveState(f.AllMulti, f.NoMulti), Unicast: receiveState(f.AllUni, f.NoUni),
			VLAN:              receiveState(!f.VLANFilter, len(vlans) == 0),
			MulticastOverflow: f.MulticastOverflow, UnicastOverflow: f.UnicastOverflow,
			MAC: macs(f.MAC)[0], VLANs: vlans, UnicastTable: macs(f.Unicast...), MulticastTable: macs(f.Multicast...),
		})
	}
	if a.Name != nil && list == nil {
		return nil, qmp.Errorf("invalid net client name: %s", *a.Name)
	}
	return list, nil
}

func macs(addrs ...virtionet.MAC) []string {
	list := []string{}
	for _, a := range addrs {
		list = append(list, net.HardwareAddr(a[:]).String())
	}
	return list
}
