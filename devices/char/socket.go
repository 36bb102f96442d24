package char

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Dial connects to the server that a spec of kind Unix or TCP names.
func Dial(ctx context.Context, spec Spec) (io.ReadWriteCloser, error) {
	conn, err := new(net.Dialer).DialContext(ctx, string(spec.Kind), spec.Path)
	if err != nil {
		return nil, fmt.Errorf("%w\nhint: start the side that listens first, or listen here with server=on", err)
	}
	return conn, nil
}

// Listen opens the socket of a server, of kind Unix or TCP. A Unix socket is its owner's alone from the moment it
// exists: bind takes the mode from the descriptor. One that a dead process left behind is
// replaced, one that is alive is not.
func Listen(ctx context.Context, spec Spec) (net.Listener, error) {
	var lc net.ListenConfig
	if spec.Kind == Unix {
		if err := removeStale(spec.Path); err != nil {
			return nil, err
		}
		lc.Control = func(_, _ string, c syscall.RawConn) error {
			var err error
			return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
		}
	}
	return lc.Listen(ctx, string(spec.Kind), spec.Path)
}

func removeStale(path string) error {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s exists and is not a socket\nhint: remove it or choose another path", path)
	}
	conn, err := net.Dial("unix", path)
	switch {
	case err == nil:
		conn.Close()
		fallthrough
	case errors.Is(err, unix.EAGAIN): // its backlog is full
		return fmt.Errorf("another process listens on %s\nhint: choose another path, or end that process", path)
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	}
	return err
}

// AcceptFirst waits for the first peer; the listener is closed if there is none before ctx ends.
func AcceptFirst(ctx context.Context, l net.Listener) (io.ReadWriteCloser, error) {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	conn, err := l.Accept()
	if !stop() && err == nil { // too late: the listener is closed
		conn.Close()
		err = ctx.Err()
	}
	if err != nil {
		l.Close()
		return nil, cmp.Or(ctx.Err(), err)
	}
	return conn, nil
}

// accept takes peers, one at a time; the others wait in the backlog.
func (p *Port) accept() {
	for {
		p.wait(func() bool { return p.peer == nil })
		conn, err := p.listen.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		if p.closed {
			conn.Close()
		} else {
			p.peer = conn
		}
		p.change.Broadcast()
		p.mu.Unlock()
	}
}
