package hmp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

const patience = 20 * time.Second

// client is the other end of a conversation.
type client struct {
	net.Conn
	t   *testing.T
	got []byte
	end chan struct{} // closed at the conversation's end
}

func talk(t *testing.T, m *Monitor, telnet bool) *client {
	t.Helper()
	here, there := net.Pipe()
	if err := here.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	c := &client{Conn: here, t: t, end: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); <-c.end })
	go func() { defer close(c.end); m.Converse(ctx, there, telnet) }()
	return c
}

// say writes without waiting for what comes meanwhile.
func (c *client) say(s string) { go c.Write([]byte(s)) }

// hear reads until s has come, and returns what came before it.
func (c *client) hear(s string) string {
	c.t.Helper()
	var b [512]byte
	for {
		if before, after, ok := bytes.Cut(c.got, []byte(s)); ok {
			c.got = slices.Clone(after)
			return string(before)
		}
		n, err := c.Read(b[:])
		if c.got = append(c.got, b[:n]...); err != nil {
			c.t.Fatalf("no %q in %q: %v", s, c.got, err)
		}
	}
}

func (c *client) ends() {
	c.t.Helper()
	if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		c.t.Error(err)
	}
	select {
	case <-c.end:
	case <-time.After(patience):
		c.t.Error("the conversation does not end")
	}
}

func TestConversation(t *testing.T) {
	m, f := newMonitor()
	c := talk(t, m, false)
	c.hear("help' for more information\r\n(qemu) ")
	c.say("info status\n")
	c.hear("info status\r\nVM status: paused (prelaunch)\r\n(qemu) ")
	c.say("stop\r\ncont\r\n") // one new line each
	c.hear("stop\r\n(qemu) cont\r\n(qemu) ")
	c.say("garbage\x03info vers\t\r") // Ctrl-C, completion
	c.hear("baton v0, with the monitors of QEMU 10.0.2\r\n(qemu) ")
	c.say("sy\t\t") // first as far as it goes, then what there is
	c.hear("system_powerdown  system_reset\r\n(qemu) system_")
	c.say("\x15\x1b[A\x1b[A\r") // history
	c.hear("(qemu) ")
	c.Close()
	c.ends()
	want := []string{"query-status null", "stop null", "cont null", "query-version null", "cont null"}
	if !slices.Equal(f.calls, want) {
		t.Errorf("calls %q, want %q", f.calls, want)
	}
}

// Whatever a client sends, its conversation goes on or ends; it does not spin or grow.
func TestRubbish(t *testing.T) {
	for name, text := range map[string]string{
		"long line":       strings.Repeat("x", maxLine+300),
		"escape":          "\x1b[" + strings.Repeat("1", maxLine+300),
		"pasted":          "\x1b[200~" + strings.Repeat("x", maxLine+300),
		"end of input":    "\x04\x04\x04",
		"not ASCII":       "\xff\xfe\xc3" + strings.Repeat("\xc3\xa4", 300),
		"incomplete rune": strings.Repeat("\xe2", 300),
	} {
		t.Run(name, func(t *testing.T) {
			m, _ := newMonitor()
			c := talk(t, m, false)
			c.hear("(qemu) ")
			c.say(text)
			if len(text) > maxLine {
				c.ends()
				return
			}
			c.say("info version\n")
			c.hear("baton v0")
		})
	}
}

// A client that does not read gets what it asked for, though not to know it.
func TestStall(t *testing.T) {
	ran := make(chan struct{})
	m, _ := newMonitor()
	m.cfg.Do = func(f func()) error { f(); close(ran); return nil }
	c := talk(t, m, false)
	c.hear("(qemu) ")
	c.say("help\r")
	c.hear("help\r\n")
	select {
	case <-ran:
	case <-time.After(patience):
		t.Error("the command is stuck")
	}
}

func TestMachineEnded(t *testing.T) {
	m, _ := newMonitor()
	m.cfg.Do = func(func()) error { return errors.New("ended") }
	c := talk(t, m, false)
	c.hear("(qemu) ")
	c.say("stop\r")
	c.ends()
}

