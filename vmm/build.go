package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"baton/devices/char"
	"baton/devices/pci"
	"baton/devices/tap"
	"baton/devices/vhost"
	"baton/devices/virtio"
	"baton/devices/virtio/blk"
	"baton/devices/virtio/console"
	"baton/devices/virtio/net"
	"baton/devices/virtio/rng"
)

// builder turns the -device options of a command line into functions on buses.
type builder struct {
	*Machine
	ctx   context.Context
	ports map[string][]console.Port // of each virtio-serial-pci, by the name of its bus
	model virtio.Device             // that transport was called for, if it was
}

// device is a PCI device that there is.
type device struct {
	*Device
	fn     pci.Function
	model  virtio.Device // nil if it is not virtio
	unplug *unplugging   // nil if nobody waits for that
	watch  watch
}

// builders has one entry for each PCI driver of the driver table.
var builders = map[string]func(*builder, *Device) (pci.Function, error){
	"pcie-root-port":    (*builder).rootPort,
	"virtio-net-pci":    (*builder).virtioNet,
	"virtio-blk-pci":    (*builder).virtioBlk,
	"virtio-serial-pci": (*builder).virtioSerial,
	"virtio-rng-pci":    (*builder).virtioRNG,
	"vfio-pci":          (*builder).vfioPCI,
}

// build makes all devices. Each one is tried, so that all errors are seen at once.
func (b *builder) build() error {
	var errs []error
	b.ports = make(map[string][]console.Port)
	for i := range b.cfg.Devices {
		if d := &b.cfg.Devices[i]; builders[d.Driver] == nil {
			errs = append(errs, b.consolePort(d))
		}
	}
	b.onClose(b.closeDevices)
	b.onClose(b.closePairs)
	for i := range b.cfg.Devices {
		if d := &b.cfg.Devices[i]; d.isStandby() {
			b.addStandby(d)
		}
	}
	for i := range b.cfg.Devices {
		d := &b.cfg.Devices[i]
		if builders[d.Driver] == nil {
			continue
		}
		if hidden, err := b.addPrimary(d); hidden || err != nil {
			errs = append(errs, err)
			continue
		}
		dev, err := b.make(d)
		if err == nil {
			b.devices = append(b.devices, dev)
			if d.isStandby() {
				b.attachStandby(dev)
			}
			err = b.plug(d, dev.fn)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// closeDevices closes all devices, the last one first.
func (m *Machine) closeDevices() error {
	var errs []error
	for _, d := range slices.Backward(m.devices) {
		errs = append(errs, d.fn.Close())
	}
	return errors.Join(errs...)
}

// make makes a PCI device, which is on no bus and not among the devices yet.
func (b *builder) make(d *Device) (*device, error) {
	b.model = nil
	f, err := builders[d.Driver](b, d)
	if err != nil {
		return nil, err
	}
	dev := &device{Device: d, fn: f, model: b.model}
	if d.Given(pairID) {
		b.observe(dev)
	}
	return dev, nil
}

// plug puts f where bus= and addr= say.
func (b *builder) plug(d *Device, f pci.Function) error {
	slot, fn := -1, -1
	if d.Addr != "" {
		s, n, _ := strings.Cut(d.Addr, ".")
		v, err := strconv.ParseUint(s, 16, 8)
		if err != nil {
			return fmt.Errorf("%s: addr=%s: %w", d, d.Addr, err)
		}
		slot = int(v)
		if n != "" {
			if v, err = strconv.ParseUint(n, 16, 8); err != nil {
				return fmt.Errorf("%s: addr=%s: %w", d, d.Addr, err)
			}
			fn = int(v)
		}
	}
	for _, bus := range b.pci.Buses() {
		if bus.ID == d.Bus {
			return bus.Add(slot, fn, f)
		}
	}
	return fmt.Errorf("%s: there is no bus %s", d, d.Bus) // its root port failed
}

func (b *builder) rootPort(d *Device) (pci.Function, error) {
	return pci.NewRootPort(pci.RootPortConfig{
		ID:            d.ID,
		Chassis:       uint8(d.Uint("chassis")),
		Port:          uint8(d.Uint("port")),
		Slot:          uint16(d.Uint("slot")),
		Multifunction: d.Bool("multifunction"),
		Native:        b.cfg.Machine.NativeHotplug,
		Button:        b.cfg.Machine.NativeHotplug && d.Bool("attention-button"),
		Vectors:       b.irq,
		Host:          slotHost{b.Machine},
	})
}

// transport puts a virtio device behind virtio-pci.
func (b *builder) transport(d *Device, dev virtio.Device) (pci.Function, error) {
	f, err := virtio.NewPCI(dev, virtio.PCIOptions{
		ID:            d.String(),
		Mem:           b.mem,
		Vectors:       b.irq,
		Doorbells:     doorbells{b.kvm},
		FeaturesOff:   d.FeaturesOff(),
		Multifunction: d.Bool("multifunction"),
		Log:           b.log,
	})
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	b.model = dev
	return f, nil
}

func (b *builder) virtioBlk(d *Device) (pci.Function, error) {
	spec := b.cfg.Blockdev(d.Text("drive"))
	disk, err := blk.Open(spec.File, blk.Options{ReadOnly: spec.ReadOnly, IgnoreFlush: spec.NoFlush, Unlocked: b.State() == StateInMigrate})
	if err != nil {
		return nil, err
	}
	dev, err := blk.New(blk.Config{
		Disk:      disk,
		Serial:    d.Text("serial"),
		Queues:    int(d.Uint("num-queues")),
		BlockSize: uint32(d.Uint("logical_block_size")),
	})
	if err != nil {
		return nil, errors.Join(err, disk.Close())
	}
	return b.transport(d, dev)
}

func (b *builder) virtioRNG(d *Device) (pci.Function, error) { return b.transport(d, rng.New()) }

// consolePort opens the chardev of a virtconsole or virtserialport for its carrier.
func (b *builder) consolePort(d *Device) error {
	port, err := b.openChar(b.ctx, d.String(), b.cfg.Chardev(d.Text("chardev")).Spec)
	if err != nil {
		return err
	}
	p := console.Port{Console: d.Driver == "virtconsole", Name: d.Text("name"), Backend: port}
	if d.Given("nr") {
		p.Number = int(d.Uint("nr"))
	} else {
		p.Number = b.freePort(d.Bus, p.Console)
	}
	b.ports[d.Bus] = append(b.ports[d.Bus], p)
	return nil
}

// freePort is the first port number of a carrier that is not taken. Number 0 is for a
// console only: guests expect one there.
func (b *builder) freePort(bus string, isConsole bool) int {
	n := 1
	if isConsole {
		n = 0
	}
	for slices.ContainsFunc(b.ports[bus], func(p console.Port) bool { return p.Number == n }) {
		n++
	}
	return n
}

func (b *builder) virtioSerial(d *Device) (pci.Function, error) {
	dev, err := console.New(b.ports[d.ID+".0"])
	if err != nil {
		return nil, err
	}
	return b.transport(d, dev)
}

// openChar opens what a char.Parse string says; owner names it in errors.
func (m *Machine) openChar(ctx context.Context, owner, spec string) (*char.Port, error) {
	s, err := char.Parse(spec)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", owner, err)
	}
	p, err := char.Open(ctx, s, char.Options{OnQuit: func() { m.PowerOff("host-ui") }})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", owner, err)
	}
	return p, nil
}

// openSerial opens the backend of COM1, nil if there is no such port.
func (m *Machine) openSerial(ctx context.Context) (*char.Port, error) {
	if len(m.cfg.Serials) == 0 {
		return nil, nil
	}
	spec := m.cfg.charSpec(m.cfg.Serials[0])
	if spec == string(char.None) {
		return nil, nil
	}
	p, err := m.openChar(ctx, "serial port", spec)
	if err == nil {
		m.shared = p.Monitor()
	}
	return p, err
}

func (b *builder) virtioNet(d *Device) (pci.Function, error) {
	spec := b.cfg.Netdev(d.Text("netdev"))
	mac, _ := d.MAC()
	backend, err := b.nics.borrow(b.ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("netdev %s: %w", spec.ID, err)
	}
	pairs := 1
	if d.Bool("mq") {
		pairs = spec.Queues
	}
	dev, err := net.New(net.Config{
		MAC:       mac,
		Queues:    pairs,
		QueueSize: uint16(d.Uint("rx_queue_size")),
		MTU:       uint16(d.Uint("host_mtu")),
		Speed:     uint32(d.Uint("speed")),
		Standby:   d.Bool("failover"),

		Activated: b.standbyActivated(d),

		FilterChanged: func() { b.nics.changed(d.netName(), b.events) },
	}, backend)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", d, err), backend.Close())
	}
	return b.transport(d, dev)
}

