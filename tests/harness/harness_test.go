package harness

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain lets this binary stand in for a VMM: FAKE_VMM says what it does.
func TestMain(m *testing.M) {
	if mode := os.Getenv("FAKE_VMM"); mode != "" {
		fakeVMM(mode)
	}
	os.Exit(m.Run())
}

// fakeVMM takes the options that Start adds, boots at once, and serves an agent that
// answers with its own arguments, the second request before the first.
func fakeVMM(mode string) {
	var agent net.Conn
	var events *os.File
	for i, a := range os.Args {
		var err error
		switch a {
		case "-event-log":
			events, err = os.OpenFile(os.Args[i+1], os.O_WRONLY, 0)
		case "-chardev":
			_, path, _ := strings.Cut(os.Args[i+1], "path=")
			agent, err = net.Dial("unix", path)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "fake:", err)
			os.Exit(9)
		}
	}
	fmt.Print("Linux version 6.12\r\nlogin: ")
	switch mode {
	case "exit":
		fmt.Fprintln(os.Stderr, "fake: no kernel")
		os.Exit(3)
	case "events":
		fmt.Fprintln(events, `{"event":"RESUME","seq":1,"timestamp":{"seconds":5,"microseconds":7}}`)
		fmt.Fprintln(events, `{"event":"STOP","seq":2,"data":{"why":"test"}}`)
		fmt.Fprintln(events, `{"event":"STOP","seq":3,"data":{"why":"again"}}`)
	case "broken-events":
		fmt.Fprintln(events, `{"event":`)
	case "echo":
		line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
		fmt.Printf("got %s\n", line)
	case "agent":
		serveFakeAgent(agent)
	}
	select {}
}

func serveFakeAgent(conn net.Conn) {
	dec, enc := json.NewDecoder(conn), json.NewEncoder(conn)
	var held *agentRequest
	for {
		var r agentRequest
		if dec.Decode(&r) != nil {
			os.Exit(0)
		}
		switch r.Argv[0] {
		case "hold":
			held = &r
		case "never":
		case "gone":
			os.Exit(4)
		default:
			enc.Encode(agentResponse{ID: r.ID, Exit: len(r.Argv) - 1, Stdout: strings.Join(r.Argv, " "), Error: map[bool]string{true: "no such file"}[r.Argv[0] == "missing"]})
			if held != nil {
				enc.Encode(agentResponse{ID: held.ID, Stdout: "held"})
				held = nil
			}
		}
	}
}

func startFake(t *testing.T, mode string) *Guest {
	t.Helper()
	t.Setenv("FAKE_VMM", mode)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Start(t, GuestConfig{VMM: self})
}

func TestGuestSerial(t *testing.T) {
	g := startFake(t, "echo")
	ctx := Context(t, 20*time.Second)
	if m := g.WaitSerial(ctx, `^Linux version (\S+)$`); m[1] != "6.12" {
		t.Errorf("match %q", m)
	}
	g.WaitSerial(ctx, "^login: ") // a line without an end
	g.Type("root\n")
	g.WaitSerial(ctx, "got root")
	g.Signal(syscall.SIGTERM)
	if code := g.Wait(ctx); code != -1 {
		t.Errorf("exit code %d after a signal", code)
	}
}

func TestGuestThatEnds(t *testing.T) {
	g := startFake(t, "exit")
	ctx := Context(t, 20*time.Second)
	if code := g.Wait(ctx); code != 3 {
		t.Errorf("exit code %d", code)
	}
	if s := g.Stderr.String(); s != "fake: no kernel\n" {
		t.Errorf("stderr %q", s)
	}
	// Whoever waits for more is told at once that nothing will come.
	if _, err := g.Serial.Wait(ctx, 0, "never"); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("serial: %v", err)
	}
	if _, err := g.Events.WaitEvent(ctx, 0, "RESUME", nil); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("events: %v", err)
	}
}

func TestGuestEvents(t *testing.T) {
	g := startFake(t, "events")
	ctx := Context(t, 20*time.Second)
	if e := g.WaitEvent(ctx, "STOP"); e.Seq != 2 || string(e.Data) != `{"why":"test"}` {
		t.Errorf("event %+v", e)
	}
	if e := g.WaitEvent(ctx, "RESUME"); e.Micros() != 5000007 {
		t.Errorf("time %d", e.Micros())
	}
	e, err := g.Events.WaitEvent(ctx, 2, "STOP", func(e Event) bool { return strings.Contains(string(e.Data), "again") })
	if err != nil || e.Seq != 3 {
		t.Errorf("%+v, %v", e, err)
	}
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if _, err := g.Events.WaitEvent(short, 3, "STOP", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("past the last event: %v", err)
	}
}

func TestGuestBrokenEvents(t *testing.T) {
	g := startFake(t, "broken-events")
	if _, err := g.Events.WaitEvent(Context(t, 20*time.Second), 0, "X", nil); err == nil || !strings.Contains(err.Error(), "in line") {
		t.Errorf("%v", err)
	}
}

func TestGuestAgent(t *testing.T) {
	g := startFake(t, "agent")
	ctx := Context(t, 20*time.Second)
	if out := g.Output(ctx, "uname"); out != "uname" {
		t.Errorf("output %q", out)
	}
	if r, err := g.Run(ctx, "false", "x"); err != nil || r.Exit != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := g.Run(ctx, "missing"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%v", err)
	}

	// Answers in another order than the requests find their way.
	held := make(chan Result)
	go func() {
		r, _ := g.Run(ctx, "hold")
		held <- r
	}()
	for r, more := (Result{}), true; more; {
		if out := g.Output(ctx, "next"); out != "next" {
			t.Fatalf("output %q", out)
		}
		select {
		case r = <-held:
			more = false
			if r.Stdout != "held" {
				t.Errorf("held answer %+v", r)
			}
		default: // "hold" may not be sent yet
		}
	}

	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := g.Run(short, "never"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if _, err := g.Run(ctx, "gone"); err == nil {
		t.Error("no error when the guest is gone")
	}
	if _, err := g.Run(ctx, "uname"); err == nil {
		t.Error("no error after the guest is gone")
	}
}

func TestKillEndsWhatWasStarted(t *testing.T) {
	g := startFake(t, "echo")
	g.Kill()
	if err := syscall.Kill(g.PID(), 0); err != syscall.ESRCH {
		t.Errorf("the VMM's process: %v", err)
	}
	g.Kill() // again is harmless
}

func TestLogPositions(t *testing.T) {
	l := NewLog()
	fmt.Fprint(l, "one\ntwo\n")
	ctx := Context(t, 20*time.Second)
	from := l.Len()
	done := make(chan error)
	go func() {
		_, err := l.Wait(ctx, from, "^t")
		done <- err
	}()
	fmt.Fprint(l, "three\n")
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := l.Tail(2); got != "two\nthree" {
		t.Errorf("tail %q", got)
	}
	if _, err := l.Wait(ctx, 0, "("); err == nil {
		t.Error("a bad pattern is no error")
	}
	l.Close(errors.New("over"))
	if _, err := l.Wait(ctx, from, "^t"); err != nil {
		t.Errorf("what is there is found after the end: %v", err)
	}
}
