package vmm

import (
	"fmt"
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
)

// Version says which baton this is.
func Version() string {
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		version = info.Main.Version
	}
	return fmt.Sprintf("baton %s (%s)", version, runtime.Version())
}

const helpHead = `baton: a virtual machine monitor whose guests keep their network while they move

usage: baton [run] [OPTION...] [IMAGE]   start a machine; IMAGE is a raw disk
       baton check [-json]               what this host can do, and how to get what it cannot
       baton completion bash             a script: eval "$(baton completion bash)"
       baton device SOCKET [add DRIVER,KEY=VALUE... | del ID [surprise]]   list, plug in, take out
       baton events [-json] SOCKET|FILE  what happens to a machine; SOCKET is -qmp's, FILE -event-log's
       baton events -timeline LOG LOG > OUT.html   a move as a page, from both sides' -event-log
       baton help
       baton migrate SOCKET URI [NAME=VALUE...]   move a guest; SOCKET is its -qmp's, URI -incoming's there
       baton monitor SOCKET [COMMAND...] talk to a machine by its -qmp socket: HMP, or QMP in braces
       baton version

Options are QEMU's, with one dash or two. A comma in a value is doubled.
`

const helpTail = `
Examples:
  baton -m 1G -smp 2 -kernel vmlinuz -initrd initrd.img -append console=ttyS0 disk.raw
  baton -m 1G -kernel vmlinuz -append "console=ttyS0 root=/dev/vda1" \
    -netdev tap,id=net0,ifname=tap0,vhost=on -device virtio-net-pci,netdev=net0 \
    -drive file=disk.raw,format=raw,if=virtio
  baton -m 1G -kernel vmlinuz -device pcie-root-port,id=root1,chassis=1 \
    -netdev tap,id=net0,vhost=on -device virtio-net-pci,netdev=net0,bus=root1
  baton -device virtio-net-pci,help
  baton -m 1G -kernel vmlinuz -daemonize -serial file:serial.log -qmp unix:qmp,server,nowait
  baton device qmp add virtio-net-pci,id=net1,netdev=net1,bus=root1
  baton monitor qmp info status
  baton monitor qmp '{"execute":"query-rx-filter"}'
  baton -m 1G -incoming tcp:0.0.0.0:4444 -qmp unix:qmp2,server,nowait disk.raw
  baton migrate qmp tcp:192.0.2.7:4444 max-bandwidth=1G multifd=on

Exit status: 0 the guest turned itself off, or baton was told to end; 1 bad options, a
host that cannot do what they ask, or a guest that crashed; 130 Ctrl-C cancelled a
migration.
`

// Help is the text of `baton help`.
func Help() string {
	var b strings.Builder
	b.WriteString(helpHead)
	byGroup := map[string][]option{}
	table := options()
	slices.SortFunc(table, func(a, b option) int { return strings.Compare(strings.ToLower(a.name), strings.ToLower(b.name)) })
	for _, o := range table {
		byGroup[o.group] = append(byGroup[o.group], o)
	}
	for _, group := range []string{groupMachine, groupBoot, groupDevice, groupHost, groupRun, groupInfo} {
		fmt.Fprintf(&b, "\n%s:\n", group)
		for _, o := range byGroup[group] {
			usage := "-" + o.name
			if o.alias != "" {
				usage += ", -" + o.alias
			}
			row(&b, strings.TrimSpace(usage+" "+o.arg), o.help)
		}
	}
	b.WriteString(helpTail)
	return b.String()
}

// row writes a term and its explanation, on a line of its own if the term is long.
func row(b *strings.Builder, term, help string) {
	if len(term) > 26 {
		fmt.Fprintf(b, "  %s\n", term)
		term = ""
	}
	fmt.Fprintf(b, "  %-26s  %s\n", term, help)
}

// describe is the help on an option's argument: on one kind of object, or the list of them.
func (o *option) describe(kind string) (string, error) {
	var b strings.Builder
	s := &o.kinds[0]
	switch {
	case o.key == "":
	case kind == "":
		fmt.Fprintf(&b, "-%s %s:\n", o.name, o.arg)
		for _, s := range o.kinds {
			row(&b, strings.Join(append([]string{s.name}, s.aliases...), ", "), s.help)
		}
		return b.String(), nil
	default:
		var err error
		if s, err = findSchema(o.kinds, o.key, kind); err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "%s: %s\n", s.name, s.help)
	}
	props := map[string]prop{}
	for _, p := range s.props {
		props[p.name] = p
	}
	for _, name := range slices.Sorted(maps.Keys(props)) {
		p := props[name]
		help := p.help
		switch {
		case p.ignored != "":
			help = "changes nothing: " + p.ignored
		case p.required:
			help += "; required"
		case p.def != nil:
			help += fmt.Sprintf("; default: %v", spell(p.def))
		}
		row(&b, name+"="+p.kindName(), help)
	}
	return b.String(), nil
}
