package pci

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"baton/devices"
)

// Configuration space header: PCIe 7.5.1.
const (
	RegVendor      = 0x00
	RegCommand     = 0x04
	RegStatus      = 0x06
	RegClass       = 0x08 // revision in the low byte
	regCacheLine   = 0x0c
	RegHeaderType  = 0x0e
	RegBAR         = 0x10
	RegSubsystem   = 0x2c // type 0
	regROM         = 0x30 // type 0
	RegCapPointer  = 0x34
	RegInterrupt   = 0x3c
	RegPrimary     = 0x18 // type 1, as all that follow
	regSecondary   = 0x19
	RegSubordinate = 0x1a
	regSecStatus   = 0x1e
	regMemBase     = 0x20 // then the limit
	regPrefBase    = 0x24 // then the limit, the base's upper half, the limit's upper half
	regBridgeCtl   = 0x3e

	CommandMemory = 1 << 1
	CommandMaster = 1 << 2
	commandMask   = CommandMemory | CommandMaster | 1<<6 /* parity */ | 1<<8 /* SERR# */ | 1<<10 /* INTx */

	StatusCapList = 1 << 4
	statusW1C     = 0xf900 // the error bits

	headerMultifunction = 1 << 7

	bridgeCtlReset = 1 << 6                                    // secondary bus reset
	bridgeCtlMask  = bridgeCtlReset | 1<<0 /* parity */ | 1<<1 /* SERR# */
)

// The configuration space's size and parts, in bytes.
const (
	ConfigSize = 4096
	CapBase    = 0x40  // where capabilities start, after the header
	ExtBase    = 0x100 // where extended capabilities start: PCIe 7.6
)

// Header is what tells one function from another: PCIe 7.5.1.
type Header struct {
	ID                   string // what errors and logs call the function; not a register
	Vendor, Device       uint16
	Class                uint32 // 24 bits: base class, sub-class, programming interface
	Revision             uint8
	SubVendor, SubDevice uint16 // type 0 only
	Type                 uint8  // 0 endpoint, 1 bridge
	Multifunction        bool   // the slot may have functions 1 to 7
	InterruptPin         uint8  // 1: INTA#; 0: none
}

// Config is the configuration space of one function: 4096 bytes, of which a guest's write
// changes only the bits of the write mask and clears those of the write-1-to-clear mask.
// Capabilities, BARs and hooks are added before the function is added to a bus; after that
// all methods may be called at any time from any goroutine.
type Config struct {
	id      string
	bridge  bool
	bars    [7]*bar // the last one is the option ROM
	reads   []hook
	backed  []backing
	writes  []hook
	resets  []func()
	msix    *MSIX
	uses    uses
	pcie    int // offset of the PCI Express capability, 0 without
	nextCap int // first free offset of the capabilities
	lastCap int // offset of the pointer to fill in for the next one
	nextExt int
	lastExt int

	at        atomic.Pointer[place]
	resetting sync.Mutex // one reset of the function at a time

	mu      sync.Mutex
	data    [ConfigSize]byte
	initial [ConfigSize]byte // power-on values of what the masks let the guest change
	wmask   [ConfigSize]byte
	w1c     [ConfigSize]byte
	dmask   [ConfigSize]byte // what the device itself has changed
}

// place is where a function sits.
type place struct {
	bus      *Bus
	devfn    int
	fn       Function
	reported atomic.Bool
}

type hook struct {
	off, end int
	f        func()
}

// backing is a part of the space that a device answers itself.
type backing struct {
	off, end int
	dev      devices.BusDevice
}

