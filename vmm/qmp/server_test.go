package qmp

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const patience = 20 * time.Second

// bus is an EventSource that keeps the last eight events.
type bus struct {
	mu     sync.Mutex
	events []Event
	more   chan struct{}
}

func (b *bus) Poll(seq uint64) ([]Event, uint64, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := uint64(len(b.events) + 1)
	if seq >= next {
		return nil, next, b.more
	}
	return b.events[max(int(seq)-1, len(b.events)-8):], next, b.more
}

func (b *bus) publish(name string, data any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = append(b.events, Event{uint64(len(b.events) + 1), time.UnixMicro(5_000_007), name, data})
	close(b.more)
	b.more = make(chan struct{})
}

type color string

func (color) Values() []string { return []string{"red", "green"} }

type inner struct {
	X int64  `json:"x"`
	Y *int64 `json:"y"`
}

type allArgs struct {
	Name string   `json:"name"`
	Up   bool     `json:"up"`
	N    int64    `json:"n,omitempty"`
	List []string `json:"list,omitempty"`
	In   *inner   `json:"in"`
	C    color    `json:"c,omitempty"`
	Any  any      `json:"any,omitempty"`
}

type restArgs struct {
	Driver string `json:"driver"`
	Rest   Rest
}

// rig is a server with a few commands.
type rig struct {
	*Server
	bus
	quit chan struct{}
}

func newRig(t *testing.T) *rig {
	t.Helper()
	g := &rig{quit: make(chan struct{})}
	g.more = make(chan struct{})
	c := Config{
		Commands: []Command{
			New("echo", func(a allArgs) (allArgs, error) { return a, nil }),
			New("rest", func(a restArgs) (any, error) { return a.Rest, nil }),
			Query("stop", func() None { g.publish("STOP", nil); return None{} }),
			Query("big", func() string { return strings.Repeat("x", 1<<20) }),
			Query("nothing", func() []string { return nil }),
			New("fail", func(None) (None, error) { return None{}, errors.New("no luck\nhint: try again") }),
			New("nodevice", func(None) (None, error) { return None{}, fmt.Errorf("wrapped: %w", NoDevice("x")) }),
			Query("quit", func() None { close(g.quit); return None{} }),
		},
		EventTypes: []EventType{{"STOP", nil}, {"GONE", inner{}}},
		Events:     &g.bus,
		Do:         func(f func()) error { f(); return nil },
	}
	c.Version.QEMU.Major, c.Version.Package = 10, "test"
	g.Server = NewServer(c)
	t.Cleanup(func() { g.Server.Close() })
	return g
}

// client is one client of the rig.
type client struct {
	net.Conn
	t     *testing.T
	lines *bufio.Reader
}

func (g *rig) connect(t *testing.T) *client {
	t.Helper()
	ours, theirs := net.Pipe()
	go g.ServeConn(theirs)
	ours.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { ours.Close() })
	c := &client{ours, t, bufio.NewReader(ours)}
	c.hear(`{"QMP":{"version":{"qemu":{"micro":0,"minor":0,"major":10},"package":"test"},"capabilities":[]}}`)
	return c
}

func (g *rig) ready(t *testing.T) *client {
	t.Helper()
	c := g.connect(t)
	c.ask(`{"execute":"qmp_capabilities"}`, `{"return":{}}`)
	return c
}

func (c *client) say(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatalf("say %s: %v", text, err)
	}
}

func (c *client) line() string {
	c.t.Helper()
	line, err := c.lines.ReadString('\n')
	if err != nil {
		c.t.Fatalf("heard %q, then %v", line, err)
	}
	return strings.TrimSuffix(line, "\r\n")
}

func (c *client) hear(want string) {
	c.t.Helper()
	if got := c.line(); got != want {
		c.t.Fatalf("heard %s\nwant  %s", got, want)
	}
}

func (c *client) ask(request, want string) {
	c.t.Helper()
	c.say(request)
	c.hear(want)
}

func failure(class, desc string) string {
	text, _ := json.Marshal(reply{Error: &Error{class, desc}})
	return string(text)
}

const stopped = `{"timestamp":{"seconds":5,"microseconds":7},"event":"STOP"}`

