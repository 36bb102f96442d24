package pci

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"baton/devices"
)

// slotMachine is a machine with one slot, which records what the slot says.
type slotMachine struct {
	*machine
	t        testing.TB
	port     *RootPort
	block    *SlotBlock
	drain    []func() // not done yet: a vCPU may be in there
	said     []string
	slotBell int // SlotEvent, not taken
}

func (m *slotMachine) SlotEvent()               { m.slotBell++ }
func (m *slotMachine) Changed(*Slot, SlotState) {}
func (m *slotMachine) Drain(done func())        { m.drain = append(m.drain, done) }
func (m *slotMachine) Refused(s *Slot, why string) {
	m.said = append(m.said, "refused: "+why)
}
func (m *slotMachine) Ejected(s *Slot, f Function) {
	m.said = append(m.said, "ejected "+f.Config().ID())
	if f.Config().at.Load() != nil || f.(*fakeFunction).resets == 0 {
		m.t.Errorf("%s is on a bus, or was not reset", f.Config().ID())
	}
}

func newSlotMachine(t testing.TB, cfg RootPortConfig) *slotMachine {
	m := &slotMachine{machine: newMachine(t, testLayout), t: t}
	cfg.ID, cfg.Host = "root1", m
	m.port = m.addPort(t, 1, 0, cfg)
	m.block = m.SlotBlock()
	m.assign(t)
	return m
}

// drained lets all vCPUs leave.
func (m *slotMachine) drained() {
	list := m.drain
	m.drain = nil
	for _, f := range list {
		f()
	}
}

func (m *slotMachine) want(state SlotState, said ...string) {
	m.t.Helper()
	if s := m.port.Slot().State(); s != state {
		m.t.Errorf("the slot is %s, want %s", s, state)
	}
	if !slices.Equal(m.said, said) {
		m.t.Errorf("the slot said %q, want %q", m.said, said)
	}
	m.said = nil
}

func (m *slotMachine) plug(f Function) {
	m.t.Helper()
	if err := m.port.Slot().Plug(f); err != nil {
		m.t.Fatal(err)
	}
}

func (m *slotMachine) ask(mode UnplugMode) {
	m.t.Helper()
	if err := m.port.Slot().RequestUnplug(mode); err != nil {
		m.t.Fatal(err)
	}
}

// event is what _EVT reads.
func (m *slotMachine) event() uint32 {
	if m.slotBell == 0 {
		return 0
	}
	m.slotBell = 0
	var p [4]byte
	m.block.Read(0, p[:])
	return le.Uint32(p[:])
}

func (m *slotMachine) writeBlock(off uint64, v uint32) { m.block.Write(off, le.AppendUint32(nil, v)) }

func (m *slotMachine) wantEvent(want uint32) {
	m.t.Helper()
	if got := m.event(); got != want {
		m.t.Errorf("event %#x, want %#x", got, want)
	}
}

const (
	check1 = 1<<8 | slotEventCheck
	eject1 = 1<<8 | slotEventEject

	done1 = notifyDeviceCheck<<16 | 1 // _OST for a check, of port 1
)

func (m *slotMachine) vendor() uint32 { return m.read32(NewBDF(1, 0, 0), 0) }

func TestSlotACPI(t *testing.T) {
	m := newSlotMachine(t, RootPortConfig{})
	s := m.port.Slot()
	f := newFunction(t, "f", mib)
	m.want(SlotEmpty)
	wantError(t, s.RequestUnplug(Cooperative), "unplug from root1: the slot is empty")

	m.plug(f)
	m.want(SlotPlugging)
	if m.vendor() != 0x1041_1af4 || s.Occupant() != f {
		t.Errorf("vendor %#x, occupant %v", m.vendor(), s.Occupant())
	}
	m.wantEvent(check1)
	m.writeBlock(8, done1)
	m.want(SlotPresent)
	wantError(t, s.Plug(newFunction(t, "g", 0)), "plug g: the slot of root1 is present: f is there")

	m.ask(Cooperative)
	m.want(SlotRequested)
	m.wantEvent(eject1)
	m.want(SlotBusy)
	m.wantEvent(0)
	m.ask(Cooperative) // a reminder
	m.wantEvent(eject1)
	m.writeBlock(4, 1)
	m.want(SlotDraining)
	if m.vendor() != ^uint32(0) {
		t.Errorf("vendor %#x after the eject", m.vendor())
	}
	wantError(t, s.Plug(f), "is draining")
	m.writeBlock(8, notifyEject<<16|1) // Linux's _OST after _EJ0
	m.writeBlock(4, 1)                 // once more
	m.drained()
	m.want(SlotEmpty, "ejected f")

	m.plug(f) // the same one again, before the guest has heard of the first
	m.want(SlotPlugging)
}

