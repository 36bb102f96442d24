package vmm

import (
	"strings"

	"baton/devices"
	"baton/devices/pci"
	"baton/vmm/qmp"
)

// peripheral is where QEMU's object model has the devices that have ids.
const peripheral = "/machine/peripheral"

type (
	qomArgs struct {
		Path     string `json:"path"`
		Property string `json:"property"`
	}
	qomListArgs struct {
		Path string `json:"path"`
	}
	qomProperty struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
)

func (m *Machine) pciCommands() []qmp.Command {
	return []qmp.Command{
		qmp.Query("query-pci", m.pciBuses),
		qmp.New("qom-get", m.qomGet),
		qmp.New("qom-list", m.qomList),
	}
}

// qomDevice finds a device by its path in the object model, or the end of the path.
func (m *Machine) qomDevice(path string) *device {
	id := strings.TrimPrefix(path, peripheral+"/")
	for _, d := range m.devices {
		if id != "" && d.ID == id {
			return d
		}
	}
	return nil
}

func (m *Machine) qomGet(a qomArgs) (any, error) {
	d := m.qomDevice(a.Path)
	if d == nil {
		return nil, qmp.NoDevice(a.Path)
	}
	switch mac, ok := d.MAC(); {
	case a.Property == "type":
		return d.Driver, nil
	case a.Property == "mac" && ok:
		return macs(mac)[0], nil
	}
	return nil, qmp.Errorf("Property '%s.%s' not found", d.Driver, a.Property)
}

func (m *Machine) qomList(a qomListArgs) ([]qomProperty, error) {
	list := []qomProperty{{"type", "string"}}
	if d := m.qomDevice(a.Path); d != nil {
		if _, ok := d.MAC(); ok {
			list = append(list, qomProperty{"mac", "str"})
		}
		return list, nil
	}
	if strings.TrimSuffix(a.Path, "/") != peripheral {
		return nil, qmp.NoDevice(a.Path)
	}
	for _, d := range m.devices {
		if d.ID != "" {
			list = append(list, qomProperty{d.ID, "child<" + d.Driver + ">"})
		}
	}
	return list, nil
}

// What query-pci shows: QEMU's qapi/pci.json.
type (
	pciBus struct {
		Bus     int64        `json:"bus"`
		Devices []*pciDevice `json:"devices"`
		Pairs   []pairInfo   `json:"failover,omitempty"` // baton's: primaries that are hidden, too
	}
	pciDevice struct {
		Bus      int64 `json:"bus"`
		Slot     int64 `json:"slot"`
		Function int64 `json:"function"`
		Class    struct {
			Desc  string `json:"desc,omitempty"`
			Class int64  `json:"class"`
		} `json:"class_info"`
		ID struct {
			Device    int64  `json:"device"`
			Vendor    int64  `json:"vendor"`
			Subsystem *int64 `json:"subsystem,omitempty"`
			SubVendor *int64 `json:"subsystem-vendor,omitempty"`
		} `json:"id"`
		IRQPin  int64       `json:"irq_pin"`
		QdevID  string      `json:"qdev_id"`
		Bridge  *pciBridge  `json:"pci_bridge,omitempty"`
		Regions []pciRegion `json:"regions"`
	}
	pciRegion struct {
		BAR      int64  `json:"bar"`
		Type     string `json:"type"`
		Address  int64  `json:"address"` // -1: not mapped
		Size     int64  `json:"size"`
		Prefetch bool   `json:"prefetch"`
		Is64     bool   `json:"mem_type_64"`
	}
	pciBridge struct {
		Bus struct {
			Number       int64    `json:"number"`
			Secondary    int64    `json:"secondary"`
			Subordinate  int64    `json:"subordinate"`
			IO           pciRange `json:"io_range"`
			Memory       pciRange `json:"memory_range"`
			Prefetchable pciRange `json:"prefetchable_range"`
		} `json:"bus"`
		Devices []*pciDevice `json:"devices,omitempty"`
		Slot    *pciSlot     `json:"x-slot,omitempty"` // baton's
	}
	pciSlot struct {
		Chassis int64     `json:"chassis"`
		Number  int64     `json:"number"`
		State   slotState `json:"state"`
	}
	slotState string
	pciRange  struct {
		Base  int64 `json:"base"`
		Limit int64 `json:"limit"`
	}
)