func TestNegotiation(t *testing.T) {
	c := newRig(t).connect(t)
	c.ask(`{"execute":"stop"}`, failure(CommandNotFound, "Expecting capabilities negotiation with 'qmp_capabilities'"))
	c.ask(`{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}`, failure(GenericError, "Capability oob not available"))
	c.ask(`{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}`, failure(GenericError, "Parameter 'null' does not accept value 'x'"))
	c.ask(`{"execute":"qmp_capabilities","arguments":{"foo":1}}`, failure(GenericError, "Parameter 'foo' is unexpected"))
	c.ask(`{'execute':'qmp_capabilities','id':1.50}`, `{"return":{},"id":1.50}`)
	c.ask(`{"execute":"qmp_capabilities"}`, failure(CommandNotFound, "Capabilities negotiation is already complete, command ignored"))
}

func TestRequests(t *testing.T) {
	c := newRig(t).ready(t)
	input := func(desc string) string { return failure(GenericError, "QMP input "+desc) }
	param := func(desc string) string { return failure(GenericError, desc) }
	for _, r := range []struct{ request, want string }{
		{`[1]`, input("must be a JSON object")},
		{`42 `, input("must be a JSON object")},
		{`{"execute":"stop","arguments":1}`, input("member 'arguments' must be an object")},
		{`{"execute":"stop","arguments":null}`, input("member 'arguments' must be an object")},
		{`{"execute":1}`, input("member 'execute' must be a string")},
		{`{"execute":"stop","foo":1}`, input("member 'foo' is unexpected")},
		{`{"exec-oob":"stop"}`, input("member 'exec-oob' is unexpected")},
		{`{}`, input("lacks member 'execute'")},
		{`{"id":[1,null,{"a":"b"}]}`, `{"error":{"class":"GenericError","desc":"QMP input lacks member 'execute'"},"id":[1,null,{"a":"b"}]}`},
		{`{"execute":"nope","id":null}`, `{"error":{"class":"CommandNotFound","desc":"The command nope has not been found"},"id":null}`},
		{`{"execute" 1}`, param("JSON parse error, missing : in object pair")},
		{`{"execute":"stop","arguments":{"b":1,"a":1}}`, param("Parameter 'a' is unexpected")},
		{`{"execute":"nothing"}`, `{"return":[]}`},
		{`{"execute":"fail"}`, param("no luck\nhint: try again")},
		{`{"execute":"nodevice"}`, failure(DeviceNotFound, "Device 'x' not found")},
		{`{"execute":"echo"}`, param("Parameter 'name' is missing")},
		{`{"execute":"echo","arguments":{"name":1}}`, param("Invalid parameter type for 'name', expected: string")},
		{`{"execute":"echo","arguments":{"name":null}}`, param("Invalid parameter type for 'name', expected: string")},
		{`{"execute":"echo","arguments":{"name":"x"}}`, param("Parameter 'up' is missing")},
		{`{"execute":"echo","arguments":{"name":"x","up":"on"}}`, param("Invalid parameter type for 'up', expected: boolean")},
		{`{"execute":"echo","arguments":{"name":"x","up":true,"n":1.5}}`, param("Invalid parameter type for 'n', expected: integer")},
		{`{"execute":"echo","arguments":{"name":"x","up":true,"n":99999999999999999999}}`, param("Invalid parameter type for 'n', expected: integer")},
		{`{"execute":"echo","arguments":{"name":"x","up":true,"list":"a"}}`, param("Invalid parameter type for 'list', expected: array")},
		{`{"execute":"echo","arguments":{"name":"x","up":true,"list":["a",3]}}`, param("Invalid parameter type for 'list[1]', expected: string")},
		{`{"execute":"echo","arguments":{"name":"x","up":true,"in":3}}`, param("Invalid parameter type for 'in', expected: object")},
		{`{"execute":"echo","arguments":{"name":"x","up":true,"in":{}}}`, param("Parameter 'in.x' is missing")},
		{`{"execute":"echo","arguments":{"name":"x","up":true,"in":{"x":1,"z":2}}}`, param("Parameter 'in.z' is unexpected")},
		{`{"execute":"echo","arguments":{"name":"x","up":true,"c":"blue"}}`, param("Parameter 'c' does not accept value 'blue'")},
		{`{"execute":"echo","arguments":{"name":"x","up":true,"n":-1,"list":["a"],"in":{"x":1,"y":2},"c":"red","any":[1]}}`,
			`{"return":{"name":"x","up":true,"n":-1,"list":["a"],"in":{"x":1,"y":2},"c":"red","any":[1]}}`},
		{`{"execute":"rest","arguments":{"driver":"d","b":1,"a":"x"}}`, `{"return":{"a":"x","b":1}}`},
		{`{"execute":"query-version"}`, `{"return":{"qemu":{"micro":0,"minor":0,"major":10},"package":"test"}}`},
		{`{"execute":"query-events"}`, `{"return":[{"name":"STOP"},{"name":"GONE"}]}`},
	} {
		c.ask(r.request, r.want)
	}
	c.say(`{"execute":"query-commands"}{"execute":"nothing","id":2}`)
	if got := c.line(); !strings.HasPrefix(got, `{"return":[{"name":"big"},{"name":"echo"}`) || strings.Count(got, "name") != 13 {
		t.Errorf("query-commands: %s", got)
	}
	c.hear(`{"return":[],"id":2}`)
	c.say(`{"execute":"big"}`)
	if got := c.line(); len(got) != 1<<20+len(`{"return":""}`) {
		t.Errorf("a big reply has %d bytes", len(got))
	}
}

