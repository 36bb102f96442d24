package vfio

import (
	"fmt"

	"baton/devices"
	"baton/devices/pci"
)

// What package pci, whose registers these are, has no use for.
const (
	commandINTxOff = 1 << 10 // PCIe 7.5.1.1.3
	headerType     = 0x7f    // PCIe 7.5.1.1.9
	barIO          = 1 << 0  // PCIe 7.5.1.2.1
	pmNoSoftReset  = 1 << 3  // of PMCSR: D3hot loses nothing, as it is never entered
	pcieTypeLegacy = 1       // legacy endpoint: PCIe 7.5.3.2
)

// Capabilities: PCI Code and ID Assignment 1.14.
const (
	capPM     = 0x01
	capVPD    = 0x03
	capMSI    = 0x05
	capVendor = 0x09
	capPCIe   = 0x10
	capMSIX   = 0x11

	extAER    = 0x0001
	extSerial = 0x0003
	extVendor = 0x000b
	extACS    = 0x000d
	extARI    = 0x000e
	extATS    = 0x000f
	extSRIOV  = 0x0010
	extPRI    = 0x0013
	extReBAR  = 0x0015
	extLTR    = 0x0018
	extPASID  = 0x001b
	extL1PM   = 0x001e
	extDVSEC  = 0x0023
)

// way is how the guest meets a capability.
type way int

const (
	hide    way = iota // it is not there; so are all that the tables do not list
	virtual            // the registers are the VMM's; they start as the device's
	pass               // accesses go to the device, as far as the host's kernel lets them
)

var capabilities = map[byte]way{
	capPM:     virtual, // the device stays in D0: its state is not the guest's to lose
	capVPD:    pass,
	capMSI:    virtual,
	capVendor: pass,
	capPCIe:   virtual, // payload sizes and the link are the host's
	capMSIX:   virtual,
}

var extCapabilities = map[uint16]way{
	extSerial: virtual,
	extVendor: pass,
	extDVSEC:  pass,
	extAER:    hide, // errors are reported to the host's root port
	extACS:    hide, // what isolates the host from the guest
	extARI:    hide, // it names functions that the guest may not have
	extATS:    hide, // the guest has no IOMMU to translate by
	extPRI:    hide,
	extPASID:  hide,
	extSRIOV:  hide, // VFs are made by who owns the bus
	extReBAR:  hide, // the kernel has sized the BARs
	extLTR:    hide, // power states of a link that is the host's
	extL1PM:   hide,
}

// capability is one of the device's.
type capability struct {
	id      uint16
	version uint8 // of an extended one
	off, n  int
}

// parse lists the capabilities of a configuration space, in the order of the chain. Off is
// the first one's offset; each one's size ends where another one starts, at most.
func parse(space []byte, off int, ext bool) (list []capability, err error) {
	start, end := pci.CapBase, min(pci.ExtBase, len(space))
	if ext {
		start, end = pci.ExtBase, len(space)
	}
	seen := map[int]bool{}
	for off != 0 {
		off &^= 3
		if off < start || off+4 > end || seen[off] {
			return nil, fmt.Errorf("capability list: broken at %#x", off)
		}
		seen[off] = true
		if !ext {
			list = append(list, capability{id: uint16(space[off]), off: off, n: end - off})
			off = int(space[off+1])
			continue
		}
		h := le.Uint32(space[off:])
		if h == 0 || h == 0xffff_ffff {
			break // no capabilities: PCIe 7.6.2
		}
		list = append(list, capability{id: uint16(h), version: uint8(h >> 16 & 15), off: off, n: end - off})
		off = int(h >> 20)
	}
	for i := range list {
		for at := range seen {
			if gap := at - list[i].off; gap > 0 {
				list[i].n = min(list[i].n, gap)
			}
		}
	}
	return list, nil
}

// size is the number of bytes of a capability that the guest sees, going by its kind.
func (c capability) size(space []byte, ext bool) int {
	n := 0
	switch b := space[c.off:]; {
	case ext && c.id == extSerial:
		n = 12 // PCIe 7.9.3
	case ext && c.id == extVendor: // PCIe 7.9.5
		n = field(b, 4, 20)
	case ext && c.id == extDVSEC: // PCIe 7.9.6
		n = field(b, 4, 20)
	case ext:
	case c.id == capPM: // PCI Power Management 1.2, 3.2
		n = 8
	case c.id == capVPD: // PCIe 7.9.18
		n = 8
	case c.id == capVendor: // PCI appendix H
		n = int(b[2])
	case c.id == capPCIe && b[2]&15 < 2: // PCIe 1.1, 7.8: an endpoint's
		n = 0x14
	case c.id == capPCIe:
		n = 0x3c
	}
	return min(n, c.n)
}

// field is the number from a bit of the 32-bit register at off to its top, 0 beyond the end.
func field(b []byte, off, bit int) int {
	if len(b) < off+4 {
		return 0
	}
	return int(le.Uint32(b[off:]) >> bit)
}

