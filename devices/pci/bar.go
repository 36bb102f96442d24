package pci

import (
	"fmt"
	"math/bits"

	"baton/devices"
)

// BAR is a base address register for memory: PCIe 7.5.1.2.1.
type BAR struct {
	Size         uint64 // bytes, a power of two of at least 16
	Is64         bool   // takes two registers
	Prefetchable bool   // reads have no side effects; with Is64, may be placed above 4 GiB behind a port
	Device       devices.BusDevice
	// Gone answers after the function was pulled, until the guest knows; nil: all ones.
	Gone devices.BusDevice
	// Mapped, which may be nil, is told after the range starting at base was mapped (on)
	// or unmapped; a move is both. See the package comment for what it may not do.
	Mapped func(base uint64, on bool)
}

// Memory BAR: PCIe 7.5.1.2.1. Expansion ROM: 7.5.1.2.4.
const (
	numBARs     = 6
	romEnable   = 1 << 0
	MinROM      = 2 << 10
	MaxROM      = 16 << 20
	BAR64       = 1 << 2
	BARPrefetch = 1 << 3
	barFlags    = 0xf
)

// bar is a BAR and whether it is mapped, which the root complex's lock guards.
type bar struct {
	BAR
	reg    int
	name   string
	mapped bool
	base   uint64 // when mapped
}

// SetBAR defines BAR i: 0 to 5, on a bridge 0 or 1.
func (c *Config) SetBAR(i int, b BAR) error {
	n := numBARs
	if c.bridge {
		n = 2
	}
	last, maxSize := i, uint64(1)<<31
	if b.Is64 {
		last, maxSize = i+1, 1<<63
	}
	switch {
	case i < 0 || last >= n:
		return fmt.Errorf("define BAR %d of %s: it has BARs 0 to %d", i, c.id, n-1)
	case b.Size < 16 || b.Size > maxSize || bits.OnesCount64(b.Size) != 1:
		return fmt.Errorf("define BAR %d of %s: size %#x is not a power of two of 16 to %#x", i, c.id, b.Size, maxSize)
	case c.bars[i] != nil || c.bars[last] != nil || i > 0 && c.bars[i-1] != nil && c.bars[i-1].Is64:
		return fmt.Errorf("define BAR %d of %s: the register is in use", i, c.id)
	case b.Device == nil:
		return fmt.Errorf("define BAR %d of %s: no device answers it", i, c.id)
	}
	reg := RegBAR + 4*i
	c.bars[i] = &bar{BAR: b, reg: reg, name: fmt.Sprintf("%s BAR %d", c.id, i)}
	mask, flags := ^(b.Size - 1), uint32(0)
	if b.Prefetchable {
		flags |= BARPrefetch
	}
	if b.Is64 {
		flags |= BAR64
		c.define32(reg+4, 0, uint32(mask>>32))
	}
	c.define32(reg, flags, uint32(mask))
	return nil
}

// SetROM gives an endpoint an option ROM of that size, a power of two of 2 KiB to 16 MiB, that
// dev answers where the guest has enabled it.
func (c *Config) SetROM(size uint64, dev devices.BusDevice) error {
	if c.bridge || size < MinROM || size > MaxROM || bits.OnesCount64(size) != 1 {
		return fmt.Errorf("define option ROM of %s: size %#x is not a power of two of %#x to %#x", c.id, size, MinROM, MaxROM)
	}
	c.bars[numBARs] = &bar{BAR: BAR{Size: size, Device: dev}, reg: regROM, name: c.id + " option ROM"}
	c.define32(regROM, 0, ^uint32(size-1)|romEnable)
	return nil
}

// decodes says whether a register of a function whose memory space is enabled claims its range.
func (c *Config) decodes(b *bar) bool { return b.reg != regROM || c.Uint16(regROM)&romEnable != 0 }

// Region is a BAR as it stands.
type Region struct {
	Index              int    // 6 is the option ROM
	Base, Size         uint64 // Base is valid if Mapped
	Is64, Prefetchable bool
	Mapped             bool
}

// Regions are the BARs of a function that is on a bus, in order.
func (c *Config) Regions() (list []Region) {
	rc := c.at.Load().bus.rc
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for i, b := range c.bars {
		if b != nil {
			list = append(list, Region{i, b.base, b.Size, b.Is64, b.Prefetchable, b.mapped})
		}
	}
	return list
}

// address is where the register says that the BAR is.
func (c *Config) address(b *bar) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := uint64(le.Uint32(c.data[b.reg:]) &^ barFlags)
	if b.Is64 {
		a |= uint64(le.Uint32(c.data[b.reg+4:])) << 32
	}
	return a
}

// setAddress programs the BAR as firmware would.
func (c *Config) setAddress(b *bar, a uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	le.PutUint32(c.data[b.reg:], uint32(a)|le.Uint32(c.data[b.reg:])&barFlags)
	if b.Is64 {
		le.PutUint32(c.data[b.reg+4:], uint32(a>>32))
	}
}

// Windows are the ranges that a bridge passes down: PCIe 7.5.1.3.8, 7.5.1.3.9. A window
// whose limit is below its base is closed and has the size zero.
func (c *Config) Windows() (mem, pref devices.Range) {
	c.mu.Lock()
	defer c.mu.Unlock()
	base, limit := uint64(le.Uint16(c.data[regMemBase:])&0xfff0)<<16, uint64(le.Uint16(c.data[regMemBase+2:])|0xf)<<16|0xffff
	mem = window(base, limit)
	base = uint64(le.Uint32(c.data[regPrefBase+4:]))<<32 | uint64(le.Uint16(c.data[regPrefBase:])&0xfff0)<<16
	limit = uint64(le.Uint32(c.data[regPrefBase+8:]))<<32 | uint64(le.Uint16(c.data[regPrefBase+2:])|0xf)<<16 | 0xffff
	return mem, window(base, limit)
}

func window(base, limit uint64) devices.Range {
	if limit < base {
		return devices.Range{}
	}
	return devices.Range{Base: base, Size: limit - base + 1}
}

// closedWindow is a range that setWindows turns into a base above the limit.
var closedWindow = devices.Range{Base: 1 << 20}

// setWindows programs both windows of a bridge; they must be multiples of 1 MiB.
func (c *Config) setWindows(mem, pref devices.Range) {
	if mem.Size == 0 {
		mem = closedWindow
	}
	if pref.Size == 0 {
		pref = closedWindow
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, a := range []uint64{mem.Base, mem.End() - 1, pref.Base, pref.End() - 1} {
		r := regMemBase + 2*i
		le.PutUint16(c.data[r:], uint16(a>>16)&0xfff0|le.Uint16(c.data[r:])&0xf)
	}
	le.PutUint32(c.data[regPrefBase+4:], uint32(pref.Base>>32))
	le.PutUint32(c.data[regPrefBase+8:], uint32((pref.End()-1)>>32))
}

// within says whether r lies in w; r must not wrap around.
func within(r, w devices.Range) bool {
	return w.Size != 0 && r.Base >= w.Base && r.End()-1 <= w.End()-1
}
