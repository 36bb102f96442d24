package pci

import (
	"bytes"
	"testing"

	"baton/devices"
)

// FuzzConfigSpace is a guest that writes anything anywhere: BARs over each other, windows,
// bus numbers, resets, with any width and alignment.
func FuzzConfigSpace(f *testing.F) {
	f.Add([]byte{0, 0x50, 4, 2, 0x13, 0, 0, 0, 0xd0})                        // a BAR moves
	f.Add([]byte{1, 0x18, 3, 0, 1, 1, 1, 0x20, 4, 0, 0, 0xf0, 0xff})         // bus numbers, window
	f.Add([]byte{2, 0x4, 2, 2, 0, 2, 0x10, 8, 0, 0, 0, 0xc0, 0, 0, 0, 0xc0}) // enabled, then two BARs
	f.Add([]byte{3, 0x48, 2, 0x10, 0xa8, 1, 0x3e, 2, 0x40, 0})               // FLR, secondary reset
	f.Fuzz(func(t *testing.T, ops []byte) {
		m := newMachine(t, testLayout)
		p1 := m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
		p2 := m.addPort(t, 2, 0, RootPortConfig{ID: "root2"})
		fns := []*fakeFunction{newFunction(t, "f", mib), newFunction(t, "g", 64*kib), newFunction(t, "h", 0)}
		fns[2].setBAR(t, 1, BAR{Size: 64 * kib, Device: marker(1)})
		fns[2].setBAR(t, 2, BAR{Size: 64 * kib, Device: marker(2)})
		add(t, p1.Secondary(), 0, 0, fns[0])
		add(t, p2.Secondary(), 0, 0, fns[1])
		add(t, m.Root(), 3, 0, fns[2])
		m.assign(t)
		targets := []Function{p1, p2, fns[0], fns[1], fns[2]}
		for n := 0; len(ops) >= 3 && n < 64; n++ {
			target, off, width := targets[int(ops[0])%len(targets)], uint64(ops[1]), int(ops[2]%17)
			if ops[0] >= 0xf0 {
				off += ConfigSize - 8 // around the end
			}
			ops = ops[3:]
			data := make([]byte, width)
			ops = ops[copy(data, ops):]
			at := target.Config().at.Load()
			if at == nil { // ejected: no access reaches it any more
				continue
			}
			ecam := uint64(at.bus.number())<<20 | uint64(at.devfn)<<12 + off
			m.Write(ecam, data)
			a, b := bytes.Repeat([]byte{0x5a}, width), bytes.Repeat([]byte{0xa5}, width)
			m.Read(ecam, a)
			if m.Read(ecam, b); !bytes.Equal(a, b) {
				t.Fatalf("read of %d at %#x does not fill: % x, % x", width, ecam, a, b)
			}
			checkInvariants(t, m, targets)
		}
		if err := m.Reset(); err != nil {
			t.Fatal(err)
		}
		checkAssigned(t, m)
	})
}

// checkInvariants compares the memory bus with what the registers say.
func checkInvariants(t *testing.T, m *machine, all []Function) {
	t.Helper()
	claims, mapped := m.claims(), 0
	var end uint64
	m.mmio.Walk(func(r devices.Range, name string) {
		if r.Base < end {
			t.Fatalf("%s at %v overlaps what is before", name, r)
		}
		end = r.End()
	})
	for _, f := range all {
		c := f.Config()
		place := c.at.Load()
		if place == nil { // the guest has ejected it, as it may
			for _, b := range c.bars {
				if b != nil && claims[b.name].Size != 0 {
					t.Fatalf("%s is mapped, and its function on no bus", b.name)
				}
			}
			if fake, ok := f.(*fakeFunction); ok && len(fake.mapped) != 0 {
				t.Fatalf("%s is on no bus, and was told %v", c.id, fake.mapped)
			}
			continue
		}
		if id := c.Uint16(0); id != 0x1af4 && id != 0x1b36 {
			t.Fatalf("vendor of %s is %#x", c.id, id)
		}
		for _, b := range c.bars {
			if b == nil {
				continue
			}
			r, on := claims[b.name]
			delete(claims, b.name)
			at := c.address(b)
			want := place.bus.passes(c, devices.Range{Base: at, Size: b.Size})
			if on && (!want || r.Base != at || r.Size != b.Size || !within(r, m.layout.MMIO32) && !within(r, m.layout.MMIO64)) {
				t.Fatalf("%s is at %v; the register says %#x, visible %v", b.name, r, at, want)
			}
			if !on && want && !overlapsAny(m, devices.Range{Base: at, Size: b.Size}) {
				t.Fatalf("%s should be at %#x and nothing is in its way", b.name, at)
			}
			if fake, ok := f.(*fakeFunction); ok && on {
				mapped++
				if fake.mapped[at] != b.name {
					t.Fatalf("%s is at %v, but Mapped was told %v", b.name, r, fake.mapped)
				}
			}
		}
		if fake, ok := f.(*fakeFunction); ok {
			mapped -= len(fake.mapped)
		}
	}
	if len(claims) != 0 || mapped != 0 {
		t.Fatalf("claims %v belong to nobody; %d more mapped than told", claims, mapped)
	}
}

