// Package char opens what the host lends to a serial port or a console: a terminal, a
// file, a socket.
//
//	guest ──Write──> buffer (1 MiB) ──goroutine──> peer      no peer, full buffer: dropped, counted
//	guest <──Read──────────────────────────────── peer      waits for the next peer
//
// A Port outlives its peers: a server accepts them one after the other, and a peer that is
// slow, stuck or gone never holds up the guest.
package char

import (
	"fmt"
	"net"
	"strconv"
	"strings"
)

// Kind is what a port is connected to.
type Kind string

// The kinds of ports.
const (
	None  Kind = "none"  // there is no port
	Null  Kind = "null"  // nothing: no input, output is dropped
	Stdio Kind = "stdio" // standard input and output
	File  Kind = "file"  // output goes to a file, which is truncated first
	Unix  Kind = "unix"  // a Unix stream socket
	TCP   Kind = "tcp"
)

// Spec says what to open.
type Spec struct {
	Kind    Kind   `json:"kind"`
	Path    string `json:"path,omitempty"`    // File, Unix: its path; TCP: host:port
	Server  bool   `json:"server,omitempty"`  // Unix, TCP: listen
	Wait    bool   `json:"wait,omitempty"`    // with Server: Open waits for the first peer
	Monitor bool   `json:"monitor,omitempty"` // Stdio: shared with the monitor
	Telnet  bool   `json:"telnet,omitempty"`  // TCP: for a monitor whose clients speak telnet
}

const accepted = "accepted: stdio, mon:stdio, null, none, file:PATH, " +
	"unix:PATH[,server=on|off][,wait=on|off], tcp:HOST:PORT[,server=on|off][,wait=on|off], " +
	"for a monitor telnet:HOST:PORT[,server=on|off][,wait=on|off]"

// Parse reads a Spec as QEMU's -serial spells it. In a path or host, a comma is written
// twice. A server waits for its first peer unless told otherwise.
func Parse(s string) (Spec, error) {
	spec, err := parse(s)
	if err != nil {
		return Spec{}, fmt.Errorf("serial %q: %w\n%s", s, err, accepted)
	}
	return spec, nil
}

func parse(s string) (Spec, error) {
	kind, rest, hasRest := strings.Cut(s, ":")
	spec := Spec{Kind: Kind(kind)}
	switch spec.Kind {
	case None, Null, Stdio:
		if hasRest {
			return spec, fmt.Errorf("%s takes nothing after the colon, not %q", kind, rest)
		}
		return spec, nil
	case "mon":
		if rest != string(Stdio) {
			return spec, fmt.Errorf("the monitor can share stdio only, not %q", rest)
		}
		return Spec{Kind: Stdio, Monitor: true}, nil
	case File:
		spec.Path = rest
		if rest == "" {
			return spec, fmt.Errorf("the path is missing")
		}
		return spec, nil
	case "telnet":
		spec = Spec{Kind: TCP, Telnet: true}
		return spec, spec.parseSocket(rest)
	case Unix, TCP:
		return spec, spec.parseSocket(rest)
	}
	return spec, fmt.Errorf("unknown kind %q", kind)
}

func (spec *Spec) parseSocket(s string) error {
	words := strings.Split(strings.ReplaceAll(s, ",,", "\x00"), ",")
	spec.Path = strings.ReplaceAll(words[0], "\x00", ",")
	if spec.Kind == TCP {
		_, port, err := net.SplitHostPort(spec.Path)
		if err != nil {
			return err
		}
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return fmt.Errorf("port %q is not a number from 0 to 65535", port)
		}
	} else if spec.Path == "" {
		return fmt.Errorf("the path is missing")
	}
	wait := true
	for _, w := range words[1:] {
		switch w {
		case "server", "server=on":
			spec.Server = true
		case "server=off":
			spec.Server = false
		case "wait", "wait=on":
			wait = true
		case "nowait", "wait=off":
			wait = false
		default:
			return fmt.Errorf("unknown option %q", w)
		}
	}
	spec.Wait = spec.Server && wait
	return nil
}
