package pci

import "sync"

// Use is what a guest's driver makes of a function, as far as configuration space tells: first
// it lets it do DMA, then it turns MSI-X on, and when it serves it, it unmasks vectors. It lets
// go of it the other way round.
type Use struct {
	Master   bool // bus mastering is enabled
	Enabled  bool // MSI-X is; without that capability the same as Master
	Unmasked bool // a vector is, too; without MSI-X the same as Master
}

// uses tells an observer of changes.
type uses struct {
	mu   sync.Mutex
	last Use
	f    func(Use)
}

// OnUse has f called after each change of what the guest makes of the function, on the vCPU's
// thread that does it or by who resets. It is set once, before the function is added to a bus.
func (c *Config) OnUse(f func(Use)) {
	c.uses.f = f
	c.OnWrite(RegCommand, 2, c.used)
	c.resets = append(c.resets, c.used)
}

// used looks whether something has changed.
func (c *Config) used() {
	if c.uses.f == nil {
		return
	}
	c.uses.mu.Lock()
	defer c.uses.mu.Unlock()
	now := Use{Master: c.Uint16(RegCommand)&CommandMaster != 0}
	now.Enabled, now.Unmasked = now.Master, now.Master
	if c.msix != nil {
		now.Enabled, now.Unmasked = c.msix.Enabled(), c.msix.anyUnmasked()
	}
	if now != c.uses.last {
		c.uses.last = now
		c.uses.f(now)
	}
}

func (m *MSIX) anyUnmasked() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, on := range m.unmasked {
		if on {
			return true
		}
	}
	return false
}
