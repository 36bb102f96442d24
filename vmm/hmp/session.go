package hmp

import (
	"context"
	"errors"
	"io"
	"strings"

	"golang.org/x/term"
)

const (
	prompt   = "(qemu) "
	maxLine  = 8 << 10 // bytes from one return key to the next
	greeting = "baton's monitor - type 'help' for more information\n"
	// Bounds of a window's size: a line is broken at its width.
	minColumns, maxColumns = 20, 1000
)

// Converse talks to one client, who speaks telnet or sends plain text, until he goes or ctx
// is done, and closes the connection. A client that does not read stops his own
// conversation only.
func (m *Monitor) Converse(ctx context.Context, conn io.ReadWriteCloser, isTelnet bool) {
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer conn.Close()
	keys := &keyboard{ReadWriter: conn}
	t := term.NewTerminal(keys, prompt)
	if isTelnet {
		client, err := newTelnet(conn, func(columns, rows int) {
			_ = t.SetSize(min(max(columns, minColumns), maxColumns), rows)
		})
		if err != nil {
			return
		}
		keys.ReadWriter = client
	}
	t.AutoCompleteCallback = m.completer(t)
	_, err := io.WriteString(t, greeting)
	for err == nil {
		var line, text string
		line, err = t.ReadLine()
		if err != nil && !errors.Is(err, term.ErrPasteIndicator) {
			return
		}
		if err = m.cfg.Do(func() { text = m.Run(line) }); err != nil {
			return
		}
		_, err = io.WriteString(t, text)
	}
}

// completer is what the tab key does in t.
func (m *Monitor) completer(t *term.Terminal) func(string, int, rune) (string, int, bool) {
	return func(line string, pos int, key rune) (string, int, bool) {
		if key != '\t' {
			return "", 0, false
		}
		longer, choices := m.Complete(line[:pos])
		if len(choices) > 0 && longer == line[:pos] {
			_, _ = io.WriteString(t, strings.Join(choices, "  ")+"\n")
		}
		return longer + line[pos:], len(longer), true
	}
}

// keyboard is what the editor reads: printable ASCII and the keys that it knows. From
// anything else, or a line without an end, it would not recover.
type keyboard struct {
	io.ReadWriter
	line int  // bytes since the last return key
	cr   bool // the last byte was a carriage return
}

var errLongLine = errors.New("the line is too long")

func (k *keyboard) Read(p []byte) (int, error) {
	for {
		if len(p) == 0 { // the editor waits for the end of an escape sequence that has none
			return 0, errLongLine
		}
		n, err := k.ReadWriter.Read(p)
		out := p[:0]
		for _, c := range p[:n] {
			k.line++
			lf := c == '\n'
			switch {
			case lf && k.cr, c == 0, c == 0x04, c >= 0x80: // Ctrl-D would be the end
			case c == '\r', lf:
				out = append(out, '\r')
				k.line = 0
			case c == ctrlC:
				out = append(out, ctrlU)
			default:
				out = append(out, c)
			}
			k.cr = c == '\r'
		}
		if k.line > maxLine {
			return 0, errLongLine
		}
		if len(out) > 0 || err != nil {
			return len(out), err
		}
	}
}
