package char

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

const patience = 20 * time.Second

func open(t *testing.T, s string) *Port {
	t.Helper()
	spec, err := Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(t.Context(), spec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func dialTest(t *testing.T, p *Port, network string) net.Conn {
	t.Helper()
	conn, err := net.Dial(network, p.Name())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// say writes and fails the test if that does not end at once.
func say(t *testing.T, w io.Writer, s string) {
	t.Helper()
	if n, err := io.WriteString(w, s); err != nil || n != len(s) {
		t.Fatalf("write %q: %d, %v", s, n, err)
	}
}

func hear(t *testing.T, r io.Reader, want string) {
	t.Helper()
	within(t, "hear "+want, func() error {
		got := make([]byte, len(want))
		n, err := io.ReadFull(r, got)
		if err != nil || string(got) != want {
			return fmt.Errorf("heard %q, want %q: %v", got[:n], want, err)
		}
		return nil
	})
}

func within(t *testing.T, what string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal(what + ": it hangs")
	}
}

// ends checks that Close ends a Read that waits, with io.EOF.
func ends(t *testing.T, p *Port) {
	t.Helper()
	read := make(chan error, 1)
	go func() {
		_, err := p.Read(make([]byte, 1))
		read <- err
	}()
	within(t, "close", p.Close)
	within(t, "read", func() error {
		if err := <-read; err != io.EOF {
			return fmt.Errorf("read after close: %v", err)
		}
		return nil
	})
	if _, err := p.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write after close: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

// attached waits until the port has a peer, or has none.
func attached(t *testing.T, p *Port, want bool) {
	t.Helper()
	within(t, "peer", func() error {
		p.wait(func() bool { return (p.peer != nil) == want })
		return nil
	})
}

func TestNull(t *testing.T) {
	p := open(t, "null")
	say(t, p, "nobody hears it")
	if p.Dropped() != 15 || p.Name() != "null" {
		t.Errorf("dropped %d, name %q", p.Dropped(), p.Name())
	}
	ends(t, p)
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("what was there before"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := open(t, "file:"+path)
	for i := range 1000 {
		say(t, p, fmt.Sprintf("line %d\n", i))
	}
	ends(t, p) // writes what is in the buffer
	got, err := os.ReadFile(path)
	if err != nil || !bytes.HasPrefix(got, []byte("line 0\n")) || !bytes.HasSuffix(got, []byte("\nline 999\n")) {
		t.Errorf("%v, file: %.40q", err, got)
	}
	if p.Dropped() != 0 {
		t.Errorf("dropped %d", p.Dropped())
	}
}

// A device that takes nothing costs the output, not the port.
func TestFileThatFails(t *testing.T) {
	p := open(t, "file:/dev/full")
	say(t, p, "lost")
	attached(t, p, false)
	say(t, p, "too")
	if p.Dropped() != 7 {
		t.Errorf("dropped %d", p.Dropped())
	}
	ends(t, p)
}

func TestServer(t *testing.T) {
	for _, c := range []struct{ network, spec string }{
		{"unix", "unix:" + filepath.Join(t.TempDir(), "s")},
		{"tcp", "tcp:127.0.0.1:0"},
	} {
		t.Run(c.network, func(t *testing.T) {
			p := open(t, c.spec+",server=on,wait=off")
			say(t, p, "unheard")
			if p.Dropped() != 7 {
				t.Errorf("dropped %d", p.Dropped())
			}
			for i := range 3 { // peers come and go
				conn := dialTest(t, p, c.network)
				attached(t, p, true)
				waiting := dialTest(t, p, c.network)
				say(t, waiting, "next") // is heard only when its turn comes
				say(t, conn, "hello")
				hear(t, p, "hello")
				reply := fmt.Sprintf("welcome %d", i)
				say(t, p, reply)
				hear(t, conn, reply)
				conn.Close()
				hear(t, p, "next")
				say(t, p, "you")
				hear(t, waiting, "you")
				waiting.Close()
			}
			ends(t, p)
			if _, err := net.Dial(c.network, p.Name()); err == nil {
				t.Error("it still listens")
			}
		})
	}
}

func TestServerWaits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	spec := Spec{Kind: Unix, Path: path, Server: true, Wait: true}
	opened := make(chan *Port, 1)
	go func() {
		p, err := Open(t.Context(), spec, Options{})
		if err != nil {
			t.Error(err)
		}
		opened <- p
	}()
	var conn net.Conn
	within(t, "connect", func() (err error) {
		for conn, err = net.Dial("unix", path); err != nil; conn, err = net.Dial("unix", path) {
			select {
			case <-opened:
				return errors.New("it did not wait")
			default:
			}
		}
		return nil
	})
	defer conn.Close()
	p := <-opened
	defer p.Close()
	say(t, p, "first")
	hear(t, conn, "first")
}

func TestServerWaitEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel) // before or while it waits: both must end it
	within(t, "open", func() error {
		if _, err := Open(ctx, Spec{Kind: Unix, Path: path, Server: true, Wait: true}, Options{}); !errors.Is(err, context.Canceled) {
			return fmt.Errorf("cancelled, yet %v", err)
		}
		return nil
	})
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestUnixSocketFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	server := Spec{Kind: Unix, Path: path, Server: true}
	p := open(t, "unix:"+path+",server,nowait")
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := Open(t.Context(), server, Options{}); err == nil || !strings.Contains(err.Error(), "another process listens on "+path+"\nhint: ") {
		t.Errorf("a live socket was taken over: %v", err)
	}
	say(t, dialTest(t, p, "unix"), "alive")
	// The look of the one above came first, as a peer that left.
	hear(t, p, "alive")
	p.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}

	stale, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close() // as a process that was killed
	p = open(t, "unix:"+path+",server,nowait")
	say(t, dialTest(t, p, "unix"), "new")
	hear(t, p, "new")
	p.Close()

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), server, Options{}); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file was replaced: %v", err)
	}
}

