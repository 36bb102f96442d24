package hmp

import (
	"encoding/json"
	"fmt"
	"strings"
)

// just is a command that passes nothing on and has nothing to show.
func just(name, alias, help string) command {
	return command{name: name, alias: alias, help: help, qmp: name, run: func(m *Monitor, _ []string) (string, error) { return m.do(name, nil) }}
}

func commands() []command {
	return []command{
		{name: "help", alias: "?", params: "[COMMAND]", help: "show the commands, or one of them", run: (*Monitor).help},
		{name: "info", params: "[SUBJECT]", help: "show something of the machine; without a subject, which there are",
			run: func(m *Monitor, _ []string) (string, error) { return list("info ", m.infos), nil }},
		just("cont", "c", "let the guest run on"),
		just("quit", "q", "end baton; the guest is turned off"),
		just("stop", "s", "stop the guest"),
		just("system_powerdown", "", "press the power button"),
		just("system_reset", "", "reset the guest"),
		{name: "device_add", params: "DRIVER[,KEY=VALUE...]", help: "plug a device into a free slot, or that of bus=", qmp: "device_add", run: (*Monitor).deviceAdd},
		{name: "device_del", params: "ID [MODE]", help: "unplug a device: cooperative, which asks the guest, or surprise", qmp: "device_del", run: (*Monitor).deviceDel},
		{name: "netdev_add", params: "tap,id=ID[,KEY=VALUE...]", help: "add a host's side of a network card", qmp: "netdev_add", run: (*Monitor).netdevAdd},
		{name: "netdev_del", params: "ID", help: "remove one", qmp: "netdev_del", run: pass("netdev_del", "id")},
		{name: "set_link", params: "NAME on|off", help: "plug or pull the cable of a network card or a netdev", qmp: "set_link", run: (*Monitor).setLink},
	}
}

var infos = []command{
	{name: "block", help: "the disks", qmp: "query-block", run: infoBlock},
	{name: "cpus", help: "the vCPUs and their threads", qmp: "query-cpus-fast", run: infoCPUs},
	{name: "pci", help: "the PCI devices as the guest has configured them", qmp: "query-pci", run: infoPCI},
	{name: "status", help: "whether the guest runs", qmp: "query-status", run: infoStatus},
	{name: "version", help: "which baton this is", qmp: "query-version", run: infoVersion},
}

// list shows rows of a table; before stands before each name.
func list(before string, rows []command) string {
	var b strings.Builder
	for _, c := range rows {
		name := before + c.name
		if c.alias != "" {
			name += "|" + c.alias
		}
		fmt.Fprintf(&b, "%s -- %s\n", strings.TrimSpace(name+" "+c.params), c.help)
	}
	return b.String()
}

func (m *Monitor) help(args []string) (string, error) {
	if len(args) == 0 {
		return list("", m.commands), nil
	}
	c := find(m.commands, args[0])
	switch {
	case c == nil:
		return "", fmt.Errorf("there is no command %s", args[0])
	case c.name == "info":
		return list("info ", m.infos), nil
	}
	return list("", []command{*c}), nil
}

// Word is a value whose type only the command knows, as people do not write any.
type Word string

// words reads "first,key=value,flag", where first is the value of the key implied, as an option
// of the command line.
func words(text, implied string) (map[string]any, error) {
	object := map[string]any{}
	for i, word := range strings.Split(strings.ReplaceAll(text, ",,", "\x00"), ",") {
		key, value, given := strings.Cut(strings.ReplaceAll(word, "\x00", ","), "=")
		if !given && i == 0 {
			key, value = implied, key
		} else if !given {
			value = "on"
		}
		if _, twice := object[key]; twice {
			return nil, fmt.Errorf("%s: given twice", key)
		}
		object[key] = Word(value)
	}
	return object, nil
}

// netdevAdd takes what -netdev takes.
func (m *Monitor) netdevAdd(args []string) (string, error) {
	object, err := words(args[0], "type")
	if err != nil {
		return "", err
	}
	for key, v := range object {
		switch value := string(v.(Word)); key {
		case "vhost":
			object[key] = value == "on"
		case "queues":
			object[key] = json.Number(value)
		default:
			object[key] = value
		}
	}
	return m.do("netdev_add", object)
}

// deviceAdd takes what -device takes.
func (m *Monitor) deviceAdd(args []string) (string, error) {
	object, err := words(args[0], "driver")
	if err != nil {
		return "", err
	}
	if driver, ok := object["driver"].(Word); ok {
		object["driver"] = string(driver)
	}
	if id, ok := object["id"].(Word); ok {
		object["id"] = string(id)
	}
	return m.do("device_add", object)
}

func (m *Monitor) deviceDel(args []string) (string, error) {
	object := map[string]any{"id": args[0]}
	if len(args) > 1 {
		object["mode"] = args[1]
	}
	return m.do("device_del", object)
}

func (m *Monitor) setLink(args []string) (string, error) {
	up, err := onOff(args[1])
	if err != nil {
		return "", err
	}
	return m.do("set_link", map[string]any{"name": args[0], "up": up})
}

func infoStatus(m *Monitor, _ []string) (string, error) {
	s, err := ask[struct {
		Status  string
		Running bool
	}](m, "query-status")
	text := "running"
	if !s.Running {
		text = "paused"
		if s.Status != "paused" {
			text += " (" + s.Status + ")"
		}
	}
	return "VM status: " + text + "\n", err
}