// Masks of virtual capabilities, from their third byte on: what the guest may write.
var (
	pmMask   = []byte{0, 0, 3, 0} // PMCSR: the power state
	pcieMask = func() []byte {
		m := make([]byte, 0x3c)
		le.PutUint16(m[0x08:], 0x781f) // device control: error reporting, ordering, read request size
		le.PutUint16(m[0x10:], 0x02c8) // link control: completion boundary, clock, sync, width
		le.PutUint16(m[0x28:], 0x001f) // device control 2: completion timeout
		return m[2:]
	}()
)

// newConfig makes the header. INTx is not there if the host's is not connected.
func newConfig(hw hardware, space []byte, o Options) (*pci.Config, error) {
	if len(space) < 64 || le.Uint16(space) == 0xffff {
		return nil, fmt.Errorf("its configuration space cannot be read")
	}
	if t := space[pci.RegHeaderType] & headerType; t != 0 {
		return nil, fmt.Errorf("its header type is %d: bridges cannot be passed through", t)
	}
	pin := space[pci.RegInterrupt+1]
	if n, err := hw.irqs(irqINTX); err != nil {
		return nil, fmt.Errorf("interrupts: %w", err)
	} else if n == 0 || pin > 4 {
		pin = 0
	}
	return pci.NewConfig(pci.Header{
		ID:            o.ID,
		Vendor:        le.Uint16(space),
		Device:        le.Uint16(space[2:]),
		Class:         le.Uint32(space[pci.RegClass:]) >> 8,
		Revision:      space[pci.RegClass],
		SubVendor:     le.Uint16(space[pci.RegSubsystem:]),
		SubDevice:     le.Uint16(space[pci.RegSubsystem+2:]),
		Multifunction: o.Multifunction,
		InterruptPin:  pin,
	}), nil
}

// firstCapabilities are those of the first 256 bytes.
func firstCapabilities(space []byte) ([]capability, error) {
	if le.Uint16(space[pci.RegStatus:])&pci.StatusCapList == 0 {
		return nil, nil
	}
	return parse(space, int(space[pci.RegCapPointer]), false)
}

// legacy says whether a function may need I/O space, as a PCI Express endpoint must not:
// PCIe 1.3.2.
func legacy(space []byte) bool {
	list, _ := firstCapabilities(space)
	for _, c := range list {
		if c.id == capPCIe {
			return space[c.off+2]>>4 == pcieTypeLegacy
		}
	}
	return true
}

// addCapabilities gives the guest those that the tables let through, at their own offsets.
// MSI and MSI-X are for interrupts to add.
func (f *Function) addCapabilities(space []byte, interrupts func(capability) error) error {
	list, err := firstCapabilities(space)
	if err != nil {
		return err
	}
	for _, c := range list {
		how := capabilities[byte(c.id)]
		n := c.size(space, false)
		if how == hide || n < 4 && c.id != capMSI && c.id != capMSIX {
			continue
		}
		f.c.PlaceNext(c.off)
		body := append([]byte(nil), space[c.off+2:c.off+max(n, 2)]...)
		switch {
		case c.id == capMSI || c.id == capMSIX:
			err = interrupts(c)
		case c.id == capPCIe && (n >= 0x34 || n >= 0x14 && body[0]&15 < 2):
			mask := append([]byte(nil), pcieMask[:n-2]...)
			if le.Uint32(body[2:])&pci.DevCapFLR != 0 {
				mask[0x09-2] |= pci.DevCtlFLR >> 8
			}
			f.c.AddPCIeRegisters(body, mask)
		case c.id == capPM && n == 8:
			body[1] &= 0x07                     // no PME, nor auxiliary power for it
			body[2], body[3] = pmNoSoftReset, 0 // in D0
			f.c.AddCapability(capPM, body, pmMask)
		case how == pass:
			f.c.AddCapability(byte(c.id), body, nil)
			f.c.Back(c.off+2, n-2, f.space())
		}
		if err != nil {
			return err
		}
	}
	if len(space) < pci.ConfigSize {
		return nil
	}
	if list, err = parse(space, pci.ExtBase, true); err != nil {
		return err
	}
	for _, c := range list {
		how, n := extCapabilities[c.id], c.size(space, true)
		if how == hide || n < 8 {
			continue
		}
		if f.first && c.off != pci.ExtBase {
			f.c.AddExtCapability(0, 1, nil, nil) // the chain starts at 0x100: PCIe 7.9.28, null capability
		}
		f.first = false
		f.c.PlaceNext(c.off)
		f.c.AddExtCapability(c.id, c.version, space[c.off+4:c.off+n], nil)
		if how == pass {
			f.c.Back(c.off+4, n-4, f.space())
		}
	}
	return nil
}

// space is the device's own configuration space.
func (f *Function) space() devices.BusDevice { return window{f.hw, regionConfig} }