func TestSchema(t *testing.T) {
	c := newRig(t).ready(t)
	c.say(`{"execute":"query-qmp-schema"}`)
	var r struct{ Return []schemaInfo }
	if err := json.Unmarshal([]byte(c.line()), &r); err != nil {
		t.Fatal(err)
	}
	byName := map[string]schemaInfo{}
	for _, i := range r.Return {
		if _, twice := byName[i.Name]; twice {
			t.Errorf("%s is described twice", i.Name)
		}
		byName[i.Name] = i
	}
	members := func(name string) (text string) {
		for _, m := range *byName[name].Members {
			text += " " + m.Name + ":" + m.Type
			if m.Default != nil {
				t.Errorf("%s.%s: default %v", name, m.Name, *m.Default)
			}
		}
		return text
	}
	echo := byName["echo"]
	if echo.Meta != "command" || echo.Args != echo.Ret || byName[echo.Args].Meta != "object" {
		t.Fatalf("echo: %+v", echo)
	}
	in, c3 := (*byName[echo.Args].Members)[4].Type, (*byName[echo.Args].Members)[5].Type
	if got := members(echo.Args); got != " name:str up:bool n:int list:[str] in:"+in+" c:"+c3+" any:any" {
		t.Errorf("echo's arguments:%s", got)
	}
	if got := members(in); got != " x:int y:int" || byName["GONE"].Args != in {
		t.Errorf("inner:%s; GONE: %+v", got, byName["GONE"])
	}
	if e := byName[c3]; e.Meta != "enum" || fmt.Sprint(e.Values) != "[red green]" {
		t.Errorf("color: %+v", e)
	}
	if a := byName["[str]"]; a.Meta != "array" || a.Element != "str" || byName["str"].Builtin != "string" {
		t.Errorf("array: %+v", a)
	}
	if s := byName["STOP"]; s.Meta != "event" || members(s.Args) != "" {
		t.Errorf("STOP: %+v", s)
	}
}

// Optional members are those that have a default, null, in the JSON.
func TestSchemaDefaults(t *testing.T) {
	text, err := json.Marshal(describe([]Command{Query("q", func() inner { return inner{} })}, nil))
	if want := `[{"name":"x","type":"int"},{"name":"y","type":"int","default":null}]`; err != nil || !strings.Contains(string(text), want) {
		t.Errorf("%s lacks %s (%v)", text, want, err)
	}
}

func TestEvents(t *testing.T) {
	g := newRig(t)
	g.publish("STOP", nil) // nobody hears it
	a, b, mute := g.ready(t), g.ready(t), g.connect(t)
	g.publish("GONE", inner{X: 1})
	gone := `{"timestamp":{"seconds":5,"microseconds":7},"event":"GONE","data":{"x":1,"y":null}}`
	a.hear(gone)
	b.hear(gone)
	for range 20 { // the event of a command is there before its reply
		a.ask(`{"execute":"stop"}`, stopped)
		a.hear(`{"return":{}}`)
		b.hear(stopped)
	}
	mute.ask(`{"execute":"qmp_capabilities"}`, `{"return":{}}`)
	mute.ask(`{"execute":"nothing"}`, `{"return":[]}`) // no event of the past
}

