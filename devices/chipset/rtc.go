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
	rtcDValid   = 1 << 7
)

// RTC is an MC146818 clock with its NVRAM. It shows UTC, in 24-hour mode, and cannot be
// set. An update takes no time, so update in progress is never set. There is no
// interrupt: alarms are stored and never fire.
type RTC struct {
	now func() time.Time

	mu    sync.Mutex
	index byte
	ram   [128]byte // what is not time
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
		if v, ok := r.time(); ok {
			return v
		}
		return r.ram[r.index]
	})
}

// time is the selected register if it is one of the time's.
func (r *RTC) time() (byte, bool) {
	var v int
	switch t := r.now().UTC(); r.index {
	case rtcSeconds:
		v = t.Second()
	case rtcMinutes:
		v = t.Minute()
	case rtcHours:
		v = t.Hour()
	case rtcWeekday:
		v = int(t.Weekday()) + 1
	case rtcDay:
		v = t.Day()
	case rtcMonth:
		v = int(t.Month())
	case rtcYear:
		v = t.Year() % 100
	case rtcCentury:
		v = t.Year() / 100
	default:
		return 0, false
	}
	if r.ram[rtcB]&rtcBBinary == 0 {
		v = v/10<<4 | v%10
	}
	return byte(v), true
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
			r.write(v)
		}
	})
}

func (r *RTC) write(v byte) {
	switch r.index {
	case rtcA:
		v &^= rtcAUIP
	case rtcB:
		v |= rtcB24Hour
	case rtcC, rtcD:
		return
	}
	r.ram[r.index] = v
}