// netBackend opens the TAP of a netdev, runs its script and puts vhost-net or the VMM
// behind it. Ctx ends the script.
func netBackend(ctx context.Context, n *Netdev) (net.Backend, error) {
	t, err := tap.Open(tap.Config{Name: n.IfName, Queues: n.Queues, FDs: n.FDs})
	if err != nil {
		return nil, err
	}
	end := hostEnd{net.NewTAP(t), n.DownScript, t.Name()}
	if len(n.FDs) == 0 {
		err = netUp(ctx, n, t)
	}
	if err == nil && n.VHost {
		var kernel net.Backend
		if kernel, err = vhostBackend(t); err == nil {
			end.Backend = kernel
		}
	}
	if err != nil {
		return nil, errors.Join(err, end.Close())
	}
	return end, nil
}

// netUp makes the host's end of the link ready: by the user's script if there is one.
func netUp(ctx context.Context, n *Netdev, t *tap.TAP) error {
	if n.Script == "" {
		return t.SetUp()
	}
	return runScript(ctx, n.Script, t.Name())
}

// hostEnd is a backend whose TAP is still there when the user's script takes it down.
type hostEnd struct {
	net.Backend
	script, name string
}

func (e hostEnd) Close() error {
	var err error
	if e.script != "" {
		err = runScript(context.Background(), e.script, e.name)
	}
	return errors.Join(err, e.Backend.Close())
}

// vhostBackend opens vhost-net for each queue of the TAP.
func vhostBackend(t *tap.TAP) (net.Backend, error) {
	var kernel []*vhost.Net
	for range t.Queues() {
		v, err := vhost.Open()
		if err != nil {
			for _, v := range kernel {
				err = errors.Join(err, v.Close())
			}
			return nil, err
		}
		kernel = append(kernel, v)
	}
	return net.NewVhost(t, kernel)
}

// runScript runs a script of the user's with the TAP's name as its argument, as QEMU does.
func runScript(ctx context.Context, path, ifname string) error {
	cmd := exec.CommandContext(ctx, path, ifname)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("script %s %s: %w", path, ifname, err)
	}
	return nil
}
