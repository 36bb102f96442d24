package virtio

import (
	"runtime"
	"sync/atomic"
	"time"
)

// notifyEvery is how many chains a busy worker completes before it tells the driver, so
// that the guest works on the first ones while the device works on the next.
const notifyEvery = 8

// How a worker gathers: it waits for the next chain of a batch up to twice as long as the
// driver takes to make one, and tries now and then whether one more would come.
const (
	gatherLimit  = time.Millisecond
	gatherSmooth = 8   // weight of the past in the driver's time
	gatherMore   = 32  // batches from one try to the next,
	gatherFirst  = 128 // and as long as a batch is one chain
)

// Worker is a goroutine that serves one queue.
type Worker struct {
	q        *Queue
	failed   func(error)
	stopping atomic.Bool
	stop     chan struct{} // closed by Stop
	done     chan struct{} // closed when the goroutine has ended
	taken    int           // chains since the last Notify

	gathers  bool
	batch    int           // how many chains the driver has under way at once, as far as is known
	untilTry int           // batches that are left before the next try
	told     time.Time     // when the driver was told last; zero once it has answered
	turn     time.Duration // that it takes to answer with a chain, on average
}

// Go starts run in a goroutine, which takes chains with Next until that returns nil.
// Failed is told when the queue is broken.
func (q *Queue) Go(failed func(error), run func(*Worker)) *Worker {
	w := &Worker{q: q, failed: failed, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		run(w)
		q.Notify()
	}()
	return w
}

// Next waits for a chain. It is nil when the worker has to end: it was stopped or the queue
// is broken. Chains pushed before are notified at the latest before Next waits. Only the
// worker's own goroutine may call it.
func (w *Worker) Next() *Chain {
	for !w.stopping.Load() {
		c, err := w.q.Pop()
		switch {
		case err != nil:
			w.failed(err)
			return nil
		case c != nil:
			w.answered()
			if w.taken++; w.taken > notifyEvery {
				w.taken = 1
				w.q.Notify()
			}
			return c
		}
		if w.gather() {
			continue
		}
		w.taken = 0
		w.q.Notify()
		if !w.q.EnableKicks() {
			if err := w.q.Kick.Wait(); err != nil {
				w.failed(err)
				return nil
			}
		}
		w.q.DisableKicks()
	}
	return nil
}

// Gather makes Next hold the notification of the first chains of a batch back until the last
// one has come, for a device whose work takes less time than the guest's exits: each request
// is done before the guest has made the next, so that each would cost it a kick and an
// interrupt. How many make a batch is learned: a chain that does not come in time makes the
// batch smaller, and it is one, for which nobody waits, with a driver that has one request
// under way at a time. To be called before the first Next.
func (w *Worker) Gather() { w.gathers = runtime.NumCPU() > 1 }

// gather waits for the rest of a batch and says whether more of it has come.
func (w *Worker) gather() bool {
	if !w.gathers || !w.q.unnotified() {
		return false
	}
	now := time.Now()
	want := w.batch
	if w.untilTry <= 0 {
		want++
	}
	if w.taken < min(want, notifyEvery) {
		for limit := min(2*w.turn, gatherLimit); time.Since(now) < limit; {
			if w.q.pending() != 0 || w.stopping.Load() {
				return true
			}
		}
		now = time.Now()
	}
	switch grown := w.taken > w.batch; {
	case grown:
		w.untilTry = 0
	case w.untilTry <= 0 && w.taken > 1:
		w.untilTry = gatherMore
	case w.untilTry <= 0:
		w.untilTry = gatherFirst
	default:
		w.untilTry--
	}
	w.batch, w.told = w.taken, now
	return false
}

// answered measures how long the driver took.
func (w *Worker) answered() {
	if !w.told.IsZero() {
		w.turn += (min(time.Since(w.told), gatherLimit) - w.turn) / gatherSmooth
		w.told = time.Time{}
	}
}

// Stopping is closed when Stop is called, for a worker that also waits for other things.
func (w *Worker) Stopping() <-chan struct{} { return w.stop }

// Stop ends the worker and waits until its goroutine has returned. It may be called once.
func (w *Worker) Stop() {
	w.stopping.Store(true)
	close(w.stop)
	w.q.Kick.Signal()
	<-w.done
}
