package vfio

import (
	"errors"
	"fmt"
	"sync"

	"baton/devices"
	"baton/devices/pci"
)

// MSI-X: PCI 6.8.2. Offsets are from the start of the capability.
const (
	msixControl  = 2
	msixTable    = 4 // offset, and the BAR in the low bits
	msixPBA      = 8
	msixSize     = 0x7ff
	msixBARMask  = 7
	msixCapBytes = 12
)

// MSI: PCI 6.8.1.
const (
	msiControl  = 2
	msiAddress  = 4
	msiEnable   = 1 << 0
	msiMaximum  = 7 << 1 // log2 of how many the device has
	msiCount    = 7 << 4 // log2 of how many the guest has enabled
	msi64       = 1 << 7
	msiMaskable = 1 << 8
)

// addInterrupts adds MSI-X, or MSI if the device has only that.
func (f *Function) addInterrupts(space []byte, c capability) error {
	switch {
	case c.id == capMSIX && c.n >= msixCapBytes && f.msix == nil:
		return f.addMSIX(space[c.off:], c.off)
	case c.id == capMSI && c.n >= 10 && f.msi == nil:
		return f.addMSI(le.Uint16(space[c.off+msiControl:]), c)
	}
	return fmt.Errorf("capability %#x at %#x: there are two, or it has %d bytes", c.id, c.off, c.n)
}

func (f *Function) addMSIX(space []byte, off int) (err error) {
	n := int(le.Uint16(space[msixControl:])&msixSize) + 1
	table, pba := le.Uint32(space[msixTable:]), le.Uint32(space[msixPBA:])
	index := int(table & msixBARMask)
	if index != int(pba&msixBARMask) {
		return fmt.Errorf("MSI-X table in BAR %d, pending bits in BAR %d: not supported", index, pba&msixBARMask)
	}
	table, pba = table&^msixBARMask, pba&^msixBARMask
	if index >= len(f.bars) || f.bars[index] == nil {
		return fmt.Errorf("MSI-X table in BAR %d, which it does not have", index)
	}
	b := f.bars[index]
	b.reserved = []devices.Range{{Base: uint64(table), Size: uint64(n) * 16}, {Base: uint64(pba), Size: uint64(n+63) / 64 * 8}}
	for _, r := range b.reserved {
		if r.End() > b.size {
			return fmt.Errorf("MSI-X table or pending bits at %s, beyond BAR %d", r, index)
		}
	}
	if f.msix, err = pci.AddMSIX(f.c, index, table, pba, n, f.o.Vectors); err != nil {
		return err
	}
	b.msix = f.msix
	vectors := make([]devices.Vector, n)
	for i := range vectors {
		vectors[i] = f.msix.Vector(i)
	}
	// All at once, when the guest turns MSI-X on: a vector that it masks stays in its eventfd.
	f.c.OnWrite(off+msixControl, 2, func() { f.enable(irqMSIX, f.msix.Enabled(), vectors) })
	return nil
}

// msi is the MSI capability of the guest's function.
type msi struct {
	c       *pci.Config
	off     int
	data    int // offsets in the capability; that of the masks is 0 if there are none
	masks   int
	vectors []devices.Vector

	mu sync.Mutex
}

func (f *Function) addMSI(control uint16, c capability) error {
	m := &msi{c: f.c, data: 8}
	body := make([]byte, 8) // control, address, data
	if control&msi64 != 0 {
		m.data, body = 12, make([]byte, 12)
	}
	if control&msiMaskable != 0 {
		m.masks = m.data + 4
		body = make([]byte, m.masks+8-2) // and the pending bits
	}
	if len(body)+2 > c.n || control&msiMaximum > 5<<1 {
		return fmt.Errorf("MSI capability at %#x: control %#x with %d bytes", c.off, control, c.n)
	}
	wmask := make([]byte, len(body))
	le.PutUint16(body, control&(msiMaximum|msi64|msiMaskable))
	le.PutUint16(wmask, msiEnable|msiCount)
	for i := msiAddress - 2; i < m.data; i++ { // and the data, 2 bytes
		wmask[i] = 0xff
	}
	wmask[msiAddress-2] = 0xfc
	n := 1 << (control & msiMaximum >> 1)
	if m.masks != 0 {
		le.PutUint32(wmask[m.masks-2:], uint32(1<<n-1))
		f.c.OnRead(c.off+m.masks+4, 4, m.pending)
	}
	f.msi = m
	for range n {
		v, err := f.o.Vectors.NewVector()
		if err != nil {
			return err
		}
		m.vectors = append(m.vectors, v)
	}
	m.off = f.c.AddCapability(capMSI, body, wmask)
	f.c.OnWrite(m.off+msiControl, len(body), func() {
		n, err := m.program()
		if err != nil {
			f.warn(fmt.Errorf("program MSI: %w", err))
		}
		f.enable(irqMSI, n > 0 && (f.msix == nil || !f.msix.Enabled()), m.vectors[:n])
	})
	return nil
}

// program tells the vectors what the registers say, and returns how many are enabled.
func (m *msi) program() (enabled int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	control := m.c.Uint16(m.off + msiControl)
	n := min(1<<(control&msiCount>>4), len(m.vectors))
	if control&msiEnable != 0 {
		enabled = n
	}
	msg := devices.MSI{Addr: uint64(m.c.Uint32(m.off + msiAddress)), Data: uint32(m.c.Uint16(m.off + m.data))}
	if m.data == 12 {
		msg.Addr |= uint64(m.c.Uint32(m.off+msiAddress+4)) << 32
	}
	var masks uint32
	if m.masks != 0 {
		masks = m.c.Uint32(m.off + m.masks)
	}
	for i, v := range m.vectors {
		one := msg
		one.Data = msg.Data&^uint32(n-1) | uint32(i) // PCI 6.8.1.6
		err = errors.Join(err, v.Set(one, i >= enabled || masks>>i&1 != 0))
	}
	return enabled, err
}

// pending shows the vectors that wait because they are masked.
func (m *msi) pending() {
	var bits uint32
	for i, v := range m.vectors {
		if v.Pending() {
			bits |= 1 << i
		}
	}
	m.c.PutUint32(m.off+m.masks+4, bits)
}

// mask keeps all vectors from the guest.
func (m *msi) mask() {
	for _, v := range m.vectors {
		_ = v.Set(devices.MSI{}, true) // fails only for an irqfd that is not there
	}
}

func (m *msi) close() (err error) {
	for _, v := range m.vectors {
		err = errors.Join(err, v.Close())
	}
	return err
}
