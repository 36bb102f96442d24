package vfio

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
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
	// INTx makes a line for pin (1: INTA#) of a function in, or behind, a slot of the root
	// bus. Ended is called on a vCPU's thread.
	INTx func(slot, pin int, ended func()) Line
	ROM  bool // show the option ROM, if there is one
	Log  *slog.Logger
}

// Function is what the guest sees of a host's function. It implements [pci.Function].
//
// I/O BARs are not shown, as there are no I/O windows for them: a PCI Express endpoint has to
// work without (PCIe 1.3.2). Another function that has nothing else is refused.
type Function struct {
	hw    hardware
	o     Options
	c     *pci.Config
	bars  []*bar
	msix  *pci.MSIX
	msi   *msi
	intx  *intx // nil if the pin is not connected
	first bool  // no extended capability was added

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
	space := make([]byte, min(r.size, pci.ConfigSize))
	if err := hw.read(regionConfig, 0, space); err != nil {
		return nil, fmt.Errorf("read configuration space: %w", err)
	}
	if f.c, err = newConfig(hw, space, o); err != nil {
		return nil, err
	}
	if pin := f.c.Uint16(pci.RegInterrupt) >> 8; pin != 0 {
		f.intx = &intx{f: f, pin: int(pin)}
	}
	if err := f.findBARs(space); err != nil {
		return nil, err
	}
	if err := f.addCapabilities(space, func(c capability) error { return f.addInterrupts(space, c) }); err != nil {
		return nil, err
	}
	if f.msix == nil && f.msi == nil && f.intx == nil {
		return nil, errors.New("it cannot interrupt: it has neither MSI-X nor MSI, nor an INTx that is connected")
	}
	if err := f.mapBARs(); err != nil {
		return nil, err
	}
	f.c.OnWrite(pci.RegCommand, 2, f.command)
	return f, f.setCommand(pci.CommandMemory)
}

// findBARs learns what BARs there are: VFIO says their size, the registers their kind.
func (f *Function) findBARs(space []byte) error {
	f.bars = make([]*bar, 6)
	memory, ports := 0, -1
	for i := 0; i < 6; i++ {
		r, err := f.hw.region(i)
		if err != nil {
			return err
		}
		flags := le.Uint32(space[pci.RegBAR+4*i:])
		if r.size == 0 {
			continue
		}
		if flags&barIO != 0 {
			ports = i
			continue
		}
		memory++
		b := &bar{window: window{f.hw, i}, f: f, size: r.size}
		for _, a := range r.areas {
			b.maps = append(b.maps, mapping{Range: a})
		}
		f.bars[i] = b
		err = f.c.SetBAR(i, pci.BAR{
			Size: r.size, Is64: flags&pci.BAR64 != 0, Prefetchable: flags&pci.BARPrefetch != 0,
			Device: b, Mapped: b.mapped,
		})
		if err != nil {
			return err
		}
		if flags&pci.BAR64 != 0 {
			i++
		}
	}
	if ports >= 0 && legacy(space) {
		if memory == 0 {
			return fmt.Errorf("its registers are I/O ports (BAR %d), for which root ports have no window\nonly functions with memory BARs can be passed through", ports)
		}
		f.o.Log.Info("I/O BAR not shown to the guest, whose driver has to do without", "id", f.o.ID, "bar", ports)
	}
	if f.o.ROM {
		return f.addROM()
	}
	return nil
}

// addROM shows the option ROM.
func (f *Function) addROM() error {
	r, err := f.hw.region(regionROM)
	if err != nil || r.size == 0 {
		return err
	}
	if r.size > pci.MaxROM {
		return fmt.Errorf("its option ROM has %d bytes, more than %d\nrombar=0 leaves it out", r.size, pci.MaxROM)
	}
	size := max(uint64(pci.MinROM), 1<<bits.Len64(r.size-1))
	return f.c.SetROM(size, &rom{hw: f.hw, size: r.size})
}

// rom is the option ROM, which is read from the device when the guest first looks at it.
type rom struct {
	hw   hardware
	size uint64
	once sync.Once
	data []byte
}

