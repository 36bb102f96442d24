package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"sync"
)

// A Log collects text that arrives piece by piece, such as a serial console's, and wakes
// those who wait for something in it.
type Log struct {
	mu     sync.Mutex
	text   []byte
	more   chan struct{} // closed at each change, then replaced
	closed error
}

// NewLog returns an empty log.
func NewLog() *Log { return &Log{more: make(chan struct{})} }

// Write appends. It never fails.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	l.wake()
	return len(p), nil
}

// Close says that nothing will follow, and why.
func (l *Log) Close(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed == nil {
		l.closed = why
		l.wake()
	}
}

func (l *Log) wake() {
	close(l.more)
	l.more = make(chan struct{})
}

// String returns all text so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// Len is the position in the text, in bytes, from which a later Wait sees only what is new.
func (l *Log) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.text)
}

// Tail returns the last n lines.
func (l *Log) Tail(n int) string {
	lines := strings.Split(strings.TrimRight(l.String(), "\r\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Wait returns the first match, with its submatches, of the pattern at or after the
// position from. The pattern's ^ and $ are those of lines. It fails when ctx is done, or
// the log is closed, without a match.
func (l *Log) Wait(ctx context.Context, from int, pattern string) ([]string, error) {
	re, err := regexp.Compile("(?m)" + pattern)
	if err != nil {
		return nil, err
	}
	var match []string
	err = l.wait(ctx, func() bool {
		match = re.FindStringSubmatch(strings.ReplaceAll(string(l.text[min(from, len(l.text)):]), "\r\n", "\n"))
		return match != nil
	})
	if err != nil {
		return nil, fmt.Errorf("wait for %q: %w", pattern, err)
	}
	return match, nil
}

// wait calls found, with the lock held, now and at each change until it returns true.
func (l *Log) wait(ctx context.Context, found func() bool) error {
	for {
		l.mu.Lock()
		ok, more, closed := found(), l.more, l.closed
		l.mu.Unlock()
		if ok {
			return nil
		}
		if closed != nil {
			return closed
		}
		select {
		case <-more:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// An Event is one line of the VMM's event log: QMP's form and a sequence number.
type Event struct {
	Name      string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Seq       uint64          `json:"seq"`
	Timestamp struct {
		Seconds, Microseconds int64
	} `json:"timestamp"`
}

// Micros is the time of the event in microseconds since 1970, the host's wall clock.
func (e Event) Micros() int64 { return e.Timestamp.Seconds*1e6 + e.Timestamp.Microseconds }

// An EventLog is a Log of events.
type EventLog struct {
	Log
	events []Event
	parsed int // bytes of text
	broken error
}

// NewEventLog returns an empty event log.
func NewEventLog() *EventLog { return &EventLog{Log: Log{more: make(chan struct{})}} }

// Events returns those so far.
func (l *EventLog) Events() ([]Event, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.parse()
	return l.events, l.broken
}

// WaitEvent returns the first event of the name, and for which match (if not nil) holds,
// after the one numbered after.
func (l *EventLog) WaitEvent(ctx context.Context, after uint64, name string, match func(Event) bool) (Event, error) {
	var e Event
	err := l.wait(ctx, func() bool {
		l.parse()
		for _, e = range l.events {
			if e.Seq > after && e.Name == name && (match == nil || match(e)) {
				return true
			}
		}
		return l.broken != nil
	})
	if l.broken != nil {
		err = l.broken
	}
	if err != nil {
		return Event{}, fmt.Errorf("wait for event %s: %w", name, err)
	}
	return e, nil
}

// parse takes in the whole lines that have arrived; the lock is held.
func (l *EventLog) parse() {
	for l.broken == nil {
		line, _, whole := strings.Cut(string(l.text[l.parsed:]), "\n")
		if !whole {
			return
		}
		l.parsed += len(line) + 1
		var e Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			l.broken = fmt.Errorf("event log: %w in line %q", err, line)
			return
		}
		l.events = append(l.events, e)
	}
}
