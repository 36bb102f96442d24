package vmm

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
)

// The arguments of the options, other than -device, that are made of keys.
var (
	machineKinds = []schema{{name: "machine", props: []prop{
		{name: "type", kind: kindEnum, enum: []string{"q35"}, help: "PCIe root complex, split irqchip, no chipset of old"},
		{name: "accel", kind: kindEnum, enum: []string{"kvm"}, help: "there is no emulation of the CPU"},
		{name: "native-hotplug", kind: kindBool, help: "let the guest drive PCIe hotplug itself (_OSC); default: off, by ACPI"},
		{name: "memory-backend", help: "id of the -object memory-backend-memfd that is the RAM"},
		only("kernel-irqchip", "split", "the IOAPIC is baton's, the LAPICs are KVM's"),
		only("acpi", "on", "a guest without ACPI finds no PCIe"),
		only("usb", "off", "there is no USB"), only("graphics", "off", "there is no display"),
		only("vmport", "off", "there is no VMware port"), only("smm", "off", "there is no SMM"),
		only("hpet", "off", "there is no HPET"), only("sata", "off", "there is no SATA; use -drive"),
	}}}
	accelKinds = []schema{{name: "accel", props: []prop{
		{name: "accel", kind: kindEnum, enum: []string{"kvm"}, help: "there is no emulation of the CPU"},
		{name: "force", kind: kindBool, help: "boot even where KVM is known not to run a stock kernel"},
		{name: "dirty-ring-size", kind: kindUint, help: "pages a vCPU lists when the machine migrates, 1024 to 65536, a power of two; default: 0, KVM's log"},
		only("kernel-irqchip", "split", "the IOAPIC is baton's, the LAPICs are KVM's"),
	}}}
	memoryKinds = []schema{{name: "memory", props: []prop{
		{name: "size", kind: kindMiB, help: "64M to 64G; a bare number counts MiB"},
		{name: "slots", kind: kindUint, ignored: "RAM is not plugged"},
		{name: "maxmem", kind: kindMiB, ignored: "RAM is not plugged"},
	}}}
	smpKinds = []schema{{name: "smp", props: []prop{
		count("cpus", "vCPUs"), count("maxcpus", "as cpus: vCPUs are not plugged"),
		count("sockets", ""), count("dies", ""), count("cores", ""), count("threads", ""),
	}}}
	nameKinds = []schema{{name: "name", props: []prop{
		{name: "guest", required: true, help: "name of the machine"},
		{name: "process", ignored: "the process is called baton"},
		{name: "debug-threads", kind: kindBool, ignored: "Go's threads have no names"},
	}}}
	netdevKinds = []schema{{name: "tap", help: "network of the host, by a TAP", props: []prop{
		{name: "id", required: true, help: "name of the netdev"},
		{name: "ifname", help: "the TAP, made if there is none; default: tap0 and up"},
		{name: "script", help: "run with the TAP's name once it is up; no: none; default: no"},
		{name: "downscript", help: "run with the TAP's name at the end; no: none; default: no"},
		{name: "vhost", kind: kindBool, help: "move the packets in the kernel; default: off"},
		{name: "queues", kind: kindUint, help: "queue pairs, 1 to 16; default: 1"},
		{name: "fd", kind: kindUint, help: "open TAP to use in place of ifname"},
		{name: "fds", help: "open TAP, a:b:c, one descriptor for each queue pair"},
	}}}
	driveKinds = []schema{{name: "drive", props: []prop{
		{name: "file", required: true, help: "raw image or block device"},
		{name: "id", help: "name of the drive"},
		{name: "if", kind: kindEnum, enum: []string{"virtio", "none"}, help: "virtio, the default, makes the virtio-blk-pci too"},
		only("format", "raw", "convert others: qemu-img convert -O raw OLD NEW"), only("media", "disk", "there is no CD-ROM"),
		{name: "readonly", kind: kindBool, help: "do not write; default: off"}, {name: "read-only", kind: kindBool, help: "the same"},
		{name: "cache", kind: kindEnum, enum: []string{"writeback", "none", "unsafe"}, help: "unsafe: do not wait for the disk when the guest flushes; default: writeback"},
		{name: "serial", help: "serial number, up to 20 bytes, with if=virtio"},
		{name: "aio", ignored: "baton chooses"}, {name: "index", kind: kindUint, ignored: "use addr= of -device"},
	}}}
	blockdevKinds = []schema{
		{name: "raw", help: "raw image, over the node that file= names or that file.* describe", props: append(blockdevProps,
			prop{name: "file", help: "node-name of a -blockdev file"},
			prop{name: "file.driver", kind: kindEnum, enum: []string{"file", "host_device"}, help: "kind of the inner node"},
			prop{name: "file.filename", help: "path"})},
		{name: "file", aliases: []string{"host_device"}, help: "raw image or block device",
			props: append(blockdevProps, prop{name: "filename", required: true, help: "path"})},
	}
	blockdevProps = slices.Clip([]prop{
		{name: "node-name", required: true, help: "name of the node"},
		{name: "read-only", kind: kindBool, help: "do not write; default: off"},
		{name: "cache.no-flush", kind: kindBool, help: "do not wait for the disk when the guest flushes; default: off"},
		{name: "cache.direct", kind: kindBool, ignored: pageCache},
	})
	pageCache    = "I/O goes through the host's page cache, and a flush reaches the disk"
	chardevKinds = []schema{
		{name: "socket", help: "stream socket", props: []prop{chardevID,
			{name: "path", help: "unix socket"}, {name: "host", help: "TCP: name or address"}, {name: "port", help: "TCP"},
			{name: "server", kind: kindBool, help: "listen; default: off, connect"},
			{name: "wait", kind: kindBool, help: "with server=on, start once a client is there; default: on"}}},
		{name: "file", help: "write to a file", props: []prop{chardevID, {name: "path", required: true, help: "the file"}}},
		{name: "stdio", help: "this terminal", props: []prop{chardevID}},
		{name: "null", help: "nothing", props: []prop{chardevID}},
	}
	monitorKinds = []schema{{name: "mon", props: []prop{
		{name: "chardev", required: true, help: "id of the -chardev"},
		{name: "mode", kind: kindEnum, enum: []string{monitorQMP, monitorHMP}, def: monitorHMP, help: "control: QMP; readline: the human monitor"},
	}}}
	chardevID   = prop{name: "id", required: true, help: "name of the chardev"}
	objectKinds = []schema{
		{name: "memory-backend-memfd", help: "pages of the RAM, with -machine memory-backend=", props: []prop{
			{name: "id", required: true, help: "name of the object"},
			{name: "size", kind: kindSize, required: true, help: "as -m"},
			{name: "hugetlb", kind: kindBool, help: "huge pages; default: off"},
			{name: "hugetlbsize", kind: kindSize, help: "2M or 1G; default: 2M"},
			{name: "prealloc", kind: kindBool, help: "populate before the start; default: off"},
			only("share", "on", "guest RAM is always shared")}},
		{name: "rng-random", help: "entropy", props: []prop{{name: "id", required: true},
			{name: "filename", ignored: "entropy is always the host's getrandom(2)"}}},
		{name: "rng-builtin", help: "entropy", props: []prop{{name: "id", required: true}}},
	}
)

