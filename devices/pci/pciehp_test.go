package pci

import (
	"fmt"
	"testing"
)

// pciehp is Linux's driver as far as it has to do with the registers
// (drivers/pci/hotplug/pciehp_ctrl.c and pciehp_hpc.c).
type pciehp struct {
	*slotMachine
	enables    uint16
	on         bool // as it believes
	interrupts int  // taken until now
}

func newPciehp(t testing.TB, button bool) *pciehp {
	g := &pciehp{slotMachine: newSlotMachine(t, RootPortConfig{Native: true, Button: button}), enables: slotCtlPresenceEnable}
	if button {
		g.enables = slotCtlButtonEnable
	}
	g.port.msix.Write(0, le.AppendUint64(nil, 0xfee0_0000))
	g.port.msix.Write(12, make([]byte, 4))
	g.write16(NewBDF(0, 1, 0), g.port.msix.off+msixControl, msixEnable)
	return g
}

func (g *pciehp) reg(off int) int { return g.port.c.pcie + off }

func (g *pciehp) control() uint16 { return g.read16(NewBDF(0, 1, 0), g.reg(pcieSlotCtl)) }
func (g *pciehp) indicate(v uint16) {
	g.write16(NewBDF(0, 1, 0), g.reg(pcieSlotCtl), g.control()&^slotCtlPowerIndicator|v)
}

// probe is pciehp_probe: it looks once all is enabled.
func (g *pciehp) probe() {
	g.on = g.vendor() != ^uint32(0)
	g.write16(NewBDF(0, 1, 0), g.reg(pcieSlotStatus), slotStatusButton|slotStatusLinkEvent)
	g.write16(NewBDF(0, 1, 0), g.reg(pcieSlotCtl), g.control()|g.enables|slotCtlInterruptEnable|slotCtlLinkEnable)
	if g.present() != g.on {
		g.changed()
	}
}

func (g *pciehp) present() bool {
	return g.read16(NewBDF(0, 1, 0), g.reg(pcieSlotStatus))&slotStatusPresent != 0
}

// irq is pciehp_isr and pciehp_ist; it says which events there were.
func (g *pciehp) irq() (events uint16) {
	v := g.port.cfg.Vectors.(*fakeSource).vectors[0]
	if v.raised == g.interrupts {
		return 0
	}
	g.interrupts = v.raised
	events = g.read16(NewBDF(0, 1, 0), g.reg(pcieSlotStatus)) & (slotStatusButton | slotStatusPresenceEvent | slotStatusLinkEvent)
	g.write16(NewBDF(0, 1, 0), g.reg(pcieSlotStatus), events)
	if events&slotStatusButton != 0 {
		g.indicate(indicatorBlink) // the rest follows after 5 s
	}
	if events&(slotStatusPresenceEvent|slotStatusLinkEvent) != 0 {
		g.changed()
	}
	return events
}

// changed is pciehp_handle_presence_or_link_change.
func (g *pciehp) changed() {
	if g.on {
		g.off()
	}
	if g.present() {
		g.indicate(indicatorBlink)
		if g.on = g.vendor() != ^uint32(0); g.on {
			g.indicate(indicatorOn)
		} else {
			g.indicate(indicatorOff)
		}
	}
}

func (g *pciehp) off() { g.on = false; g.indicate(indicatorOff) }

// wantEvents takes an interrupt that must be there, or not.
func (g *pciehp) wantEvents(want uint16) {
	g.t.Helper()
	if got := g.irq(); got != want {
		g.t.Errorf("events %#x, want %#x", got, want)
	}
}

const changes = slotStatusPresenceEvent | slotStatusLinkEvent

func TestSlotNative(t *testing.T) {
	for _, button := range []bool{true, false} {
		t.Run(fmt.Sprint("button ", button), func(t *testing.T) {
			g := newPciehp(t, button)
			g.probe()
			f := newFunction(t, "f", mib)
			g.plug(f)
			g.want(SlotPlugging)
			g.wantEvents(changes)
			g.want(SlotPresent)

			g.ask(Cooperative)
			if button {
				g.want(SlotRequested)
				g.wantEvents(slotStatusButton)
				g.want(SlotBusy)
				g.off()
				g.want(SlotDraining)
			} else {
				g.want(SlotBusy)
				if g.vendor() == ^uint32(0) {
					t.Error("the device has gone before its driver has")
				}
				g.wantEvents(changes)
				g.want(SlotDraining)
			}
			g.drained()
			g.want(SlotEmpty, "ejected f")
			g.irq() // the slot says that it is empty now

			g.plug(f)
			g.wantEvents(changes)
			g.want(SlotPresent)
			g.ask(Surprise)
			if g.vendor() != ^uint32(0) {
				t.Errorf("vendor %#x of what was pulled", g.vendor())
			}
			g.drained()
			g.want(SlotDraining, "ejected f")
			g.wantEvents(changes)
			g.want(SlotEmpty)

			g.plug(f)
			g.wantEvents(changes)
			g.off() // the guest's own idea
			g.drained()
			g.want(SlotEmpty, "ejected f")
			if g.slotBell != 0 {
				t.Error("an ACPI event")
			}
		})
	}
}

