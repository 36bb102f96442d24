package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"sync"
	"sync/atomic"

	"baton/devices"
	"baton/devices/pci"
	"baton/kvm/guestmem"
)

// PCI identity: 4.1.2.
const (
	pciVendor        = 0x1af4
	pciDeviceBase    = 0x1040
	pciRevision      = 1
	pciSubsystem     = 0x1100 // as QEMU
	pciCapVendor     = 0x09   // vendor-specific capability
	notifyMultiplier = 4
)

// Structures that capabilities point to: 4.1.4.
const (
	cfgCommon = 1
	cfgNotify = 2
	cfgISR    = 3
	cfgDevice = 4
	cfgPCI    = 5

	pciCfgBAR    = 4 // offsets in the VIRTIO_PCI_CAP_PCI_CFG capability
	pciCfgOffset = 8
	pciCfgLength = 12
	pciCfgData   = 16
)

// One BAR holds everything, a page for each.
const (
	barIndex  = 0
	barCommon = 0x0000
	barISR    = 0x1000
	barDevice = 0x2000
	barNotify = 0x3000
	barMSIX   = 0x4000
	barPage   = 0x1000
)

// ISR status bits: 4.1.4.5.
const (
	isrQueue  = 1 << 0
	isrConfig = 1 << 1
)

// noVector is VIRTIO_MSI_NO_VECTOR.
const noVector = 0xffff

var pciClass = map[uint32]uint32{
	TypeNet:     0x020000,
	TypeBlock:   0x010000,
	TypeConsole: 0x078000,
}

// PCIOptions is what the transport needs of the machine.
type PCIOptions struct {
	ID            string // what errors and logs call the device
	Mem           *guestmem.Memory
	Vectors       devices.VectorSource
	Doorbells     devices.Doorbells
	Log           *slog.Logger
	Multifunction bool
	// FeaturesOff are feature bits of the device that the driver is not to be offered.
	FeaturesOff uint64
}

// PCI is the virtio-pci transport (4.1), non-transitional, for one device. It implements
// [pci.Function].
type PCI struct {
	dev    Device
	o      PCIOptions
	config *pci.Config
	msix   *pci.MSIX
	size   uint64 // of the BAR
	pciCfg int    // offset of the VIRTIO_PCI_CAP_PCI_CFG capability

	isr          atomic.Uint32
	status       atomic.Uint32
	generation   atomic.Uint32
	configVector atomic.Uint32
	vectors      []atomic.Uint32 // by queue

	mu             sync.Mutex
	active         bool // Activate was called
	paused         bool // between Quiesce and Unquiesce
	deviceSelect   uint32
	driverSelect   uint32
	driverFeatures uint64
	queueSelect    uint16
	sizes          []uint16 // the greatest ones
	queues         []*Queue

	bells bells
}

// NewPCI makes a PCI function of dev, which it owns from then on; on an error it does not.
func NewPCI(dev Device, o PCIOptions) (_ *PCI, err error) {
	p := &PCI{dev: dev, o: o, sizes: dev.QueueSizes()}
	class, ok := pciClass[dev.Type()]
	if !ok {
		class = 0x00ff00 // unclassified
	}
	p.config = pci.NewConfig(pci.Header{
		ID:            o.ID,
		Vendor:        pciVendor,
		Device:        uint16(pciDeviceBase + dev.Type()),
		Class:         class,
		Revision:      pciRevision,
		SubVendor:     pciVendor,
		SubDevice:     pciSubsystem,
		Multifunction: o.Multifunction,
	})
	p.vectors = make([]atomic.Uint32, len(p.sizes))
	defer func() {
		if err != nil {
			err = errors.Join(err, p.release())
		}
	}()
	for i, size := range p.sizes {
		q, err := NewQueue(uint16(i), size)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", o.ID, err)
		}
		q.Interrupt = func() { p.interrupt(&p.vectors[i], isrQueue) }
		p.queues = append(p.queues, q)
	}
	p.config.AddPCIeCapability(pci.TypeEndpoint)
	vectors := len(p.sizes) + 1
	pba := uint32(barMSIX + 16*vectors)
	if p.msix, err = pci.AddMSIX(p.config, barIndex, barMSIX, pba, vectors, o.Vectors); err != nil {
		return nil, err
	}
	p.addCapability(cfgCommon, barCommon, commonSize)
	p.addCapability(cfgISR, barISR, 1)
	p.addCapability(cfgDevice, barDevice, barPage)
	p.addCapability(cfgNotify, barNotify, uint32(notifyMultiplier*len(p.sizes)), notifyMultiplier, 0, 0, 0)
	p.pciCfg = p.addCapability(cfgPCI, 0, 0, 0, 0, 0, 0)
	p.config.OnRead(p.pciCfg+pciCfgData, 4, func() { p.accessBAR(window{p}.Read) })
	p.config.OnWrite(p.pciCfg+pciCfgData, 4, func() { p.accessBAR(window{p}.Write) })

	end := p.msix.Window().End()
	p.size = 1 << bits.Len64(end-1)
	p.bells = bells{PCI: p}
	err = p.config.SetBAR(barIndex, pci.BAR{Size: p.size, Is64: true, Prefetchable: true, Device: window{p}, Gone: zeros{}, Mapped: p.bells.mapped})
	if err != nil {
		return nil, err
	}
	p.clear()
	return p, nil
}

