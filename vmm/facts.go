package vmm

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"baton/devices/virtio/blk"
	"baton/kvm"
	"baton/migrate"
)

// facts are what a guest can see of its machine, and what its state is
// made of. It moves only to a machine that has all that, for what migrates is the state of these
// devices and CPUs, not the devices. The CPU's facts are, on the source, what its guest has been
// told, and on the target, what that could tell one.
//
//	machine, native-hotplug, cpus, memory, memory map, serial   equal
//	cpu/0xLEAF.INDEX/REGISTER   feature bits: the target has those of the source
//	cpu/xsave/COMPONENT         equal: where it is in the area
//	cpu/vendor, cpu/xsave, cpu/tsc, cpu/capabilities, cpu/msrs
//	device/ADDRESS              driver and id; the driver is equal
//	device/ADDRESS/PROPERTY     equal
func (m *Machine) facts() []migrate.Fact {
	facts := []migrate.Fact{
		{Name: "machine", Value: m.cfg.Machine.Type},
		{Name: "native-hotplug", Value: fmt.Sprint(spell(m.cfg.Machine.NativeHotplug))},
		{Name: "cpus", Value: fmt.Sprint(m.cfg.SMP)},
		{Name: "memory", Value: fmt.Sprintf("%d MiB", m.cfg.Memory.Size>>20)},
		{Name: "memory map", Value: fmt.Sprint(append(m.layout.RAM(), m.layout.ECAM, m.layout.MMIO32, m.layout.MMIO64))},
		{Name: "serial", Value: fmt.Sprint(spell(m.serial != nil))},
	}
	facts = append(facts, m.migration.cpu...)
	devices := map[string]*device{}
	for _, d := range m.devices {
		if !m.isPrimary(d.fn) { // of which the guest lets go before
			devices[m.addressOf(d.Device)] = d
		}
	}
	for _, address := range slices.Sorted(maps.Keys(devices)) {
		facts = append(facts, m.deviceFacts("device/"+address, devices[address])...)
	}
	return facts
}

// hostProps are the properties that say what a device is on the host, which the guest cannot
// see, and those that are in the device's own fact.
var hostProps = []string{"netdev", "drive", "chardev", "rng", "bootindex", pairID, "standby", "steer", "failover-unplug", "failover-unplug-timeout", "failover-primary", "id", "bus", "addr"}

func (m *Machine) deviceFacts(name string, d *device) (facts []migrate.Fact) {
	add := func(prop string, v any) { facts = append(facts, migrate.Fact{Name: name + prop, Value: fmt.Sprint(v)}) }
	add("", strings.TrimSpace(d.Driver+" "+d.ID))
	for _, p := range d.row().props {
		if v := d.value(p.name); v != nil && p.ignored == "" && p.feature == 0 && !slices.Contains(hostProps, p.name) {
			add("/"+p.name, spell(v))
		}
	}
	if d.model != nil {
		add("/features", fmt.Sprintf("%#x", d.model.Features()&^d.FeaturesOff()))
	}
	if disk, ok := d.model.(*blk.Device); ok {
		add("/sectors", disk.Disk().Size()/blk.SectorSize)
	}
	for i := range m.cfg.Devices { // the ports of a virtio-serial-pci
		if p := &m.cfg.Devices[i]; d.ID != "" && p.Bus == d.ID+".0" {
			add("/port "+p.Text("name"), fmt.Sprint(p.Driver, " ", p.Uint("nr")))
		}
	}
	return facts
}

// addressOf is the device's place as the sections of the state have it: the bus numbers are
// the guest's, so what is behind a root port is named by the way there.
func (m *Machine) addressOf(d *Device) string {
	if d.Bus != RootBus {
		for i := range m.cfg.Devices {
			if port := &m.cfg.Devices[i]; port.ID == d.Bus {
				return m.addressOf(port) + "/" + d.Addr
			}
		}
	}
	return "pci/0000:00:" + d.Addr
}

// leafXSave has the size and place of each component: Intel SDM vol. 1, 13.2.
const leafXSave = 0xd

