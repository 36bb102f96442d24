package vmm

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"

	"baton/devices"
	"baton/vmm/hmp"
	"baton/vmm/qmp"
)

const monitorHMP = "readline" // Monitor.Mode of the human monitor, as -mon has it

type humanArgs struct {
	Line string `json:"command-line"`
	CPU  *int64 `json:"cpu-index"`
}

// humanCommand is human-monitor-command. The monitor is made once there is a server.
func humanCommand(human **hmp.Monitor) qmp.Command {
	return qmp.New("human-monitor-command", func(a humanArgs) (string, error) {
		return strings.ReplaceAll((*human).Run(a.Line), "\n", "\r\n"), nil
	})
}

// newHuman makes the human monitor of the commands that s has.
func (m *Machine) newHuman(s *qmp.Server) *hmp.Monitor {
	return hmp.New(hmp.Config{
		Commands: s.Names(), Execute: s.Execute, Do: m.call,
		Views: []hmp.View{
			{Name: "network", Help: "the network cards and what is behind them", Text: m.networkText},
			{Name: "qtree", Help: "the devices, by their buses", Text: m.deviceText},
			{Name: "failover", Help: "the failover pairs: where each primary is, and why", Text: m.failoverText},
			{Name: "mtree", Help: "what is where in memory and I/O space", Text: m.addressText},
			{Name: "registers", Help: "where each CPU stands", Text: m.registersText},
			{Name: "irq", Help: "the interrupts that KVM knows the way of: IOAPIC pins that wait for an EOI, and messages", Text: m.irq.text},
		},
	})
}

// serveHuman talks to the clients of the human monitor at mon until ctx is done.
func (m *Machine) serveHuman(ctx context.Context, human *hmp.Monitor, mon monitor) {
	if mon.conn != nil {
		go human.Converse(ctx, mon.conn, mon.telnet)
	}
	if mon.listener != nil {
		context.AfterFunc(ctx, func() { mon.listener.Close() })
		go qmp.Accept(mon.listener, func(conn net.Conn) { human.Converse(ctx, conn, mon.telnet) })
	}
}

// networkText is info network: each card with its netdev, then the netdevs without one.
func (m *Machine) networkText() string {
	var b strings.Builder
	netdev := func(before string, n *Netdev) {
		fmt.Fprintf(&b, "%s%s: type=%s,ifname=%s,script=%s,downscript=%s,vhost=%v,queues=%d\n", before, n.ID, n.Type, n.IfName,
			cmp.Or(n.Script, "no"), cmp.Or(n.DownScript, "no"), spell(n.VHost), n.Queues)
	}
	used := map[string]bool{}
	for _, card := range m.networkCards() {
		mac, _ := card.MAC()
		fmt.Fprintf(&b, "%s: type=nic,model=%s,macaddr=%s\n", card.netName(), card.Driver, macs(mac)[0])
		if n := m.cfg.Netdev(card.Text("netdev")); n != nil {
			used[n.ID] = true
			netdev(` \ `, n)
		}
	}
	for i := range m.cfg.Netdevs {
		if n := &m.cfg.Netdevs[i]; !used[n.ID] {
			netdev("", n)
		}
	}
	return b.String()
}

// deviceText is info qtree.
func (m *Machine) deviceText() string {
	var b strings.Builder
	var walk func(bus string, kind busKind, indent string)
	walk = func(bus string, kind busKind, indent string) {
		fmt.Fprintf(&b, "%sbus: %s\n%s  type %s\n", indent, bus, indent, kind)
		for i := range m.cfg.Devices {
			d := &m.cfg.Devices[i]
			if d.Bus != bus {
				continue
			}
			fmt.Fprintf(&b, "%s  dev: %s, id %q\n", indent, d.Driver, d.ID)
			if d.Addr != "" {
				fmt.Fprintf(&b, "%s    addr = %s\n", indent, d.Addr)
			}
			for _, key := range slices.Sorted(maps.Keys(d.Props)) {
				fmt.Fprintf(&b, "%s    %s = %v\n", indent, key, spell(d.Props[key]))
			}
			switch d.row().provides {
			case busPCI:
				walk(d.ID, busPCI, indent+"    ")
			case busSerial:
				walk(d.ID+".0", busSerial, indent+"    ")
			}
		}
	}
	walk(RootBus, busPCI, "")
	return b.String()
}

// addressText is info mtree.
func (m *Machine) addressText() string {
	var b strings.Builder
	line := func(digits int) func(r devices.Range, name string) {
		return func(r devices.Range, name string) {
			fmt.Fprintf(&b, "  %0*x-%0*x: %s\n", digits, r.Base, digits, r.End()-1, name)
		}
	}
	b.WriteString("address-space: memory\n")
	for _, r := range m.mem.Regions() {
		line(16)(devices.Range{Base: r.GPA, Size: r.Size}, "ram")
	}
	m.mmio.Walk(line(16))
	b.WriteString("memory slots of KVM\n")
	for i, r := range m.mem.Regions() {
		line(16)(devices.Range{Base: r.GPA, Size: r.Size}, fmt.Sprintf("slot %d", i))
	}
	m.vfio.slots.walk(func(slot uint32, r devices.Range) { line(16)(r, fmt.Sprintf("slot %d", slot)) })
	b.WriteString("address-space: I/O\n")
	m.ports.Walk(line(4))
	return b.String()
}

// registersText is info registers. The vCPUs stand still for it.
func (m *Machine) registersText() string {
	var b strings.Builder
	running := m.State() == StateRunning
	m.stopVCPUs()
	for _, c := range m.vcpus {
		fmt.Fprintf(&b, "%s\n  %s\n", m.describe(c, "registers"), c.interrupts())
	}
	if running {
		m.goOn()
	}
	return b.String()
}

// failoverText is info failover.
func (m *Machine) failoverText() string {
	var b strings.Builder
	for _, p := range m.pairInfos() {
		fmt.Fprintf(&b, "%s: ", p.Standby)
		if p.Primary == nil {
			b.WriteString("no primary\n")
			continue
		}
		fmt.Fprintf(&b, "primary %s is %s, for %d ms\n", *p.Primary, p.State, p.For)
		fmt.Fprintf(&b, "    the guest's driver has %sacked STANDBY\n", map[bool]string{false: "not "}[p.Negotiated])
		fmt.Fprintf(&b, "    open: %s, wanted away: %s", spell(p.Open), spell(p.Away))
		if p.Slot != nil {
			fmt.Fprintf(&b, ", slot: %s", *p.Slot)
		}
		if p.Unplug != nil {
			fmt.Fprintf(&b, ", unplug: %s", *p.Unplug)
		}
		b.WriteString("\n")
		if p.Reason != nil {
			fmt.Fprintf(&b, "    %s\n", *p.Reason)
		}
		for _, s := range p.Switches {
			fmt.Fprintf(&b, "    %s: to the %s, after %.1f ms; %d frames held, %d dropped\n", s.Point, s.To, float64(s.Outage)/1000, s.Held, s.Dropped)
		}
	}
	return b.String()
}