// addCapability adds a struct virtio_pci_cap (4.1.4) and what follows it.
func (p *PCI) addCapability(typ byte, off, size uint32, more ...byte) int {
	body := append(make([]byte, 0, 18), byte(16+len(more)), typ, barIndex, 0, 0, 0)
	body = binary.LittleEndian.AppendUint32(body, off)
	body = binary.LittleEndian.AppendUint32(body, size)
	var wmask []byte
	if typ == cfgPCI { // the driver writes bar, offset, length and data
		wmask = []byte{0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	}
	return p.config.AddCapability(pciCapVendor, append(body, more...), wmask)
}

// Config implements [pci.Function].
func (p *PCI) Config() *pci.Config { return p.config }

// Reset implements [pci.Function].
func (p *PCI) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reset()
}

// Close implements [pci.Function]. The device is closed as well.
func (p *PCI) Close() error {
	p.Reset()
	return errors.Join(p.dev.Close(), p.release())
}

func (p *PCI) release() error {
	var errs []error
	if p.msix != nil {
		errs = append(errs, p.msix.Close())
	}
	for _, q := range p.queues {
		errs = append(errs, q.Close())
	}
	return errors.Join(errs...)
}

// interrupt raises a vector or, when MSI-X is off, sets the ISR bit: 4.1.5.1.2. There is no
// INTx, so that a driver without MSI-X has to poll.
func (p *PCI) interrupt(vector *atomic.Uint32, isr uint32) {
	if p.msix.Enabled() {
		p.msix.Signal(int(vector.Load())) // noVector is beyond the table
		return
	}
	p.isr.Or(isr)
}

// zeros answers for a device that was pulled. Linux resets the device as it lets go of it, and
// waits for ever for a status of 0.
type zeros struct{}

func (zeros) Read(_ uint64, b []byte) { clear(b) }
func (zeros) Write(uint64, []byte)    {}

// window answers the BAR. What no structure understands reads all ones; a write is dropped.
type window struct{ *PCI }

func (p window) Read(off uint64, b []byte) {
	devices.AllOnes(b)
	switch page := off &^ (barPage - 1); page {
	case barCommon:
		p.readCommon(off-barCommon, b)
	case barISR:
		if off == barISR && len(b) == 1 {
			b[0] = byte(p.isr.Swap(0)) // reading acknowledges: 4.1.4.5
		}
	case barDevice:
		p.dev.ReadConfig(off-barDevice, b)
	case barNotify:
	default:
		if w := p.msix.Window(); w.Contains(off) {
			p.msix.Read(off-w.Base, b)
		}
	}
}

func (p window) Write(off uint64, b []byte) {
	switch page := off &^ (barPage - 1); page {
	case barCommon:
		p.writeCommon(off-barCommon, b)
	case barISR, barDevice:
	case barNotify:
		// Normally the doorbell takes it and this is never reached.
		if i := (off - barNotify) / notifyMultiplier; off%notifyMultiplier == 0 && i < uint64(len(p.queues)) {
			p.queues[i].Kick.Signal()
		}
	default:
		if w := p.msix.Window(); w.Contains(off) {
			p.msix.Write(off-w.Base, b)
		}
	}
}

// accessBAR is an access through the VIRTIO_PCI_CAP_PCI_CFG capability: 4.1.4.9.
func (p *PCI) accessBAR(access func(off uint64, b []byte)) {
	bar := byte(p.config.Uint32(p.pciCfg + pciCfgBAR))
	off := uint64(p.config.Uint32(p.pciCfg + pciCfgOffset))
	n := uint64(p.config.Uint32(p.pciCfg + pciCfgLength))
	if bar != barIndex || n != 1 && n != 2 && n != 4 || off%n != 0 || off+n > p.size {
		return
	}
	var data [4]byte
	binary.LittleEndian.PutUint32(data[:], p.config.Uint32(p.pciCfg+pciCfgData))
	access(off, data[:n])
	p.config.PutUint32(p.pciCfg+pciCfgData, binary.LittleEndian.Uint32(data[:]))
}

// bells binds the Kicks of an active device to the addresses of their notify registers while
// the BAR is mapped, so that a notification does not leave the kernel. Its lock is its own:
// mapped runs with the PCI tree locked and must not wait for a device that is being reset.
type bells struct {
	*PCI
	mu     sync.Mutex
	base   uint64
	on     bool // the BAR is mapped
	active bool
	bound  []boundBell
}

type boundBell struct {
	addr uint64
	fd   int
}

func (b *bells) mapped(base uint64, on bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.base, b.on = base, on
	b.update()
}

func (b *bells) setActive(active bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.active = active
	b.update()
}

// update binds or unbinds. A doorbell that the kernel refuses is served by Write.
func (b *bells) update() {
	for _, d := range b.bound {
		if err := b.o.Doorbells.RemoveDoorbell(d.addr, 0, d.fd); err != nil {
			b.o.Log.Warn("remove doorbell", "device", b.o.ID, "err", err)
		}
	}
	b.bound = b.bound[:0]
	if !b.on || !b.active {
		return
	}
	for i, q := range b.queues {
		if !q.Enabled {
			continue
		}
		d := boundBell{b.base + barNotify + uint64(notifyMultiplier*i), q.Kick.FD()}
		if err := b.o.Doorbells.AddDoorbell(d.addr, 0, d.fd); err != nil {
			b.o.Log.Warn("add doorbell, notifications will be slower", "device", b.o.ID, "err", err)
			return
		}
		b.bound = append(b.bound, d)
	}
}
