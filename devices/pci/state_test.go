package pci

import (
	"testing"

	"baton/devices"
	"baton/tests/devicetest"
)

// saved is an endpoint with a state.
type saved struct{ *fakeFunction }

func (s saved) StateInfo() devices.StateInfo { return s.c.StateInfo("fake") }
func (s saved) SaveState() ([]byte, error)   { return devices.EncodeState(bareState{s.c.SaveState()}) }
func (s saved) LoadState(version uint16, data []byte) error {
	return loadBare(s.c, s.StateInfo(), version, data)
}

// withPort is a machine with an endpoint on the root bus and one behind a port, as firmware
// leaves it.
func withPort(t testing.TB) (*machine, saved, saved) {
	m := newMachine(t, testLayout)
	root, behind := saved{newFunction(t, "root", 64*kib)}, saved{newFunction(t, "behind", 64*kib)}
	add(t, m.Root(), 2, 0, root)
	p := m.addPort(t, 3, 0, RootPortConfig{ID: "rp", Chassis: 1})
	add(t, p.Secondary(), 0, 0, behind)
	m.assign(t)
	return m, root, behind
}

func TestStateContract(t *testing.T) {
	make := func(t testing.TB) devices.Stater { _, f, _ := withPort(t); return f }
	devicetest.State(t, make, func(_ testing.TB, d devices.Stater) {
		f := d.(saved)
		f.c.Write(RegCommand, []byte{CommandMemory | CommandMaster, 4})
		f.c.Write(RegBAR+16, le.AppendUint32(nil, 0xd000_0000))
		f.c.Write(uint64(f.msix.off+msixControl), []byte{0, msixEnable >> 8})
		f.msix.Write(16, []byte{1, 2, 3, 4, 5, 6, 7, 8})
		f.msix.Write(24, []byte{9, 8, 7, 6, 1, 0, 0, 0})
		f.msix.Signal(1)
	})
}

func TestPaths(t *testing.T) {
	m, _, _ := withPort(t)
	var ids []string
	add(t, m.Root(), 4, 0, newFunction(t, "plain", 0)) // which has no state
	for _, s := range m.Staters() {
		ids = append(ids, s.StateInfo().ID)
	}
	want := []string{"pci/0000:00:00.0", "pci/0000:00:02.0", "pci/0000:00:03.0", "pci/0000:00:03.0/00.0"}
	if len(ids) != len(want) {
		t.Fatalf("sections %q", ids)
	}
	for i := range want {
		if ids[i] != want[i] {
			t.Errorf("section %d: %s, want %s", i, ids[i], want[i])
		}
	}
}

// What the guest has set up is in effect on the other side: bus numbers, windows, BARs that
// have changed places, vectors and what is pending.
func TestStateInEffect(t *testing.T) {
	src, root, behind := withPort(t)
	port := NewBDF(0, 3, 0)
	src.write32(port, RegPrimary, 0x00_09_09_00) // the guest has renumbered
	b := behind.c.Uint32(RegBAR + 16)
	src.write32(NewBDF(0, 2, 0), RegBAR+16, uint32(b)+1<<20)
	src.write16(NewBDF(0, 2, 0), RegCommand, CommandMemory)
	src.write16(NewBDF(9, 0, 0), RegCommand, CommandMemory)
	src.write16(NewBDF(0, 2, 0), root.msix.off+msixControl, msixEnable)
	root.msix.Write(0, le.AppendUint64(nil, 0xfee0_1000))
	root.msix.Write(8, le.AppendUint64(nil, 0x41))
	root.msix.Write(16, le.AppendUint64(nil, 0xfee0_2000))
	root.msix.Write(24, le.AppendUint64(nil, 0x42|msixMasked<<32))
	root.msix.Signal(1)

	dst, root2, behind2 := withPort(t)
	to := dst.Staters()
	for i, s := range src.Staters() {
		data, err := s.SaveState()
		if err != nil {
			t.Fatal(err)
		}
		if err := to[i].LoadState(1, data); err != nil {
			t.Fatal(err)
		}
	}
	want, got := src.claims(), dst.claims()
	if len(want) < 3 || len(got) != len(want) {
		t.Errorf("claims %v, want %v", got, want)
	}
	for name, r := range want {
		if got[name] != r {
			t.Errorf("%s at %v, want %v", name, got[name], r)
		}
	}
	if v := dst.read32(NewBDF(9, 0, 0), 0); v != behind2.c.Uint32(0) {
		t.Errorf("bus 9 reads %#x", v)
	}
	v0, v1 := root2.msix.vectors[0].(*fakeVector), root2.msix.vectors[1].(*fakeVector)
	if v0.masked || v0.msg != (devices.MSI{Addr: 0xfee0_1000, Data: 0x41}) || v0.raised != 0 {
		t.Errorf("vector 0: %+v", v0)
	}
	if !v1.masked || !v1.waiting {
		t.Errorf("vector 1: %+v", v1)
	}
	root2.msix.Write(28, []byte{0, 0, 0, 0})
	if v1.raised != 1 {
		t.Errorf("the pending interrupt is lost: %+v", v1)
	}
	if dst.logs.Len() != 0 {
		t.Errorf("logged %s", dst.logs)
	}
}