// Read implements [devices.BusDevice]; what cannot be read is all ones.
func (r *rom) Read(off uint64, p []byte) {
	r.once.Do(func() {
		if data := make([]byte, r.size); r.hw.read(regionROM, 0, data) == nil {
			r.data = data
		}
	})
	n := 0
	if off < uint64(len(r.data)) {
		n = copy(p, r.data[off:])
	}
	devices.AllOnes(p[n:])
}

// Write implements [devices.BusDevice].
func (*rom) Write(uint64, []byte) {}

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
		devices.AllOnes(p)
	}
}

// Write implements [devices.BusDevice].
func (w window) Write(off uint64, p []byte) { _ = w.hw.write(w.index, off, p) }

// command gives the device the guest's say on bus mastering. Its memory stays enabled: the
// guest's accesses end where its own BARs do.
func (f *Function) command() {
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.c.Uint16(pci.RegCommand)
	f.used = f.used || was&(pci.CommandMemory|pci.CommandMaster) != 0
	if err := f.setCommand(pci.CommandMemory | was&pci.CommandMaster); err != nil {
		f.warn(fmt.Errorf("set bus mastering: %w", err))
	}
	if err := f.updateINTx(); err != nil {
		f.warn(err)
	}
}

func (f *Function) setCommand(v uint16) error {
	return f.hw.write(regionConfig, pci.RegCommand, le.AppendUint16(nil, v))
}

// enable has an index of the host's interrupts signal the vectors' eventfds, or turns it off.
func (f *Function) enable(index uint32, on bool, vectors []devices.Vector) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.enabled[index] == on {
		return
	}
	f.enabled[index] = on
	var err error
	if on {
		err = f.updateINTx() // the host has one kind at a time
		var fds []int32
		for _, v := range vectors {
			fds = append(fds, int32(v.EventFD()))
		}
		if ierr := f.hw.setIRQs(index, fds); ierr != nil {
			f.enabled[index] = false
			err = errors.Join(err, ierr)
		}
	} else {
		err = f.hw.setIRQs(index, nil)
		err = errors.Join(err, f.updateINTx())
	}
	if err != nil {
		f.warn(err)
	}
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

// Stop implements [pci.Stopper]: no interrupts and no DMA from here on.
func (f *Function) Stop() {
	f.enable(irqMSI, false, nil)
	f.enable(irqMSIX, false, nil)
	if f.msi != nil {
		f.msi.mask() // MSI-X does so itself
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.setCommand(pci.CommandMemory)
	if f.intx != nil && f.intx.on {
		err = errors.Join(err, f.intx.stop())
	}
	if err != nil {
		f.warn(err)
	}
}

// Kick raises each MSI-X vector that the guest's driver has unmasked, as if the device had.
func (f *Function) Kick() {
	for i := 0; f.msix != nil && i < f.msix.Vectors(); i++ {
		if !f.msix.Masked(i) {
			f.msix.Signal(i)
		}
	}
}

// Reset implements [pci.Function]: as Stop, and the device as at power-on.
func (f *Function) Reset() {
	f.Stop()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.used {
		if err := errors.Join(f.hw.reset(), f.setCommand(pci.CommandMemory)); err != nil {
			f.warn(err)
		}
	}
	f.used = false
}

// Close implements [pci.Function]: the device goes back to the host.
func (f *Function) Close() error {
	f.mu.Lock()
	x := f.intx
	f.intx = nil
	var errs []error
	if x != nil && x.on {
		errs = append(errs, x.stop())
	}
	f.mu.Unlock()
	f.enable(irqMSI, false, nil)
	f.enable(irqMSIX, false, nil)
	f.mu.Lock()
	defer f.mu.Unlock()
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
	if f.c != nil {
		errs = append(errs, f.setCommand(pci.CommandMemory))
	}
	closed := make(chan error) // while the kernel waits for the reset
	go func() {
		var err error
		if f.msix != nil {
			err = f.msix.Close()
		}
		if f.msi != nil {
			err = errors.Join(err, f.msi.close())
		}
		closed <- err
	}()
	errs = append(errs, f.hw.Close())
	return errors.Join(append(errs, <-closed)...)
}