func infoVersion(m *Monitor, _ []string) (string, error) {
	v, err := ask[struct {
		QEMU    struct{ Major, Minor, Micro int }
		Package string
	}](m, "query-version")
	return fmt.Sprintf("%s, with the monitors of QEMU %d.%d.%d\n", v.Package, v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro), err
}

func infoCPUs(m *Monitor, _ []string) (string, error) {
	cpus, err := ask[[]struct {
		Index  int `json:"cpu-index"`
		Thread int `json:"thread-id"`
	}](m, "query-cpus-fast")
	var b strings.Builder
	for i, c := range cpus {
		mark := " "
		if i == 0 {
			mark = "*"
		}
		fmt.Fprintf(&b, "%s CPU #%d: thread_id=%d\n", mark, c.Index, c.Thread)
	}
	return b.String(), err
}

func infoBlock(m *Monitor, _ []string) (string, error) {
	disks, err := ask[[]struct {
		Device   string
		QDev     string
		Inserted struct {
			File     string
			Drv      string
			ReadOnly bool   `json:"ro"`
			Node     string `json:"node-name"`
		}
	}](m, "query-block")
	var b strings.Builder
	for _, d := range disks {
		name := d.Device
		if name == "" {
			name = d.Inserted.Node
		}
		ro := ""
		if d.Inserted.ReadOnly {
			ro = ", read-only"
		}
		fmt.Fprintf(&b, "%s: %s (%s%s)\n", name, d.Inserted.File, d.Inserted.Drv, ro)
		if d.QDev != "" {
			fmt.Fprintf(&b, "    Attached to:      %s\n", d.QDev)
		}
	}
	return b.String(), err
}

// Results of query-pci: QEMU's qapi/pci.json.
type (
	pciRange  struct{ Base, Limit int64 }
	pciDevice struct {
		Bus, Slot, Function int
		Class               struct {
			Desc  string `json:"desc"`
			Class uint16 `json:"class"`
		} `json:"class_info"`
		ID struct {
			Vendor          uint16
			Device          uint16
			Subsystem       uint16
			SubsystemVendor uint16 `json:"subsystem-vendor"`
		}
		QDev    string `json:"qdev_id"`
		Regions []struct {
			BAR           int
			Type          string
			Address, Size int64 // address -1: the guest has given it none
			Prefetch      bool
			Mem64         bool `json:"mem_type_64"`
		}
		Bridge *struct {
			Bus struct {
				Number, Secondary, Subordinate int
				Memory                         pciRange `json:"memory_range"`
				Prefetchable                   pciRange `json:"prefetchable_range"`
			}
			Devices []pciDevice
			Slot    *struct {
				Number int
				State  string
			} `json:"x-slot"`
		} `json:"pci_bridge"`
	}
)

func infoPCI(m *Monitor, _ []string) (string, error) {
	buses, err := ask[[]struct{ Devices []pciDevice }](m, "query-pci")
	var b strings.Builder
	for _, bus := range buses {
		for i := range bus.Devices {
			bus.Devices[i].print(&b)
		}
	}
	return b.String(), err
}

func (d *pciDevice) print(b *strings.Builder) {
	class := d.Class.Desc
	if class == "" {
		class = fmt.Sprintf("Class %04x", d.Class.Class)
	}
	fmt.Fprintf(b, "  Bus %2d, device %3d, function %d:\n", d.Bus, d.Slot, d.Function)
	fmt.Fprintf(b, "    %s: PCI device %04x:%04x\n", class, d.ID.Vendor, d.ID.Device)
	if d.ID.SubsystemVendor != 0 {
		fmt.Fprintf(b, "      PCI subsystem %04x:%04x\n", d.ID.SubsystemVendor, d.ID.Subsystem)
	}
	if d.Bridge != nil {
		bus := d.Bridge.Bus
		fmt.Fprintf(b, "      BUS %d.\n      secondary bus %d.\n      subordinate bus %d.\n", bus.Number, bus.Secondary, bus.Subordinate)
		fmt.Fprintf(b, "      memory range [0x%08x, 0x%08x]\n", bus.Memory.Base, bus.Memory.Limit)
		fmt.Fprintf(b, "      prefetchable memory range [0x%08x, 0x%08x]\n", bus.Prefetchable.Base, bus.Prefetchable.Limit)
	}
	if d.Bridge != nil && d.Bridge.Slot != nil {
		fmt.Fprintf(b, "      slot %d: %s\n", d.Bridge.Slot.Number, d.Bridge.Slot.State)
	}
	for _, r := range d.Regions {
		kind, digits := "I/O", 4
		if r.Type != "io" {
			kind, digits = "32 bit", 8
			if r.Mem64 {
				kind = "64 bit"
			}
			if r.Prefetch {
				kind += " prefetchable"
			}
			kind += " memory"
		}
		where := "nowhere"
		if r.Address != -1 {
			where = fmt.Sprintf("0x%0*x [0x%0*x]", digits, r.Address, digits, r.Address+r.Size-1)
		}
		fmt.Fprintf(b, "      BAR%d: %s at %s.\n", r.BAR, kind, where)
	}
	fmt.Fprintf(b, "      id %q\n", d.QDev)
	if d.Bridge != nil {
		for i := range d.Bridge.Devices {
			d.Bridge.Devices[i].print(b)
		}
	}
}
