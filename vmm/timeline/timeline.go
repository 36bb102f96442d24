// Package timeline draws what two machines said while a guest went from one to the other, with
// what a peer saw of its network, as one page of HTML that needs nothing else: it can be read on
// a phone and printed.
package timeline

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Event is one line of an event log.
type Event struct {
	Time float64 // seconds since 1970
	Name string
	Data map[string]any
}

// text is a member of the data that is a string.
func (e *Event) text(key string) string { s, _ := e.Data[key].(string); return s }

// Side is one machine.
type Side struct {
	Name   string
	Events []Event
}

// Series is what somebody measured meanwhile.
type Series struct {
	Name   string // with its unit, such as "ping, ms"
	Points []Point
}

// Point is one value; NaN is one that did not come, such as the answer to a ping.
type Point struct{ Time, Value float64 }

// Limits of what is read: a log may be of a machine that has run for months.
const (
	maxEvents = 100_000
	maxPoints = 1_000_000
	maxLine   = 1 << 20
	lastTime  = 1e11 // seconds since 1970
)

// lines calls f for each line that is not empty, up to max of them.
func lines(in io.Reader, max int, f func(line []byte) error) error {
	s := bufio.NewScanner(in)
	s.Buffer(nil, maxLine)
	n := 0
	for at := 1; s.Scan(); at++ {
		line := bytes.TrimSpace(s.Bytes())
		if len(line) == 0 {
			continue
		}
		if n++; n > max {
			return fmt.Errorf("more than %d lines", max)
		}
		if err := f(line); err != nil {
			return fmt.Errorf("line %d: %w", at, err)
		}
	}
	return s.Err()
}

// ReadEvents reads an event log: a line of JSON each, as -event-log and QMP write them.
func ReadEvents(in io.Reader) (events []Event, err error) {
	err = lines(in, maxEvents, func(line []byte) error {
		var e struct {
			Event     string
			Data      map[string]any
			Timestamp struct{ Seconds, Microseconds float64 }
		}
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("not an event: %w", err)
		}
		at := e.Timestamp.Seconds + e.Timestamp.Microseconds/1e6
		if e.Event == "" { // it is a reply
			return nil
		}
		if at < 0 || at > lastTime {
			return fmt.Errorf("%g s since 1970 is no time of these days", at)
		}
		events = append(events, Event{at, e.Event, e.Data})
		return nil
	})
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.Time, b.Time) })
	return events, err
}

// ReadPoints reads a series: lines of TIME,VALUE with the time in seconds since 1970; an empty
// value is one that did not come.
func ReadPoints(in io.Reader) (points []Point, err error) {
	err = lines(in, maxPoints, func(line []byte) error {
		first, second, ok := strings.Cut(string(line), ",")
		at, err := strconv.ParseFloat(first, 64)
		if !ok || err != nil || !(at >= 0 && at <= lastTime) {
			return fmt.Errorf("%q: want TIME,VALUE", line)
		}
		value := math.NaN()
		if second != "" {
			if value, err = strconv.ParseFloat(second, 64); err != nil || math.IsInf(value, 0) {
				return fmt.Errorf("%q: want TIME,VALUE", line)
			}
		}
		points = append(points, Point{at, value})
		return nil
	})
	slices.SortStableFunc(points, func(a, b Point) int { return cmp.Compare(a.Time, b.Time) })
	return points, err
}

// Phase is a part of a guest's way, in seconds.
type Phase struct {
	Name     string
	From, To float64
}

// Phases are those that the events of a source and a target tell of, in order of their
// beginning.
func Phases(source, target []Event) (list []Phase) {
	status := func(events []Event, value string) float64 {
		return last(events, func(e *Event) bool { return e.Name == "MIGRATION" && e.text("status") == value })
	}
	state := func(events []Event, value string) float64 {
		return last(events, func(e *Event) bool { return e.Name == "FAILOVER_STATE" && e.text("state") == value })
	}
	named := func(events []Event, name string) float64 {
		return last(events, func(e *Event) bool { return e.Name == name })
	}
	add := func(name string, from, to float64) {
		if from <= to { // not NaN
			list = append(list, Phase{name, from, to})
		}
	}
	stop, resume := named(source, "STOP"), named(target, "RESUME")
	unplug := named(source, "UNPLUG_PRIMARY")
	away := state(source, "standby")
	if math.IsNaN(away) {
		away = status(source, "active")
	}
	add("primary taken away", unplug, away)
	add("RAM", status(source, "active"), stop)
	add("stop to resume", stop, resume)
	add("primary plugged", state(target, "plugging"), state(target, "primary"))
	add("all of it", status(source, "setup"), max(resume, orZero(state(target, "primary"))))
	slices.SortStableFunc(list, func(a, b Phase) int { return cmp.Compare(a.From, b.From) })
	return list
}

func orZero(f float64) float64 {
	if math.IsNaN(f) {
		return 0
	}
	return f
}

// last is the time of the last event that is one of those, NaN if there is none.
func last(events []Event, is func(*Event) bool) float64 {
	for i := range slices.Backward(events) {
		if is(&events[i]) {
			return events[i].Time
		}
	}
	return math.NaN()
}

// window is the time of the last migration, or failover, with a little before and after.
func window(sides []Side) (from, to float64) {
	from, to = math.NaN(), math.Inf(-1)
	first := math.Inf(1)
	for _, s := range sides {
		if n := len(s.Events); n > 0 {
			first, to = min(first, s.Events[0].Time), max(to, s.Events[n-1].Time)
		}
	}
	if len(sides) > 0 {
		from = last(sides[0].Events, func(e *Event) bool { return e.Name == "MIGRATION" && e.text("status") == "setup" })
		if math.IsNaN(from) {
			from = last(sides[0].Events, func(e *Event) bool { return e.Name == "FAILOVER_STATE" && e.text("state") == "unplugging" })
		}
	}
	if math.IsNaN(from) {
		from = first
	}
	if to < from || math.IsInf(from, 0) {
		return 0, 1
	}
	pad := max((to-from)/20, 0.05)
	return from - pad, to + pad
}