func TestStateOfAnotherDevice(t *testing.T) {
	_, f, _ := withPort(t)
	data, err := f.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	m := newMachine(t, testLayout)
	other := saved{newFunctionHeader(t, Header{ID: "other", Multifunction: true}, 64*kib)}
	add(t, m.Root(), 2, 0, other)
	wantError(t, other.LoadState(1, data), "load pci/0000:00:02.0 (fake): Registers: byte 0xe ", "the same devices")
	for _, s := range []ConfigState{
		{Registers: make([]byte, ConfigSize+1)},
		{Registers: f.c.SaveState().Registers, Table: make([]byte, 16), Pending: make([]byte, 1)},
		{Registers: f.c.SaveState().Registers, Table: make([]byte, 48), Pending: make([]byte, 2)},
	} {
		if err := f.c.LoadState(f.StateInfo(), s); err == nil {
			t.Errorf("%d registers, table %d, pending %d: loaded", len(s.Registers), len(s.Table), len(s.Pending))
		}
	}
}

func TestPortState(t *testing.T) {
	make := func(t testing.TB) devices.Stater {
		m, _, behind := withPort(t)
		_ = m
		return behind.c.at.Load().bus.port
	}
	devicetest.State(t, make, func(_ testing.TB, d devices.Stater) {
		p := d.(*RootPort)
		p.c.Write(RegPrimary, []byte{0, 7, 9})
		if err := p.slot.RequestUnplug(Cooperative); err != nil {
			t.Fatal(err)
		}
		p.c.Write(uint64(p.c.pcie+pcieSlotCtl), []byte{slotCtlPresenceEnable | slotCtlInterruptEnable, indicatorOn >> 8})
	})
}

// A slot goes on on another host from wherever it was.
func TestSlotState(t *testing.T) {
	type step struct {
		name string
		do   func(m *slotMachine)
	}
	plug := func(m *slotMachine) { m.plug(newFunction(m.t, "f", mib)) }
	before := []step{
		{"empty", func(*slotMachine) {}},
		{"plugging", plug},
		{"requested", func(m *slotMachine) { plug(m); m.wantEvent(check1); m.writeBlock(8, done1); m.ask(Cooperative) }},
		{"busy", func(m *slotMachine) { plug(m); m.wantEvent(check1); m.ask(Cooperative); m.wantEvent(eject1) }},
		{"pulled", func(m *slotMachine) { plug(m); m.wantEvent(check1); m.ask(Surprise); m.drained(); m.said = nil }},
	}
	after := map[string]func(m *slotMachine){
		"empty":    func(m *slotMachine) { plug(m); m.want(SlotPlugging) },
		"plugging": func(m *slotMachine) { m.wantEvent(check1); m.writeBlock(8, done1); m.want(SlotPresent) },
		"requested": func(m *slotMachine) {
			m.wantEvent(eject1)
			m.writeBlock(4, 1)
			m.drained()
			m.want(SlotEmpty, "ejected f")
		},
		"busy": func(m *slotMachine) { m.writeBlock(4, 1); m.drained(); m.want(SlotEmpty, "ejected f") },
		"pulled": func(m *slotMachine) {
			m.writeBlock(8, done1)
			m.want(SlotDraining)
			m.wantEvent(check1)
			m.writeBlock(8, done1)
			m.want(SlotEmpty)
		},
	}
	for _, c := range before {
		t.Run(c.name, func(t *testing.T) {
			src, dst := newSlotMachine(t, RootPortConfig{}), newSlotMachine(t, RootPortConfig{})
			c.do(src)
			data, err := src.port.SaveState()
			if err != nil {
				t.Fatal(err)
			}
			if src.port.slot.Occupant() != nil {
				wantError(t, dst.port.LoadState(1, data), "Slot.State", "and here it is empty")
				add(t, dst.port.Secondary(), 0, 0, newFunction(t, "f", mib))
			}
			if err := dst.port.LoadState(1, data); err != nil {
				t.Fatal(err)
			}
			dst.slotBell = 1 // chipset.PM's state
			after[c.name](dst)
		})
	}
	src, dst := newSlotMachine(t, RootPortConfig{}), newSlotMachine(t, RootPortConfig{})
	plug(dst)
	data, err := src.port.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, dst.port.LoadState(1, data), "the slot is empty, and here f is in it")
}

// The same with Linux's own driver, which has not unplugged yet.
func TestSlotStateNative(t *testing.T) {
	for _, button := range []bool{true, false} {
		src, dst := newPciehp(t, button), newPciehp(t, button)
		src.probe()
		src.plug(newFunction(t, "f", mib))
		src.wantEvents(changes)
		src.ask(Cooperative)
		if button {
			src.wantEvents(slotStatusButton)
		}
		data, err := src.port.SaveState()
		if err != nil {
			t.Fatal(err)
		}
		add(t, dst.port.Secondary(), 0, 0, newFunction(t, "f", mib))
		if err := dst.port.LoadState(1, data); err != nil {
			t.Fatal(err)
		}
		dst.want(SlotBusy)
		if dst.present() != button {
			t.Errorf("button %v: shown as present %v", button, dst.present())
		}
		dst.off()
		dst.drained()
		dst.want(SlotEmpty, "ejected f")
	}
}
