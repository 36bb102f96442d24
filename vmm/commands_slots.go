package vmm

import (
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"baton/devices/pci"
	"baton/vmm/hmp"
	"baton/vmm/qmp"
)

// unplugDeadline is how long device_del waits for a guest unless it is told otherwise. A guest
// that boots does not listen for a while; an attention button takes 5 s.
const unplugDeadline = 30 * time.Second

type (
	deviceAddArgs struct {
		Driver string   `json:"driver"`
		Rest   qmp.Rest // its properties
	}
	deviceDelArgs struct {
		ID       string      `json:"id"` // or the path in the object model
		Mode     *unplugMode `json:"mode"`
		Deadline *int64      `json:"deadline"` // milliseconds
	}
	blockdevArgs struct {
		Driver string   `json:"driver"`
		Rest   qmp.Rest // as -blockdev
	}
	nodeArgs struct {
		Node string `json:"node-name"`
	}
	unplugMode  string
	deviceEvent struct {
		Device string `json:"device,omitempty"`
		Path   string `json:"path"`
	}
	// unplugError is QEMU's event with baton's reason and slot.
	unplugError struct {
		Device string `json:"device,omitempty"`
		Path   string `json:"path"`
		Reason string `json:"reason"`
		Bus    string `json:"bus"`
		Slot   string `json:"slot-state"`
	}
)

func (unplugMode) Values() []string { return []string{pci.Cooperative.String(), pci.Surprise.String()} }

func (m *Machine) slotCommands() []qmp.Command {
	return []qmp.Command{
		qmp.Act("device_add", m.deviceAdd),
		qmp.Act("blockdev-add", m.blockdevAdd),
		qmp.Act("blockdev-del", func(a nodeArgs) error { return m.blockdevDel(a.Node) }),
		qmp.Act("device_del", m.deviceDel),
	}
}

// parseDevice reads the arguments of device_add.
func (m *Machine) parseDevice(a deviceAddArgs) (d Device, err error) {
	row := find(drivers, func(r *driver) bool { return r.name == a.Driver || slices.Contains(r.aliases, a.Driver) })
	switch id, _ := a.Rest["id"].(string); {
	case row == nil:
		return d, qmp.Errorf("'%s' is not a valid device model name", a.Driver)
	case id != "" && slices.ContainsFunc(m.cfg.Devices, func(d Device) bool { return d.ID == id }):
		return d, qmp.Errorf("Duplicate device ID '%s'", id)
	}
	if err := checkTypes(row, a.Rest); err != nil {
		return d, err
	}
	s, vals, err := parseArgs("driver", a.Driver, a.Rest, driverSchemas())
	if err != nil {
		return d, err
	}
	return newDevice(s.name, vals), row.missing(vals)
}

// checkTypes is as strict as QEMU with names, and what JSON has types for. Words of the human monitor
// have none, and errors that suggest the nearest name.
func checkTypes(row *driver, args map[string]any) error {
	for _, name := range slices.Sorted(maps.Keys(args)) {
		p := row.prop(name)
		if _, word := args[name].(hmp.Word); word {
			continue
		}
		if p == nil {
			return qmp.Errorf("Property '%s.%s' not found", row.name, name)
		}
		want, ok := "string", false
		switch _, number := args[name].(json.Number); p.kind {
		case kindBool:
			want = "boolean"
			_, ok = args[name].(bool)
		case kindUint, kindPow2:
			want, ok = "integer", number
		case kindAddr:
			if ok = number; !ok {
				_, ok = args[name].(string)
			}
		default:
			_, ok = args[name].(string)
		}
		if !ok {
			return qmp.Errorf("Invalid parameter type for '%s', expected: %s", name, want)
		}
	}
	return nil
}

