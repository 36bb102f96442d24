package l0

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// terminal is a pseudo terminal with a program on its slave.
type terminal struct {
	*harness.Log // what it shows
	master       *os.File
	slave        *os.File
	cmd          *exec.Cmd
	before       unix.Termios // how the terminal was before the program had it
}

// openTerminal starts baton on a terminal of its own.
func openTerminal(t *testing.T, args ...string) *terminal {
	t.Helper()
	return openTerminalOf(t, harness.Baton(t), args...)
}

// openTerminalOf starts a program on a terminal of its own.
func openTerminalOf(t *testing.T, program string, args ...string) *terminal {
	t.Helper()
	master, slave := ptyPair(t)
	c := &terminal{harness.NewLog(), master, slave, exec.Command(program, args...), termios(t, slave)}
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = c.slave, c.slave, c.slave
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if c.cmd.ProcessState == nil {
			c.cmd.Process.Kill()
			c.cmd.Wait()
		}
	})
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := c.master.Read(buf)
			c.Write(buf[:n])
			if err != nil {
				c.Close(err)
				return
			}
		}
	}()
	return c
}

func ptyPair(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	raw, err := master.SyscallConn() // Fd would make it blocking, and Close wait for the reader
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err != nil {
			return
		}
		var n int
		if n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN); err == nil {
			slave, err = os.OpenFile(filepath.Join("/dev/pts", fmt.Sprint(n)), os.O_RDWR|unix.O_NOCTTY, 0)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

func termios(t *testing.T, f *os.File) unix.Termios {
	t.Helper()
	v, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *v
}

func (c *terminal) typeAndSee(t *testing.T, keys, pattern string) {
	t.Helper()
	from := c.Len()
	if _, err := c.master.WriteString(keys); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(harness.Context(t, limit), from, pattern); err != nil {
		t.Fatalf("after %q: %v; the terminal shows %q", keys, err, c.String())
	}
}

func TestTerminal(t *testing.T) {
	kernel := tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo)
	for _, tc := range []struct {
		name string
		end  func(*terminal)
	}{
		{"Ctrl-A x", func(c *terminal) { c.master.WriteString("\x01x") }},
		{"SIGTERM", func(c *terminal) { c.cmd.Process.Signal(syscall.SIGTERM) }},
		{"SIGINT", func(c *terminal) { c.cmd.Process.Signal(syscall.SIGINT) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := openTerminal(t, "-kernel", kernel)
			c.typeAndSee(t, "", "^up$")
			if now := termios(t, c.slave); now.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) != 0 {
				t.Errorf("the terminal is not raw: lflag %#x", now.Lflag)
			}
			c.typeAndSee(t, "k", "k")
			c.typeAndSee(t, "\x03", "\x03") // for the guest
			c.typeAndSee(t, "\x01\x01", "\x01")
			c.typeAndSee(t, "\x01h", "C-a x +quit")
			tc.end(c)
			done := make(chan error, 1)
			go func() { done <- c.cmd.Wait() }()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("%v; the terminal shows %q", err, c.String())
				}
			case <-harness.Context(t, limit).Done():
				t.Fatal("still runs")
			}
			if now := termios(t, c.slave); now != c.before {
				t.Errorf("the terminal was\n%+v\nand is\n%+v", c.before, now)
			}
		})
	}
}

// The terminal is as it was after a start that failed, too.
func TestTerminalAfterError(t *testing.T) {
	master, slave := ptyPair(t)
	before := termios(t, slave)
	cmd := exec.Command(harness.Baton(t), "-kernel", os.Args[0]) // an ELF file without a PVH note
	var msg strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, &msg
	if err := cmd.Run(); err == nil || !strings.Contains(msg.String(), "no PVH entry point") {
		t.Errorf("%v: %s", err, &msg)
	}
	if now := termios(t, slave); now != before {
		t.Errorf("the terminal was\n%+v\nand is\n%+v", before, now)
	}
	master.Close()
}

