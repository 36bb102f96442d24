package vmm

import (
	"context"
	"encoding/json"
	"io"
	"iter"
	"sync"
	"time"
)

// Event is something that happened to the machine. Its JSON form is QMP's (QEMU's
// qmp-spec, 2.4.2 "Asynchronous events") plus the sequence number.
type Event struct {
	Seq  uint64    // 1 for the first event of the process, without gaps
	Time time.Time // host's wall clock
	Name string    // upper case, such as RESUME
	Data any       // nil or something that marshals to a JSON object
}

// MarshalJSON renders the event as QMP does.
func (e Event) MarshalJSON() ([]byte, error) {
	type stamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	}
	return json.Marshal(struct {
		Timestamp stamp  `json:"timestamp"`
		Event     string `json:"event"`
		Data      any    `json:"data,omitempty"`
		Seq       uint64 `json:"seq"`
	}{stamp{e.Time.Unix(), int64(e.Time.Nanosecond() / 1000)}, e.Name, e.Data, e.Seq})
}

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
	b.recent = append(b.recent, Event{b.seq, time.Now(), name, data})
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

// Since yields every event from sequence number seq on, the ones of the past first, and
// waits for more until the bus is closed or ctx is done. A gap in the numbers means that
// the reader was too slow.
func (b *EventBus) Since(ctx context.Context, seq uint64) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		for {
			b.mu.Lock()
			more, closed := b.more, b.closed
			var batch []Event
			for i, e := range b.recent {
				if e.Seq >= seq {
					batch = b.recent[i:len(b.recent):len(b.recent)]
					break
				}
			}
			b.mu.Unlock()
			for _, e := range batch {
				if !yield(e) {
					return
				}
				seq = e.Seq + 1
			}
			if len(batch) > 0 {
				continue
			}
			if closed {
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
