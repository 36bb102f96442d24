package qmp

import (
	"encoding/json"
	"time"
)

// Event is something that happened: QEMU's qmp-spec, "Asynchronous events".
type Event struct {
	Seq  uint64    // 1 for the first event of the process, without gaps; 0 is not shown
	Time time.Time // host's wall clock
	Name string    // upper case, such as RESUME
	Data any       // nil or something that marshals to a JSON object
}

// MarshalJSON renders the event as QMP does, with its number as "seq" unless that is 0.
func (e Event) MarshalJSON() ([]byte, error) {
	type stamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	}
	return json.Marshal(struct {
		Timestamp stamp  `json:"timestamp"`
		Event     string `json:"event"`
		Data      any    `json:"data,omitempty"`
		Seq       uint64 `json:"seq,omitempty"`
	}{stamp{e.Time.Unix(), int64(e.Time.Nanosecond() / 1000)}, e.Name, e.Data, e.Seq})
}

// EventType says that there are events of that name.
type EventType struct {
	Name string
	Data any // a value of the type that Event.Data has
}

// EventSource keeps the events of the last while.
type EventSource interface {
	// Poll returns the events from number seq on that it still has, the number of the
	// next one that will happen, and a channel that is closed when it has; nil if there
	// will be none.
	Poll(seq uint64) (events []Event, next uint64, more <-chan struct{})
}
