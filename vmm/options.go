package vmm

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	"baton/devices/char"
)

// Invocation is what a command line asks for.
type Invocation struct {
	Config      *Config
	Notes       []string // one line each: accepted, but worth a word
	PrintConfig bool     // print Config as JSON and stop
	Print       string   // text that was asked for (-help, -device help): print it and stop
}

// option is one row of the table of options, which drives the parser and the help. An
// option takes nothing (arg ""), a string (set), or keys and values (kinds, add).
type option struct {
	name, alias, arg string
	group, help      string
	set              func(p *parser, arg string) error
	key              string // names the kind of the object, if there are several
	kinds            []schema
	add              func(p *parser, kind string, v Values) error
}

// Groups of the help, in its order.
const (
	groupMachine = "Machine"
	groupBoot    = "Boot"
	groupDevice  = "Devices"
	groupHost    = "What the host lends to them"
	groupRun     = "Running"
	groupInfo    = "Information"
)

type parser struct {
	Invocation
	cfg     *Config
	objects map[string]*MemoryConfig // by id; of an rng, empty
	backend string                   // -machine memory-backend=
}

func setText(field func(*Config) *string) func(*parser, string) error {
	return func(p *parser, arg string) error { *field(p.cfg) = arg; return nil }
}

func setFlag(field func(*Config) *bool) func(*parser, string) error {
	return func(p *parser, _ string) error { *field(p.cfg) = true; return nil }
}

func nothing(*parser, string) error { return nil }

// justNone is for options that turn something off that baton does not have anyway.
func justNone(have string) func(*parser, string) error {
	return func(p *parser, arg string) error {
		if arg != "none" {
			return fmt.Errorf("%s: none is all that baton takes here\n%s", arg, have)
		}
		return nil
	}
}