// A client that does not read holds up nobody; one that has missed events is disconnected.
func TestStalledClient(t *testing.T) {
	g := newRig(t)
	stalled, other := g.ready(t), g.ready(t)
	stalled.say(`{"execute":"big"}`)
	for range 30 {
		other.ask(`{"execute":"stop"}`, stopped)
		other.hear(`{"return":{}}`)
	}
	rest, err := io.ReadAll(stalled.lines)
	if n := strings.Count(string(rest), stopped); err != nil || n >= 30 {
		t.Errorf("%d events, %v: some must have been missed, and the connection closed", n, err)
	}
}

// A command may be the server's last: its reply still reaches the client.
func TestQuit(t *testing.T) {
	g := newRig(t)
	c := g.ready(t)
	c.say(`{"execute":"quit"}{"execute":"nothing"}`)
	<-g.quit
	closed := make(chan struct{})
	go func() { g.Close(); close(closed) }()
	c.hear(`{"return":{}}`)
	if rest, err := io.ReadAll(c.lines); err != nil || strings.Count(string(rest), "\n") > 1 {
		t.Errorf("%q, %v", rest, err)
	}
	<-closed
}

// What has happened before the server closes reaches the clients; those that do not read
// only cost a moment.
func TestClose(t *testing.T) {
	g := newRig(t)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { g.Serve(l); close(served) }()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	c := &client{conn, t, bufio.NewReader(conn)}
	c.line()
	c.ask(`{"execute":"qmp_capabilities"}`, `{"return":{}}`)
	stalled := g.ready(t)
	stalled.say(`{"execute":"big"}`)
	g.publish("STOP", nil)
	closed := make(chan struct{})
	go func() { g.Close(); close(closed) }()
	c.hear(stopped)
	if rest, err := io.ReadAll(c.lines); err != nil || len(rest) != 0 {
		t.Errorf("%q, %v", rest, err)
	}
	for _, ch := range []chan struct{}{closed, served} {
		select {
		case <-ch:
		case <-time.After(patience):
			t.Fatal("does not end")
		}
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("it still listens")
	}
	ours, theirs := net.Pipe()
	g.ServeConn(theirs)
	if _, err := ours.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a new client after Close: %v", err)
	}
}

func TestMachineIsGone(t *testing.T) {
	g := newRig(t)
	g.cfg.Do = func(func()) error { return errors.New("the machine has ended") }
	c := g.ready(t)
	c.ask(`{"execute":"stop"}`, failure(GenericError, "the machine has ended"))
}

// FuzzSession checks that there is one reply to each value, whatever it is.
func FuzzSession(f *testing.F) {
	for _, c := range streams {
		f.Add([]byte(c.in))
	}
	f.Add([]byte(`{"execute":"echo","arguments":{"name":"x","up":true,"n":-1,"list":["a"],"in":{"x":1}}}{"execute":"stop"}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		if strings.Contains(string(in), "quit") || strings.Contains(string(in), `\u`) {
			return
		}
		in = append([]byte(`{"execute":"qmp_capabilities"}`), in...)
		want := len(stream(strings.NewReader(string(in)))) + 1 // the greeting
		g := newRig(t)
		ours, theirs := net.Pipe()
		go g.ServeConn(theirs)
		ours.SetDeadline(time.Now().Add(patience))
		var got int
		done := make(chan error, 1)
		go func() {
			d := json.NewDecoder(ours)
			for got = 0; got < want; {
				var r map[string]any
				if err := d.Decode(&r); err != nil {
					done <- err
					return
				}
				if r["event"] == nil {
					got++
				}
			}
			done <- nil
		}()
		ours.Write(in)
		if err := <-done; err != nil {
			t.Errorf("%q: %d replies, want %d: %v", in, got, want, err)
		}
		ours.Close()
	})
}
