// Package qmp is the server's side of the QEMU Machine Protocol: QEMU's docs/interop/qmp-spec.
//
//	client ──JSON stream──> Decoder ──> session ──Do──> Command        one thread: the machine's
//	client <──replies, events── session <──Poll── EventSource          each at its own pace
//
// Commands are functions whose arguments and results are structs: these are the table from
// which arguments are checked, in QEMU's words, and query-qmp-schema is made. Every client
// has a session of its own; what one of them does not read stops its session and nothing else.
package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"
)

// closeTime is how long a client that is slow has for what is left when the server closes.
const closeTime = time.Second

// Version is the result of query-version.
type Version struct {
	QEMU struct {
		Micro int64 `json:"micro"`
		Minor int64 `json:"minor"`
		Major int64 `json:"major"`
	} `json:"qemu"`
	Package string `json:"package"`
}

// Config is what a server needs.
type Config struct {
	Version    Version
	Commands   []Command
	EventTypes []EventType
	Events     EventSource
	// Do runs a function where commands have to run, one at a time, and waits for its end.
	// It fails if nothing runs there any more.
	Do func(func()) error
}

// Server answers clients. Its methods may be called at any time.
type Server struct {
	cfg      Config
	commands map[string]*Command

	mu        sync.Mutex
	closed    bool
	listeners []net.Listener
	sessions  map[*session]bool
	running   sync.WaitGroup // sessions
}

type nameInfo struct {
	Name string `json:"name"`
}

// NewServer returns a server that has the commands of the protocol itself besides the given
// ones: query-commands, query-events, query-qmp-schema and query-version.
func NewServer(c Config) *Server {
	s := &Server{cfg: c, commands: map[string]*Command{}, sessions: map[*session]bool{}}
	s.cfg.Commands = append(slices.Clone(c.Commands),
		New("qmp_capabilities", func(capabilities) (None, error) {
			return None{}, &Error{CommandNotFound, "Capabilities negotiation is already complete, command ignored"}
		}),
		Query("query-version", func() Version { return c.Version }),
		Query("query-commands", s.names),
		Query("query-events", func() (list []nameInfo) {
			for _, e := range c.EventTypes {
				list = append(list, nameInfo{e.Name})
			}
			return list
		}),
		Query("query-qmp-schema", func() []schemaInfo { return describe(s.cfg.Commands, c.EventTypes) }))
	slices.SortFunc(s.cfg.Commands, func(a, b Command) int { return strings.Compare(a.Name, b.Name) })
	for i := range s.cfg.Commands {
		s.commands[s.cfg.Commands[i].Name] = &s.cfg.Commands[i]
	}
	return s
}

func (s *Server) names() (list []nameInfo) {
	for _, c := range s.cfg.Commands {
		list = append(list, nameInfo{c.Name})
	}
	return list
}

// Serve takes clients until the server or the listener is closed. It owns the listener.
func (s *Server) Serve(l net.Listener) {
	s.mu.Lock()
	s.listeners = append(s.listeners, l)
	closed := s.closed
	s.mu.Unlock()
	if closed {
		l.Close()
	}
	Accept(l, func(conn net.Conn) { s.ServeConn(conn) })
}

// Accept has serve talk to each client of l, on a goroutine of its own, until l is closed.
func Accept(l net.Listener, serve func(net.Conn)) {
	for {
		conn, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // out of descriptors: others may go
			time.Sleep(time.Second)
		default:
			go serve(conn)
		}
	}
}

// ServeConn talks to one client until it goes, and closes the connection.
func (s *Server) ServeConn(conn io.ReadWriteCloser) {
	c := &session{Server: s, conn: conn, done: make(chan struct{})}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		conn.Close()
		return
	}
	s.sessions[c] = true
	s.running.Add(1)
	s.mu.Unlock()
	defer s.running.Done()
	c.serve()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, c)
}

// Close ends all sessions. What has happened so far still reaches the clients, unless they
// are too slow.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	for _, l := range s.listeners {
		l.Close()
	}
	sessions := s.sessions
	for c := range sessions {
		late := time.AfterFunc(closeTime, func() { c.conn.Close() })
		go func() {
			defer late.Stop()
			c.hangUp()
		}()
	}
	s.mu.Unlock()
	s.running.Wait()
	return nil
}

// session is the conversation with one client.
type session struct {
	*Server
	conn  io.ReadWriteCloser
	files *fileReader   // nil if the connection cannot carry any
	done  chan struct{} // closed at the end of the client's input

	turn  sync.Mutex // held from a request to its reply
	out   sync.Mutex // held while something is written: replies and events do not mix
	ready bool       // capabilities are negotiated; events may be sent
	next  uint64     // number of the next event
}

type capability string

func (capability) Values() []string { return []string{"oob"} }

type capabilities struct {
	Enable []capability `json:"enable,omitempty"`
}

type reply struct {
	Return any    `json:"return,omitempty"`
	Error  *Error `json:"error,omitempty"`
	ID     *any   `json:"id,omitempty"`
}