func options() []option {
	return []option{
		{name: "enable-kvm", group: groupMachine, help: "use KVM; baton always does", set: nothing},
		{name: "accel", arg: "kvm[,KEY=VALUE...]", group: groupMachine, help: "force=on: try a stock kernel even where KVM cannot run one; dirty-ring-size=N", kinds: accelKinds,
			add: func(p *parser, _ string, v Values) error { return v.into(&p.cfg.Accel) }},
		{name: "machine", alias: "M", arg: "q35[,KEY=VALUE...]", group: groupMachine, help: "kernel-irqchip=split, native-hotplug=on|off, memory-backend=ID", kinds: machineKinds,
			add: func(p *parser, _ string, v Values) error {
				if id := v.take("memory-backend"); id != "" {
					p.backend = id
				}
				return v.into(&p.cfg.Machine)
			}},
		{name: "cpu", arg: "host", group: groupMachine, help: "the host's CPU, as far as KVM offers it", set: setCPU},
		{name: "smp", arg: "N", group: groupMachine, help: "vCPUs, 1 to 64; sockets=, cores= and threads= have to match", kinds: smpKinds, add: (*parser).addSMP},
		{name: "m", arg: "SIZE", group: groupMachine, help: "RAM, 64M to 64G; a bare number counts MiB; default: 128", kinds: memoryKinds,
			add: func(p *parser, _ string, v Values) error { return v.into(&p.cfg.Memory) }},
		{name: "mem-prealloc", group: groupMachine, help: "populate the RAM before the guest starts", set: setFlag(func(c *Config) *bool { return &c.Memory.Prealloc })},
		{name: "name", arg: "NAME", group: groupMachine, help: "name of the machine", kinds: nameKinds,
			add: func(p *parser, _ string, v Values) error { p.cfg.Name = v.take("guest"); return nil }},
		{name: "kernel", arg: "FILE", group: groupBoot, help: "bzImage, vmlinux or any ELF with a PVH entry", set: setText(func(c *Config) *string { return &c.Kernel })},
		{name: "initrd", arg: "FILE", group: groupBoot, help: "initial RAM disk", set: setText(func(c *Config) *string { return &c.Initrd })},
		{name: "append", arg: "TEXT", group: groupBoot, help: "kernel command line", set: setText(func(c *Config) *string { return &c.Append })},
		{name: "device", arg: "DRIVER[,KEY=VALUE...]", group: groupDevice, help: "add a device, or '{\"driver\":...}'; `-device help`, `-device DRIVER,help`", key: "driver", kinds: driverSchemas(),
			add: func(p *parser, kind string, v Values) error {
				p.cfg.Devices = append(p.cfg.Devices, newDevice(kind, v))
				return nil
			}},
		{name: "net", arg: "none", group: groupDevice, help: "no network card; baton makes none by itself", set: justNone("use -netdev tap and -device virtio-net-pci")},
		{name: "nic", arg: "none", group: groupDevice, help: "the same", set: justNone("use -netdev tap and -device virtio-net-pci")},
		{name: "netdev", arg: "tap,id=ID[,KEY=VALUE...]", group: groupHost, help: "ifname=, script=, downscript=, vhost=on|off, queues=, fd=, fds=", key: "type", kinds: netdevKinds, add: (*parser).addNetdev},
		{name: "drive", arg: "file=FILE[,KEY=VALUE...]", group: groupHost, help: "raw disk: if=virtio|none, id=, readonly=, cache=, serial=", kinds: driveKinds, add: (*parser).addDrive},
		{name: "blockdev", arg: "DRIVER,node-name=ID...", group: groupHost, help: "the host's side of a disk: file,filename= or raw,file=NODE", key: "driver", kinds: blockdevKinds, add: (*parser).addBlockdev},
		{name: "chardev", arg: "KIND,id=ID[,KEY=VALUE...]", group: groupHost, help: "socket, file, stdio or null", key: "backend", kinds: chardevKinds, add: (*parser).addChardev},
		{name: "serial", arg: "DEV", group: groupHost, help: "COM1: stdio, mon:stdio (monitor: C-a c), file:PATH, unix:PATH,..., none",
			set: func(p *parser, arg string) error { p.cfg.Serials = append(p.cfg.Serials, arg); return nil }},
		{name: "object", arg: "KIND,id=ID[,KEY=VALUE...]", group: groupHost, help: "memory-backend-memfd,size=,hugetlb=on, rng-random", key: "qom-type", kinds: objectKinds, add: (*parser).addObject},
		{name: "nographic", group: groupRun, help: "no display, serial port on stdio; baton's way anyhow", set: nothing},
		{name: "display", arg: "none", group: groupRun, help: "no display", set: justNone("there is no display; use -serial")},
		{name: "vga", arg: "none", group: groupRun, help: "no display", set: justNone("there is no display; use -serial")},
		{name: "k", arg: "LAYOUT", group: groupRun, help: "keyboard layout; changes nothing",
			set: func(p *parser, arg string) error {
				p.Notes = append(p.Notes, "-k "+arg+" changes nothing: there is no display, hence no keyboard")
				return nil
			}},
		{name: "nodefaults", group: groupRun, help: "no serial port without -serial", set: setFlag(func(c *Config) *bool { return &c.NoDefaults })},
		{name: "no-user-config", group: groupRun, help: "read no configuration by default; baton never does", set: nothing},
		{name: "no-reboot", group: groupRun, help: "end when the guest resets", set: setFlag(func(c *Config) *bool { return &c.NoReboot })},
		{name: "no-shutdown", group: groupRun, help: "stop where baton would end: guest off, reset under -no-reboot, crash", set: setFlag(func(c *Config) *bool { return &c.NoShutdown })},
		{name: "S", group: groupRun, help: "start no vCPU until the monitor says cont", set: setFlag(func(c *Config) *bool { return &c.Paused })},
		{name: "incoming", arg: "URI", group: groupRun, help: "where a guest comes from: tcp:, unix:, file:, fd:, exec:, or defer",
			set: setText(func(c *Config) *string { return &c.Incoming })},
		{name: "qmp", arg: "DEV", group: groupRun, help: "QMP clients: unix:PATH,server=on,wait=off, tcp:HOST:PORT,..., stdio, chardev:ID",
			set: func(p *parser, arg string) error {
				p.cfg.Monitors = append(p.cfg.Monitors, Monitor{monitorQMP, arg})
				return nil
			}},
		{name: "monitor", arg: "DEV", group: groupRun, help: "the monitor for people: telnet:HOST:PORT,..., unix:PATH,..., stdio, none",
			set: func(p *parser, arg string) error {
				if arg != string(char.None) {
					p.cfg.Monitors = append(p.cfg.Monitors, Monitor{monitorHMP, arg})
				}
				return nil
			}},
		{name: "mon", arg: "chardev=ID[,mode=MODE]", group: groupRun, help: "either of them on a -chardev: mode=control is QMP; default: readline", kinds: monitorKinds,
			add: func(p *parser, _ string, v Values) error {
				mode := cmp.Or(v.take("mode"), monitorHMP)
				p.cfg.Monitors = append(p.cfg.Monitors, Monitor{mode, "chardev:" + v.take("chardev")})
				return nil
			}},
		{name: "daemonize", group: groupRun, help: "go to the background once the machine is ready", set: setFlag(func(c *Config) *bool { return &c.Daemonize })},
		{name: "pidfile", arg: "FILE", group: groupRun, help: "write the process id there", set: setText(func(c *Config) *string { return &c.PIDFile })},
		{name: "D", arg: "FILE", group: groupRun, help: "write the log there; default: stderr", set: setText(func(c *Config) *string { return &c.LogFile })},
		{name: "event-log", arg: "FILE", group: groupRun, help: "write each event there, a line of JSON each", set: setText(func(c *Config) *string { return &c.EventLog })},
		{name: "config", arg: "FILE", group: groupRun, help: "start from what -print-config printed", set: (*parser).readConfig},
		{name: "print-config", group: groupInfo, help: "check everything, print the machine as JSON, stop", set: func(p *parser, _ string) error { p.PrintConfig = true; return nil }},
		{name: "help", alias: "h", group: groupInfo, help: "print this", set: func(p *parser, _ string) error { p.Print = Help(); return nil }},
		{name: "version", group: groupInfo, help: "print the version", set: func(p *parser, _ string) error { p.Print = Version() + "\n"; return nil }},
	}
}

