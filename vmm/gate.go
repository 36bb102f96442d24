package vmm

import (
	"sync"
	"sync/atomic"
)

// gate stands before every entry into the guest. While it is closed no vCPU executes
// guest code; close returns only when that is so. While it is throttled they wait there, too,
// but nobody relies on it.
type gate struct {
	shut atomic.Bool // closed or throttled: what pass looks at first, without a lock

	mu        sync.Mutex
	change    sync.Cond // on mu: parked or shut changed
	parked    int
	total     int // vCPU threads that will come to the gate
	closed    bool
	throttled bool
	quit      bool
}

// newGate returns a closed gate for n vCPU threads.
func newGate(n int) *gate {
	g := &gate{total: n, closed: true}
	g.change.L = &g.mu
	g.shut.Store(true)
	return g
}

// pass is called by a vCPU's thread before it enters the guest. It waits while the gate is
// closed; false means that the thread is to end.
func (g *gate) pass() bool {
	if !g.shut.Load() {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.parked++
	g.change.Broadcast()
	for g.shut.Load() && !g.quit {
		g.change.Wait()
	}
	g.parked--
	return !g.quit
}

// set changes what keeps the vCPUs out; g.mu is held.
func (g *gate) set(closed, throttled bool) {
	g.closed, g.throttled = closed, throttled
	g.shut.Store(closed || throttled)
	g.change.Broadcast()
}

// hold closes the gate without waiting, so that a vCPU's own thread may call it: that
// vCPU executes nothing more of the guest. The others need a kick.
func (g *gate) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set(true, g.throttled)
}

// close closes the gate, calls kick, which must interrupt every vCPU, and waits until
// the last one stands before the gate.
func (g *gate) close(kick func()) {
	g.hold()
	kick()
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.parked < g.total {
		g.change.Wait()
	}
}

// open lets the vCPUs through, as far as they are not throttled.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set(false, g.throttled)
}

// throttle keeps the vCPUs out, or no longer. Those that are in need a kick.
func (g *gate) throttle(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set(g.closed, on)
}

// end makes pass return false for every thread, now and later. The gate must be closed.
func (g *gate) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.quit = true
	g.change.Broadcast()
}