// The guest finds a device by itself, lets go of it by itself, or not at all.
func TestSlotGuestsOwnIdeas(t *testing.T) {
	m := newSlotMachine(t, RootPortConfig{})
	f := newFunction(t, "f", mib)
	m.plug(f)
	m.write16(NewBDF(1, 0, 0), RegCommand, CommandMemory)
	m.want(SlotPresent)
	m.writeBlock(4, 1)
	m.drained()
	m.want(SlotEmpty, "ejected f")

	m.plug(f)
	m.wantEvent(check1)
	m.writeBlock(8, done1)
	for status, why := range map[uint32]string{
		1: "the guest failed to eject it", 0x80: "the guest does not support ejection", 0x81: "an application of the guest uses it",
		0x82: "it is busy in the guest", 0x83: "something that depends on it is busy in the guest",
	} {
		m.ask(Cooperative)
		m.wantEvent(eject1)
		m.writeBlock(8, notifyEject<<16|statusEjectionPending<<8|1)
		m.want(SlotBusy)
		m.writeBlock(8, notifyEject<<16|status<<8|1)
		m.want(SlotPresent, "refused: "+why)
	}
}

func TestSlotWithdraw(t *testing.T) {
	m := newSlotMachine(t, RootPortConfig{})
	s := m.port.Slot()
	m.plug(newFunction(t, "f", mib))
	m.wantEvent(check1)
	m.writeBlock(8, done1)
	m.ask(Cooperative)
	if !s.Withdraw() {
		t.Error("too late for a request that the guest has not seen")
	}
	m.want(SlotPresent)
	m.wantEvent(0)
	m.ask(Cooperative)
	m.wantEvent(eject1)
	if s.Withdraw() {
		t.Error("in time for one that it has")
	}
	m.want(SlotBusy)
}

func TestSlotSurpriseACPI(t *testing.T) {
	m := newSlotMachine(t, RootPortConfig{})
	s := m.port.Slot()
	f, g := newFunction(t, "f", mib), newFunction(t, "g", 0)
	m.plug(f)
	m.wantEvent(check1)
	m.ask(Surprise) // while the guest looks
	if m.vendor() != ^uint32(0) {
		t.Errorf("vendor %#x of what was pulled", m.vendor())
	}
	m.drained()
	m.want(SlotDraining, "ejected f")
	m.writeBlock(8, done1) // of the first look
	m.want(SlotDraining)
	wantError(t, s.Plug(g), "draining: the guest has not noticed yet")
	wantError(t, s.RequestUnplug(Surprise), "unplug from root1: the slot is draining")
	m.wantEvent(check1)
	m.writeBlock(8, done1)
	m.want(SlotEmpty)
	m.plug(g)
}

// A request becomes a surprise, and what the guest says to the request is of no consequence.
func TestSlotEscalation(t *testing.T) {
	m := newSlotMachine(t, RootPortConfig{})
	f := newFunction(t, "f", 0)
	m.plug(f)
	m.wantEvent(check1)
	m.writeBlock(8, done1)
	m.ask(Cooperative)
	m.wantEvent(eject1)
	m.ask(Surprise)
	m.want(SlotDraining)
	m.writeBlock(4, 1)
	m.writeBlock(8, notifyEject<<16|1)
	m.drained()
	m.want(SlotDraining, "ejected f")
	m.wantEvent(check1)
	m.writeBlock(8, done1)
	m.want(SlotEmpty)
}

