package vmm

import (
	"context"
	"encoding/json"
	"io"
	"iter"
	"sync"
	"time"

	"baton/vmm/qmp"
)

// Event is something that happened to the machine.
type Event = qmp.Event

// eventHistory is how many events a reader may lag behind before it misses some.
const eventHistory = 4096

// EventBus carries the machine's events to whoever reads them: monitors, the event log,
// progress lines, tests. Publish never waits for a reader.
type EventBus struct {
	mu     sync.Mutex
	recent []Event
	seq    uint64
	more   chan struct{} // closed when an event is added, then replaced
	closed bool
}

// NewEventBus returns a bus without events.
func NewEventBus() *EventBus { return &EventBus{more: make(chan struct{})} }

// Publish adds an event and wakes the readers.
func (b *EventBus) Publish(name string, data any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	b.seq++
	b.recent = append(b.recent, Event{Seq: b.seq, Time: time.Now(), Name: name, Data: data})
	if len(b.recent) > eventHistory {
		b.recent = append([]Event(nil), b.recent[len(b.recent)-eventHistory/2:]...)
	}
	close(b.more)
	b.more = make(chan struct{})
}

// Close ends every reader once it has seen the last event.
func (b *EventBus) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.closed = true
		close(b.more)
	}
}

// Poll is qmp.EventSource: it does not wait.
func (b *EventBus) Poll(seq uint64) (events []Event, next uint64, more <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, e := range b.recent {
		if e.Seq >= seq {
			events = b.recent[i:len(b.recent):len(b.recent)]
			break
		}
	}
	if !b.closed {
		more = b.more
	}
	return events, b.seq + 1, more
}

// Since yields every event from sequence number seq on, the ones of the past first, and
// waits for more until the bus is closed or ctx is done. A gap in the numbers means that
// the reader was too slow.
func (b *EventBus) Since(ctx context.Context, seq uint64) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		for {
			events, next, more := b.Poll(seq)
			for _, e := range events {
				if !yield(e) {
					return
				}
			}
			if seq = next; more == nil {
				return
			}
			select {
			case <-more:
			case <-ctx.Done():
				return
			}
		}
	}
}

// LogTo writes every event as one line of JSON until the bus is closed.
func (b *EventBus) LogTo(w io.Writer) error {
	enc := json.NewEncoder(w)
	for e := range b.Since(context.Background(), 1) {
		if err := enc.Encode(e); err != nil {
			return err
		}
	}
	return nil
}
