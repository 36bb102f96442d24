package char

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"baton/devices"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

var stdioTaken atomic.Bool

// stdio is standard input and output. Their file descriptions may be shared with the shell
// and others, so they are not made non-blocking: Read polls, beside an eventfd that ends it.
type stdio struct {
	in, out int
	saved   *term.State // nil unless in is a terminal
	wake    *devices.EventFD
	reading sync.RWMutex // held for reading by Read; Close takes wake away only after it
	ended   bool         // input is at its end; used by Read only
	closed  atomic.Bool
}

func openStdio() (io.ReadWriteCloser, error) {
	if !stdioTaken.CompareAndSwap(false, true) {
		return nil, errors.New("standard input and output are already in use\nhint: only one port can have them")
	}
	s, err := newStdio(int(os.Stdin.Fd()), int(os.Stdout.Fd()))
	if err != nil {
		stdioTaken.Store(false)
		return nil, err
	}
	return s, nil
}

func newStdio(in, out int) (*stdio, error) {
	wake, err := devices.NewEventFD()
	if err != nil {
		return nil, err
	}
	s := &stdio{in: in, out: out, wake: wake}
	if term.IsTerminal(in) {
		if err := s.raw(); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return s, nil
}

// raw makes the terminal raw for input only: output still gets its carriage returns, for
// what others write there, such as our own log.
func (s *stdio) raw() (err error) {
	if s.saved, err = term.MakeRaw(s.in); err != nil {
		return err
	}
	t, err := unix.IoctlGetTermios(s.in, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Oflag |= unix.OPOST
	return unix.IoctlSetTermios(s.in, unix.TCSETS, t)
}

// Read fails only after Close: at the end of input, output goes on.
func (s *stdio) Read(b []byte) (int, error) {
	s.reading.RLock()
	defer s.reading.RUnlock()
	for !s.closed.Load() {
		fds := []unix.PollFd{
			{Fd: int32(s.wake.FD()), Events: unix.POLLIN},
			{Fd: int32(s.in), Events: unix.POLLIN},
		}
		if s.ended {
			fds = fds[:1]
		}
		if _, err := unix.Poll(fds, -1); err != nil || fds[0].Revents != 0 {
			continue // interrupted, or closed
		}
		switch n, err := unix.Read(s.in, b); {
		case n > 0:
			return n, nil
		case err != unix.EINTR && err != unix.EAGAIN:
			s.ended = true
		}
	}
	return 0, io.EOF
}

// Write drops what standard output does not take, for example into a closed pipe: the port
// stays, and with it the way to quit.
func (s *stdio) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		n, err := unix.Write(s.out, rest)
		switch err {
		case nil:
			rest = rest[n:]
		case unix.EINTR:
		case unix.EAGAIN: // somebody else made the file description non-blocking
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.out), Events: unix.POLLOUT}}, -1)
		default:
			return len(b), nil
		}
	}
	return len(b), nil
}

func (s *stdio) Close() error {
	s.closed.Store(true)
	s.wake.Signal()
	s.reading.Lock()
	defer s.reading.Unlock()
	defer stdioTaken.Store(false)
	err := s.wake.Close()
	if s.saved != nil {
		err = errors.Join(err, term.Restore(s.in, s.saved))
	}
	return err
}

const ctrlA = 0x01

const escapeHelp = "\r\nC-a h    print this help\r\nC-a x    quit\r\nC-a C-a  send C-a\r\n"

// escape finds the commands that follow Ctrl-A in what is typed.
type escape struct {
	quit  func()
	port  io.Writer // for the help
	armed bool      // the last byte was Ctrl-A
}

// filter returns what is left for the guest, in the same memory.
func (e *escape) filter(p []byte) []byte {
	out := p[:0]
	for _, c := range p {
		switch {
		case !e.armed && c == ctrlA:
			e.armed = true
			continue
		case !e.armed, c == ctrlA:
			out = append(out, c)
		case c == 'x':
			e.quit()
		case c == 'h', c == '?':
			_, _ = e.port.Write([]byte(escapeHelp))
		}
		e.armed = false
	}
	return out
}