// deviceAdd is device_add.
func (m *Machine) deviceAdd(a deviceAddArgs) error {
	d, err := m.parseDevice(a)
	if err != nil {
		return err
	}
	if d.Bus != "" && d.on(busPCI) {
		known := d.Bus == RootBus || slices.ContainsFunc(m.pci.Ports(), func(p *pci.RootPort) bool { return p.Secondary().ID == d.Bus })
		if !known {
			return qmp.Errorf("Bus '%s' not found", d.Bus)
		}
	}
	switch {
	case d.Bus == RootBus || d.Driver == "pcie-root-port":
		return qmp.Errorf("Bus '%s' does not support hotplugging", RootBus)
	case !d.on(busPCI):
		return qmp.Errorf("Device '%s' does not support hotplugging", d.Driver)
	case m.migrating():
		return qmp.Errorf("device_add not allowed while migrating")
	}
	if d.Given(pairID) {
		if err := d.checkPrimary(); err != nil {
			return err
		}
		if p := m.pairOf(d.Text(pairID)); p != nil && p.primary != nil {
			return tooMany(p.standby, p.primary.ID, d.ID)
		}
	}
	return m.plugDevice(d)
}

// deviceDel is device_del: it begins to unplug, and an event says how that ends.
func (m *Machine) deviceDel(a deviceDelArgs) error {
	mode, deadline := pci.Cooperative, unplugDeadline
	if a.Mode != nil && string(*a.Mode) == pci.Surprise.String() {
		mode = pci.Surprise
	}
	if a.Deadline != nil {
		if *a.Deadline <= 0 || *a.Deadline > int64(24*time.Hour/time.Millisecond) {
			return qmp.Errorf("Parameter 'deadline' expects milliseconds, up to a day")
		}
		deadline = time.Duration(*a.Deadline) * time.Millisecond
	}
	if m.removePrimary(a.ID) {
		return nil
	}
	d := m.qomDevice(a.ID)
	if d != nil && d.unplug != nil && d.unplug.del && (mode == pci.Cooperative || d.unplug.mode == pci.Surprise) {
		return inProcess(d)
	}
	if d != nil && m.migrating() {
		return qmp.Errorf("device_del not allowed while migrating")
	}
	again := d != nil && d.unplug != nil && d.unplug.del
	err := m.unplug(a.ID, mode, deadline, func(err error) {
		switch {
		case again: // who asked first answers
		case err == nil:
			m.deleteDevice(d)
		default:
			state := m.slotOf(d.Device).State()
			if e, ok := err.(slotError); ok {
				state = e.state
			}
			m.events.Publish("DEVICE_UNPLUG_GUEST_ERROR", unplugError{d.ID, d.path(), firstLine(err), d.Bus, state.String()})
		}
	})
	if err == nil && d.unplug != nil {
		d.unplug.del = true
	}
	return err
}

// firstLine is an error without its hints.
func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// blockdevAdd adds what -blockdev describes; the device that uses it opens it.
func (m *Machine) blockdevAdd(a blockdevArgs) error {
	s, vals, err := parseArgs("driver", a.Driver, a.Rest, blockdevKinds)
	if err != nil {
		return err
	}
	p := parser{cfg: &Config{Blockdevs: slices.Clone(m.cfg.Blockdevs)}}
	if err := p.addBlockdev(s.name, vals); err != nil {
		return err
	}
	if id := p.cfg.Blockdevs[len(p.cfg.Blockdevs)-1].ID; m.cfg.Blockdev(id) != nil {
		return qmp.Errorf("Duplicate nodes with node-name='%s'", id)
	}
	var bad problems
	p.cfg.validateBackends(&bad)
	if err := errors.Join(append(bad, p.cfg.CheckFiles())...); err != nil {
		return err
	}
	m.cfg.Blockdevs = p.cfg.Blockdevs
	return nil
}

func (m *Machine) blockdevDel(node string) error {
	switch {
	case m.cfg.Blockdev(node) == nil:
		return qmp.Errorf("Failed to find node with node-name='%s'", node)
	case slices.ContainsFunc(m.cfg.Devices, func(d Device) bool { return d.Text("drive") == node }):
		return qmp.Errorf("Node %s is in use", node)
	}
	m.cfg.Blockdevs = slices.DeleteFunc(slices.Clone(m.cfg.Blockdevs), func(b Blockdev) bool { return b.ID == node })
	return nil
}
