package chipset

import (
	"sync"
	"time"
)

// RTCPorts is how many I/O ports the RTC decodes.
const RTCPorts = 2

// Registers and bits, MC146818 data sheet, figures 12 to 16; the century's place is a
// convention that the FADT states.
const (
	rtcSeconds = 0x00
	rtcMinutes = 0x02
	rtcHours   = 0x04
	rtcWeekday = 0x06 // 1 is Sunday
	rtcDay     = 0x07
	rtcMonth   = 0x08
	rtcYear    = 0x09
	rtcA       = 0x0a
	rtcB       = 0x0b
	rtcC       = 0x0c // interrupt flags, none of them ever set
	rtcD       = 0x0d
	rtcCentury = 0x32

	rtcAUIP     = 1 << 7
	rtcADefault = 0x26 // 32768 Hz time base, 1024 Hz periodic rate
	rtcB24Hour  = 1 << 1
	rtcBBinary  = 1 << 2
	rtcBSet     = 1 << 7
	rtcDValid   = 1 << 7
	rtcHoursPM  = 1 << 7
)

// RTC is an MC146818 clock in UTC with its NVRAM. An update takes no time, so update in
// progress is never set. It has no interrupt: alarms are stored and never fire.
type RTC struct {
	now func() time.Time

	mu     sync.Mutex
	offset time.Duration // what the guest has set the clock ahead of now
	index  byte
	ram    [128]byte // time registers are current only while the guest sets the time
}

// NewRTC returns a clock that shows now.
func NewRTC(now func() time.Time) *RTC {
	r := &RTC{now: now}
	r.ram[rtcA], r.ram[rtcB], r.ram[rtcD] = rtcADefault, rtcB24Hour, rtcDValid
	return r
}

// Read implements devices.BusDevice. The index register is write-only.
func (r *RTC) Read(off uint64, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	readBytes(off, p, func(reg uint64) byte {
		if reg != 1 {
			return 0xff
		}
		if isTime(r.index) && r.ram[rtcB]&rtcBSet == 0 {
			r.latch()
		}
		return r.ram[r.index]
	})
}

// Write implements devices.BusDevice.
func (r *RTC) Write(off uint64, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	writeBytes(off, p, func(reg uint64, v byte) {
		switch reg {
		case 0:
			r.index = v & 0x7f // bit 7 masks NMIs on a PC
		case 1:
			r.write(r.index, v)
		}
	})
}

func (r *RTC) write(reg, v byte) {
	set := r.ram[rtcB]&rtcBSet != 0
	switch {
	case reg == rtcA:
		r.ram[reg] = v &^ rtcAUIP
	case reg == rtcB:
		if !set && v&rtcBSet != 0 {
			r.latch()
		}
		r.ram[reg] = v
		if set && v&rtcBSet == 0 {
			r.adjust()
		}
	case reg == rtcC, reg == rtcD:
	case isTime(reg) && !set:
		r.latch()
		r.ram[reg] = v
		r.adjust()
	default:
		r.ram[reg] = v
	}
}

func isTime(reg byte) bool {
	switch reg {
	case rtcSeconds, rtcMinutes, rtcHours, rtcWeekday, rtcDay, rtcMonth, rtcYear, rtcCentury:
		return true
	}
	return false
}

// latch copies the time to the registers.
func (r *RTC) latch() {
	t := r.now().Add(r.offset).UTC()
	hour, pm := t.Hour(), byte(0)
	if r.ram[rtcB]&rtcB24Hour == 0 {
		if hour >= 12 {
			pm = rtcHoursPM
		}
		hour = (hour+11)%12 + 1
	}
	r.ram[rtcSeconds] = r.encode(t.Second())
	r.ram[rtcMinutes] = r.encode(t.Minute())
	r.ram[rtcHours] = r.encode(hour) | pm
	r.ram[rtcWeekday] = r.encode(int(t.Weekday()) + 1)
	r.ram[rtcDay] = r.encode(t.Day())
	r.ram[rtcMonth] = r.encode(int(t.Month()))
	r.ram[rtcYear] = r.encode(t.Year() % 100)
	r.ram[rtcCentury] = r.encode(t.Year() / 100)
}

// adjust sets the clock to the registers. Values out of range carry over.
func (r *RTC) adjust() {
	hours := r.ram[rtcHours]
	hour := r.decode(hours)
	if r.ram[rtcB]&rtcB24Hour == 0 {
		hour = r.decode(hours&^rtcHoursPM) % 12
		if hours&rtcHoursPM != 0 {
			hour += 12
		}
	}
	t := time.Date(r.decode(r.ram[rtcCentury])*100+r.decode(r.ram[rtcYear]),
		time.Month(r.decode(r.ram[rtcMonth])), r.decode(r.ram[rtcDay]),
		hour, r.decode(r.ram[rtcMinutes]), r.decode(r.ram[rtcSeconds]), 0, time.UTC)
	r.offset = t.Sub(r.now())
}

func (r *RTC) encode(v int) byte {
	if r.ram[rtcB]&rtcBBinary != 0 {
		return byte(v)
	}
	return byte(v/10<<4 | v%10)
}

func (r *RTC) decode(v byte) int {
	if r.ram[rtcB]&rtcBBinary != 0 {
		return int(v)
	}
	return int(v>>4)*10 + int(v&0x0f)
}
