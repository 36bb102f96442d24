package virtio

import "sync/atomic"

// notifyEvery is how many chains a busy worker completes before it tells the driver, so
// that the guest works on the first ones while the device works on the next.
const notifyEvery = 8

// Worker is a goroutine that serves one queue.
type Worker struct {
	q        *Queue
	failed   func(error)
	stopping atomic.Bool
	stop     chan struct{} // closed by Stop
	done     chan struct{} // closed when the goroutine has ended
	taken    int           // chains since the last Notify
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
			if w.taken++; w.taken > notifyEvery {
				w.taken = 1
				w.q.Notify()
			}
			return c
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

// Stopping is closed when Stop is called, for a worker that also waits for other things.
func (w *Worker) Stopping() <-chan struct{} { return w.stop }

// Stop ends the worker and waits until its goroutine has returned. It may be called once.
func (w *Worker) Stop() {
	w.stopping.Store(true)
	close(w.stop)
	w.q.Kick.Signal()
	<-w.done
}
