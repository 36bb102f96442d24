package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"baton/devices/char"
	"baton/devices/pci"
	"baton/devices/tap"
	"baton/devices/vhost"
	"baton/devices/virtio"
	"baton/devices/virtio/blk"
	"baton/devices/virtio/net"
)

// builder turns the -device options of a command line into functions on buses.
type builder struct {
	*Machine
	ctx   context.Context
}

// builders has one entry for each PCI driver of the driver table.
var builders = map[string]func(*builder, *Device) (pci.Function, error){
	"pcie-root-port":    (*builder).rootPort,
	"virtio-net-pci":    (*builder).virtioNet,
	"virtio-blk-pci":    (*builder).virtioBlk,
}

// build makes all devices. Each one is tried, so that all errors are seen at once.
func (b *builder) build() error {
	var errs []error
	for i := range b.cfg.Devices {
		if d := &b.cfg.Devices[i]; builders[d.Driver] == nil {
		}
	}
	for i := range b.cfg.Devices {
		d := &b.cfg.Devices[i]
		make := builders[d.Driver]
		if make == nil {
			continue
		}
		f, err := make(b, d)
		if err == nil {
			b.onClose(f.Close)
			err = b.plug(d, f)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
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
		Vectors:       b.irq,
	})
}

// transport puts a virtio device behind virtio-pci.
func (b *builder) transport(d *Device, dev virtio.Device) (pci.Function, error) {
	f, err := virtio.NewPCI(dev, virtio.PCIOptions{
		ID:            d.String(),
		Mem:           b.mem,
		Vectors:       b.irq,
		Doorbells:     doorbells{b.kvm},
		Multifunction: d.Bool("multifunction"),
		Log:           b.log,
	})
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return f, nil
}

func (b *builder) virtioBlk(d *Device) (pci.Function, error) {
	spec := b.cfg.Blockdev(d.Text("drive"))
	disk, err := blk.Open(spec.File, blk.Options{ReadOnly: spec.ReadOnly})
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
	spec := m.cfg.Serials[0]
	if id, ok := strings.CutPrefix(spec, "chardev:"); ok {
		spec = m.cfg.Chardev(id).Spec
	}
	if spec == string(char.None) {
		return nil, nil
	}
	return m.openChar(ctx, "serial port", spec)
}

func (b *builder) virtioNet(d *Device) (pci.Function, error) {
	spec := b.cfg.Netdev(d.Text("netdev"))
	mac, _ := d.MAC()
	backend, err := b.netBackend(spec)
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
		Standby:   d.Bool("failover"),
	}, backend)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", d, err), backend.Close())
	}
	return b.transport(d, dev)
}

// netBackend opens the TAP of a netdev, runs its script and puts vhost-net or the VMM
// behind it.
func (b *builder) netBackend(n *Netdev) (_ net.Backend, err error) {
	t, err := tap.Open(tap.Config{Name: n.IfName, Queues: n.Queues, FDs: n.FDs})
	if err != nil {
		return nil, err
	}
	if len(n.FDs) == 0 {
		if err := b.netUp(n, t); err != nil {
			return nil, errors.Join(err, t.Close())
		}
	}
	if !n.VHost {
		return net.NewTAP(t), nil
	}
	var kernel []*vhost.Net
	for range n.Queues {
		v, err := vhost.Open()
		if err != nil {
			for _, v := range kernel {
				err = errors.Join(err, v.Close())
			}
			return nil, errors.Join(err, t.Close())
		}
		kernel = append(kernel, v)
	}
	return net.NewVhost(t, kernel)
}

// netUp makes the host's end of the link ready: by the user's script if there is one.
func (b *builder) netUp(n *Netdev, t *tap.TAP) error {
	if n.DownScript != "" {
		name := t.Name()
		b.onClose(func() error { return runScript(context.Background(), n.DownScript, name) })
	}
	if n.Script == "" {
		return t.SetUp()
	}
	return runScript(b.ctx, n.Script, t.Name())
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
