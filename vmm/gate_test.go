package vmm

import "testing"

// A pause that throttles neither keeps the gate from being closed nor opens one that is.
func TestGate(t *testing.T) {
	g := newGate(1)
	passed := make(chan bool)
	go func() {
		for g.pass() {
			passed <- true
		}
		close(passed)
	}()
	kicks := 0
	g.throttle(true)
	g.open()
	select {
	case <-passed:
		t.Fatal("throttled, and a vCPU passes")
	default:
	}
	g.throttle(false)
	<-passed
	g.throttle(true)
	done := make(chan bool)
	go func() { g.close(func() { kicks++ }); close(done) }()
	for open := true; open; { // what it is in the middle of
		select {
		case <-passed:
		case <-done:
			open = false
		}
	}
	g.throttle(false)
	select {
	case <-passed:
		t.Fatal("closed, and a vCPU passes")
	default:
	}
	g.open()
	<-passed
	go g.close(func() {})
	go func() {
		for range passed {
		}
	}()
	g.close(func() {})
	g.end()
	if kicks != 1 {
		t.Errorf("%d kicks", kicks)
	}
}
