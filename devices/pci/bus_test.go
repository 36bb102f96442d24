package pci

import (
	"fmt"
	"testing"
)

func TestAddErrors(t *testing.T) {
	single := func(id string) Function { return newFunction(t, id, 0) }
	multi := func(id string) Function { return newFunctionHeader(t, Header{ID: id, Multifunction: true}, 0) }
	port := func(id string) Function {
		p, err := NewRootPort(RootPortConfig{ID: id, Vectors: &fakeSource{}})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for _, x := range []struct {
		name     string
		bus      string
		slot, fn int
		f        Function
		want     []string // nothing: no error
	}{
		{"taken", "pcie.0", 3, 0, single("net1"), []string{"add net1: ", "slot 3 function 0 of bus pcie.0 is taken by blk0\n", "addr="}},
		{"host bridge", "pcie.0", 0, 0, single("net1"), []string{"taken by host-bridge"}},
		{"beside the host bridge", "pcie.0", 0, 1, single("net1"), []string{"single function: host-bridge"}},
		{"slot 32", "pcie.0", 32, 0, single("net1"), []string{"slot 32 does not exist on bus pcie.0\n", "0 to 31"}},
		{"slot -2", "pcie.0", -2, 0, single("net1"), []string{"slot -2 does not exist"}},
		{"function 8", "pcie.0", 4, 8, single("net1"), []string{"function 8 does not exist\n", "0 to 7"}},
		{"function -2", "pcie.0", 4, -2, single("net1"), []string{"function -2 does not exist"}},
		{"behind a single function", "pcie.0", 3, 1, single("net1"), []string{"single function: blk0\n", "give blk0 multifunction=on"}},
		{"function 1 first", "pcie.0", 6, 1, single("net1"), nil},
		{"single function 0 last", "pcie.0", 5, 0, single("net1"), []string{"another function already: f5.1\n", "give net1 multifunction=on"}},
		{"multifunction 0 last", "pcie.0", 5, 0, multi("net1"), nil},
		{"slot 1 behind a port", "root1", 1, 0, single("net1"), []string{"slot 1 does not exist on bus root1\n", "slot 0 only"}},
		{"first free behind a port", "root1", -1, -1, single("net1"), nil},
		{"port behind a port", "root1", 0, 0, port("root9"), []string{"a root port goes on the root bus, not on bus root1\n", "bus=pcie.0"}},
		{"port with a slot taken", "root2", -1, -1, single("net1"), []string{"no free slot on bus root2: 0 vf0\n", "another root port"}},
		{"first free", "pcie.0", -1, -1, single("net1"), nil},
	} {
		t.Run(x.name, func(t *testing.T) {
			m := newMachine(t, testLayout)
			m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
			add(t, m.addPort(t, 2, 0, RootPortConfig{ID: "root2"}).Secondary(), 0, 0, newFunction(t, "vf0", 0))
			add(t, m.Root(), 3, -1, newFunction(t, "blk0", 0))
			add(t, m.Root(), 5, 1, newFunction(t, "f5.1", 0))
			for _, b := range m.Buses() {
				if b.ID != x.bus {
					continue
				}
				err := b.Add(x.slot, x.fn, x.f)
				at := x.f.Config().at.Load()
				if x.want != nil {
					wantError(t, err, x.want...)
				}
				if (x.want == nil) != (err == nil) || (at != nil) != (err == nil) {
					t.Errorf("error %v, placed at %+v", err, at)
				}
				return
			}
			t.Fatalf("no bus %s", x.bus)
		})
	}
}

func TestAddFillsSlotsInOrder(t *testing.T) {
	m := newMachine(t, testLayout)
	for i := 1; i < 32; i++ {
		f := newFunction(t, fmt.Sprint("f", i), 0)
		add(t, m.Root(), -1, -1, f)
		if got := f.c.at.Load().devfn; got != i*8 {
			t.Fatalf("f%d is at %02x.%d", i, got/8, got%8)
		}
	}
	wantError(t, m.Root().Add(-1, -1, newFunction(t, "more", 0)), "add more: no free slot on bus pcie.0: 0 host-bridge, 1 f1, ", "31 f31\n", "multifunction=on")
}

func TestAddTwiceAndDetached(t *testing.T) {
	m := newMachine(t, testLayout)
	f := newFunction(t, "f", 0)
	add(t, m.Root(), 1, 0, f)
	wantError(t, m.Root().Add(2, 0, f), "already on bus pcie.0")
	p, err := NewRootPort(RootPortConfig{ID: "root1", Vectors: &fakeSource{}})
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, p.Secondary().Add(0, 0, newFunction(t, "g", 0)), "add g: bus root1 is behind a root port that is on no bus\n")
}

