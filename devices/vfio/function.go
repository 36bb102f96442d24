package vfio

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"baton/devices"
	"baton/devices/pci"
)

// Slots puts memory of the VMM's process into the guest's physical address space (KVM memory
// slots). The methods are called from vCPUs' threads.
type Slots interface {
	// Map shows host, whole pages that stay mapped until Unmap, at gpa.
	Map(gpa uint64, host []byte) (slot uint32, err error)
	Unmap(slot uint32) error
}

// Options is what a function needs of the machine.
type Options struct {
	ID            string // what errors and logs call it
	Multifunction bool
	Slots         Slots
	Vectors       devices.VectorSource
	Log           *slog.Logger
}

// Function is what the guest sees of a host's function. It implements [pci.Function].
// There are no I/O BARs, no INTx and no option ROM; a device that can interrupt by nothing
// else is refused.
type Function struct {
	hw    hardware
	o     Options
	c     *pci.Config
	bars  []*bar
	msix  *pci.MSIX
	msi   *msi
	first bool // no extended capability was added

	warned atomic.Bool

	mu      sync.Mutex
	enabled map[uint32]bool // interrupts of the host, by index
	used    bool            // since the last reset
}

const pageSize = 4096

// bar answers what the guest cannot reach by itself.
type bar struct {
	window
	f        *Function
	size     uint64
	maps     []mapping
	msix     *pci.MSIX // if its table is in here
	reserved []devices.Range
}

// mapping is a part of a BAR that the guest reaches without an exit.
type mapping struct {
	devices.Range
	host []byte
	slot uint32
	on   bool
}

// New makes a function of an open device, which it owns from then on, also when it fails.
func New(d *Device, o Options) (*Function, error) { return newFunction(d, o) }

func newFunction(hw hardware, o Options) (_ *Function, err error) {
	f := &Function{hw: hw, o: o, first: true, enabled: map[uint32]bool{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("device %s: %w", o.ID, err), f.Close())
		}
	}()
	r, err := hw.region(regionConfig)
	if err != nil {
		return nil, err
	}
	space := make([]byte, min(r.size, configSize))
	if err := hw.read(regionConfig, 0, space); err != nil {
		return nil, fmt.Errorf("read configuration space: %w", err)
	}
	if f.c, err = newConfig(space, o); err != nil {
		return nil, err
	}
	if err := f.findBARs(space); err != nil {
		return nil, err
	}
	if err := f.addCapabilities(space, func(c capability) error { return f.addInterrupts(space, c) }); err != nil {
		return nil, err
	}
	if f.msix == nil && f.msi == nil {
		return nil, errors.New("it has neither MSI-X nor MSI, and INTx is not supported")
	}
	if err := f.mapBARs(); err != nil {
		return nil, err
	}
	f.c.OnWrite(regCommand, 2, f.command)
	return f, f.setCommand(commandMemory)
}

// findBARs learns what BARs there are: VFIO says their size, the registers their kind.
func (f *Function) findBARs(space []byte) error {
	f.bars = make([]*bar, 6)
	for i := 0; i < 6; i++ {
		r, err := f.hw.region(i)
		if err != nil {
			return err
		}
		flags := le.Uint32(space[regBAR+4*i:])
		if r.size == 0 || flags&barIO != 0 {
			continue
		}
		b := &bar{window: window{f.hw, i}, f: f, size: r.size}
		for _, a := range r.areas {
			b.maps = append(b.maps, mapping{Range: a})
		}
		f.bars[i] = b
		err = f.c.SetBAR(i, pci.BAR{
			Size: r.size, Is64: flags&bar64 != 0, Prefetchable: flags&barPrefetch != 0,
			Device: b, Mapped: b.mapped,
		})
		if err != nil {
			return err
		}
		if flags&bar64 != 0 {
			i++
		}
	}
	return nil
}

// mapBARs maps all that may be, but for the pages of the MSI-X table and pending bits.
func (f *Function) mapBARs() error {
	for _, b := range f.bars {
		if b == nil {
			continue
		}
		areas := b.maps
		b.maps = nil
		for _, a := range areas {
			for _, part := range without(a.Range, b.size, b.reserved) {
				host, err := f.hw.mmap(b.index, part)
				if err != nil {
					return fmt.Errorf("map %s of BAR %d: %w", part, b.index, err)
				}
				b.maps = append(b.maps, mapping{Range: part, host: host})
			}
		}
	}
	return nil
}

// without is the whole pages of a in a BAR of the given size that no hole touches.
func without(a devices.Range, size uint64, holes []devices.Range) (parts []devices.Range) {
	if a.Base >= size {
		return nil
	}
	end := (a.Base + min(a.Size, size-a.Base)) &^ (pageSize - 1)
	at := (a.Base + pageSize - 1) &^ (pageSize - 1)
	for at < end {
		next, skip := end, uint64(0)
		for _, h := range holes {
			if first := h.Base &^ (pageSize - 1); h.End() > at && first < next {
				next, skip = max(first, at), (h.End()+pageSize-1)&^(pageSize-1)
			}
		}
		if at < next {
			parts = append(parts, devices.Range{Base: at, Size: next - at})
		}
		at = max(next, skip)
	}
	return parts
}