// ParseArgs turns the arguments of `baton run` into a checked configuration. The error
// joins all that is wrong with them, see Errors.
func ParseArgs(args []string) (*Invocation, error) {
	p := &parser{cfg: DefaultConfig(), objects: map[string]*MemoryConfig{}}
	table := options()
	var errs []error
	for _, a := range args {
		if !utf8.ValidString(a) { // JSON could not hold it
			errs = append(errs, fmt.Errorf("argument %q: not UTF-8", a))
		}
	}
	for len(args) > 0 && p.Print == "" {
		word := args[0]
		args = args[1:]
		name := strings.TrimPrefix(strings.TrimPrefix(word, "-"), "-")
		if name == word {
			errs = append(errs, p.addDrive("", Values{"file": word}))
			continue
		}
		o := find(table, func(o *option) bool { return o.name == name || o.alias == name })
		arg, takes := "", o != nil && o.arg != ""
		if o == nil { // its argument is no image: a word without a dash goes with it
			takes = len(args) > 0 && !strings.HasPrefix(args[0], "-")
			errs = append(errs, unknownOption(name, table))
		}
		if takes {
			if len(args) == 0 {
				errs = append(errs, fmt.Errorf("-%s: an argument is missing: %s", name, o.arg))
				break
			}
			arg, args = args[0], args[1:]
		}
		if o != nil {
			errs = append(errs, inObject("-"+name, p.apply(o, arg)))
		}
	}
	if p.Print == "" {
		errs = append(errs, p.finish(), p.cfg.Validate(), p.cfg.CheckFiles())
	}
	p.Config = p.cfg
	return &p.Invocation, errors.Join(errs...)
}

func unknownOption(name string, table []option) error {
	if hint := insteadOf("-" + name); hint != "" {
		return fmt.Errorf("-%s: an option of QEMU's that has no meaning here\n%s", name, hint)
	}
	var names []string
	for _, o := range table {
		names = append(names, "-"+o.name)
	}
	return unknown("option", "-"+name, names)
}

func (p *parser) apply(o *option, arg string) error {
	if o.kinds == nil {
		return o.set(p, arg)
	}
	if kind, ok := strings.CutSuffix(arg, "help"); ok && (kind == "" || strings.HasSuffix(kind, ",")) {
		text, err := o.describe(strings.TrimSuffix(kind, ","))
		p.Print = text
		return err
	}
	s, vals, notes, err := parseObject(arg, o.key, o.kinds)
	for _, n := range notes {
		p.Notes = append(p.Notes, "-"+o.name+": "+n)
	}
	if s == nil {
		return err
	}
	return errors.Join(err, o.add(p, s.name, vals))
}

// finish resolves what the order of the options left open.
func (p *parser) finish() error {
	var errs []error
	c := p.cfg
	if m, ok := p.objects[p.backend]; ok {
		if m.Size != c.Memory.Size {
			errs = append(errs, fmt.Errorf("-object %s: its size is %d MiB, but -m says %d MiB", p.backend, m.Size>>20, c.Memory.Size>>20))
		}
		m.Size, m.Prealloc = c.Memory.Size, m.Prealloc || c.Memory.Prealloc
		c.Memory = *m
	} else if p.backend != "" {
		errs = append(errs, inObject("-machine memory-backend", unknown("object", p.backend, slices.Collect(maps.Keys(p.objects)))))
	}
	for _, d := range c.Devices {
		if rng, ok := d.Props["rng"].(string); ok && p.objects[rng] == nil {
			errs = append(errs, inObject("-device "+d.String()+": rng", unknown("object", rng, slices.Collect(maps.Keys(p.objects)))))
		}
		delete(d.Props, "rng") // any of them is the host's getrandom(2)
	}
	c.Complete()
	for _, n := range c.Netdevs {
		if !slices.ContainsFunc(c.Devices, func(d Device) bool { return d.Props["netdev"] == n.ID }) {
			p.Notes = append(p.Notes, "netdev "+n.ID+" has no peer: no -device uses it")
		}
	}
	return errors.Join(errs...)
}

func setCPU(p *parser, arg string) error {
	words := splitCommas(arg)
	if p.cfg.CPU.Model = words[0]; len(words) > 1 {
		return fmt.Errorf("%s: features cannot be chosen\nthe guest gets what the host's KVM offers; hide a feature from Linux by -append clearcpuid=", words[1])
	}
	return nil
}

func (p *parser) readConfig(file string) error {
	if !reflect.DeepEqual(p.cfg, DefaultConfig()) {
		return errors.New("has to stand before the options that add to it")
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	c, err := ReadConfig(data)
	if err == nil {
		*p.cfg = *c
	}
	return err
}

// ReadConfig reads what -print-config printed.
func ReadConfig(data []byte) (*Config, error) {
	c := DefaultConfig()
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("text after the configuration")
	}
	return c, nil
}
