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

const escapeMonitorHelp = "C-a c    turn to the monitor, and back\r\n"

// escape finds the commands that follow Ctrl-A in what is typed.
type escape struct {
	quit    func()
	port    io.Writer // for the help
	monitor *Monitor  // nil unless it shares the terminal
	armed   bool      // the last byte was Ctrl-A
	turned  bool      // to the monitor
}

// filter returns what is left for the guest, in the same memory.
func (e *escape) filter(p []byte) []byte {
	out := p[:0]
	for _, c := range p {
		switch {
		case !e.armed && c == ctrlA:
			e.armed = true
			continue
		case (!e.armed || c == ctrlA) && e.turned:
			e.monitor.typed(c)
		case !e.armed, c == ctrlA:
			out = append(out, c)
		case c == 'x':
			e.quit()
		case c == 'c' && e.monitor != nil:
			if e.turned = !e.turned; e.turned {
				e.monitor.shown.Store(true)
				e.monitor.typed('\r') // it answers with its prompt
			}
		case c == 'h', c == '?':
			help := escapeHelp
			if e.monitor != nil {
				help += escapeMonitorHelp
			}
			_, _ = e.port.Write([]byte(help))
		}
		e.armed = false
	}
	return out
}

// Monitor is the end, for a monitor, of a terminal that it shares with the guest. It says
// nothing before Ctrl-A c has turned to it for the first time.
type Monitor struct {
	*Port
	keys  chan byte
	shown atomic.Bool
}

// Monitor returns the monitor's end of the port; nil unless the spec has one.
func (p *Port) Monitor() *Monitor { return p.monitor }

// typed never waits: a monitor that is busy for so long misses keys.
func (m *Monitor) typed(c byte) {
	select {
	case m.keys <- c:
	default:
	}
}

// Read waits for a key. It ends with io.EOF once the port is closed.
func (m *Monitor) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	select {
	case p[0] = <-m.keys:
		return 1, nil
	case <-m.drained:
		return 0, io.EOF
	}
}

// Write never waits, as the port's.
func (m *Monitor) Write(p []byte) (int, error) {
	if !m.shown.Load() {
		return len(p), nil
	}
	return m.Port.Write(p)
}

// Close does nothing: the terminal is the guest's too.
func (m *Monitor) Close() error { return nil }

// Bounds of what is typed ahead: of the monitor in bytes, of the guest in reads.
const (
	monitorAhead = 4 << 10
	guestAhead   = 256
)

// shareStdio puts the escape character, if there is to be one, between the terminal and who
// reads the port.
func (p *Port) shareStdio(monitor bool, quit func()) {
	if quit == nil {
		return
	}
	if monitor {
		p.monitor = &Monitor{Port: p, keys: make(chan byte, monitorAhead)}
	}
	a := &ahead{ReadWriteCloser: p.peer, typed: make(chan []byte, guestAhead), done: make(chan struct{})}
	p.peer = a
	go a.fill(&escape{quit: quit, port: p, monitor: p.monitor})
}

// ahead reads what is typed before the guest wants it: the escape character works while the
// guest stands still.
type ahead struct {
	io.ReadWriteCloser
	typed chan []byte
	rest  []byte
	done  chan struct{} // closed by Close
}

func (a *ahead) fill(e *escape) {
	defer close(a.typed)
	for {
		b := make([]byte, 256)
		n, err := a.ReadWriteCloser.Read(b)
		if b = e.filter(b[:n]); len(b) > 0 {
			select {
			case a.typed <- b:
			case <-a.done:
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (a *ahead) Read(p []byte) (int, error) {
	if len(a.rest) == 0 {
		var ok bool
		if a.rest, ok = <-a.typed; !ok {
			return 0, io.EOF
		}
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

func (a *ahead) Close() error {
	close(a.done)
	return a.ReadWriteCloser.Close()
}
