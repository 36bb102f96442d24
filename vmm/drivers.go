package vmm

import "fmt"

// driver is one row of the table of devices.
type driver struct {
	schema
	on       busKind // what it is plugged into
	provides busKind // the bus that it brings along, if any
}

type busKind string

const (
	busPCI    busKind = "PCIe"
	busSerial busKind = "virtio-serial" // "ID.0" of a virtio-serial-pci
)

// drivers is the table of all that -device takes.
var drivers = []driver{
	{schema{name: "pcie-root-port", help: "PCIe root port: one slot that a device can be plugged into", props: onPCI(
		prop{name: "chassis", kind: kindUint, max: 255, help: "chassis number; with slot= unique; default: a free one"},
		prop{name: "slot", kind: kindUint, max: 8191, def: uint64(0), help: "physical slot number"},
		prop{name: "port", kind: kindUint, max: 255, def: uint64(0), help: "port number in the link capabilities"},
		prop{name: "attention-button", kind: kindBool, def: true, help: "under native-hotplug=on: the guest is asked by it, which takes 5 s; off: by a slot that looks empty"},
	)}, busPCI, busPCI},
	{schema{name: "virtio-net-pci", aliases: aliases("virtio-net"), help: "network card", props: onVirtio(asPrimary(
		prop{name: "netdev", required: true, help: "id of the -netdev behind it"},
		prop{name: "mac", kind: kindMAC, help: "its address; default: 52:54:00:12:34:56 and up"},
		prop{name: "mq", kind: kindBool, def: false, help: "offer all queue pairs of the netdev"},
		prop{name: "failover", kind: kindBool, def: false, help: "offer VIRTIO_NET_F_STANDBY: the slow half of a failover pair"},
		prop{name: "steer", def: "auto", help: "what moves the guest's MAC between the halves: auto, none or script=PATH"},
		prop{name: "host_mtu", kind: kindUint, min: 68, max: 65535, help: "MTU told to the guest; default: none"},
		prop{name: "rx_queue_size", kind: kindPow2, min: 256, max: 1024, def: uint64(256), help: "descriptors"},
		prop{name: "tx_queue_size", kind: kindPow2, min: 256, max: 1024, help: "as rx_queue_size"},
		prop{name: "speed", kind: kindUint, min: 1, max: 1 << 31, help: "Mbit/s told to the guest; default: none"},
		feature("csum", 0), feature("guest_csum", 1), feature("guest_tso4", 7), feature("guest_tso6", 8),
		feature("guest_ecn", 9), feature("guest_ufo", 10), feature("host_tso4", 11), feature("host_tso6", 12),
		feature("host_ecn", 13), feature("host_ufo", 14), feature("mrg_rxbuf", 15), feature("status", 16),
		feature("ctrl_vq", 17), feature("ctrl_rx", 18), feature("ctrl_vlan", 19), feature("ctrl_mac_addr", 23),
	)...)}, busPCI, ""},
	{schema{name: "virtio-blk-pci", aliases: aliases("virtio-blk"), help: "disk", props: onVirtio(
		prop{name: "drive", required: true, help: "id of the -drive or -blockdev behind it"},
		prop{name: "serial", help: "serial number, up to 20 bytes"},
		prop{name: "num-queues", kind: kindUint, min: 1, max: MaxQueues, def: uint64(1), help: "request queues"},
		prop{name: "logical_block_size", kind: kindPow2, min: 512, max: 32768, def: uint64(512), help: "bytes"},
		feature("discard", 13), feature("write-zeroes", 14),
		prop{name: "bootindex", kind: kindUint, ignored: "the kernel is given by -kernel"},
	)}, busPCI, ""},
	{schema{name: "virtio-serial-pci", aliases: aliases("virtio-serial"), help: "carrier of consoles and ports", props: onVirtio(
		prop{name: "max_ports", kind: kindUint, ignored: "there are as many as are plugged in"},
	)}, busPCI, busSerial},
	{schema{name: "virtconsole", help: "console (hvc0 and up) on a virtio-serial-pci", props: portProps}, busSerial, ""},
	{schema{name: "virtserialport", help: "byte channel (/dev/virtio-ports/NAME) on a virtio-serial-pci", props: portProps}, busSerial, ""},
	{schema{name: "virtio-rng-pci", aliases: aliases("virtio-rng"), help: "entropy", props: onVirtio(
		prop{name: "rng", help: "id of an -object rng-random or rng-builtin"},
	)}, busPCI, ""},
	{schema{name: "vfio-pci", help: "PCI function of the host, such as a VF", props: onPCI(asPrimary(
		prop{name: "host", help: "its address there, 0000:01:10.0"},
		prop{name: "sysfsdev", help: "its folder below /sys, in place of host="},
		prop{name: "pool", help: "interface or address of a PF, in place of host=: any free VF of it; several: PF+PF"},
		prop{name: "bind", kind: kindEnum, enum: []string{"off", "auto"}, def: "off", help: "auto: take it from its driver, and give it back at the end"},
		prop{name: "rombar", kind: kindUint, max: 1, def: uint64(1), help: "1: show the option ROM, if there is one"},
	)...)}, busPCI, ""},
}

