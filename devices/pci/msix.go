package pci

import (
	"errors"
	"fmt"
	"sync"

	"baton/devices"
)

// MSI-X: PCI 6.8.2.
const (
	CapMSIX      = 0x11
	msixControl  = 2 // offset in the capability
	msixEnable   = 1 << 15
	msixMaskAll  = 1 << 14
	msixEntry    = 16 // bytes of a table entry: address, data, vector control
	msixMasked   = 1  // vector control
	msixMaxTable = 2048
)

// MSIX is the MSI-X capability of a function with its table and pending bits. It answers
// its window of the BAR.
type MSIX struct {
	c          *Config
	off        int // capability
	window     devices.Range
	table, pba uint64 // in the window
	vectors    []devices.Vector

	mu       sync.Mutex // held while vectors are programmed, so that the last write wins
	entries  []byte
	unmasked []bool // as the vectors were told
	messages []devices.MSI
}

// AddMSIX adds the capability to c, with n vectors (1 to 2048) from src, which come masked.
// Table and pba are offsets in BAR number barIndex, multiples of 8. The caller puts the MSIX
// into that BAR at [MSIX.Window], and closes it.
func AddMSIX(c *Config, barIndex int, table, pba uint32, n int, src devices.VectorSource) (*MSIX, error) {
	fail := func(cause string) (*MSIX, error) {
		return nil, fmt.Errorf("add MSI-X to %s: %s", c.id, cause)
	}
	if n < 1 || n > msixMaxTable {
		return fail(fmt.Sprintf("%d vectors, not 1 to %d", n, msixMaxTable))
	}
	t := devices.Range{Base: uint64(table), Size: uint64(n) * msixEntry}
	p := devices.Range{Base: uint64(pba), Size: uint64(n+63) / 64 * 8}
	if (table|pba)&7 != 0 || t.Overlaps(p) {
		return fail(fmt.Sprintf("table at %s and pending bits at %s are not aligned to 8 or overlap", t, p))
	}
	if barIndex < 0 || barIndex >= numBARs {
		return fail(fmt.Sprintf("there is no BAR %d", barIndex))
	}
	start, end := min(t.Base, p.Base), max(t.End(), p.End())
	m := &MSIX{
		c:        c,
		window:   devices.Range{Base: start, Size: end - start},
		table:    t.Base - start,
		pba:      p.Base - start,
		entries:  make([]byte, t.Size),
		unmasked: make([]bool, n),
		messages: make([]devices.MSI, n),
	}
	for range n {
		v, err := src.NewVector()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("add MSI-X to %s: %w", c.id, err), m.Close())
		}
		m.vectors = append(m.vectors, v)
	}
	body := le.AppendUint16(nil, uint16(n-1))
	body = le.AppendUint32(body, table|uint32(barIndex))
	body = le.AppendUint32(body, pba|uint32(barIndex))
	m.off = c.AddCapability(CapMSIX, body, []byte{0, (msixEnable | msixMaskAll) >> 8})
	m.clear()
	c.OnWrite(m.off+msixControl, 2, func() { m.program(0, n) })
	c.resets = append(c.resets, func() { m.clear(); m.program(0, n) })
	c.msix = m
	return m, nil
}

// Window is the part of the BAR that holds the table and the pending bits.
func (m *MSIX) Window() devices.Range { return m.window }

// Vectors is how many there are.
func (m *MSIX) Vectors() int { return len(m.vectors) }

// Vector is vector i; the MSIX owns it.
func (m *MSIX) Vector(i int) devices.Vector { return m.vectors[i] }

// Signal raises vector i; one that is not there is ignored. A signal to a masked vector
// waits until it is unmasked.
func (m *MSIX) Signal(i int) {
	if uint(i) < uint(len(m.vectors)) {
		m.vectors[i].Signal()
	}
}

// Enabled says whether the guest has enabled MSI-X.
func (m *MSIX) Enabled() bool { return m.c.Uint16(m.off+msixControl)&msixEnable != 0 }

// Masked says whether signals of vector i wait: MSI-X is off, all are masked, or it is.
func (m *MSIX) Masked(i int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.unmasked[i]
}

// Close closes the vectors.
func (m *MSIX) Close() error {
	var errs []error
	for _, v := range m.vectors {
		errs = append(errs, v.Close())
	}
	return errors.Join(errs...)
}

// Read implements [devices.BusDevice]; off is relative to the window.
func (m *MSIX) Read(off uint64, p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range p {
		p[i] = 0 // between and beyond: reserved
		at := off + uint64(i)
		if e := at - m.table; e < uint64(len(m.entries)) {
			p[i] = m.entries[e]
		} else if first := (at - m.pba) * 8; at-m.pba < uint64(len(m.vectors)+7)/8 {
			for bit := range min(8, uint64(len(m.vectors))-first) {
				if m.vectors[first+bit].Pending() {
					p[i] |= 1 << bit
				}
			}
		}
	}
}

// Write implements [devices.BusDevice]; off is relative to the window. Only aligned writes
// of 4 or 8 bytes to the table mean something (PCI 6.8.2); others are dropped.
func (m *MSIX) Write(off uint64, p []byte) {
	n := uint64(len(p))
	e := off - m.table
	if n != 4 && n != 8 || e%n != 0 || e >= uint64(len(m.entries)) {
		return
	}
	i := int(e / msixEntry)
	m.mu.Lock()
	copy(m.entries[e:], p)
	control := m.entries[i*msixEntry+12:][:4]
	copy(control, []byte{control[0] & msixMasked, 0, 0, 0})
	m.mu.Unlock()
	m.program(i, i+1)
}

// clear gives the table its power-on value: no messages, all masked.
func (m *MSIX) clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.entries)
	for i := range m.vectors {
		m.entries[i*msixEntry+12] = msixMasked
	}
}

// program tells vectors [from, to) what the registers say.
func (m *MSIX) program(from, to int) {
	if at, err := m.c.at.Load(), m.apply(from, to); at != nil && err != nil {
		at.report(err)
	}
}

// apply is program for who wants the error.
func (m *MSIX) apply(from, to int) error {
	var errs []error
	m.mu.Lock()
	control := m.c.Uint16(m.off + msixControl)
	for i := from; i < to; i++ {
		e := m.entries[i*msixEntry:]
		unmasked := control&(msixEnable|msixMaskAll) == msixEnable && e[12]&msixMasked == 0
		msg := devices.MSI{Addr: le.Uint64(e), Data: le.Uint32(e[8:])}
		if unmasked == m.unmasked[i] && (!unmasked || msg == m.messages[i]) {
			continue
		}
		errs = append(errs, m.vectors[i].Set(msg, !unmasked))
		m.unmasked[i], m.messages[i] = unmasked, msg
	}
	m.mu.Unlock()
	m.c.used()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("program MSI-X vectors: %w", err)
	}
	return nil
}
