package pci

import (
	"errors"
	"fmt"

	"baton/devices"
)

// Slot and link registers of a root port: PCIe 7.5.3.2, 7.5.3.6 to 7.5.3.13.
const (
	flagsSlot = 1 << 8 // slot implemented

	linkCapActiveReporting = 1 << 20 // data link layer link active reporting
	linkCapPortShift       = 24
	linkCtlDisable         = 1 << 4
	linkStatusActive       = 1 << 13

	slotCapButton           = 1 << 0
	slotCapPowerIndicator   = 1 << 4
	slotCapHotPlugSurprise  = 1 << 5
	slotCapHotPlugCapable   = 1 << 6
	slotCapNoCommandDone    = 1 << 18
	slotCapNumberShift      = 19
	slotCtlButtonEnable     = 1 << 0
	slotCtlPresenceEnable   = 1 << 3
	slotCtlInterruptEnable  = 1 << 5
	slotCtlPowerIndicator   = 3 << 8
	slotCtlLinkEnable       = 1 << 12
	slotStatusButton        = 1 << 0
	slotStatusPresenceEvent = 1 << 3
	slotStatusPresent       = 1 << 6
	slotStatusLinkEvent     = 1 << 8

	rootCtlMask   = 0x000f // system errors, PME interrupt
	rootStatusPME = 0x0001 // in the upper half
	capSSVID      = 0x0d   // subsystem of a bridge: PCI-to-PCI Bridge 1.2, 3.2.5.13
	extACS        = 0x000d // access control services: PCIe 7.7.8
	acsMask       = 0x001d // validation, request and completion redirect, forwarding

	vendorRedHat   = 0x1b36 // QEMU's identifiers, which Linux has no quirks for
	deviceRootPort = 0x000c
	deviceHost     = 0x0008
	classHost      = 0x060000
	classBridge    = 0x060400
)

// RootPortConfig describes a root port.
type RootPortConfig struct {
	ID            string // also the name of its bus
	Chassis       uint8  // with Slot, names the slot to the user; the caller checks for duplicates
	Port          uint8  // port number of the link capabilities
	Slot          uint16 // physical slot number, 0 to 8191; 0: the number of the chassis
	Multifunction bool   // the port's own slot has functions 1 to 7
	Native        bool   // the guest works the slot by its registers; otherwise by ACPI
	Button        bool   // with an attention button, which makes Linux wait for 5 s
	Vectors       devices.VectorSource
	Host          SlotHost // may be nil
}

// RootPort is a PCI Express root port with a slot, and the bus behind it. The slot is
// hot-plug capable and allows surprise removal; it has a power indicator, but no power
// controller and no command completed events, with which Linux would wait for seconds.
type RootPort struct {
	c         *Config
	msix      *MSIX
	secondary *Bus
	slot      *Slot
	cfg       RootPortConfig
}

// NewRootPort returns a root port, not yet on a bus.
func NewRootPort(cfg RootPortConfig) (*RootPort, error) {
	if cfg.Slot == 0 {
		cfg.Slot = uint16(cfg.Chassis)
	}
	if cfg.Slot > 0x1fff {
		return nil, fmt.Errorf("create root port %s: slot %d is above 8191", cfg.ID, cfg.Slot)
	}
	if cfg.Host == nil {
		cfg.Host = noHost{}
	}
	c := NewConfig(Header{ID: cfg.ID, Vendor: vendorRedHat, Device: deviceRootPort, Class: classBridge, Type: 1, Multifunction: cfg.Multifunction})
	p := &RootPort{c: c, cfg: cfg}
	p.slot = &Slot{port: p}
	p.secondary = &Bus{ID: cfg.ID, port: p, fns: make([]Function, 8)}
	off := c.AddPCIeCapability(TypeRootPort)
	c.define16(off+pcieFlags, pcieVersion|uint16(TypeRootPort)<<4|flagsSlot, 0)
	c.define32(off+pcieLinkCap, linkSpeed32|linkWidth16|linkCapActiveReporting|uint32(cfg.Port)<<linkCapPortShift, 0)
	c.define16(off+pcieLinkCtl, 0, linkCtlMask|linkCtlDisable)
	p.slot.initSlotRegisters()
	c.define16(off+pcieRootCtl, 0, rootCtlMask)
	c.SetW1C16(off+pcieRootStatus+2, rootStatusPME)
	c.AddCapability(capSSVID, le.AppendUint16([]byte{0, 0}, vendorRedHat), nil)
	c.AddExtCapability(extACS, 1, []byte{acsMask, 0, 0, 0}, []byte{0, 0, acsMask, 0})

	// One vector, for hot-plug and power events; PME's message number is 0 as well.
	var err error
	if p.msix, err = AddMSIX(c, 0, 0, 0x800, 1, cfg.Vectors); err != nil {
		return nil, err
	}
	if err := c.SetBAR(0, BAR{Size: 4096, Device: p.msix}); err != nil {
		return nil, errors.Join(err, p.msix.Close())
	}
	c.OnWrite(regBridgeCtl, 2, p.secondaryReset)
	p.show(false)
	return p, nil
}

// Config implements [Function].
func (p *RootPort) Config() *Config { return p.c }

// Reset implements [Function]; the port is all registers, which the caller resets.
func (p *RootPort) Reset() {}

// Close implements [Function].
func (p *RootPort) Close() error { return p.msix.Close() }

// Secondary is the bus behind the port.
func (p *RootPort) Secondary() *Bus { return p.secondary }

// Address is where the port is, once it is on the root bus.
func (p *RootPort) Address() BDF { return BDF(p.c.at.Load().devfn) }

// Number is the chassis and the physical slot number, which together name the slot.
func (p *RootPort) Number() (chassis uint8, slot uint16) { return p.cfg.Chassis, p.cfg.Slot }

// show says in the registers whether a device is in the slot, without the events of a change.
func (p *RootPort) show(yes bool) {
	present, link := uint16(0), uint16(linkSpeedMin)
	if yes {
		present, link = slotStatusPresent, linkSpeed32|linkWidth16|linkStatusActive
	}
	p.c.update16(p.c.pcie+pcieSlotStatus, slotStatusPresent, present)
	p.c.PutUint16(p.c.pcie+pcieLinkStatus, link)
}

// secondaryReset resets what is behind the port while the guest asserts the reset: PCIe 7.5.1.3.13.
func (p *RootPort) secondaryReset() {
	at := p.c.at.Load()
	if at == nil || p.c.Uint16(regBridgeCtl)&bridgeCtlReset == 0 {
		return
	}
	for _, f := range at.bus.rc.snapshot(p.secondary) {
		resetFunction(f)
	}
}

// hostBridge is the root complex's own function, which Linux expects at 00.0.
type hostBridge struct{ c *Config }

func newHostBridge() hostBridge {
	return hostBridge{NewConfig(Header{ID: "host-bridge", Vendor: vendorRedHat, Device: deviceHost, Class: classHost})}
}

func (h hostBridge) Config() *Config { return h.c }
func (h hostBridge) Reset()          {}
func (h hostBridge) Close() error    { return nil }
