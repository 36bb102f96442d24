package vmm

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"baton/tests/tiny"
)

// A throttled vCPU idles, can be stopped meanwhile, and is as fast as before afterwards.
func TestThrottle(t *testing.T) {
	m := startWhole(t, "-kernel", tiny.Kernel(t, tiny.Say("a"), tiny.Spin))
	if _, err := m.serial.ReadByte(); err != nil {
		t.Fatal(err)
	}
	ticks := func() int { // of CPU time, in hundredths of a second: proc(5)
		stat, err := os.ReadFile("/proc/self/task/" + strconv.Itoa(int(m.vcpus[0].tid.Load())) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')'):]))
		user, _ := strconv.Atoi(fields[12])
		system, _ := strconv.Atoi(fields[13])
		return user + system
	}
	busy := func(d time.Duration) float64 {
		before, start := ticks(), time.Now()
		<-time.After(d)
		return float64(ticks()-before) / 100 / time.Since(start).Seconds()
	}
	throttle := func(percent int) { m.in(func() error { m.throttleVCPUs(percent); return nil }) }
	throttle(0)
	throttle(90)
	if got := busy(2 * time.Second); got > 0.4 {
		t.Errorf("throttled by 90 %%, it is busy for %.0f %% of the time", got*100)
	}
	throttle(99)
	for range 20 {
		start := time.Now()
		m.pause()
		if took := time.Since(start); took > 800*time.Millisecond { // a pause is a second long
			t.Errorf("stopping it took %v", took)
		}
		if m.goOn(); m.State() != StateRunning {
			t.Fatal(m.State())
		}
	}
	throttle(0)
	for end := time.Now().Add(30 * time.Second); busy(200*time.Millisecond) < 0.3; {
		if time.Now().After(end) {
			t.Fatal("it is still throttled")
		}
	}
}
