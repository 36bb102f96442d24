package proto

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// client starts Serve on one end of a pipe and returns the other.
func client(t *testing.T, run func(context.Context, Request) Response) (send func(string), recv func() Response, end func() error) {
	t.Helper()
	host, guest := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(guest, run) }()
	if err := host.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	in := bufio.NewReader(host)
	send = func(s string) {
		t.Helper()
		if _, err := io.WriteString(host, s); err != nil {
			t.Fatal(err)
		}
	}
	recv = func() (r Response) {
		t.Helper()
		line, err := in.ReadBytes('\n')
		if err == nil {
			err = json.Unmarshal(line, &r)
		}
		if err != nil {
			t.Fatalf("answer %q: %v", line, err)
		}
		return r
	}
	end = func() error { host.Close(); return <-done }
	return send, recv, end
}

func echo(_ context.Context, r Request) Response {
	return Response{Stdout: strings.Join(r.Argv, " ") + r.Stdin}
}

func TestServe(t *testing.T) {
	send, recv, end := client(t, echo)
	for _, tc := range []struct {
		in   string
		want Response
	}{
		{`{"id":1,"argv":["a","b"],"stdin":"\nc"}`, Response{ID: 1, Stdout: "a b\nc"}},
		{"\n\r\n" + `{"id":-2,"argv":["x"]}`, Response{ID: -2, Stdout: "x"}},
		{`{"id":3,"argv":[]}`, Response{ID: 3, Exit: -1, Error: "request: argv is empty"}},
		{`{"id":4}`, Response{ID: 4, Exit: -1, Error: "request: argv is empty"}},
		{`junk`, Response{Exit: -1, Error: "request: invalid character 'j' looking for beginning of value"}},
		{`{"id":5,"argv":["after junk"]}`, Response{ID: 5, Stdout: "after junk"}},
	} {
		send(tc.in + "\n")
		if got := recv(); got.ID != tc.want.ID || got.Exit != tc.want.Exit || got.Stdout != tc.want.Stdout || got.Error != tc.want.Error {
			t.Errorf("%s: got %+v, want %+v", tc.in, got, tc.want)
		}
	}
	if err := end(); err != nil {
		t.Errorf("at the end: %v", err)
	}
}

// The first request is answered last, when the second one is through.
func TestServeConcurrently(t *testing.T) {
	second := make(chan struct{})
	send, recv, _ := client(t, func(ctx context.Context, r Request) Response {
		if r.Argv[0] == "second" {
			close(second)
		} else {
			<-second
		}
		return Response{}
	})
	send(`{"id":1,"argv":["first"]}` + "\n" + `{"id":2,"argv":["second"]}` + "\n")
	ids := []int64{recv().ID, recv().ID}
	slices.Sort(ids)
	if !slices.Equal(ids, []int64{1, 2}) {
		t.Errorf("answers to %v", ids)
	}
}

func TestServeTimeLimit(t *testing.T) {
	send, recv, _ := client(t, func(ctx context.Context, r Request) Response {
		if _, limited := ctx.Deadline(); !limited {
			return Response{Stdout: "no limit"}
		}
		<-ctx.Done()
		return Response{Error: ctx.Err().Error()}
	})
	send(`{"id":1,"argv":["x"],"timeout_ms":1}` + "\n")
	if r := recv(); r.Error != context.DeadlineExceeded.Error() {
		t.Errorf("with a limit: %+v", r)
	}
	send(`{"id":2,"argv":["x"]}` + "\n")
	if r := recv(); r.Stdout != "no limit" {
		t.Errorf("without: %+v", r)
	}
}

func TestServeAfter(t *testing.T) {
	after := make(chan struct{})
	send, recv, _ := client(t, func(context.Context, Request) Response {
		return Response{After: func() { close(after) }}
	})
	send(`{"id":1,"argv":["x"]}` + "\n")
	recv()
	select {
	case <-after:
	case <-time.After(20 * time.Second):
		t.Error("After was not called")
	}
}

// A line without end costs an error, not memory, and the next one is read.
func TestServeTooLong(t *testing.T) {
	send, recv, _ := client(t, echo)
	chunk := strings.Repeat("x", 1<<20)
	for range MaxLine>>20 + 1 {
		send(chunk)
	}
	send("\n")
	if r := recv(); r.Exit != -1 || !strings.Contains(r.Error, "longer than 16 MiB") {
		t.Errorf("got %+v", r)
	}
	send(`{"id":1,"argv":["next"]}` + "\n")
	if r := recv(); r.Stdout != "next" {
		t.Errorf("got %+v", r)
	}
}

type stream struct {
	io.Reader
	io.Writer
}

func FuzzServe(f *testing.F) {
	f.Add(`{"id":1,"argv":["a"],"timeout_ms":5}` + "\n\n{}\nx")
	f.Fuzz(func(t *testing.T, in string) {
		var out strings.Builder
		if err := Serve(stream{strings.NewReader(in), &out}, echo); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			var r Response
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Errorf("answer %q: %v", line, err)
			}
		}
	})
}
