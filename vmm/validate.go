package vmm

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"

	"baton/devices/char"
	"baton/vmm/qmp"

	"golang.org/x/sys/unix"
)

// Complete fills in what was left to baton: the serial port on stdio, buses, addresses,
// chassis numbers and MACs. What it completed once, it leaves alone.
func (c *Config) Complete() {
	onStdio := func(b Chardev) bool { return b.Spec == string(char.Stdio) }
	controlled := func(m Monitor) bool { return m.Spec == string(char.Stdio) }
	if len(c.Serials) == 0 && !c.NoDefaults && !c.Daemonize && !slices.ContainsFunc(c.Chardevs, onStdio) && !slices.ContainsFunc(c.Monitors, controlled) {
		c.Serials = []string{string(char.Stdio)}
	}
	used := map[string]bool{RootBus + " 00": true} // ids, MACs, chassis numbers, slots; there is the host bridge
	for i := range c.Devices {
		d := &c.Devices[i]
		if d.Bus == "" && !d.on(busSerial) {
			d.Bus = RootBus
		}
		slot, _, _ := strings.Cut(d.Addr, ".")
		used[d.ID], used[d.Text("mac")], used[d.Bus+" "+slot] = true, true, true
		used[fmt.Sprint("chassis ", d.Props["chassis"])] = true
	}
	// free takes the first name of the format that nobody uses, if there is one.
	free := func(lo, hi int, format string, take func(name string, n int)) {
		for n := lo; n <= hi; n++ {
			if name := fmt.Sprintf(format, n); !used[name] {
				used[name] = true
				take(name, n)
				return
			}
		}
	}
	var serialBus string
	for i := range c.Devices {
		d := &c.Devices[i]
		switch {
		case d.Driver == "pcie-root-port" && !d.Given("chassis"):
			free(1, 255, "chassis %d", func(_ string, n int) { d.set("chassis", uint64(n)) })
		case d.Driver == "virtio-net-pci" && !d.Given("mac"):
			free(0x56, 0xff, "52:54:00:12:34:%02x", func(mac string, _ int) { d.set("mac", mac) })
		case d.Driver == "virtio-serial-pci" && d.ID == "":
			free(0, len(c.Devices), "virtio-serial%d", func(id string, _ int) { d.ID = id })
		}
		if d.Driver == "virtio-serial-pci" {
			serialBus = cmp.Or(serialBus, d.ID+".0")
		}
		switch {
		case d.Addr != "" || !d.on(busPCI):
		case d.Bus == RootBus:
			free(1, 31, RootBus+" %02x", func(_ string, slot int) { d.Addr = fmt.Sprintf("%02x.0", slot) })
		default:
			d.Addr = "00.0"
		}
	}
	for i := range c.Devices {
		c.Devices[i].Bus = cmp.Or(c.Devices[i].Bus, serialBus)
	}
	// A bus is there before what is plugged into it, in whatever order they were asked for.
	slices.SortStableFunc(c.Devices, func(a, b Device) int { return cmp.Compare(a.depth(), b.depth()) })
}

// depth is how far the device is from RootBus: root ports, their devices, serial ports.
func (d *Device) depth() int {
	switch {
	case d.Bus == RootBus:
		return 0
	case d.on(busPCI):
		return 1
	}
	return 2
}

// on says whether the device belongs on a bus of that kind.
func (d *Device) on(kind busKind) bool { row := d.row(); return row != nil && row.on == kind }

// problems collects errors, each about a named object.
type problems []error

func (p *problems) add(object, format string, args ...any) {
	*p = append(*p, inObject(object, fmt.Errorf(format, args...)))
}