func TestClient(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := open(t, "unix:"+path)
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	say(t, p, "hi")
	hear(t, conn, "hi")
	say(t, conn, "last words")
	conn.Close()
	hear(t, p, "last words")
	ends(t, p) // a server that is gone is no end of input
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	for s, want := range map[string]string{
		"file:" + dir + "/no/log":                                         "open file port: open " + dir + "/no/log: no such file or directory",
		"unix:" + dir + "/s":                                              "hint: start the side that listens first",
		"unix:" + dir + "/no/s,server,nowait":                             "no such file or directory",
		"unix:" + dir + "/" + strings.Repeat("x", 200) + ",server,nowait": "invalid argument",
		"tcp:127.0.0.1:1":                                                 "hint: start the side that listens first",
		"tcp:192.0.2.1:4444,server,nowait":                                "cannot assign requested address",
	} {
		spec, err := Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), spec, Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", s, err, want)
		}
	}
	if _, err := Open(t.Context(), Spec{Kind: "vc"}, Options{}); err == nil {
		t.Error("an unknown kind was opened")
	}
}

// A peer that reads nothing does not hold up the guest, and gets what the buffer held.
func TestSlowPeer(t *testing.T) {
	p := open(t, "unix:"+filepath.Join(t.TempDir(), "s")+",server,nowait")
	conn := dialTest(t, p, "unix")
	attached(t, p, true)
	line := bytes.Repeat([]byte("0123456789abcdef"), 64)
	total := 0
	within(t, "write to a stuck peer", func() error {
		for total < 8*bufferSize {
			n, err := p.Write(line)
			if err != nil {
				return err
			}
			total += n
		}
		return nil
	})
	dropped := int(p.Dropped())
	if dropped == 0 {
		t.Fatal("the buffer has no end")
	}
	got := make([]byte, total-dropped)
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatalf("%d bytes were kept: %v", len(got), err)
	}
	if !bytes.HasPrefix(got, line) {
		t.Error("what was kept is not what was written first")
	}
	say(t, p, "again")
	hear(t, conn, "again")
}

// A peer that is stuck for good holds up Close only for a moment, and one that leaves with
// output under way makes room for the next.
func TestStuckPeer(t *testing.T) {
	p := open(t, "unix:"+filepath.Join(t.TempDir(), "s")+",server,nowait")
	conn := dialTest(t, p, "unix")
	attached(t, p, true)
	fill := func() {
		for before := p.Dropped(); p.Dropped() == before; {
			say(t, p, strings.Repeat("x", 4096))
		}
	}
	fill()
	conn.Close()
	attached(t, p, false)
	conn = dialTest(t, p, "unix")
	attached(t, p, true)
	say(t, p, "fresh")
	hear(t, conn, "fresh")
	fill()
	ends(t, p)
}

// terminal returns a pseudo terminal as a user has it, not raw. What is typed at the Port is
// typed at the terminal.
func terminal(t *testing.T) (master *Port, tty *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	master = &Port{peer: os.NewFile(uintptr(fd), "/dev/ptmx"), drained: make(chan struct{})}
	master.change.L = &master.mu
	go master.drain()
	t.Cleanup(func() { master.Close() })
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	if tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	termios, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	termios.Lflag |= unix.ICANON | unix.ECHO | unix.ISIG
	termios.Oflag |= unix.OPOST | unix.ONLCR
	if err := unix.IoctlSetTermios(int(tty.Fd()), unix.TCSETS, termios); err != nil {
		t.Fatal(err)
	}
	return master, tty
}