// cpuFacts are vCPU 0's; the others differ in their APIC IDs only. What cannot be read is
// left out, and then missed. A vCPU that is in the guest would not answer before it comes out,
// which may be never: these are read when it has not run yet.
func (m *Machine) cpuFacts() (facts []migrate.Fact) {
	add := func(name string, v any) {
		facts = append(facts, migrate.Fact{Name: "cpu/" + name, Value: fmt.Sprint(v)})
	}
	v := m.vcpus[0]
	leaves, _ := v.CPUID()
	for _, e := range leaves {
		r := [4]uint32{e.Eax, e.Ebx, e.Ecx, e.Edx}
		for i := range cpuWords {
			if w := &cpuWords[i]; w.leaf == e.Function && w.index == e.Index {
				add(w.fact(), fmt.Sprintf("%#x", r[w.register]&^w.volatile))
			}
		}
		switch {
		case e.Function == 0:
			var name []byte
			for _, v := range []uint32{e.Ebx, e.Edx, e.Ecx} {
				name = append(name, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
			}
			add("vendor", strings.TrimRight(string(name), "\x00"))
		case e.Function == leafXSave && e.Index > 1 && e.Eax != 0:
			add(fmt.Sprintf("xsave/%d", e.Index), fmt.Sprintf("%d bytes at %d, %#x", e.Eax, e.Ebx, e.Ecx))
		}
	}
	add("xsave", fmt.Sprintf("%d bytes", v.XSaveSize()))
	if khz, err := v.TSCKHz(); err == nil { // else unknown: the host's is not stable
		add("tsc", fmt.Sprintf("%d kHz", khz))
	}
	if msrs, _, err := v.MSRs([]uint32{msrArchCapabilities}); err == nil && len(msrs) == 1 {
		add("capabilities", fmt.Sprintf("%#x", msrs[0].Data))
	}
	indices, _ := m.sys.MSRIndices()
	slices.Sort(indices)
	var words []string
	for _, index := range indices {
		words = append(words, fmt.Sprintf("%#x", index))
	}
	add("msrs", strings.Join(words, " "))
	return facts
}

// check lists what keeps a guest that has seen the source's facts from coming here.
func (m *Machine) check(source []migrate.Fact) (list []string) {
	return differences(source, m.facts(), m.sys.CheckExtension(kvm.CapTSCControl) > 0)
}

// differences lists what keeps the source's guest from the target, whose TSC may be one that
// scales.
func differences(source, target []migrate.Fact, tscScales bool) (list []string) {
	there := map[string]string{}
	for _, f := range target {
		there[f.Name] = f.Value
	}
	here := map[string]bool{}
	skip := "" // a device that is not there, or another one, is one difference
	for _, f := range source {
		if here[f.Name] = true; skip != "" && strings.HasPrefix(f.Name, skip) {
			continue
		}
		value, ok := there[f.Name]
		if value != f.Value || !ok {
			d := difference(f, value, ok, tscScales)
			list = append(list, d...)
			if isDevice(f.Name) && d != nil {
				skip = f.Name + "/"
			}
		}
	}
	skip = ""
	for _, f := range target {
		if here[f.Name] || skip != "" && strings.HasPrefix(f.Name, skip) || strings.HasPrefix(f.Name, "cpu/") {
			continue
		}
		list = append(list, fmt.Sprintf("%s: not at the source, %s at the target", f.Name, f.Value))
		if isDevice(f.Name) {
			skip = f.Name + "/"
		}
	}
	return list
}

// isDevice tells a device's own fact from its properties': device/pci/0000:00:01.0[/00.0].
func isDevice(name string) bool {
	last := name[strings.LastIndexByte(name, '/')+1:]
	return strings.HasPrefix(name, "device/") && strings.Contains(last, ".") && !strings.ContainsFunc(last, func(r rune) bool { return !strings.ContainsRune("0123456789abcdef:.", r) })
}

// difference says what a fact of the source that the target has as value, or has not, means.
func difference(f migrate.Fact, value string, ok, tscScales bool) []string {
	none := []string{fmt.Sprintf("%s: %s at the source, not at the target", f.Name, f.Value)}
	differ := []string{fmt.Sprintf("%s: %s at the source, %s at the target", f.Name, f.Value, value)}
	switch {
	case f.Name == "cpu/tsc":
		if khz, there := leading(f.Value), leading(value); tscScales || max(khz, there)-min(khz, there) <= khz*tscTolerance/1_000_000 {
			return nil
		}
	case f.Name == "cpu/msrs":
		return missingMSRs(f.Value, value)
	case f.Name == "cpu/capabilities":
		if bits(f.Value)&^bits(value) == 0 {
			return nil
		}
	case isDevice(f.Name) && ok:
		driver, _, _ := strings.Cut(f.Value, " ")
		if other, _, _ := strings.Cut(value, " "); other == driver {
			return nil
		}
	}
	for i := range cpuWords {
		if w := &cpuWords[i]; f.Name == "cpu/"+w.fact() {
			return w.missing(uint32(bits(f.Value) &^ bits(value)))
		}
	}
	if !ok {
		return none
	}
	return differ
}

const (
	msrArchCapabilities = 0x10a // which flaws of CPUs the guest need not care for
	tscTolerance        = 250   // parts per million that KVM takes for equal: its tsc_tolerance_ppm
)

// leading is the number that a value begins with.
func leading(value string) int {
	word, _, _ := strings.Cut(value, " ")
	n, _ := strconv.Atoi(word)
	return n
}

func bits(value string) uint64 {
	n, _ := strconv.ParseUint(value, 0, 64)
	return n
}

func missingMSRs(source, target string) (list []string) {
	there := strings.Fields(target)
	for _, word := range strings.Fields(source) {
		if !slices.Contains(there, word) {
			list = append(list, fmt.Sprintf("MSR %s: not at the target", msrName(uint32(bits(word)))))
		}
	}
	return list
}
