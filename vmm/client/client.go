// Package client is what `baton monitor` and `baton events` are made of: a client of QMP for
// a person, or for a script, at a terminal.
//
//	stdin ──a line of HMP, or of JSON──> Conn ──QMP──> the machine
//	stdout <──answers, events─────────── Conn <──────
package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
)

// Conn is a conversation with a QMP server. One goroutine at a time may use it.
type Conn struct {
	conn    net.Conn
	replies chan reply
	err     error // why replies is closed
}

type reply struct {
	text  json.RawMessage // all of it
	Event string          `json:"event"`
	Error *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Return json.RawMessage `json:"return"`
}

// ErrFailed is the end of a command that has said itself what is wrong.
var ErrFailed = errors.New("the command failed")

// Dial connects to a Unix socket, PATH or unix:PATH, or to tcp:HOST:PORT. Events go to
// onEvent, from a goroutine of their own. The end of ctx closes the connection.
func Dial(ctx context.Context, address string, onEvent func(json.RawMessage)) (*Conn, error) {
	network, path := "unix", strings.TrimPrefix(address, "unix:")
	if host, ok := strings.CutPrefix(address, "tcp:"); ok {
		network, path = "tcp", host
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, path)
	if err != nil {
		return nil, fmt.Errorf("%w\nSOCKET is what -qmp said: PATH of a Unix socket, or tcp:HOST:PORT", err)
	}
	c := &Conn{conn: conn, replies: make(chan reply)}
	context.AfterFunc(ctx, func() { conn.Close() })
	in := json.NewDecoder(conn)
	var greeting struct{ QMP *json.RawMessage }
	if err = in.Decode(&greeting); err == nil && greeting.QMP == nil {
		err = errors.New("no greeting")
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: nobody there speaks QMP: %w\nis it the socket of a -monitor, or is the machine about to end?", address, err)
	}
	go func() {
		for {
			var r reply
			if c.err = in.Decode(&r.text); c.err != nil {
				break
			}
			if c.err = json.Unmarshal(r.text, &r); c.err != nil {
				break
			}
			if r.Event != "" {
				onEvent(r.text)
			} else {
				c.replies <- r
			}
		}
		conn.Close()
		close(c.replies)
	}()
	_, err = c.say(`{"execute":"qmp_capabilities"}`)
	return c, err
}

// say sends a request and waits for the reply. It is io.EOF if the machine ends instead.
func (c *Conn) say(request string) (reply, error) {
	if _, err := io.WriteString(c.conn, request+"\n"); err != nil {
		return reply{}, err
	}
	r, ok := <-c.replies
	if !ok {
		return r, c.err
	}
	return r, nil
}

// human runs a line of HMP.
func (c *Conn) human(line string) (text string, err error) {
	request, err := json.Marshal(map[string]any{"execute": "human-monitor-command", "arguments": map[string]string{"command-line": line}})
	if err != nil {
		return "", err
	}
	r, err := c.say(string(request))
	if err != nil {
		return "", err
	}
	if r.Error != nil {
		return "Error: " + r.Error.Desc + "\n", ErrFailed
	}
	if err := json.Unmarshal(r.Return, &text); err != nil {
		return "", err
	}
	text = strings.ReplaceAll(text, "\r\n", "\n")
	for _, bad := range []string{"Error: ", "usage: ", "unknown command: "} {
		if strings.HasPrefix(text, bad) {
			return text, ErrFailed
		}
	}
	return text, nil
}

// Run runs a line: of QMP if it begins with a brace, else of HMP. The text ends with a
// newline. Err is ErrFailed if text says why.
func (c *Conn) Run(line string) (text string, err error) {
	line = strings.TrimSpace(line)
	switch {
	case line == "":
		return "", nil
	case !strings.HasPrefix(line, "{"):
		return c.human(line)
	case !json.Valid([]byte(line)): // the reply to half a request would never come
		return "this is not JSON: " + line + "\n", ErrFailed
	}
	r, err := c.say(line)
	if err == nil && r.Error != nil {
		err = ErrFailed
	}
	if r.text != nil {
		text = string(r.text) + "\n"
	}
	return text, err
}
