package vmm

import (
	"encoding/json"
	"net"
	"strings"
)

// Limits of the machine.
const (
	MaxCPUs   = 64
	MinMemory = 64 << 20 // bytes
	MaxMemory = 64 << 30 // bytes
	MaxQueues = 16       // pairs of a netdev, queues of a disk
	RootBus   = "pcie.0" // the root complex's own bus

	// IncomingDefer, as Config.Incoming, leaves it to QMP's migrate-incoming to say where the
	// guest comes from.
	IncomingDefer = "defer"
)

// Config says everything about a machine before it exists. It is plain data: what
// -print-config prints as JSON, -config reads back to the same machine. JSON names are
// the names of QEMU's options and keys.
type Config struct {
	Name      string        `json:"name,omitempty"`
	Machine   MachineConfig `json:"machine"`
	Accel     AccelConfig   `json:"accel"`
	CPU       CPUConfig     `json:"cpu"`
	SMP       int           `json:"smp"` // vCPUs, 1 to MaxCPUs
	Memory    MemoryConfig  `json:"memory"`
	Kernel    string        `json:"kernel,omitempty"` // paths
	Initrd    string        `json:"initrd,omitempty"`
	Append    string        `json:"append,omitempty"` // kernel command line
	Netdevs   []Netdev      `json:"netdev,omitempty"`
	Blockdevs []Blockdev    `json:"blockdev,omitempty"`
	Chardevs  []Chardev     `json:"chardev,omitempty"`
	Serials   []string      `json:"serial,omitempty"` // COM1 first: a char.Parse string, or "chardev:ID"
	Monitors  []Monitor     `json:"mon,omitempty"`
	Devices   []Device      `json:"device,omitempty"`
	NoReboot  bool          `json:"no-reboot,omitempty"` // a guest's reset ends baton
	// NoShutdown stops the machine where it would end otherwise, for a client to look at.
	NoShutdown bool `json:"no-shutdown,omitempty"`
	Paused     bool `json:"S,omitempty"` // no vCPU runs until a client says so
	// Incoming is where a guest comes from that runs elsewhere, or has been saved: a URI as
	// that of QMP's migrate, or IncomingDefer. Empty: the guest starts here.
	Incoming string `json:"incoming,omitempty"`
	// NoDefaults leaves out the serial port on stdio that a machine without -serial has.
	NoDefaults bool   `json:"nodefaults,omitempty"`
	Daemonize  bool   `json:"daemonize,omitempty"` // run in the background, once the machine is ready
	PIDFile    string `json:"pidfile,omitempty"`
	LogFile    string `json:"log,omitempty"`       // -D; empty: stderr
	EventLog   string `json:"event-log,omitempty"` // one JSON object per line and event
}

// MachineConfig is the argument of -machine.
type MachineConfig struct {
	Type          string `json:"type"` // "q35": PCIe, split irqchip
	NativeHotplug bool   `json:"native-hotplug,omitempty"`
}

// AccelConfig is the argument of -accel.
type AccelConfig struct {
	Force bool `json:"force,omitempty"` // start a stock kernel even on a KVM known not to run it
	// DirtyRing is how many pages each vCPU may write, while the machine migrates, until baton
	// has to take note: a power of two, 1024 to 65536. 0: KVM's log of all of RAM instead.
	DirtyRing uint64 `json:"dirty-ring-size,omitempty"`
}

// CPUConfig is the argument of -cpu.
type CPUConfig struct {
	Model string `json:"model"` // "host": all that the host's KVM offers
}

// MemoryConfig is -m, with what -object memory-backend-memfd says about its pages.
type MemoryConfig struct {
	Size      uint64 `json:"size"`                  // bytes
	HugePages uint64 `json:"hugetlbsize,omitempty"` // bytes of one page: 0 (4 KiB), 2 MiB or 1 GiB
	Prealloc  bool   `json:"prealloc,omitempty"`    // populate before the guest starts
}

// Netdev is the host's side of a NIC. A TAP is made or attached by name, or, with FDs, was
// opened by whoever started baton.
type Netdev struct {
	ID         string `json:"id"`
	Type       string `json:"type"` // "tap"
	IfName     string `json:"ifname,omitempty"`
	Script     string `json:"script,omitempty"` // run with the name once it is up; empty: none
	DownScript string `json:"downscript,omitempty"`
	VHost      bool   `json:"vhost,omitempty"`
	Queues     int    `json:"queues"`        // pairs, 1 to MaxQueues; len(FDs) if there are any
	FDs        []int  `json:"fds,omitempty"` // one descriptor per queue pair
}