var wellFormedID = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]*$`)

// ids checks the names of one kind of object.
func (p *problems) ids(kind string, ids []string) {
	seen := map[string]bool{}
	for _, id := range ids {
		if !wellFormedID.MatchString(id) {
			p.add(kind, "id %q: want a letter, then letters, digits, '-', '.' and '_'", id)
		} else if seen[id] {
			p.add(kind+" "+id, "there are two of this id")
		}
		seen[id] = true
	}
}

func list[T any](from []T, name func(*T) string) (names []string) {
	for i := range from {
		if n := name(&from[i]); n != "" {
			names = append(names, n)
		}
	}
	return names
}

// Validate checks a completed configuration as far as it can be without looking at the
// host. The error joins all that is wrong, see Errors.
func (c *Config) Validate() error {
	var p problems
	if c.Machine.Type != "q35" {
		p.add("machine", "%w", unknown("type", c.Machine.Type, []string{"q35"}))
	}
	if c.CPU.Model != "host" {
		p.add("cpu", "%w", unknown("model", c.CPU.Model, []string{"host"}))
	}
	if n := c.Accel.DirtyRing; n != 0 && (n < 1024 || n > 65536 || n&(n-1) != 0) {
		p.add("accel", "dirty-ring-size=%d: want 0 or a power of two, 1024 to 65536", n)
	}
	if c.SMP < 1 || c.SMP > MaxCPUs {
		p.add("smp", "%d vCPUs: want 1 to %d", c.SMP, MaxCPUs)
	}
	c.validateMemory(&p)
	if c.Kernel == "" && c.Incoming == "" {
		p.add("kernel", "there is none\nsay -kernel FILE: baton has no firmware that could read a disk")
	}
	c.validateBackends(&p)
	p.ids("device", list(c.Devices, func(d *Device) string { return d.ID }))
	c.validateBuses(&p)
	c.validateUses(&p)
	c.validatePairs(&p)
	return errors.Join(p...)
}

func (c *Config) validateMemory(p *problems) {
	m, page := c.Memory, max(c.Memory.HugePages, 4096)
	if m.Size < MinMemory || m.Size > MaxMemory {
		p.add("memory", "%d bytes: want 64M to 64G", m.Size)
	}
	if m.HugePages != 0 && m.HugePages != 2<<20 && m.HugePages != 1<<30 {
		p.add("memory", "huge pages of %d bytes: want 2M or 1G", m.HugePages)
	} else if m.Size%page != 0 {
		p.add("memory", "%d bytes: not a multiple of its pages, %d bytes", m.Size, page)
	}
}

func (c *Config) validateBackends(p *problems) {
	p.ids("netdev", list(c.Netdevs, func(n *Netdev) string { return n.ID }))
	for _, n := range c.Netdevs {
		name := "netdev " + n.ID
		if n.Type != "tap" {
			p.add(name, "%w", unknown("type", n.Type, []string{"tap"}))
		}
		if n.Queues < 1 || n.Queues > MaxQueues {
			p.add(name, "queues=%d: want 1 to %d", n.Queues, MaxQueues)
		}
		if len(n.IfName) >= unix.IFNAMSIZ || strings.ContainsAny(n.IfName, "/: \t\n") {
			p.add(name, "ifname=%s: want up to %d characters, none of them '/', ':' or a space", n.IfName, unix.IFNAMSIZ-1)
		}
		if n.FDs != nil && (len(n.FDs) != n.Queues || n.IfName+n.Script+n.DownScript != "") {
			p.add(name, "fds: one descriptor for each of %d queues; ifname, script and downscript are up to who opened them", n.Queues)
		}
	}
	p.ids("drive", list(c.Blockdevs, func(b *Blockdev) string { return b.ID }))
	for _, b := range c.Blockdevs {
		if b.File == "" {
			p.add("drive "+b.ID, "it has no file")
		}
	}
	p.ids("chardev", list(c.Chardevs, func(b *Chardev) string { return b.ID }))
	specs := slices.Clone(c.Serials)
	for _, m := range c.Monitors {
		if modes := []string{monitorQMP, monitorHMP}; !slices.Contains(modes, m.Mode) {
			p.add("monitor "+m.Spec, "%w", unknown("mode", m.Mode, modes))
		}
		specs = append(specs, m.Spec)
	}
	for _, b := range c.Chardevs {
		specs = append(specs, b.Spec)
	}
	if len(c.Serials) > 1 {
		p.add("serial", "there are %d, but one port, COM1\nuse virtconsole on a virtio-serial-pci", len(c.Serials))
	}
	var stdio int
	for i, s := range specs {
		if strings.HasPrefix(s, "chardev:") {
			continue // see validateUses
		}
		spec, err := char.Parse(s)
		if err != nil {
			*p = append(*p, err)
		}
		if mons := len(c.Serials); spec.Telnet && (i < mons || i >= mons+len(c.Monitors) || c.Monitors[i-mons].Mode != monitorHMP) {
			p.add(s, "only -monitor speaks telnet\nsay tcp: instead of telnet:")
		}
		if spec.Monitor && i >= len(c.Serials) {
			p.add(s, "only -serial shares its terminal with a monitor\nsay stdio")
		}
		if spec.Kind == char.Stdio {
			stdio++
		}
	}
	if stdio > 0 && c.Daemonize {
		p.add("stdio", "a daemon has no terminal\nsay -serial file:PATH, unix:PATH,server=on,wait=off or none")
	}
	if stdio > 1 {
		p.add("stdio", "%d ports want it, but there is one terminal", stdio)
	}
}

// validateBuses checks where each device is plugged in.
func (c *Config) validateBuses(p *problems) {
	buses := map[string]busKind{RootBus: busPCI}
	for _, d := range c.Devices {
		if row := d.row(); row != nil && d.ID != "" && row.provides == busPCI {
			buses[d.ID] = busPCI
		} else if row != nil && d.ID != "" && row.provides == busSerial {
			buses[d.ID+".0"] = busSerial
		}
	}
	at := map[string]*Device{RootBus + " 00.0": {Driver: "the host bridge"}}
	chassis := map[[2]uint64]*Device{}
	for i := range c.Devices {
		d := &c.Devices[i]
		row := d.row()
		if row == nil {
			p.add("device", "%w", unknown("driver", d.Driver, list(drivers, func(r *driver) string { return r.name })))
			continue
		}
		var fitting []string
		for id, kind := range buses {
			if kind == row.on {
				fitting = append(fitting, id)
			}
		}
		switch kind, ok := buses[d.Bus]; {
		case d.Bus == "":
			p.add(d.String(), "there is no bus for it\nadd -device virtio-serial-pci")
		case !ok:
			p.add(d.String(), "%w", unknown("bus", d.Bus, fitting))
		case kind != row.on:
			p.add(d.String(), "bus=%s: that is a %s bus, and this is a %s device%s", d.Bus, kind, row.on, suggest("", fitting))
		}
		if row.on != busPCI {
			continue
		}
		place := d.Bus + " " + d.Addr
		switch other := at[place]; {
		case d.Addr == "":
			p.add(d.String(), "bus %s is full\nadd a pcie-root-port with multifunction=on, and others at its functions 1 to 7", d.Bus)
		case d.Bus != RootBus && d.Driver == "pcie-root-port":
			p.add(d.String(), "bus=%s: a root port belongs on %s", d.Bus, RootBus)
		case d.Bus != RootBus && !strings.HasPrefix(d.Addr, "00."):
			p.add(d.String(), "addr=%s: bus %s is the one slot of a root port, slot 0", d.Addr, d.Bus)
		case other != nil:
			p.add(d.String(), "bus=%s,addr=%s: %s is there\nleave addr= away for the first free slot of %s, or add a pcie-root-port", d.Bus, d.Addr, other, RootBus)
		default:
			at[place] = d
		}
		if d.Driver == "pcie-root-port" {
			key := [2]uint64{d.Uint("chassis"), d.Uint("slot")}
			if other := chassis[key]; other != nil {
				p.add(d.String(), "chassis=%d,slot=%d: %s has them\ngive each port its own chassis", key[0], key[1], other)
			}
			chassis[key] = d
		}
	}
	for place, d := range at { // PCI Local Bus 3.0, 3.2.2.3.4: function 0 says that there are others
		if fn0 := at[place[:len(place)-1]+"0"]; place[len(place)-1] != '0' && (fn0 == nil || !fn0.Bool("multifunction")) {
			p.add(d.String(), "addr=%s: function 0 of that slot needs a device with multifunction=on", d.Addr)
		}
	}
}

// validatePairs checks the primaries of failover pairs. Clients match on QEMU's words.
func (c *Config) validatePairs(p *problems) {
	primaries := map[string]*Device{}
	for i := range c.Devices {
		d := &c.Devices[i]
		if _, err := parseSteer(d.Text("steer")); err != nil {
			p.add(d.String(), "%w", err)
		}
		if !d.Given(pairID) {
			continue
		}
		if err := d.checkPrimary(); err != nil {
			p.add(d.String(), "%w", err)
		}
		standby := find(c.Devices, func(s *Device) bool { return s.isStandby() && s.ID == d.Text(pairID) })
		if standby == nil || standby == d {
			continue // it is an ordinary device, until there is a standby
		}
		if d.Bus == RootBus {
			p.add(d.String(), "Bus '%s' does not support hotplugging\nadd a pcie-root-port for it", d.Bus)
		}
		if other := primaries[standby.ID]; other != nil {
			p.add(d.String(), "%w", tooMany(standby.ID, other.ID, d.ID))
		}
		primaries[standby.ID] = d
	}
}

// checkPrimary checks what must be so of every device with a pair id.
func (d *Device) checkPrimary() error {
	switch {
	case d.ID == "":
		return errors.New("Device with failover_pair_id needs to have id")
	case d.Driver != "virtio-net-pci" && d.Driver != "vfio-pci":
		return errNoEthernet
	case d.Bool("multifunction") || d.Addr != "" && !strings.HasSuffix(d.Addr, ".0"):
		return errors.New("failover: primary device must be in its own PCI slot")
	}
	return nil
}

func tooMany(standby, one, other string) error {
	return qmp.Errorf("Cannot attach more than one primary device to '%s': '%s' and '%s'", standby, one, other)
}

// validateUses checks which device uses what of the host: each thing once.
func (c *Config) validateUses(p *problems) {
	kinds := map[string][]string{
		"netdev":  list(c.Netdevs, func(n *Netdev) string { return n.ID }),
		"drive":   list(c.Blockdevs, func(b *Blockdev) string { return b.ID }),
		"chardev": list(c.Chardevs, func(b *Chardev) string { return b.ID }),
	}
	user := map[string]string{}
	use := func(who, key, id string) {
		if !slices.Contains(kinds[key], id) {
			p.add(who, "%w", unknown(key, id, kinds[key]))
		} else if other := user[key+id]; other != "" {
			p.add(who, "%s=%s: %s uses it already", key, id, other)
		}
		user[key+id] = who
	}
	for _, s := range c.Serials {
		if id, ok := strings.CutPrefix(s, "chardev:"); ok {
			use("serial", "chardev", id)
		}
	}
	for _, m := range c.Monitors {
		if id, ok := strings.CutPrefix(m.Spec, "chardev:"); ok {
			use("monitor", "chardev", id)
		}
	}
	ports := map[string]*Device{}
	for i := range c.Devices {
		d := &c.Devices[i]
		if row := d.row(); row != nil {
			*p = append(*p, inObject(d.String(), row.missing(d.Props)))
		}
		if d.Driver == "vfio-pci" {
			bdf, err := d.hostFunction()
			if err != nil {
				p.add(d.String(), "%w", err)
			} else if bdf == "" { // any of a pool
			} else if other := user["host"+bdf]; other != "" {
				p.add(d.String(), "%s: %s has it", bdf, other)
			} else {
				user["host"+bdf] = d.String()
			}
		}
		for key := range kinds {
			if d.Given(key) {
				use(d.String(), key, d.Text(key))
			}
		}
		if n := len(d.Text("serial")); n > 20 { // virtio 1.2, 5.2.6.1
			p.add(d.String(), "serial: %d bytes, but there is room for 20", n)
		}
		if n := c.Netdev(d.Text("netdev")); n != nil && n.Queues > 1 && !d.Bool("mq") {
			p.add(d.String(), "netdev %s has %d queues, but mq=off\nsay mq=on, or queues=1 for the netdev", n.ID, n.Queues)
		}
		if d.Given("tx_queue_size") && d.Uint("tx_queue_size") != d.Uint("rx_queue_size") {
			p.add(d.String(), "tx_queue_size=%d: there is one size for both directions, rx_queue_size=%d", d.Uint("tx_queue_size"), d.Uint("rx_queue_size"))
		}
		if !d.Given("nr") {
			continue
		}
		if key := fmt.Sprint(d.Bus, " ", d.Uint("nr")); ports[key] != nil {
			p.add(d.String(), "nr=%d: %s has that port of %s", d.Uint("nr"), ports[key], d.Bus)
		} else {
			ports[key] = d
		}
		if d.Driver == "virtserialport" && d.Uint("nr") == 0 {
			p.add(d.String(), "nr=0: port 0 is for a virtconsole")
		}
	}
}

// CheckFiles looks at the files that the configuration names, so that all that is wrong
// with them is known before anything is made.
func (c *Config) CheckFiles() error {
	var p problems
	for what, file := range map[string]string{"kernel": c.Kernel, "initrd": c.Initrd} {
		if _, err := head(file); file != "" && err != nil {
			p.add(what, "%w", err)
		}
	}
	for _, b := range c.Blockdevs {
		magic, err := head(b.File)
		switch {
		case b.File == "": // Validate tells
		case err != nil:
			p.add("drive "+b.ID, "%w", err)
		case bytes.HasPrefix(magic, []byte("QFI\xfb")):
			p.add("drive "+b.ID, "%s is a qcow2 image, and baton reads raw ones\nqemu-img convert -O raw %[1]s NEW", b.File)
		case !b.ReadOnly && unix.Access(b.File, unix.W_OK) != nil:
			p.add("drive "+b.ID, "%s cannot be written\ngive it readonly=on (read-only=on for -blockdev)", b.File)
		}
	}
	for _, n := range c.Netdevs {
		for key, file := range map[string]string{"script": n.Script, "downscript": n.DownScript} {
			if err := unix.Access(file, unix.X_OK); file != "" && err != nil {
				p.add("netdev "+n.ID, "%s=%s: %w\nit has to be a program; %[1]s=no is none", key, file, err)
			}
		}
	}
	return errors.Join(p...)
}

// head reads the first bytes of a file or block device.
func head(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if mode := info.Mode(); !mode.IsRegular() && mode&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
		return nil, fmt.Errorf("%s is neither a file nor a block device", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	magic := make([]byte, 4)
	n, err := io.ReadFull(f, magic)
	if errors.Is(err, io.ErrUnexpectedEOF) || err == io.EOF {
		err = nil // whoever reads it all will say that it is too short
	}
	return magic[:n], err
}