// NewConfig returns a configuration space with the header filled in, no BARs, and no
// capabilities. I/O space, the latency timer and, on bridges, I/O windows do not exist
// and read zero.
func NewConfig(h Header) *Config {
	c := &Config{id: h.ID, bridge: h.Type == 1, nextCap: CapBase, lastCap: RegCapPointer, nextExt: ExtBase}
	if c.id == "" {
		c.id = fmt.Sprintf("%04x:%04x", h.Vendor, h.Device)
	}
	c.define32(RegVendor, uint32(h.Device)<<16|uint32(h.Vendor), 0)
	c.define16(RegCommand, 0, commandMask)
	c.SetW1C16(RegStatus, statusW1C)
	c.define32(RegClass, h.Class<<8|uint32(h.Revision), 0)
	c.wmask[regCacheLine] = 0xff
	c.define16(RegInterrupt, uint16(h.InterruptPin)<<8, 0xff)
	typ := uint16(h.Type & 1)
	if h.Multifunction {
		typ |= headerMultifunction
	}
	c.define16(RegHeaderType, typ, 0)
	if !c.bridge {
		c.define32(RegSubsystem, uint32(h.SubDevice)<<16|uint32(h.SubVendor), 0)
		return c
	}
	c.define16(RegPrimary, 0, 0xffff)
	c.define16(RegSubordinate, 0, 0x00ff)
	c.SetW1C16(regSecStatus, statusW1C)
	c.define32(regMemBase, 0, 0xfff0_fff0)
	c.define32(regPrefBase, 0x0001_0001, 0xfff0_fff0) // 64-bit addresses
	c.define32(regPrefBase+4, 0, 0xffff_ffff)
	c.define32(regPrefBase+8, 0, 0xffff_ffff)
	c.define16(regBridgeCtl, 0, bridgeCtlMask)
	return c
}

// RootSlot is the slot of the root bus that the function is in or behind; it is on no bus if
// not ok.
func (c *Config) RootSlot() (slot int, ok bool) {
	at := c.at.Load()
	if at != nil && at.bus.port != nil {
		at = at.bus.port.c.at.Load()
	}
	if at == nil {
		return 0, false
	}
	return at.devfn / 8, true
}

// ID is the name from the header.
func (c *Config) ID() string { return c.id }

// define sets the power-on value and the write mask of a register.
func (c *Config) define(off int, value, wmask []byte) {
	copy(c.data[off:], value)
	copy(c.initial[off:], value)
	copy(c.wmask[off:], wmask)
}

func (c *Config) define16(off int, value, wmask uint16) {
	c.define(off, le.AppendUint16(nil, value), le.AppendUint16(nil, wmask))
}

func (c *Config) define32(off int, value, wmask uint32) {
	c.define(off, le.AppendUint32(nil, value), le.AppendUint32(nil, wmask))
}

var le = binary.LittleEndian

// SetW1C16 makes the bits of mask in the 16-bit register at off such that the guest
// clears them by writing ones (RW1C: PCIe 7.4).
func (c *Config) SetW1C16(off int, mask uint16) { le.PutUint16(c.w1c[off:], mask) }

// PlaceNext gives the capability that is added next a fixed offset, for a function whose
// driver expects it there: of a capability 0x40 to 0xfc, of an extended one 0x100 (where
// the first one has to be) to 0xffc, a multiple of 4. The caller sees to it that nothing
// overlaps.
func (c *Config) PlaceNext(off int) {
	if off < ExtBase {
		c.nextCap = off
	} else {
		c.nextExt = off
	}
}

// Back has dev answer the guest's accesses to the n bytes at off: each as it comes, cut to
// these bytes, with off from the start of the space. No masks apply to them.
func (c *Config) Back(off, n int, dev devices.BusDevice) {
	c.backed = append(c.backed, backing{off, off + n, dev})
}

// passOn gives access the part of p, which the guest reads or writes at off, that a device
// answers itself.
func (c *Config) passOn(off int, p []byte, access func(devices.BusDevice, uint64, []byte)) {
	for _, b := range c.backed {
		if from, to := max(off, b.off), min(off+len(p), b.end); from < to {
			access(b.dev, uint64(from), p[from-off:to-off])
		}
	}
}

// AddCapability appends a capability (PCIe 7.5.1.1.11) and returns its offset. Body
// is what follows the identifier and the next pointer; its bits in wmask, which may be
// shorter, are the guest's to write. It panics when the 192 bytes are used up.
func (c *Config) AddCapability(id byte, body, wmask []byte) (off int) {
	off = c.nextCap
	if off+2+len(body) > ExtBase {
		panic(fmt.Sprintf("pci: %s: no room for capability %#x", c.id, id))
	}
	c.define(off, append([]byte{id, 0}, body...), append([]byte{0, 0}, wmask...))
	c.data[c.lastCap] = byte(off)
	c.data[RegStatus] |= StatusCapList
	c.lastCap, c.nextCap = off+1, (off+2+len(body)+3)&^3
	return off
}

