package pci

import (
	"log/slog"
	"sync"

	"baton/devices"
)

// Layout is where PCI lies in the guest's physical address space.
type Layout struct {
	ECAM   devices.Range // 1 MiB for each bus: PCIe 7.2.2
	MMIO32 devices.Range // for BARs, below 4 GiB
	MMIO64 devices.Range // for prefetchable 64-bit BARs; may be empty
}

// RootComplex is the root of the tree: it finds functions by their address for the ECAM,
// and keeps their BARs mapped where the registers say.
//
// A BAR is mapped while memory space is enabled on its function and on the port above, and
// it lies in a window of that port and in MMIO32 or MMIO64. One that overlaps something
// else on the memory bus is not mapped until that has gone.
type RootComplex struct {
	mmio   *devices.Bus
	layout Layout
	log    *slog.Logger
	root   *Bus

	mu      sync.Mutex // the tree, and what is mapped
	loading bool       // conflicts are not reported
}

// NewRootComplex returns a root complex whose bus pcie.0 has a host bridge at 00.0. BARs
// are mapped on mmio; the caller inserts the RootComplex itself there, at layout.ECAM. Log,
// which may be nil, hears of each function whose BARs are in conflict, once.
func NewRootComplex(mmio *devices.Bus, layout Layout, log *slog.Logger) *RootComplex {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	rc := &RootComplex{mmio: mmio, layout: layout, log: log}
	rc.root = &Bus{ID: "pcie.0", rc: rc, fns: make([]Function, 32*8)}
	if err := rc.root.Add(0, 0, newHostBridge()); err != nil {
		panic(err) // an empty bus has room
	}
	return rc
}

// Root is the root bus, pcie.0.
func (rc *RootComplex) Root() *Bus { return rc.root }

// Buses are the root bus and those behind its ports, in the order of the ports' addresses.
func (rc *RootComplex) Buses() []*Bus {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	return rc.buses()
}

func (rc *RootComplex) buses() []*Bus {
	all := []*Bus{rc.root}
	for _, f := range rc.root.fns {
		if p, ok := f.(*RootPort); ok {
			all = append(all, p.secondary)
		}
	}
	return all
}

// number is the bus number as the guest, or Assign, has set it.
func (b *Bus) number() uint8 {
	if b.port == nil {
		return 0
	}
	return uint8(b.port.c.Uint16(regSecondary))
}

// snapshot is b.functions for use without the lock.
func (rc *RootComplex) snapshot(b *Bus) []Function {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	return b.functions()
}

// Walk calls f for every function, by bus in the order of Buses and by address. Functions
// behind a port that has no bus number yet appear on bus 0.
func (rc *RootComplex) Walk(f func(BDF, Function)) {
	for _, b := range rc.Buses() {
		for _, fn := range rc.snapshot(b) {
			if at := fn.Config().at.Load(); at != nil {
				f(BDF(b.number())<<8|BDF(at.devfn), fn)
			}
		}
	}
}

// Read implements [devices.BusDevice] for the ECAM: PCIe 7.2.2.
func (rc *RootComplex) Read(off uint64, p []byte) {
	if c := rc.find(off); c != nil {
		c.Read(off%ConfigSize, p)
		return
	}
	devices.AllOnes(p)
}

// Write implements [devices.BusDevice] for the ECAM.
func (rc *RootComplex) Write(off uint64, p []byte) {
	if c := rc.find(off); c != nil {
		c.Write(off%ConfigSize, p)
	}
}

// find returns the configuration space at an offset of the ECAM, or nil. When the guest
// gives two ports one bus number, the first port has it.
func (rc *RootComplex) find(off uint64) *Config {
	if off/ConfigSize > 0xffff {
		return nil
	}
	bdf := BDF(off / ConfigSize)
	rc.mu.Lock()
	defer rc.mu.Unlock()
	b := rc.root
	if bdf.Bus() != 0 {
		if b = rc.behind(bdf.Bus()); b == nil {
			return nil
		}
	}
	if devfn := int(bdf & 0xff); devfn < len(b.fns) && b.fns[devfn] != nil {
		return b.fns[devfn].Config()
	}
	return nil
}