func TestTelnet(t *testing.T) {
	m, f := newMonitor()
	c := talk(t, m, true)
	// RFC 854: WILL ECHO, WILL and DO SUPPRESS-GO-AHEAD, DO NAWS.
	c.hear("\xff\xfb\x01\xff\xfb\x03\xff\xfd\x03\xff\xfd\x1f")
	c.hear("(qemu) ")
	c.say("\xff\xfd\x01\xff\xfd\x03\xff\xfb\x03\xff\xfb\x1f" + "\xff\xfa\x1f\x00\x78\x00\x28\xff\xf0" + "\xff\xf6")
	if got := c.hear("[yes]"); strings.Contains(got, "\xff") {
		t.Errorf("answer to what was agreed on: %q", got)
	}
	c.say("\xff\xfd\x18\xff\xfb\x22\xff\xfd\x18\xff\xf6") // TERMINAL-TYPE, LINEMODE, once more
	if got := c.hear("[yes]"); got != "\r\n\xff\xfc\x18\xff\xfe\x22\r\n" {
		t.Errorf("answers to what is not wanted: %q", got)
	}
	c.say("nonsense\xff\xf8stip\xff\xf7\xff\xf7op\r\x00info status\r\n")
	c.hear("VM status: paused (prelaunch)\r\n(qemu) ")
	if want := []string{"stop null", "query-status null"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %q, want %q", f.calls, want)
	}
	c.say(strings.Repeat("y", 90)) // 120 columns: no new line
	c.hear(strings.Repeat("y", 90))
}

func TestTelnetParse(t *testing.T) {
	for in, want := range map[string]string{
		"a\xff\xffb":                     "a\xffb",
		"a\r\x00b\r\nc\nd":               "a\rb\rc\nd",
		"a\xff\xf1b":                     "ab", // NOP
		"a\xff\xfa\x18\x01x\xff\xffy":    "a",  // a subnegotiation without end
		"\xff\xfa\x1f\x00\x50\xff\xf0ab": "ab", // too short
		"\xff\xf4\xff\xf7\xff\xf8":       "\x03\x7f\x15",
	} {
		for _, size := range []int{1, 3, len(in)} {
			var got []byte
			p := &telnet{refused: map[[2]byte]bool{}, resize: func(c, r int) { t.Errorf("size %d, %d", c, r) }}
			for part := range slices.Chunk([]byte(in), size) {
				typed, _ := p.parse(part)
				got = append(got, typed...)
			}
			if string(got) != want {
				t.Errorf("%q by %d: %q, want %q", in, size, got, want)
			}
		}
	}
}

func FuzzTelnet(f *testing.F) {
	f.Add([]byte("\xff\xfd\x01\xff\xfa\x1f\x00\x50\x00\x19\xff\xf0stop\r\x00"), uint8(3))
	f.Add([]byte("\xff\xff\xff\xfb\xff\xf6"), uint8(1))
	f.Fuzz(func(t *testing.T, in []byte, size uint8) {
		parse := func(size int) (typed, answer []byte) {
			p := &telnet{refused: map[[2]byte]bool{}, resize: func(int, int) {}}
			for part := range slices.Chunk(slices.Clone(in), max(1, size)) {
				a, b := p.parse(part)
				typed, answer = append(typed, a...), append(answer, b...)
			}
			if len(p.sub) > 8 {
				t.Errorf("%d bytes kept", len(p.sub))
			}
			return typed, answer
		}
		typed, answer := parse(len(in))
		typed2, answer2 := parse(int(size))
		if !bytes.Equal(typed, typed2) || !bytes.Equal(answer, answer2) {
			t.Errorf("%q by %d: %q %q, at once %q %q", in, size, typed2, answer2, typed, answer)
		}
		if len(typed) > len(in) || len(answer) > 5*len(in) {
			t.Errorf("%q: %q %q", in, typed, answer)
		}
	})
}

func FuzzConversation(f *testing.F) {
	f.Add([]byte("info status\r\x1b[A\r\t\x1b[200~x\x1b[201~\r"))
	f.Fuzz(func(t *testing.T, in []byte) {
		m, _ := newMonitor()
		m.Converse(context.Background(), &script{r: bytes.NewReader(in)}, false) // it ends
	})
}

// script is a client that reads nothing and goes at the end of its text.
type script struct{ r io.Reader }

func (s *script) Read(p []byte) (int, error)  { return s.r.Read(p) }
func (s *script) Write(p []byte) (int, error) { return len(p), nil }
func (s *script) Close() error                { return nil }