func TestSerial(t *testing.T) {
	dir := shortDir(t)
	hello := tiny.Kernel(t, tiny.Say("hello\n"), tiny.PowerOff, tiny.Halt)
	echo := tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo)
	t.Run("file", func(t *testing.T) {
		file := filepath.Join(dir, "out")
		if err := os.WriteFile(file, []byte("what was there before, which is longer"), 0o600); err != nil {
			t.Fatal(err)
		}
		g := start(t, hello, "-serial", "file:"+file)
		ends(t, g, "guest-shutdown")
		if text, err := os.ReadFile(file); err != nil || string(text) != "hello\n" {
			t.Errorf("the file has %q (%v)", text, err)
		}
	})
	for _, spec := range []string{"none", "null"} {
		t.Run(spec, func(t *testing.T) {
			g := start(t, hello, "-serial", spec)
			ends(t, g, "guest-shutdown")
			if g.Serial.String() != "" {
				t.Errorf("stdout: %q", g.Serial)
			}
		})
	}
	t.Run("unix server", func(t *testing.T) {
		path := filepath.Join(dir, "server")
		g := start(t, echo, "-serial", "unix:"+path+",server=on,wait=off")
		g.WaitEvent(harness.Context(t, limit), "RESUME")
		for range 2 { // one client after the other
			conn := connect(t, path)
			conn.SetDeadline(time.Now().Add(limit))
			echoes(t, conn)
			conn.Close()
		}
		g.Signal(syscall.SIGTERM)
		ends(t, g, "host-signal")
		missing(t, path)
	})
	t.Run("unix server that waits", func(t *testing.T) {
		path := filepath.Join(dir, "wait")
		g := start(t, hello, "-serial", "unix:"+path+",server=on")
		conn := connect(t, path)
		if got := readAll(t, conn); got != "hello\n" {
			t.Errorf("got %q: the guest did not wait for its console", got)
		}
		ends(t, g, "guest-shutdown")
		missing(t, path)
	})
	t.Run("interrupted while it waits", func(t *testing.T) {
		path := filepath.Join(dir, "never")
		g := start(t, hello, "-serial", "unix:"+path+",server=on")
		harness.WaitFile(t, harness.Context(t, limit), path)
		g.Signal(syscall.SIGTERM)
		if code := g.Wait(harness.Context(t, limit)); code != 0 || g.Stderr.String() != "" {
			t.Errorf("exit code %d: %s", code, g.Stderr)
		}
		missing(t, path)
	})
	t.Run("unix client by chardev", func(t *testing.T) {
		path := filepath.Join(dir, "client")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		g := start(t, hello, "-chardev", "socket,id=c,path="+path, "-serial", "chardev:c")
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got := readAll(t, conn); got != "hello\n" {
			t.Errorf("got %q", got)
		}
		ends(t, g, "guest-shutdown")
	})
}

// shortDir is a folder whose name leaves room for a socket's: t.TempDir's may not.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "l0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// connect connects to a socket that a server is about to make.
func connect(t *testing.T, path string) net.Conn {
	t.Helper()
	ctx := harness.Context(t, limit)
	harness.WaitFile(t, ctx, path)
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			t.Cleanup(func() { conn.Close() })
			return conn
		}
		if !errors.Is(err, unix.ECONNREFUSED) || ctx.Err() != nil { // it is bound before it listens
			t.Fatal(err)
		}
	}
}

func readAll(t *testing.T, conn net.Conn) string {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(limit))
	text, err := io.ReadAll(conn)
	if err != nil {
		t.Errorf("after %q: %v", text, err)
	}
	return string(text)
}

// echoes checks that what is sent comes back.
func echoes(t *testing.T, f io.ReadWriter) {
	t.Helper()
	text := []byte("a line of text\n")
	if _, err := f.Write(text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(f, got); err != nil || !bytes.Equal(got, text) {
		t.Errorf("sent %q, got %q (%v)", text, got, err)
	}
}