// stdioPort is Open for Stdio, on other files than the test's own.
func stdioPort(t *testing.T, in, out *os.File, quit func()) *Port {
	t.Helper()
	s, err := newStdio(int(in.Fd()), int(out.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	p := &Port{peer: s, drained: make(chan struct{})}
	p.change.L = &p.mu
	p.shareStdio(true, quit)
	go p.drain()
	t.Cleanup(func() { p.Close() })
	return p
}

func TestStdioTerminal(t *testing.T) {
	master, tty := terminal(t)
	before, err := term.GetState(int(tty.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	p := stdioPort(t, tty, tty, nil)
	say(t, master, "\x03a") // neither a line, nor an interrupt
	hear(t, p, "\x03a")
	say(t, p, "guest\r\n")
	hear(t, master, "guest\r\r\n")
	say(t, tty, "log\n") // others' output is still made fit for a terminal
	hear(t, master, "log\r\n")
	ends(t, p)
	after, err := term.GetState(int(tty.Fd()))
	if err != nil || *after != *before {
		t.Errorf("the terminal is not as it was: %v", err)
	}
}

func TestStdioPipe(t *testing.T) {
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer outR.Close()
	defer inR.Close()
	p := stdioPort(t, inR, outW, nil)
	say(t, inW, "in\x01x") // Ctrl-A is nothing special unless asked for
	hear(t, p, "in\x01x")
	say(t, p, "out")
	hear(t, outR, "out")
	inW.Close() // the end of input is not the end of output
	read := make(chan error, 1)
	go func() {
		_, err := p.Read(make([]byte, 1))
		read <- err
	}()
	say(t, p, "more")
	hear(t, outR, "more")
	outR.Close() // nor is a closed pipe the end of the port
	say(t, p, "unheard")
	within(t, "close", p.Close)
	if err := <-read; err != io.EOF {
		t.Errorf("read: %v", err)
	}
}

func TestStdioOnce(t *testing.T) {
	if !stdioTaken.CompareAndSwap(false, true) {
		t.Fatal("a port has not given it back")
	}
	defer stdioTaken.Store(false)
	if _, err := Open(t.Context(), Spec{Kind: Stdio}, Options{}); err == nil || !strings.Contains(err.Error(), "already in use") {
		t.Errorf("two ports have it: %v", err)
	}
}

func TestEscape(t *testing.T) {
	for _, c := range []struct {
		name, in, want string
		quits          int
		help           bool
	}{
		{"plain", "abc", "abc", 0, false},
		{"quit", "a\x01xb", "ab", 1, false},
		{"itself", "\x01\x01x", "\x01x", 0, false},
		{"itself, then quit", "\x01\x01\x01x", "\x01", 1, false},
		{"help", "\x01ha\x01?", "a", 0, true},
		{"unknown command", "\x01zx", "x", 0, false},
		{"at the end", "a\x01", "a", 0, false},
	} {
		for _, size := range []int{1, 2, 64} { // a command may come in pieces
			var help bytes.Buffer
			quits := 0
			e := &escape{quit: func() { quits++ }, port: &help}
			var got []byte
			for in := []byte(c.in); len(in) > 0; {
				n := min(size, len(in))
				got = append(got, e.filter(in[:n:n])...)
				in = in[n:]
			}
			if string(got) != c.want || quits != c.quits || (help.Len() > 0) != c.help {
				t.Errorf("%s, %d at a time: %q, %d quits, help %q", c.name, size, got, quits, &help)
			}
		}
	}
}

func TestEscapeInPort(t *testing.T) {
	master, tty := terminal(t)
	quit := make(chan struct{}, 1)
	p := stdioPort(t, tty, tty, func() { quit <- struct{}{} })
	say(t, master, "\x01h\x01x!")
	hear(t, p, "!")
	hear(t, master, "\r\r\nC-a h")
	select {
	case <-quit:
	default:
		t.Error("C-a x did nothing")
	}
}

// The escape character works though nobody reads the port, and Ctrl-A c turns to the monitor
// and back.
func TestMonitorInPort(t *testing.T) {
	master, tty := terminal(t)
	quit := make(chan struct{})
	p := stdioPort(t, tty, tty, func() { close(quit) })
	m := p.Monitor()
	say(t, m, "greeting") // nobody has turned to it
	for range 40 {
		say(t, master, "the guest does not read this\r") // more than a UART takes
	}
	say(t, master, "\x01cstop\r\x01\x01\x01cguest")
	hear(t, m, "\rstop\r\x01")
	say(t, m, "prompt")
	hear(t, master, "prompt")
	for range 40 {
		hear(t, p, "the guest does not read this\r")
	}
	hear(t, p, "guest")
	say(t, master, strings.Repeat("\x01c\x01c", 2*monitorAhead)+"\x01x") // keys that the monitor does not take
	within(t, "quit", func() error { <-quit; return nil })
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	within(t, "the end of the monitor", func() error {
		for {
			if _, err := m.Read(make([]byte, 1)); err == io.EOF {
				return nil
			}
		}
	})
}

func TestTelnetPort(t *testing.T) {
	spec, err := Parse("telnet:127.0.0.1:0,server,nowait")
	if err != nil {
		t.Fatal(err)
	}
	if p, err := Open(t.Context(), spec, Options{}); err == nil || !strings.Contains(err.Error(), "only a monitor speaks telnet") {
		t.Errorf("%v, %v", p, err)
	}
}