func count(name, help string) prop {
	return prop{name: name, kind: kindUint, min: 1, max: MaxCPUs, help: help}
}

func (p *parser) addSMP(_ string, v Values) error {
	n := func(key string) uint64 { n, _ := v[key].(uint64); return n }
	total := max(1, n("sockets")) * max(1, n("dies")) * max(1, n("cores")) * max(1, n("threads"))
	cpus := n("cpus")
	if cpus == 0 {
		cpus = max(total, n("maxcpus"))
	}
	p.cfg.SMP = int(cpus)
	if m := n("maxcpus"); m != 0 && m != cpus {
		return fmt.Errorf("maxcpus=%d: vCPUs are not plugged, so it has to be %d, as cpus", m, cpus)
	}
	if total > 1 && (v["sockets"] == nil && cpus%total != 0 || v["sockets"] != nil && cpus != total) {
		return fmt.Errorf("sockets, dies, cores and threads make %d vCPUs, not %d", total, cpus)
	}
	return nil
}

func (p *parser) addNetdev(kind string, v Values) error {
	n := Netdev{Type: kind, Queues: 1}
	for _, key := range []string{"script", "downscript"} {
		if v[key] == "no" {
			delete(v, key)
		}
	}
	list := v.take("fds")
	if fd, ok := v["fd"].(uint64); ok {
		list += strconv.FormatUint(fd, 10)
	}
	var errs []error
	for _, s := range strings.FieldsFunc(list, func(r rune) bool { return r == ':' }) {
		fd, err := strconv.ParseUint(s, 10, 31)
		if err != nil {
			errs = append(errs, fmt.Errorf("fds=%s: %q is not a descriptor", list, s))
		}
		n.FDs = append(n.FDs, int(fd))
	}
	if n.FDs != nil {
		n.Queues = len(n.FDs)
	}
	errs = append(errs, v.into(&n))
	p.cfg.Netdevs = append(p.cfg.Netdevs, n)
	return errors.Join(errs...)
}