// What was plugged before the driver came is found by looking, without any event.
func TestSlotNativeBeforeTheDriver(t *testing.T) {
	g := newPciehp(t, true)
	g.plug(newFunction(t, "f", mib))
	g.wantEvents(0)
	g.ask(Cooperative) // waits
	g.want(SlotRequested)
	g.wantEvents(0)
	g.probe()
	g.wantEvents(slotStatusButton)
	g.want(SlotBusy)
	g.off()
	g.drained()
	g.want(SlotEmpty, "ejected f")

	// Pulled before the driver came: it notices as it comes.
	g = newPciehp(t, true)
	g.plug(newFunction(t, "f", mib))
	g.on = true // scanned
	g.ask(Surprise)
	g.drained()
	g.want(SlotDraining, "ejected f")
	g.wantEvents(0)
	g.write16(NewBDF(0, 1, 0), g.reg(pcieSlotCtl), g.control()|g.enables|slotCtlInterruptEnable)
	g.changed()
	g.want(SlotEmpty)
}

// While the indicator blinks a press would mean to cancel.
func TestSlotNativeBlinks(t *testing.T) {
	g := newPciehp(t, true)
	g.probe()
	g.plug(newFunction(t, "f", mib))
	g.wantEvents(changes)
	g.indicate(indicatorBlink) // turning it on
	g.ask(Cooperative)
	g.wantEvents(0)
	g.want(SlotRequested)
	g.indicate(indicatorOn)
	g.wantEvents(slotStatusButton)
	g.want(SlotBusy)
	g.ask(Cooperative) // once more is not a second press
	g.wantEvents(0)

	if g.port.Slot().Withdraw() {
		t.Error("withdrawn, and nobody knows yet")
	}
	if got := g.irq(); got != slotStatusButton {
		t.Errorf("events %#x: want a second press, which cancels", got)
	}
	g.indicate(indicatorOn)
	g.want(SlotPresent, "refused: the guest keeps the slot turned on")

	g.ask(Cooperative)
	if !g.port.Slot().Withdraw() {
		t.Error("the press was not seen yet")
	}
	g.irq()
	g.want(SlotPresent)
	g.indicate(indicatorOff)
	g.drained()
	g.want(SlotEmpty, "ejected f")

	// A guest that does not use what is there is not asked.
	g.irq()
	g.plug(newFunction(t, "g", 0))
	g.ask(Cooperative)
	g.drained()
	g.want(SlotEmpty, "ejected g")
}

// A guest that has not noticed yet that its device has gone takes the next one for another.
func TestSlotNativeSwap(t *testing.T) {
	g := newPciehp(t, true)
	g.probe()
	g.plug(newFunction(t, "f", mib))
	g.wantEvents(changes)
	g.ask(Surprise)
	if err := g.port.Slot().Plug(newFunction(t, "early", 0)); err == nil {
		t.Error("plugged where a vCPU may still be")
	}
	g.drained()
	g.plug(newFunction(t, "g", mib))
	g.want(SlotPlugging, "ejected f")
	g.wantEvents(changes) // off and on again
	g.want(SlotPresent)
	if !g.on || g.port.Slot().Occupant().Config().ID() != "g" {
		t.Error("g is not on")
	}
}

// Linux told to ignore _OSC (pcie_ports=native) works a slot of an ACPI machine.
func TestSlotNativeAgainstACPI(t *testing.T) {
	g := newPciehp(t, false)
	g.port.cfg.Native = false
	g.probe()
	g.plug(newFunction(t, "f", mib))
	g.wantEvents(changes)
	g.want(SlotPresent)
	g.ask(Cooperative)
	g.wantEvents(changes)
	g.drained()
	g.want(SlotEmpty, "ejected f")
}