var portProps = []prop{
	{name: "chardev", required: true, help: "id of the -chardev behind it"},
	{name: "name", help: "name that the guest sees"},
	{name: "nr", kind: kindUint, max: 30, help: "port number; default: the first free one, 0 for a console only"},
	{name: "id", help: "name of the device"},
	{name: "bus", help: "ID.0 of a virtio-serial-pci; default: the first one"},
}

func aliases(name string) []string { return []string{name, name + "-pci-non-transitional"} }

func feature(name string, bit int) prop {
	return prop{name: name, kind: kindBool, def: true, feature: 1 << bit, help: fmt.Sprintf("offer feature bit %d", bit)}
}

// only is a property of QEMU's that has one value here.
func only(name, value, why string) prop {
	return prop{name: name, kind: kindEnum, enum: []string{value}, help: why}
}

func onPCI(own ...prop) []prop {
	return append(own,
		prop{name: "id", help: "name of the device"},
		prop{name: "bus", def: RootBus, help: "id of a pcie-root-port, or " + RootBus},
		prop{name: "addr", kind: kindAddr, help: "place on the bus; default: the first free slot"},
		prop{name: "multifunction", kind: kindBool, def: false, help: "functions 1 to 7 of this slot may be used too"},
		prop{name: pairID, help: "of a network card: id of the virtio-net-pci with failover=on that it is the fast half to"},
		prop{name: "standby", help: "the same, as it was spelled once"})
}

// asPrimary adds what a device takes that may be the fast half of a failover pair.
func asPrimary(own ...prop) []prop {
	return append(own,
		prop{name: "failover-unplug", kind: kindEnum, enum: []string{"cooperative", "surprise", "auto"}, def: "auto", help: "how it is taken from the guest; auto: politely, after the timeout by surprise"},
		prop{name: "failover-unplug-timeout", kind: kindUint, max: 1 << 31, def: uint64(5000), help: "milliseconds that the guest has to let go, after the 5 s that a native slot blinks; 0: for ever"},
		prop{name: "failover-primary", kind: kindEnum, enum: []string{"require", "prefer"}, def: "prefer", help: "prefer: a guest may arrive without it; require: only if it can be had"})
}

// pairID is the property that makes a device a primary.
const pairID = "failover_pair_id"

func onVirtio(own ...prop) []prop {
	return onPCI(append(own,
		feature("indirect_desc", 28), feature("event_idx", 29),
		prop{name: "vectors", kind: kindUint, ignored: "each queue has one, and one is for changes"},
		prop{name: "romfile", ignored: "there is no option ROM"},
		prop{name: "rombar", kind: kindUint, ignored: "there is no option ROM"},
		prop{name: "disable-legacy", kind: kindEnum, enum: []string{"on", "auto"}, help: "virtio 1.x only"},
		only("disable-modern", "off", "virtio 1.x only"),
		only("packed", "off", "split virtqueues only"),
		only("iommu_platform", "off", "the guest has no IOMMU"))...)
}

// driverSchemas are the kinds of -device.
func driverSchemas() []schema {
	kinds := make([]schema, len(drivers))
	for i, d := range drivers {
		kinds[i] = d.schema
		kinds[i].device = true
	}
	return kinds
}

// row is the device's row of the table; nil for a driver that is not in it.
func (d *Device) row() *driver {
	return find(drivers, func(r *driver) bool { return r.name == d.Driver })
}

// FeaturesOff returns the mask of the virtio features that properties took away.
func (d *Device) FeaturesOff() (mask uint64) {
	if row := d.row(); row != nil {
		for _, p := range row.props {
			if p.feature != 0 && !d.Bool(p.name) {
				mask |= p.feature
			}
		}
	}
	return mask
}

// newDevice makes a device of checked values.
func newDevice(driver string, v Values) Device {
	if id := v.take("standby"); id != "" {
		v[pairID] = id
	}
	return Device{Driver: driver, ID: v.take("id"), Bus: v.take("bus"), Addr: v.take("addr"), Props: v}
}