func (c *session) serve() {
	defer c.conn.Close()
	var greeting struct {
		QMP struct {
			Version      Version  `json:"version"`
			Capabilities []string `json:"capabilities"`
		}
	}
	greeting.QMP.Version, greeting.QMP.Capabilities = c.cfg.Version, []string{}
	if c.write(greeting) != nil {
		return
	}
	defer close(c.done)
	in := NewDecoder(c.conn)
	if conn, ok := c.conn.(*net.UnixConn); ok {
		c.files = &fileReader{conn: conn}
		defer c.files.close()
		in = NewDecoder(c.files)
	}
	for {
		request, err := in.Next()
		var syntax SyntaxError
		if err != nil && !errors.As(err, &syntax) {
			return
		}
		c.turn.Lock()
		r := reply{Error: Errorf("%s", string(syntax))}
		if err == nil {
			r = c.answer(request)
		}
		err = c.write(r)
		c.turn.Unlock()
		if err != nil {
			return
		}
	}
}

// answer carries out a request.
func (c *session) answer(request any) (r reply) {
	object, ok := request.(map[string]any)
	if ok {
		if id, given := object["id"]; given {
			r.ID = &id
		}
	}
	command, args, err := c.parse(object, ok)
	if err == nil && !c.ready {
		err = c.negotiate(args)
		r.Return = None{}
	} else if err == nil {
		if e := c.cfg.Do(func() { r.Return, err = command.execute(args, c.files) }); e != nil {
			err = e
		}
	}
	if err == nil {
		if v := reflect.ValueOf(r.Return); v.Kind() == reflect.Slice && v.IsNil() {
			r.Return = []None{}
		}
		return r
	}
	if r.Return = nil; !errors.As(err, &r.Error) {
		r.Error = Errorf("%v", err)
	}
	return r
}

// parse checks the request's form: qmp-spec, "Issuing Commands".
func (c *session) parse(object map[string]any, ok bool) (*Command, map[string]any, error) {
	bad := func(format string, a ...any) (*Command, map[string]any, error) {
		return nil, nil, Errorf("QMP input "+format, a...)
	}
	if !ok {
		return bad("must be a JSON object")
	}
	args := map[string]any{}
	for _, key := range slices.Sorted(maps.Keys(object)) {
		switch v := object[key]; key {
		case "id":
		case "execute":
			if _, ok := v.(string); !ok {
				return bad("member 'execute' must be a string")
			}
		case "arguments":
			if args, ok = v.(map[string]any); !ok {
				return bad("member 'arguments' must be an object")
			}
		default:
			return bad("member '%s' is unexpected", key)
		}
	}
	name, ok := object["execute"].(string)
	if !ok {
		return bad("lacks member 'execute'")
	}
	command := c.commands[name]
	switch {
	case !c.ready && name != "qmp_capabilities":
		return nil, nil, &Error{CommandNotFound, "Expecting capabilities negotiation with 'qmp_capabilities'"}
	case command == nil:
		return nil, nil, noCommand(name)
	}
	return command, args, nil
}

// negotiate is qmp_capabilities. From then on there are events.
func (c *session) negotiate(args map[string]any) error {
	var want capabilities
	if err := bind(reflect.ValueOf(&want).Elem(), args, ""); err != nil {
		return err
	}
	for _, name := range want.Enable {
		return Errorf("Capability %s not available", name)
	}
	c.out.Lock()
	defer c.out.Unlock()
	c.ready = true
	_, c.next, _ = c.cfg.Events.Poll(^uint64(0))
	go c.follow()
	return nil
}

// follow writes events as they happen.
func (c *session) follow() {
	for {
		c.out.Lock()
		more, err := c.flush()
		c.out.Unlock()
		if err != nil {
			c.conn.Close()
			return
		}
		select {
		case <-more:
		case <-c.done:
			return
		}
	}
}

var errLagged = errors.New("the client has missed events")

// flush writes the events that have happened; c.out is held. A client that has missed some
// could not know what it sees: it is better off with a new connection.
func (c *session) flush() (more <-chan struct{}, err error) {
	events, next, more := c.cfg.Events.Poll(c.next)
	for _, e := range events {
		if e.Seq != c.next {
			return nil, errLagged
		}
		c.next = e.Seq + 1
		e.Seq = 0
		if err := c.send(e); err != nil {
			return nil, err
		}
	}
	c.next = next
	return more, nil
}

// write writes a reply, after the events that happened before it.
func (c *session) write(v any) error {
	c.out.Lock()
	defer c.out.Unlock()
	if c.ready {
		if _, err := c.flush(); err != nil {
			return err
		}
	}
	return c.send(v)
}

func (c *session) send(v any) error {
	var line bytes.Buffer
	enc := json.NewEncoder(&line)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return err
	}
	line.Truncate(line.Len() - 1)
	line.WriteString("\r\n")
	_, err := c.conn.Write(line.Bytes())
	return err
}

// hangUp ends the session once the client has its reply and what has happened so far.
func (c *session) hangUp() {
	c.turn.Lock()
	defer c.turn.Unlock()
	c.out.Lock()
	defer c.out.Unlock()
	if c.ready {
		_, _ = c.flush()
	}
	c.conn.Close()
}