func TestRemove(t *testing.T) {
	m := newMachine(t, testLayout)
	p := m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
	f := newFunction(t, "f", mib)
	add(t, p.Secondary(), -1, -1, f)
	m.assign(t)
	a := NewBDF(1, 0, 0)
	m.write16(a, RegCommand, CommandMemory)
	if len(f.mapped) != 2 {
		t.Fatalf("mapped %v", f.mapped)
	}
	p.c.update16(p.c.pcie+pcieSlotStatus, slotStatusLinkEvent, slotStatusLinkEvent)
	if err := p.Slot().RequestUnplug(Surprise); err != nil {
		t.Fatal(err)
	}
	if got := m.read32(a, 0); got != ^uint32(0) || len(f.mapped) != 0 {
		t.Errorf("vendor %#x, mapped %v after removal", got, f.mapped)
	}
	if got := m.read16(NewBDF(0, 1, 0), p.c.pcie+pcieSlotStatus); got != slotStatusLinkEvent {
		t.Errorf("slot status %#x after removal, want the event alone", got)
	}
	f.c.Write(RegCommand, []byte{0, 0}) // an access that was under way
	p.Slot().Settle()
	add(t, p.Secondary(), -1, -1, f)
	if got := m.read32(a, 0); got != 0x1041_1af4 {
		t.Errorf("vendor %#x after adding it again", got)
	}
}

func TestRootPortRegisters(t *testing.T) {
	m := newMachine(t, testLayout)
	src := &fakeSource{}
	p, err := NewRootPort(RootPortConfig{ID: "root1", Chassis: 3, Port: 0x10, Slot: 7, Vectors: src})
	if err != nil {
		t.Fatal(err)
	}
	add(t, m.Root(), 1, 0, p)
	if c, s := p.Number(); c != 3 || s != 7 || p.Secondary().ID != "root1" {
		t.Errorf("chassis %d slot %d, bus %q", c, s, p.Secondary().ID)
	}
	a, e := NewBDF(0, 1, 0), p.c.pcie
	if got := m.read32(a, e+pcieSlotCap); got != 7<<19|0x4_0070 {
		t.Errorf("slot capabilities %#x", got)
	}
	if got := m.read32(a, e+pcieLinkCap); got != 0x1010_0105 {
		t.Errorf("link capabilities %#x", got)
	}
	state := func() string {
		return fmt.Sprintf("%04x %04x", m.read16(a, e+pcieLinkStatus), m.read16(a, e+pcieSlotStatus))
	}
	empty := state()
	f := newFunction(t, "f", 0)
	add(t, p.Secondary(), 0, 0, f)
	if full := state(); empty != "0001 0000" || full != "2105 0040" {
		t.Errorf("link and slot status %s when empty, %s when occupied", empty, full)
	}
	// Slot events are the guest's to clear, presence is not; control has no more bits than the capabilities.
	p.c.PutUint16(e+pcieSlotStatus, slotStatusPresent|slotStatusPresenceEvent|slotStatusLinkEvent)
	m.write32(a, e+pcieSlotCtl, 0x0048_fdff)
	if got := m.read32(a, e+pcieSlotCtl); got != 0x0140_1128 {
		t.Errorf("slot control and status %#x", got)
	}
	m.assign(t)
	m.write16(a, regBridgeCtl, bridgeCtlReset)
	if f.resets != 1 {
		t.Errorf("%d resets of the function behind a secondary bus reset", f.resets)
	}
	m.write16(a, regBridgeCtl, 0)
	if err := m.Reset(); err != nil || f.resets != 2 || state() != "2105 0140" && state() != "2105 0040" {
		t.Errorf("%v, %d resets, %s", err, f.resets, state())
	}
	if got := m.read16(a, e+pcieSlotStatus); got != slotStatusPresent {
		t.Errorf("slot status %#x after reset", got)
	}
	if err := p.Close(); err != nil || !src.vectors[0].closed {
		t.Errorf("close: %v", err)
	}

	if got := func() uint32 {
		p := m.addPort(t, 2, 0, RootPortConfig{ID: "root2", Chassis: 5})
		return p.c.Uint32(p.c.pcie+pcieSlotCap) >> slotCapNumberShift
	}(); got != 5 {
		t.Errorf("slot number %d, want that of the chassis", got)
	}
	_, err = NewRootPort(RootPortConfig{ID: "root3", Slot: 8192, Vectors: src})
	wantError(t, err, "create root port root3: slot 8192")
	_, err = NewRootPort(RootPortConfig{ID: "root3", Vectors: &fakeSource{limit: 1, vectors: make([]*fakeVector, 1)}})
	wantError(t, err, "root3", errNoVectors.Error())
}

func TestEndpointTypeFollowsTheBus(t *testing.T) {
	m := newMachine(t, testLayout)
	p := m.addPort(t, 1, 0, RootPortConfig{ID: "root1"})
	behind, integrated := newFunction(t, "f", 0), newFunction(t, "g", 0)
	add(t, p.Secondary(), 0, 0, behind)
	add(t, m.Root(), 2, 0, integrated)
	for _, x := range []struct {
		c           *Config
		flags, link uint32
	}{{behind.c, 0x02, 0x105}, {integrated.c, 0x92, 0}} {
		x.c.Write(uint64(x.c.pcie+pcieLinkCtl), []byte{0x40})
		if f, l := x.c.Uint16(x.c.pcie+pcieFlags), x.c.Uint32(x.c.pcie+pcieLinkCap); uint32(f) != x.flags || l != x.link {
			t.Errorf("flags %#x, link capabilities %#x, want %#x and %#x", f, l, x.flags, x.link)
		}
		if l := x.c.Uint16(x.c.pcie + pcieLinkCtl); (l != 0) != (x.link != 0) {
			t.Errorf("link control %#x", l)
		}
	}
}