func overlapsAny(m *machine, r devices.Range) (yes bool) {
	m.mmio.Walk(func(o devices.Range, _ string) { yes = yes || o.Overlaps(r) })
	return yes
}

// FuzzSlot is a guest that does anything to the registers of its slots, and a host that plugs
// and unplugs meanwhile.
func FuzzSlot(f *testing.F) {
	f.Add([]byte{0, 0, 1, 4, 1, 1, 5, 0, 5, 1, 2, 2, 4, 0})                            // ACPI: plug, check, eject
	f.Add([]byte{0x80, 0, 1, 3, 2, 0x29, 0x13, 1, 1, 3, 2, 0x29, 0x12, 3, 2, 0x29, 3}) // native: plug, button, blink, off
	f.Add([]byte{0xc0, 0, 1, 2, 0, 2, 7, 0, 0, 1, 6, 3, 1, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, ops []byte) {
		if len(ops) == 0 {
			return
		}
		m := newSlotMachine(t, RootPortConfig{Native: ops[0]&0x80 != 0, Button: ops[0]&0x40 != 0})
		m.addPort(t, 2, 0, RootPortConfig{ID: "root2", Host: m})
		m.assign(t)
		s, fn := m.port.slot, newFunction(t, "f", mib)
		plugged := false
		for ops = ops[1:]; len(ops) >= 3; ops = ops[3:] {
			a, b := ops[1], ops[2]
			switch ops[0] % 9 {
			case 0:
				free := fn.c.at.Load() == nil && len(s.draining) == 0
				err := error(nil)
				if free {
					err = s.Plug(fn)
				}
				plugged = plugged || free && err == nil
			case 1:
				_ = s.RequestUnplug(UnplugMode(a & 1))
			case 2:
				s.Withdraw()
			case 3: // slot control and status
				m.Write(uint64(NewBDF(0, 1, 0))<<12+uint64(m.port.c.pcie+pcieSlotCtl+int(a&3)), []byte{b, a, b, a}[:1+a>>4&3])
			case 4:
				var p [8]byte
				m.block.Read(uint64(a&15), p[:b&7])
			case 5:
				m.block.Write(uint64(a&15), []byte{b & 3, a, b >> 2, 0, 0, 0, 0, 0}[:4+a>>4&1*4])
			case 6:
				m.drained()
			case 7:
				m.write16(NewBDF(1, 0, 0), RegCommand, uint16(b))
			case 8:
				if err := m.Reset(); err != nil {
					t.Fatal(err)
				}
			}
			m.slotBell = 0
			for _, said := range m.said {
				if said == "ejected f" && !plugged {
					t.Fatal("ejected what was not plugged")
				}
				plugged = plugged && said != "ejected f"
			}
			m.said = nil
			in := s.state != SlotEmpty && s.state != SlotDraining
			switch {
			case (s.Occupant() != nil) != in:
				t.Fatalf("the slot is %s, occupant %v", s.state, s.Occupant())
			case plugged != (in || len(s.draining) > 0):
				t.Fatalf("the slot is %s, plugged %v", s.state, plugged)
			case s.control()&slotCtlPowerIndicator != s.indicator:
				t.Fatalf("indicator %#x, register %#x", s.indicator, s.control())
			case s.state == SlotEmpty && (s.unaware || s.draining != nil):
				t.Fatal("empty, and something drains")
			}
		}
		if err := m.Reset(); err != nil {
			t.Fatal(err)
		}
		m.drained()
		if st := s.State(); st != SlotEmpty && st != SlotPresent {
			t.Fatalf("the slot is %s after a reset", st)
		}
	})
}