func (p *parser) addDrive(_ string, v Values) error {
	b := Blockdev{ID: v.take("id"), File: v.take("file"),
		ReadOnly: v["readonly"] == true || v["read-only"] == true, NoFlush: v["cache"] == "unsafe"}
	if v["cache"] == "none" {
		p.Notes = append(p.Notes, "-drive: cache=none changes nothing: "+pageCache)
	}
	for n := 0; b.ID == ""; n++ {
		if id := fmt.Sprintf("drive%d", n); p.cfg.Blockdev(id) == nil {
			b.ID = id
		}
	}
	p.cfg.Blockdevs = append(p.cfg.Blockdevs, b)
	serial, given := v["serial"]
	if v["if"] == "none" {
		if given {
			return errors.New("serial: belongs to the device\nsay -device virtio-blk-pci,drive=ID,serial=")
		}
		return nil
	}
	props := Values{"drive": b.ID}
	if given {
		props["serial"] = serial
	}
	p.cfg.Devices = append(p.cfg.Devices, newDevice("virtio-blk-pci", props))
	return nil
}

// addBlockdev follows file= to the node that an earlier -blockdev made, as QEMU builds its
// graph from the leaves; that node is then used up.
func (p *parser) addBlockdev(_ string, v Values) error {
	b := Blockdev{File: v.take("file.filename")}
	if node := v.take("file"); node != "" {
		i := slices.IndexFunc(p.cfg.Blockdevs, func(b Blockdev) bool { return b.ID == node })
		if i < 0 {
			return fmt.Errorf("file=%s: no -blockdev before this one has that node-name", node)
		}
		b = p.cfg.Blockdevs[i]
		p.cfg.Blockdevs = slices.Delete(p.cfg.Blockdevs, i, i+1)
	}
	err := v.into(&b)
	p.cfg.Blockdevs = append(p.cfg.Blockdevs, b)
	return err
}

func (p *parser) addChardev(kind string, v Values) error {
	c := Chardev{ID: v.take("id"), Spec: kind}
	path, host, port := v.take("path"), v.take("host"), v.take("port")
	switch {
	case kind == "file":
		c.Spec = "file:" + path
	case kind == "socket" && path != "" && host+port == "":
		c.Spec = "unix:" + strings.ReplaceAll(path, ",", ",,")
	case kind == "socket" && path == "" && port != "":
		c.Spec = "tcp:" + strings.ReplaceAll(net.JoinHostPort(host, port), ",", ",,")
	case kind == "socket":
		return fmt.Errorf("socket %s: want either path= or host= and port=", c.ID)
	}
	for _, key := range []string{"server", "wait"} {
		if v[key] != nil {
			c.Spec += fmt.Sprintf(",%s=%s", key, spell(v[key]))
		}
	}
	p.cfg.Chardevs = append(p.cfg.Chardevs, c)
	return nil
}

func (p *parser) addObject(kind string, v Values) error {
	id := v.take("id")
	if _, twice := p.objects[id]; twice {
		return fmt.Errorf("%s %s: there is another object of this id", kind, id)
	}
	m := MemoryConfig{}
	if v["hugetlb"] == true {
		m.HugePages = 2 << 20
	} else if v["hugetlbsize"] != nil {
		return fmt.Errorf("%s %s: hugetlbsize: needs hugetlb=on", kind, id)
	}
	p.objects[id] = &m
	return v.into(&m)
}
