package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"
)

// A QMP is a client of a VMM's QMP socket. Every wait ends with the context of Dial.
type QMP struct {
	Events []QMPEvent // heard so far and not yet taken by WaitEvent

	t    testing.TB
	conn net.Conn
	in   *json.Decoder
}

// A QMPEvent is an event as it came.
type QMPEvent struct {
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp json.RawMessage `json:"timestamp"`
}

// A QMPError is what a command answered in place of a result.
type QMPError struct{ Class, Desc string }

func (e *QMPError) Error() string { return e.Class + ": " + e.Desc }

type qmpReply struct {
	QMPEvent
	Return json.RawMessage `json:"return"`
	Error  *QMPError       `json:"error"`
}

// DialQMP connects to a Unix socket that a VMM has opened, or is about to, and negotiates.
func DialQMP(t testing.TB, ctx context.Context, path string) *QMP {
	t.Helper()
	q := &QMP{t: t}
	must(t, "wait for "+path, waitFile(ctx, path))
	var err error
	for q.conn, err = net.Dial("unix", path); err != nil && ctx.Err() == nil; { // it is bound before it listens
		q.conn, err = net.Dial("unix", path)
	}
	must(t, "connect to "+path, err)
	t.Cleanup(func() { q.conn.Close() })
	context.AfterFunc(ctx, func() { q.conn.SetDeadline(time.Unix(1, 0)) })
	q.in = json.NewDecoder(q.conn)
	var greeting struct{ QMP json.RawMessage }
	must(t, "greeting", q.in.Decode(&greeting))
	q.Do("qmp_capabilities", nil)
	return q
}

// Execute runs a command. The error is a *QMPError, or the connection's.
func (q *QMP) Execute(command string, args any) (json.RawMessage, error) {
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	text, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	return q.Say(string(text))
}

// Say sends a text, without a newline, and returns the reply that follows.
func (q *QMP) Say(text string) (json.RawMessage, error) {
	if _, err := io.WriteString(q.conn, text); err != nil {
		return nil, err
	}
	for {
		r, err := q.next()
		switch {
		case err != nil:
			return nil, err
		case r.Error != nil:
			return nil, r.Error
		case r.Event == "":
			return r.Return, nil
		}
	}
}

func (q *QMP) next() (r qmpReply, err error) {
	if err = q.in.Decode(&r); err == nil && r.Event != "" {
		q.Events = append(q.Events, r.QMPEvent)
	}
	return r, err
}

// Do runs a command that has to succeed; else the test ends.
func (q *QMP) Do(command string, args any) json.RawMessage {
	q.t.Helper()
	result, err := q.Execute(command, args)
	must(q.t, command, err)
	return result
}

// Human runs a line of the human monitor.
func (q *QMP) Human(line string) (text string) {
	q.t.Helper()
	must(q.t, line, json.Unmarshal(q.Do("human-monitor-command", map[string]any{"command-line": line}), &text))
	return text
}

// WaitEvent returns the next event of one of the names and forgets it and those before.
func (q *QMP) WaitEvent(names ...string) QMPEvent {
	q.t.Helper()
	for {
		for i, e := range q.Events {
			if slices.Contains(names, e.Event) {
				q.Events = q.Events[i+1:]
				return e
			}
		}
		if r, err := q.next(); err != nil || r.Event == "" {
			q.t.Fatalf("wait for %v: got %s, %v", names, r.Return, err)
		}
	}
}

// WaitEnd waits until the VMM closes the connection.
func (q *QMP) WaitEnd() {
	q.t.Helper()
	for {
		if _, err := q.next(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			q.t.Fatal(fmt.Errorf("wait for the end: %w", err))
		}
	}
}
