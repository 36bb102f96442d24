package pci

// PCI Express capability: PCIe 7.5.3. Offsets are from the start of the capability.
const (
	CapPCIe        = 0x10
	pcieFlags      = 0x02
	pcieDevCap     = 0x04
	pcieDevCtl     = 0x08
	pcieDevStatus  = 0x0a
	pcieLinkCap    = 0x0c
	pcieLinkCtl    = 0x10
	pcieLinkStatus = 0x12
	pcieSlotCap    = 0x14
	pcieSlotCtl    = 0x18
	pcieSlotStatus = 0x1a
	pcieRootCtl    = 0x1c
	pcieRootStatus = 0x20
	pcieDevCap2    = 0x24
	pcieDevCtl2    = 0x28
	pcieLinkCap2   = 0x2c
	pcieLinkCtl2   = 0x30
	pcieCapSize    = 0x3c

	pcieVersion = 2 // of the capability, in the flags

	devCapRoleErrors = 1 << 15 // role-based error reporting, required
	DevCapFLR        = 1 << 28
	devCtlMask       = 0x781f // error reporting, relaxed order, no snoop, read request size
	devCtlInitial    = 0x2810 // 512-byte read requests, relaxed order, no snoop
	DevCtlFLR        = 1 << 15
	devStatusW1C     = 0x000f

	// The fastest link of the specification, on both ends, so that no passed-through
	// device seems to be held back by its port. No ASPM.
	linkSpeed32  = 5       // 32 GT/s
	linkWidth16  = 16 << 4 // x16
	linkSpeeds   = 0x3e    // 2.5 to 32 GT/s
	linkSpeedMin = 1       // what a link that is down shows
	linkCtlMask  = 0x02c8  // completion boundary, common clock, extended sync, autonomous width

	devCap2NoTimeout = 1 << 4 // completion timeout disable, in capability and control
)

// PortType is the device/port type of the PCI Express capability: PCIe 7.5.3.2.
type PortType uint8

// Device/port types.
const (
	TypeEndpoint           PortType = 0x0
	TypeRootPort           PortType = 0x4
	TypeIntegratedEndpoint PortType = 0x9 // on the root bus, without a link
)

// AddPCIeCapability adds the PCI Express capability of a function. An endpoint can be
// reset by the guest (FLR: PCIe 6.6.2) and turns into an integrated one on the root bus.
func (c *Config) AddPCIeCapability(t PortType) (off int) {
	var v, w pcieRegisters
	v.put16(pcieFlags, pcieVersion|uint16(t)<<4)
	v.put32(pcieDevCap, devCapRoleErrors)
	v.put16(pcieDevCtl, devCtlInitial)
	w.put16(pcieDevCtl, devCtlMask)
	v.put32(pcieDevCap2, devCap2NoTimeout)
	w.put16(pcieDevCtl2, devCap2NoTimeout)
	if t != TypeIntegratedEndpoint {
		v.put32(pcieLinkCap, linkSpeed32|linkWidth16)
		w.put16(pcieLinkCtl, linkCtlMask)
		v.put16(pcieLinkStatus, linkSpeed32|linkWidth16)
		v.put32(pcieLinkCap2, linkSpeeds)
		v.put16(pcieLinkCtl2, linkSpeed32)
		w.put16(pcieLinkCtl2, 0xf)
	}
	if t != TypeRootPort {
		v.put32(pcieDevCap, devCapRoleErrors|DevCapFLR)
		w.put16(pcieDevCtl, devCtlMask|DevCtlFLR)
	}
	return c.AddPCIeRegisters(v[2:], w[2:])
}

// AddPCIeRegisters adds the PCI Express capability of a function that has its own registers:
// body and wmask are as for [Config.AddCapability]. The rest is as with AddPCIeCapability,
// the reset only where wmask lets the guest ask for it.
func (c *Config) AddPCIeRegisters(body, wmask []byte) (off int) {
	off = c.AddCapability(CapPCIe, body, wmask)
	c.SetW1C16(off+pcieDevStatus, devStatusW1C)
	c.pcie = off
	if le.Uint16(c.wmask[off+pcieDevCtl:])&DevCtlFLR != 0 {
		c.OnWrite(off+pcieDevCtl, 2, c.initiateFLR)
	}
	return off
}

// pcieRegisters are the values or masks of the capability, header included.
type pcieRegisters [pcieCapSize]byte

func (r *pcieRegisters) put16(off int, v uint16) { le.PutUint16(r[off:], v) }
func (r *pcieRegisters) put32(off int, v uint32) { le.PutUint32(r[off:], v) }

// initiateFLR resets the function if the guest has just asked for it; the bit always
// reads zero.
func (c *Config) initiateFLR() {
	if c.update16(c.pcie+pcieDevCtl, DevCtlFLR, 0) == 0 {
		return
	}
	if at := c.at.Load(); at != nil {
		resetFunction(at.fn)
	}
}

// integrate makes an endpoint a root complex integrated one, which has no link: PCIe 7.5.3.2.
func (c *Config) integrate() {
	flags := c.Uint16(c.pcie + pcieFlags)
	if c.pcie == 0 || flags>>4&0xf != uint16(TypeEndpoint) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.define16(c.pcie+pcieFlags, flags|uint16(TypeIntegratedEndpoint)<<4, 0)
	link := []int{pcieLinkCap, pcieLinkCtl, pcieLinkCap2, pcieLinkCtl2} // with their status
	if flags&0xf < pcieVersion {
		link = link[:2]
	}
	for _, off := range link {
		c.define32(c.pcie+off, 0, 0)
	}
}