func TestSlotReset(t *testing.T) {
	for _, native := range []bool{false, true} {
		for _, c := range []struct {
			name  string
			do    func(m *slotMachine)
			state SlotState
			said  []string
		}{
			{"plugging", func(m *slotMachine) {}, SlotPresent, nil},
			{"requested", func(m *slotMachine) { m.ask(Cooperative) }, SlotEmpty, []string{"ejected f"}},
			{"pulled", func(m *slotMachine) { m.ask(Surprise); m.drained(); m.said = nil }, SlotEmpty, nil},
			{"pulled and not drained", func(m *slotMachine) { m.ask(Surprise) }, SlotEmpty, []string{"ejected f"}},
		} {
			t.Run(fmt.Sprintf("%s, native %v", c.name, native), func(t *testing.T) {
				m := newSlotMachine(t, RootPortConfig{Native: native, Button: true})
				m.plug(newFunction(t, "f", mib))
				c.do(m)
				if err := m.Reset(); err != nil {
					t.Fatal(err)
				}
				m.drained()
				m.want(c.state, c.said...)
				if pic := m.port.slot.control() & slotCtlPowerIndicator; (pic == indicatorOn) != (c.state == SlotPresent) {
					t.Errorf("indicator %#x", pic)
				}
				m.slotBell = 1
				m.wantEvent(0)
			})
		}
	}
}

// Functions 1 to 7 leave with function 0.
func TestSlotMultifunction(t *testing.T) {
	m := newSlotMachine(t, RootPortConfig{})
	for fn := range 3 {
		f := newFunctionHeader(t, Header{ID: fmt.Sprint("f", fn), Multifunction: true}, 0)
		add(t, m.port.Secondary(), 0, fn, f)
	}
	m.want(SlotPresent)
	m.ask(Cooperative)
	m.wantEvent(eject1)
	m.writeBlock(4, 1)
	m.drained()
	m.want(SlotEmpty, "ejected f0", "ejected f1", "ejected f2")
}

// The block answers whole reads and writes only, for ports that there are.
func TestSlotBlock(t *testing.T) {
	m := newSlotMachine(t, RootPortConfig{})
	m.addPort(t, 2, 0, RootPortConfig{ID: "root2", Host: m})
	m.plug(newFunction(t, "f", 0))
	for _, n := range []int{0, 1, 2, 3, 8, 16} {
		p := make([]byte, n)
		m.block.Read(0, p)
		if strings.Trim(string(p), "\x00") != "" {
			t.Errorf("a read of %d bytes: % x", n, p)
		}
		m.block.Write(4, append([]byte{1}, p...)[:n])
	}
	for _, v := range []uint32{0, 3, 255} {
		m.writeBlock(4, v)
		m.writeBlock(8, v)
	}
	m.writeBlock(0, 1)
	m.writeBlock(5, 1)
	m.want(SlotPlugging)
}

// What answers for a device that was pulled stays until the guest knows.
func TestSlotGhost(t *testing.T) {
	const at = 0xc800_0000
	pull := func(t *testing.T) *slotMachine {
		m := newSlotMachine(t, RootPortConfig{})
		f := newFunction(t, "f", 0)
		f.setBAR(t, 4, BAR{Size: 64 * kib, Is64: true, Device: marker(1), Gone: marker(0)})
		m.plug(f)
		m.port.c.setWindows(devices.Range{Base: at, Size: mib}, devices.Range{})
		a := NewBDF(1, 0, 0)
		m.write32(a, RegBAR+16, at)
		m.write16(a, RegCommand, CommandMemory)
		m.wantEvent(check1)
		m.writeBlock(8, done1)
		if m.at(at) != 1 {
			t.Fatalf("the BAR reads %#x", m.at(at))
		}
		m.ask(Surprise)
		if m.at(at) != 0 || m.vendor() != ^uint32(0) {
			t.Errorf("after the pull the BAR reads %#x, the vendor %#x", m.at(at), m.vendor())
		}
		return m
	}
	for name, end := range map[string]func(m *slotMachine){
		"noticed": func(m *slotMachine) { m.drained(); m.wantEvent(check1); m.writeBlock(8, done1) },
		"reset": func(m *slotMachine) {
			if err := m.Reset(); err != nil {
				t.Error(err)
			}
			m.drained()
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := pull(t)
			end(m)
			m.want(SlotEmpty, "ejected f")
			if m.at(at) != 0xff || len(m.claims()) != 1 { // the port's own
				t.Errorf("the BAR reads %#x, claims %v", m.at(at), m.claims())
			}
		})
	}
}