// mapped follows the BAR with the memory slots of its parts.
func (b *bar) mapped(base uint64, on bool) {
	b.f.mu.Lock()
	defer b.f.mu.Unlock()
	for i := range b.maps {
		m := &b.maps[i]
		if on {
			slot, err := b.f.o.Slots.Map(base+m.Base, m.host)
			if err != nil { // slower, but it works
				b.f.warn(fmt.Errorf("map BAR %d into the guest: %w", b.index, err))
				continue
			}
			m.slot, m.on = slot, true
		} else if err := b.unmap(m); err != nil {
			b.f.warn(fmt.Errorf("unmap BAR %d: %w", b.index, err))
		}
	}
}

func (b *bar) unmap(m *mapping) error {
	if !m.on {
		return nil
	}
	m.on = false
	return b.f.o.Slots.Unmap(m.slot)
}

// Read implements [devices.BusDevice].
func (b *bar) Read(off uint64, p []byte) {
	if at, ok := b.table(off); ok {
		b.msix.Read(at, p)
		return
	}
	b.window.Read(off, p)
}

// Write implements [devices.BusDevice].
func (b *bar) Write(off uint64, p []byte) {
	if at, ok := b.table(off); ok {
		b.msix.Write(at, p)
		return
	}
	b.window.Write(off, p)
}

// table says whether off lies in the MSI-X table or the pending bits, and where.
func (b *bar) table(off uint64) (uint64, bool) {
	for _, r := range b.reserved {
		if r.Contains(off) {
			return off - b.msix.Window().Base, true
		}
	}
	return 0, false
}

// window passes accesses on to a region of the device.
type window struct {
	hw    hardware
	index int
}

// Read implements [devices.BusDevice]; what cannot be read is all ones.
func (w window) Read(off uint64, p []byte) {
	if w.hw.read(w.index, off, p) != nil {
		for i := range p {
			p[i] = 0xff
		}
	}
}

// Write implements [devices.BusDevice].
func (w window) Write(off uint64, p []byte) { _ = w.hw.write(w.index, off, p) }

// command gives the device the guest's say on bus mastering. Its memory stays enabled: the
// guest's accesses end where its own BARs do.
func (f *Function) command() {
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.c.Uint16(regCommand)
	f.used = f.used || was&(commandMemory|commandMaster) != 0
	if err := f.setCommand(commandMemory | was&commandMaster); err != nil {
		f.warn(fmt.Errorf("set bus mastering: %w", err))
	}
}

func (f *Function) setCommand(v uint16) error {
	return f.hw.write(regionConfig, regCommand, le.AppendUint16(nil, v))
}

// enable has an index of the host's interrupts signal the vectors' eventfds, or turns it off.
func (f *Function) enable(index uint32, on bool, vectors []devices.Vector) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.enabled[index] == on {
		return
	}
	var fds []int32
	if on {
		for _, v := range vectors {
			fds = append(fds, int32(v.EventFD()))
		}
	}
	if err := f.hw.setIRQs(index, fds); err != nil {
		f.warn(err)
		return
	}
	f.enabled[index] = on
}

// warn logs the first thing that went wrong while the guest ran, which must not be able to
// fill the log.
func (f *Function) warn(err error) {
	if f.warned.CompareAndSwap(false, true) {
		f.o.Log.Warn("passed-through device impaired", "id", f.o.ID, "error", err)
	}
}

// Host is the function's address on the host, 0000:00:00.0.
func (f *Function) Host() string { return f.hw.Host() }

// Config implements [pci.Function].
func (f *Function) Config() *pci.Config { return f.c }

// Reset implements [pci.Function]: no interrupts, no DMA, and the device as at power-on.
func (f *Function) Reset() {
	f.enable(irqMSI, false, nil)
	f.enable(irqMSIX, false, nil)
	if f.msi != nil {
		f.msi.mask() // MSI-X does so itself
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.setCommand(commandMemory)
	if f.used {
		err = errors.Join(err, f.hw.reset(), f.setCommand(commandMemory))
	}
	f.used = false
	if err != nil {
		f.warn(err)
	}
}

// Close implements [pci.Function]: the device goes back to the host.
func (f *Function) Close() error {
	f.enable(irqMSI, false, nil)
	f.enable(irqMSIX, false, nil)
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, b := range f.bars {
		if b == nil {
			continue
		}
		for i := range b.maps {
			if m := &b.maps[i]; m.host != nil {
				errs = append(errs, b.unmap(m), f.hw.munmap(m.host))
			}
		}
		b.maps = nil
	}
	if f.msix != nil {
		errs = append(errs, f.msix.Close())
	}
	if f.msi != nil {
		errs = append(errs, f.msi.close())
	}
	return errors.Join(append(errs, f.hw.Close())...)
}
