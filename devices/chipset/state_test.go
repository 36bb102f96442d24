package chipset

import (
	"testing"
	"time"

	"baton/devices"
	"baton/tests/devicetest"
)

func TestIOAPICState(t *testing.T) {
	make := func(testing.TB) devices.Stater { return NewIOAPIC(new(lapics), 24) }
	devicetest.State(t, make, func(t testing.TB, d devices.Stater) {
		a := &ioapic{IOAPIC: d.(*IOAPIC)}
		a.setReg(ioapicRegID, 3<<24)
		a.program(4, 0x31)
		a.program(5, 0x41|rteLevel)
		a.Line(5).SetLevel(true) // remote IRR
		a.put(ioapicSelect, 0x12)
	})
}

// A level-triggered interrupt is delivered once: when it waits for its EOI it is not raised
// again, and the EOI that comes to the other side ends it.
func TestIOAPICStateLevel(t *testing.T) {
	src := newIOAPIC(t)
	src.program(5, 0x41|rteLevel)
	src.Line(5).SetLevel(true)
	src.want("source", 0x41)
	data, err := src.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	dst := newIOAPIC(t)
	routed := map[int]devices.MSI{}
	dst.OnRoute(func(pin int, m devices.MSI, masked bool) {
		if !masked {
			routed[pin] = m
		}
	})
	line := dst.Line(5)
	line.SetLevel(true)
	if err := dst.LoadState(1, data); err != nil {
		t.Fatal(err)
	}
	dst.want("in service on the source")
	if len(routed) != 1 || routed[5] != message(0x41|rteLevel) {
		t.Errorf("routes %v", routed)
	}
	dst.EOI(0x41)
	dst.want("still high", 0x41)
	line.SetLevel(false)
	dst.EOI(0x41)
	dst.want("low")
}

func TestSerialState(t *testing.T) {
	make := func(t testing.TB) devices.Stater { return newUART(t).Serial }
	devicetest.State(t, make, func(t testing.TB, d devices.Stater) {
		s := d.(*Serial)
		s.Write(regLCR, []byte{lcrDLAB | 3})
		s.Write(regData, []byte{12})
		s.Write(regIER, []byte{1})
		s.Write(regLCR, []byte{3})
		s.Write(regIIR, []byte{fcrEnable | 2<<6})
		s.Write(regMCR, []byte{mcrLoop | 3})
		s.Write(regSCR, []byte{0x5a})
		for i := range fifoSize + 1 { // the last one overruns
			s.Write(regData, []byte{byte('a' + i)})
		}
		s.Write(regIER, []byte{ierRDA | ierTHRE | ierRLS})
	})
}

// What has come from the host and the guest has not read is read on the other side, in
// order, and interrupts there.
func TestSerialStateInput(t *testing.T) {
	src, dst := newUART(t), newUART(t)
	src.outb(regIIR, fcrEnable)
	src.outb(regIER, ierRDA)
	const text = "more than a FIFO holds, at once"
	src.send(text)
	src.waitEdge("source")
	if err := src.Quiesce(); err != nil {
		t.Fatal(err)
	}
	data, err := src.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	if err := dst.Quiesce(); err != nil {
		t.Fatal(err)
	}
	if err := dst.LoadState(1, data); err != nil {
		t.Fatal(err)
	}
	dst.wantLine("loaded", true)
	if err := dst.Unquiesce(); err != nil {
		t.Fatal(err)
	}
	dst.send("!")
	got := ""
	for len(got) < len(text)+1 {
		if dst.in(regLSR)&lsrDR != 0 {
			got += string(rune(dst.in(regData)))
		}
	}
	if got != text+"!" {
		t.Errorf("read %q", got)
	}
}

// While it is quiesced the port takes nothing.
func TestSerialQuiesce(t *testing.T) {
	u := newUART(t)
	u.outb(regIER, ierRDA)
	if err := u.Quiesce(); err != nil {
		t.Fatal(err)
	}
	u.send("x")
	u.want("quiesced", regLSR, lsrTHRE|lsrTEMT)
	if err := u.Unquiesce(); err != nil {
		t.Fatal(err)
	}
	u.waitEdge("running again")
	u.want("running again", regData, 'x')
}

func TestPMState(t *testing.T) {
	make := func(testing.TB) devices.Stater { return NewPM(new(wire), Power{}) }
	devicetest.State(t, make, func(_ testing.TB, d devices.Stater) {
		m := d.(*PM)
		m.setResetControl(0, 2)
		m.PowerButton()
	})
	src, line := NewPM(new(wire), Power{}), new(wire)
	src.PowerButton()
	data, err := src.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	dst := NewPM(line, Power{})
	if err := dst.LoadState(1, data); err != nil {
		t.Fatal(err)
	}
	if _, edges := line.state(); edges != 1 || dst.takeEvents(0) != EventPowerButton {
		t.Errorf("%d edges: the press of the button is lost", edges)
	}
}

func TestRTCState(t *testing.T) {
	now := func() time.Time { return time.Unix(1e9, 0) }
	make := func(testing.TB) devices.Stater { return NewRTC(now) }
	devicetest.State(t, make, func(_ testing.TB, d devices.Stater) {
		d.(*RTC).Write(0, []byte{0x40})
		d.(*RTC).Write(1, []byte{0x55})
	})
}

// send has the host send text; it ends when the port has read it.
func (u *uart) send(text string) { go func() { _, _ = u.host.in.Write([]byte(text)) }() }

func FuzzSerialState(f *testing.F) {
	devicetest.FuzzState(f, func(t testing.TB) devices.Stater { return newUART(t).Serial })
}

func FuzzIOAPICState(f *testing.F) {
	devicetest.FuzzState(f, func(testing.TB) devices.Stater { return NewIOAPIC(new(lapics), 24) })
}