// Values is qmp.Enum.
func (slotState) Values() (names []string) {
	for s := pci.SlotEmpty; s <= pci.SlotDraining; s++ {
		names = append(names, s.String())
	}
	return names
}

// pciClassCode is where the class is, without the programming interface.
const pciClassCode = pci.RegClass + 2

var pciClasses = map[int64]string{0x0100: "SCSI controller", 0x0200: "Ethernet controller", 0x0600: "Host bridge", 0x0604: "PCI bridge"}

// pciBuses shows the tree: devices behind a port are part of the port.
func (m *Machine) pciBuses() []pciBus {
	root := pciBus{Devices: []*pciDevice{}, Pairs: m.pairInfos()}
	ids := map[pci.Function]string{}
	for _, d := range m.devices {
		ids[d.fn] = d.ID
	}
	ports := map[int64]*pciBridge{}
	m.pci.Walk(func(at pci.BDF, f pci.Function) {
		d := describePCI(at, f)
		d.QdevID = ids[f]
		if port := ports[d.Bus]; port != nil {
			port.Devices = append(port.Devices, d)
			return
		}
		root.Devices = append(root.Devices, d)
		if d.Bridge != nil && d.Bridge.Bus.Secondary != 0 {
			ports[d.Bridge.Bus.Secondary] = d.Bridge
		}
	})
	return []pciBus{root}
}

func describePCI(at pci.BDF, f pci.Function) *pciDevice {
	c := f.Config()
	get := func(off int) int64 { return int64(c.Uint16(off)) }
	d := &pciDevice{Bus: int64(at.Bus()), Slot: int64(at.Device()), Function: int64(at.Function()), Regions: []pciRegion{}}
	class := get(pciClassCode)
	d.Class.Class, d.Class.Desc = class, pciClasses[class]
	d.ID.Vendor, d.ID.Device, d.IRQPin = get(pci.RegVendor), get(pci.RegVendor+2), get(pci.RegInterrupt)>>8
	for _, r := range c.Regions() {
		address := int64(-1)
		if r.Mapped {
			address = int64(r.Base)
		}
		d.Regions = append(d.Regions, pciRegion{int64(r.Index), "memory", address, int64(r.Size), r.Prefetchable, r.Is64})
	}
	if get(pci.RegHeaderType)&0x7f == 0 {
		subsystem, vendor := get(pci.RegSubsystem+2), get(pci.RegSubsystem)
		d.ID.Subsystem, d.ID.SubVendor = &subsystem, &vendor
		return d
	}
	mem, prefetchable := c.Windows()
	b := &pciBridge{}
	b.Bus.Number, b.Bus.Secondary, b.Bus.Subordinate = get(pci.RegPrimary)&0xff, get(pci.RegPrimary)>>8, get(pci.RegSubordinate)&0xff
	b.Bus.IO = pciRange{0xf000, 0xfff} // closed: there are no I/O windows
	b.Bus.Memory, b.Bus.Prefetchable = window(mem), window(prefetchable)
	if port, ok := f.(*pci.RootPort); ok {
		chassis, number := port.Number()
		b.Slot = &pciSlot{int64(chassis), int64(number), slotState(port.Slot().State().String())}
	}
	d.Bridge = b
	return d
}

// window is closed, which is what a base above the limit says, if the range is empty.
func window(r devices.Range) pciRange {
	if r.Size == 0 {
		return pciRange{0xfff0_0000, 0xf_ffff}
	}
	return pciRange{int64(r.Base), int64(r.End() - 1)}
}