// AddExtCapability appends an extended capability (PCIe 7.6.3) and returns its offset.
// Body is what follows the 4-byte header; its bits in wmask, which may be shorter, are the
// guest's to write. It panics when the space is used up.
func (c *Config) AddExtCapability(id uint16, version uint8, body, wmask []byte) (off int) {
	off = c.nextExt
	if off+4+len(body) > ConfigSize {
		panic(fmt.Sprintf("pci: %s: no room for extended capability %#x", c.id, id))
	}
	header := le.AppendUint32(nil, uint32(id)|uint32(version&15)<<16)
	c.define(off, append(header, body...), append(make([]byte, 4), wmask...))
	if c.lastExt != 0 {
		le.PutUint16(c.data[c.lastExt+2:], le.Uint16(c.data[c.lastExt+2:])|uint16(off)<<4)
	}
	c.lastExt, c.nextExt = off, (off+4+len(body)+3)&^3
	return off
}

// OnRead has f called before each guest's read that touches the n bytes at off.
func (c *Config) OnRead(off, n int, f func()) { c.reads = append(c.reads, hook{off, off + n, f}) }

// OnWrite has f called after each guest's write that touches the n bytes at off, whether
// it changed anything or not.
func (c *Config) OnWrite(off, n int, f func()) { c.writes = append(c.writes, hook{off, off + n, f}) }

func run(hooks []hook, off, n int) {
	for _, h := range hooks {
		if off < h.end && h.off < off+n {
			h.f()
		}
	}
}

// Read is the guest's read of len(p) bytes at off. Beyond the end it is all ones.
func (c *Config) Read(off uint64, p []byte) {
	n := 0
	if off < ConfigSize {
		n = int(min(uint64(len(p)), ConfigSize-off))
		run(c.reads, int(off), n)
		c.mu.Lock()
		copy(p[:n], c.data[off:])
		c.mu.Unlock()
		c.passOn(int(off), p[:n], devices.BusDevice.Read)
	}
	devices.AllOnes(p[n:])
}

// Write is the guest's write of p at off. When it returns, what it changed is in effect:
// BARs are mapped where they now are and hooks have run.
func (c *Config) Write(off uint64, p []byte) {
	if off >= ConfigSize {
		return
	}
	p = p[:min(uint64(len(p)), ConfigSize-off)]
	redecode := false
	c.mu.Lock()
	for i, v := range p {
		o := int(off) + i
		was, w := c.data[o], c.wmask[o]
		c.data[o] = (was&^w | v&w) &^ (v & c.w1c[o])
		// The command register, the BARs, the windows of a bridge, the option ROM.
		redecode = redecode || c.data[o] != was && (o == RegCommand || o >= RegBAR && o <= regROM)
	}
	c.mu.Unlock()
	if redecode {
		c.redecode()
	}
	c.passOn(int(off), p, devices.BusDevice.Write)
	run(c.writes, int(off), len(p))
}

// Reset gives all that the guest can write its power-on value; what only the device can
// change stays. MSI-X is disabled and its table masked.
func (c *Config) Reset() {
	c.mu.Lock()
	for i := range c.data {
		w := c.wmask[i] | c.w1c[i]
		c.data[i] = c.data[i]&^w | c.initial[i]&w
	}
	c.mu.Unlock()
	c.redecode()
	for _, f := range c.resets {
		f()
	}
}

// Uint16 is the register at off as the guest would read it, without hooks.
func (c *Config) Uint16(off int) uint16 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return le.Uint16(c.data[off:])
}

// Uint32 is the register at off as the guest would read it, without hooks.
func (c *Config) Uint32(off int) uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return le.Uint32(c.data[off:])
}

// PutUint16 sets the register at off from the device's side: no masks, no hooks.
func (c *Config) PutUint16(off int, v uint16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	le.PutUint16(c.data[off:], v)
	le.PutUint16(c.dmask[off:], 0xffff)
}

// PutUint32 sets the register at off from the device's side: no masks, no hooks.
func (c *Config) PutUint32(off int, v uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	le.PutUint32(c.data[off:], v)
	le.PutUint32(c.dmask[off:], 0xffff_ffff)
}

// update16 replaces the bits of mask in the register at off by those of v, and returns
// what they were.
func (c *Config) update16(off int, mask, v uint16) (was uint16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := le.Uint16(c.data[off:])
	le.PutUint16(c.data[off:], old&^mask|v&mask)
	le.PutUint16(c.dmask[off:], le.Uint16(c.dmask[off:])|mask)
	return old & mask
}

// redecode brings the mapping of BARs in line with the registers.
func (c *Config) redecode() {
	if at := c.at.Load(); at != nil {
		at.bus.rc.redecode()
	}
}
