package wire

import (
	"fmt"
	"net"
	"strings"
)

// Network is a kind of transport.
type Network string

// Transports, the schemes of QEMU's migration URIs.
const (
	TCP  Network = "tcp"
	Unix Network = "unix"
	FD   Network = "fd"
	Exec Network = "exec"
	File Network = "file"
)

// Address is where the stream goes or comes from.
type Address struct {
	Network Network
	Host    string   // tcp
	Port    string   // tcp
	Path    string   // unix, file
	Offset  int64    // file: bytes before the stream
	Name    string   // fd: of getfd, or a number
	Args    []string // exec: the program and its arguments
}

// ParseURI reads what the argument uri of migrate has: tcp:HOST:PORT, tcp:[HOST]:PORT, unix:PATH, fd:NAME,
// exec:COMMAND, file:PATH[,offset=N].
func ParseURI(uri string) (Address, error) {
	scheme, rest, ok := strings.Cut(uri, ":")
	if !ok {
		return Address{}, fmt.Errorf("unknown migration protocol: %s", uri)
	}
	a := Address{Network: Network(scheme)}
	bad := func(why string) (Address, error) { return Address{}, fmt.Errorf("address %s: %s", uri, why) }
	switch a.Network {
	case TCP:
		var err error
		if a.Host, a.Port, err = net.SplitHostPort(rest); err != nil {
			return bad(err.(*net.AddrError).Err)
		}
		if a.Port == "" {
			return bad("no port")
		}
	case Unix:
		if a.Path = rest; rest == "" {
			return bad("no path")
		}
	case File:
		path, offset, ok := strings.Cut(rest, ",offset=")
		if a.Path = path; path == "" {
			return bad("no path")
		}
		if ok {
			if n, err := fmt.Sscanf(offset+"\n", "%v\n", &a.Offset); n != 1 || err != nil || a.Offset < 0 {
				return bad("offset is no number of bytes")
			}
		}
	case FD:
		if a.Name = rest; rest == "" {
			return bad("no name")
		}
	case Exec:
		if strings.TrimSpace(rest) == "" {
			return bad("no command")
		}
		a.Args = []string{"/bin/sh", "-c", rest}
	default:
		return Address{}, fmt.Errorf("unknown migration protocol: %s", uri)
	}
	return a, nil
}

// String is the URI.
func (a Address) String() string {
	switch a.Network {
	case TCP:
		return "tcp:" + net.JoinHostPort(a.Host, a.Port)
	case FD:
		return "fd:" + a.Name
	case Exec:
		if len(a.Args) == 3 && a.Args[1] == "-c" {
			return "exec:" + a.Args[2]
		}
		return "exec:" + strings.Join(a.Args, " ")
	case File:
		if a.Offset != 0 {
			return fmt.Sprintf("file:%s,offset=%d", a.Path, a.Offset)
		}
	}
	return string(a.Network) + ":" + a.Path
}