// Blockdev is the host's side of a disk: a raw image or a block device.
type Blockdev struct {
	ID       string `json:"node-name"`
	File     string `json:"filename"`
	ReadOnly bool   `json:"read-only,omitempty"`
	NoFlush  bool   `json:"cache.no-flush,omitempty"` // do not wait for the disk when the guest flushes
}

// Chardev is a named backend for a port; Spec is what -serial would say, for char.Parse.
type Chardev struct {
	ID   string `json:"id"`
	Spec string `json:"spec"`
}

// Monitor is where clients that control the machine connect to.
type Monitor struct {
	Mode string `json:"mode"` // "control": QMP; "readline": the human monitor
	Spec string `json:"spec"` // as a Serial
}

// Device is one -device. Its JSON is QEMU's: one flat object of "driver", "id", "bus",
// "addr" and the properties.
type Device struct {
	Driver string // canonical, never an alias
	ID     string // unique, may be empty
	Bus    string // id of what it is plugged into: RootBus, a root port, or "ID.0" of a virtio-serial-pci
	Addr   string // "SS.F", slot and function in hexadecimal; Complete fills it in, and Bus
	Props  Values // what was given; the getters add the defaults of the driver table
}

// Values are checked properties: bool, uint64 (numbers, sizes in bytes) or string.
type Values map[string]any

// DefaultConfig is the machine of a command line without options.
func DefaultConfig() *Config {
	return &Config{
		Machine: MachineConfig{Type: "q35"},
		CPU:     CPUConfig{Model: "host"},
		SMP:     1,
		Memory:  MemoryConfig{Size: 128 << 20},
	}
}

// Netdev returns the netdev of that id, or nil.
func (c *Config) Netdev(id string) *Netdev {
	return find(c.Netdevs, func(n *Netdev) bool { return n.ID == id })
}

// Blockdev returns the blockdev of that node name, or nil.
func (c *Config) Blockdev(id string) *Blockdev {
	return find(c.Blockdevs, func(b *Blockdev) bool { return b.ID == id })
}

// Chardev returns the chardev of that id, or nil.
func (c *Config) Chardev(id string) *Chardev {
	return find(c.Chardevs, func(b *Chardev) bool { return b.ID == id })
}

// charSpec is what a Spec says that may be chardev:ID.
func (c *Config) charSpec(spec string) string {
	if id, ok := strings.CutPrefix(spec, "chardev:"); ok {
		return c.Chardev(id).Spec
	}
	return spec
}

func find[T any](list []T, match func(*T) bool) *T {
	for i := range list {
		if match(&list[i]) {
			return &list[i]
		}
	}
	return nil
}

// String names the device in messages.
func (d *Device) String() string {
	if d.ID == "" {
		return d.Driver
	}
	return d.Driver + " " + d.ID
}

// Given says whether the property was set, rather than left to its default.
func (d *Device) Given(name string) bool {
	_, ok := d.Props[name]
	return ok
}

// Bool returns an on/off property.
func (d *Device) Bool(name string) bool { v, _ := d.value(name).(bool); return v }

// Uint returns a number, or a size in bytes.
func (d *Device) Uint(name string) uint64 { v, _ := d.value(name).(uint64); return v }

// Text returns a property that is a string.
func (d *Device) Text(name string) string { v, _ := d.value(name).(string); return v }

// MAC returns the property "mac"; ok is false if none was given.
func (d *Device) MAC() (mac [6]byte, ok bool) {
	hw, err := net.ParseMAC(d.Text("mac"))
	if err != nil || len(hw) != len(mac) {
		return mac, false
	}
	return [6]byte(hw), true
}

func (d *Device) value(name string) any {
	if v, ok := d.Props[name]; ok {
		return v
	}
	if row := d.row(); row != nil {
		if p := row.prop(name); p != nil {
			return p.def
		}
	}
	return nil
}

func (d *Device) set(name string, v any) {
	if d.Props == nil {
		d.Props = Values{}
	}
	d.Props[name] = v
}

// MarshalJSON writes the flat object.
func (d Device) MarshalJSON() ([]byte, error) {
	flat := map[string]any{"driver": d.Driver}
	for k, v := range d.Props {
		flat[k] = v
	}
	for k, v := range map[string]string{"id": d.ID, "bus": d.Bus, "addr": d.Addr} {
		if v != "" {
			flat[k] = v
		}
	}
	return json.Marshal(flat)
}

// UnmarshalJSON reads the flat object and checks it against the driver table.
func (d *Device) UnmarshalJSON(b []byte) error {
	s, vals, _, err := parseObject(string(b), "driver", driverSchemas())
	if err == nil {
		*d = newDevice(s.name, vals)
	}
	return err
}
