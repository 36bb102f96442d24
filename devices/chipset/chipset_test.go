package chipset

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"baton/devices"
)

type power struct{ resets, offs int }

func newPM(t *testing.T) (*PM, *devices.Bus, *wire, *power) {
	t.Helper()
	ged, ports, p := &wire{}, devices.NewBus(), &power{}
	pm := NewPM(ged, Power{Reset: func() { p.resets++ }, Off: func() { p.offs++ }})
	if err := pm.Attach(ports); err != nil {
		t.Fatal(err)
	}
	return pm, ports, ged, p
}

func inl(ports *devices.Bus, port uint64) uint32 {
	p := make([]byte, 4)
	ports.Read(port, p)
	return binary.LittleEndian.Uint32(p)
}

func TestPMRequests(t *testing.T) {
	for _, c := range []struct {
		name string
		port uint64
		data []byte
		want power
	}{
		{"S5", SleepControlPort, []byte{sleepEnable | SleepTypeS5<<2}, power{offs: 1}},
		{"S5, sleep status written with it", SleepControlPort, []byte{sleepEnable | SleepTypeS5<<2, 0x80}, power{offs: 1}},
		{"S5 without enable", SleepControlPort, []byte{SleepTypeS5 << 2}, power{}},
		{"S3", SleepControlPort, []byte{sleepEnable | 1<<2}, power{}},
		{"sleep status", SleepStatusPort, []byte{0xff}, power{}},
		{"reset register", ResetPort, []byte{ResetValue}, power{resets: 1}},
		{"full reset", ResetPort, []byte{0x0e}, power{resets: 1}},
		{"system reset, not yet the CPU", ResetPort, []byte{0x02}, power{}},
		{"keyboard controller", KeyboardCommandPort, []byte{0xfe}, power{resets: 1}},
		{"another keyboard command", KeyboardCommandPort, []byte{0xaa}, power{}},
		{"PCI configuration address", 0xcf8, []byte{0, 6, 0, 0x80}, power{}},
		{"event register", EventPort, []byte{0xff, 0xff, 0xff, 0xff}, power{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, ports, ged, got := newPM(t)
			ports.Write(c.port, c.data)
			if *got != c.want {
				t.Errorf("got %+v, want %+v", *got, c.want)
			}
			if _, edges := ged.state(); edges != 0 {
				t.Error("an event out of nowhere")
			}
		})
	}
}

func TestPMReads(t *testing.T) {
	pm, ports, _, _ := newPM(t)
	ports.Write(ResetPort, []byte{0x0a})
	for port, want := range map[uint64]byte{
		SleepControlPort: 0, SleepStatusPort: 0, EventPort: 0, KeyboardCommandPort: 0, ResetPort: 0x0a,
	} {
		if got := byte(inl(ports, port)); got != want {
			t.Errorf("port %#x reads %#x, want %#x", port, got, want)
		}
	}
	pm.Reset()
	if got := byte(inl(ports, ResetPort)); got != 0 {
		t.Errorf("reset control after reset: %#x", got)
	}
}

func TestPMPowerButton(t *testing.T) {
	pm, ports, ged, _ := newPM(t)
	pm.PowerButton()
	pm.PowerButton()
	pm.SlotEvent()
	if high, edges := ged.state(); !high || edges != 1 {
		t.Errorf("%d edges, line is %v", edges, high)
	}
	if got := inl(ports, EventPort); got != EventPowerButton|EventSlot {
		t.Errorf("events %#x, want the power button and a slot", got)
	}
	if high, _ := ged.state(); high {
		t.Error("the line is high without events")
	}
	if got := inl(ports, EventPort); got != 0 {
		t.Errorf("events %#x after they were taken", got)
	}
	pm.PowerButton()
	ports.Read(EventPort+1, make([]byte, 3)) // not the byte with the bit
	p := make([]byte, 1)
	if ports.Read(EventPort, p); p[0] != EventPowerButton {
		t.Errorf("events %#x", p)
	}
	pm.PowerButton()
	pm.Reset()
	if got := inl(ports, EventPort); got != 0 {
		t.Errorf("events %#x after reset", got)
	}
}

func TestPMAttachConflict(t *testing.T) {
	ports := devices.NewBus()
	pm := NewPM(&wire{}, Power{})
	if err := pm.Attach(ports); err != nil {
		t.Fatal(err)
	}
	if err := pm.Attach(ports); err == nil || !strings.Contains(err.Error(), "acpi sleep control") {
		t.Errorf("attached twice: %v", err)
	}
}