func (rc *RootComplex) behind(bus uint8) *Bus {
	for _, f := range rc.root.fns {
		if p, ok := f.(*RootPort); ok && p.secondary.number() == bus {
			return p.secondary
		}
	}
	return nil
}

// Reset resets every function and assigns the resources again. What was being unplugged is
// gone.
func (rc *RootComplex) Reset() error {
	for _, p := range rc.Ports() {
		p.slot.reset()
	}
	rc.Walk(func(_ BDF, f Function) { resetFunction(f) })
	return rc.Assign()
}

// redecode is decode with the lock taken.
func (rc *RootComplex) redecode() {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	rc.decode()
}

// decode brings the memory bus in line with the registers. It looks at all of them, not at
// what changed: that makes the order in which vCPUs get here irrelevant, and gives a BAR
// that was in conflict its range as soon as the other one leaves.
func (rc *RootComplex) decode() {
	type target struct {
		c    *Config
		bar  *bar
		base uint64
	}
	var targets []target
	for _, b := range rc.buses() {
		for _, f := range b.functions() {
			c := f.Config()
			for _, bar := range c.bars {
				if bar == nil {
					continue
				}
				base := c.address(bar)
				if c.decodes(bar) && b.passes(c, devices.Range{Base: base, Size: bar.Size}) {
					targets = append(targets, target{c, bar, base})
				} else {
					rc.unmap(bar)
				}
			}
		}
	}
	// The second pass is for what only fits once another one has moved away.
	for pass := range 2 {
		for _, t := range targets {
			if err := rc.remap(t.bar, t.base); err != nil && pass == 1 && !rc.loading {
				t.c.at.Load().report(err)
			}
		}
	}
}

// passes says whether accesses to r reach a function on the bus with that configuration.
func (b *Bus) passes(c *Config, r devices.Range) bool {
	if c.Uint16(RegCommand)&CommandMemory == 0 || r.Base+r.Size-1 < r.Base {
		return false
	}
	if !within(r, b.rc.layout.MMIO32) && !within(r, b.rc.layout.MMIO64) {
		return false
	}
	if b.port == nil {
		return true
	}
	mem, pref := b.port.c.Windows()
	return b.port.c.Uint16(RegCommand)&CommandMemory != 0 && (within(r, mem) || within(r, pref))
}

// remap maps or moves a BAR. In case of an error it is unmapped.
func (rc *RootComplex) remap(b *bar, base uint64) error {
	to := devices.Range{Base: base, Size: b.Size}
	if !b.mapped {
		if err := rc.mmio.Insert(to, b.name, b.Device); err != nil {
			return err
		}
	} else if b.base == base {
		return nil
	} else {
		if err := rc.mmio.Move(devices.Range{Base: b.base, Size: b.Size}, to); err != nil {
			rc.unmap(b)
			return err
		}
		b.tell(b.base, false)
	}
	b.mapped, b.base = true, base
	b.tell(base, true)
	return nil
}

// unmap takes a BAR, which may be nil, off the memory bus.
func (rc *RootComplex) unmap(b *bar) {
	if b == nil || !b.mapped {
		return
	}
	b.mapped = false
	_ = rc.mmio.Remove(devices.Range{Base: b.base, Size: b.Size}) // it is there: mapped says so
	b.tell(b.base, false)
}

func (b *bar) tell(base uint64, on bool) {
	if b.Mapped != nil {
		b.Mapped(base, on)
	}
}

// report logs the first error that the guest met on a function. Later ones are of no more
// use, and a guest must not be able to fill the log.
func (at *place) report(err error) {
	if at.reported.CompareAndSwap(false, true) {
		at.bus.rc.log.Warn("PCI function impaired", "id", at.fn.Config().id, "error", err)
	}
}
