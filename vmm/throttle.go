package vmm

import (
	"sync/atomic"
	"time"
)

// throttleSlice is for how long the vCPUs run between two pauses: QEMU's
// CPU_THROTTLE_TIMESLICE_NS.
const throttleSlice = 10 * time.Millisecond

// throttle makes the vCPUs idle for a part of the time. Its zero value does not.
type throttle struct {
	percent atomic.Int32
	changed chan struct{} // wakes the goroutine, nil: there is none
}

// throttleVCPUs makes the vCPUs idle for so many percent of the time, 0 to 99. It runs in the
// main loop. A pause does not keep the gate from being closed.
func (m *Machine) throttleVCPUs(percent int) {
	t := &m.throttle
	t.percent.Store(int32(min(max(percent, 0), 99)))
	if t.changed == nil {
		if percent <= 0 {
			return
		}
		t.changed = make(chan struct{}, 1)
		go m.throttler(t.changed)
	}
	select {
	case t.changed <- struct{}{}:
	default:
	}
}

func (m *Machine) throttler(changed <-chan struct{}) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	defer m.gate.throttle(false)
	wait := func(d time.Duration) bool {
		timer.Reset(d)
		select {
		case <-timer.C:
			return true
		case <-changed:
			return true
		case <-m.ended:
			return false
		}
	}
	for {
		p := time.Duration(m.throttle.percent.Load())
		if p == 0 { // until there is something to do again
			select {
			case <-changed:
				continue
			case <-m.ended:
				return
			}
		}
		m.gate.throttle(true)
		for _, c := range m.vcpus {
			c.Kick()
		}
		ok := wait(throttleSlice * p / (100 - p))
		m.gate.throttle(false)
		if !ok || !wait(throttleSlice) {
			return
		}
	}
}