func TestDebugPort(t *testing.T) {
	var out bytes.Buffer
	d := NewDebugPort(&out)
	d.Write(0, []byte("h"))
	d.Write(0, []byte("ello"))
	d.Write(0, nil)
	p := []byte{0, 0}
	if d.Read(0, p); !bytes.Equal(p, []byte{0xe9, 0xe9}) {
		t.Errorf("reads % x", p)
	}
	if out.String() != "hello" {
		t.Errorf("wrote %q", &out)
	}
}

func TestPVPanic(t *testing.T) {
	reports := 0
	d := NewPVPanic(func() { reports++ })
	p := []byte{0}
	if d.Read(0, p); p[0] != 1 {
		t.Errorf("capabilities %#x, want panicked only", p[0])
	}
	d.Write(0, []byte{2}) // crash loaded: a kdump kernel follows
	if reports != 0 {
		t.Error("a crash kernel was taken for a panic")
	}
	if d.Write(0, []byte{1}); reports != 1 {
		t.Errorf("%d reports of a panic", reports)
	}
}

func TestRTC(t *testing.T) {
	now := time.Date(2031, time.December, 28, 23, 59, 47, 999, time.FixedZone("", -3600)) // the 29th in UTC
	r := NewRTC(func() time.Time { return now })
	get := func(reg byte) byte {
		r.Write(0, []byte{reg})
		p := []byte{0}
		r.Read(1, p)
		return p[0]
	}
	put := func(reg, v byte) { r.Write(0, []byte{reg, v}) } // one word: index and data
	clock := []byte{rtcSeconds, rtcMinutes, rtcHours, rtcWeekday, rtcDay, rtcMonth, rtcYear, rtcCentury}
	want := func(what string, values ...byte) {
		t.Helper()
		var got []byte
		for _, reg := range clock {
			got = append(got, get(reg))
		}
		if !slices.Equal(got, values) {
			t.Errorf("%s: % x, want % x", what, got, values)
		}
	}
	want("BCD", 0x47, 0x59, 0x00, 0x02, 0x29, 0x12, 0x31, 0x20)
	for _, reg := range clock {
		put(reg, 0x11)
	}
	want("it cannot be set", 0x47, 0x59, 0x00, 0x02, 0x29, 0x12, 0x31, 0x20)
	put(rtcB, rtcBBinary)
	want("binary", 47, 59, 0, 2, 29, 12, 31, 20)
	if get(rtcB)&rtcB24Hour == 0 {
		t.Error("12-hour mode: Linux gives up on it")
	}
	now = now.Add(12*time.Hour + time.Second)
	want("binary, later", 48, 59, 12, 2, 29, 12, 31, 20)

	put(rtcA, 0xff)
	for reg, v := range map[byte]byte{rtcA: 0x7f, rtcC: 0, rtcD: rtcDValid} {
		put(rtcC, 0xff)
		put(rtcD, 0)
		if got := get(reg); got != v {
			t.Errorf("register %#x is %#x, want %#x", reg, got, v)
		}
	}
	for _, reg := range []byte{0x01, 0x0f, 0x31, 0x33, 0x7f} { // an alarm and NVRAM
		put(reg, reg^0x55)
	}
	for _, reg := range []byte{0x01, 0x0f, 0x31, 0x33, 0x7f} {
		if got := get(reg | 0x80); got != reg^0x55 { // bit 7 is the NMI mask
			t.Errorf("NVRAM %#x is %#x", reg, got)
		}
	}
	p := make([]byte, 4)
	r.Write(1, []byte{0xaa, 0xbb, 0xcc})
	if r.Read(0, p); !bytes.Equal(p, []byte{0xff, 0xaa, 0xff, 0xff}) {
		t.Errorf("wide read: % x", p)
	}
}

// All devices take accesses from several vCPUs at once, of any width.
func TestConcurrentAccess(t *testing.T) {
	pm, ports, _, _ := newPM(t)
	pm.power = Power{Reset: func() {}, Off: func() {}}
	apic := NewIOAPIC(&lapics{refuse: true}, 24)
	u := newUART(t)
	u.Serial.irq = apic.Line(COM1Pin)
	for i, d := range []devices.BusDevice{u, apic, NewRTC(time.Now)} {
		if err := ports.Insert(devices.Range{Base: uint64(0x2000 * (i + 1)), Size: 0x1000}, "dev", d); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for id := range 3 {
		wg.Go(func() {
			for i := range uint64(3000) {
				base := [...]uint64{0x2000, 0x4000, 0x6000, 0x600, 0x610}[i%5]
				p := bytes.Repeat([]byte{byte(i >> 3)}, int(i)%9)
				ports.Write(base+i%23, p)
				ports.Read(base+i%29, p)
				if id == 0 {
					pm.PowerButton()
					apic.EOI(byte(i))
				}
			}
		})
	}
	wg.Wait()
}
