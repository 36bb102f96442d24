package main

import (
	"bytes"
	"io"
	"strings"
	"sync"
)

// A terminal shows what a guest or a program says as it comes, behind a margin with its
// name. A shell's prompt waits for what is typed after it, so that it does not stand at
// the end of what was shown before.
type terminal struct {
	w    io.Writer
	name string // "guest" if empty

	mu   sync.Mutex
	held []byte // a prompt
	mid  bool   // in the middle of a line
}

// Write shows p. It never fails.
func (t *terminal) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(p)
	text := append(t.held, bytes.ReplaceAll(p, []byte("\r"), nil)...)
	t.held = nil
	var out strings.Builder
	for len(text) > 0 {
		if !t.mid {
			if s := string(text); s == "$" || s == "$ " {
				t.held = text
				break
			}
			out.WriteString(t.margin())
		}
		line, rest, whole := bytes.Cut(text, []byte("\n"))
		out.Write(line)
		if t.mid = !whole; whole {
			out.WriteByte('\n')
		}
		text = rest
	}
	io.WriteString(t.w, out.String())
	return n, nil
}

func (t *terminal) margin() string {
	name := t.name
	if name == "" {
		name = "guest"
	}
	return "  " + name + strings.Repeat(" ", max(0, 5-len(name))) + " │ "
}

// newline ends a line that is under way.
func (t *terminal) newline() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mid {
		io.WriteString(t.w, "\n")
		t.mid = false
	}
}

// forget drops a prompt after which nothing will be typed.
func (t *terminal) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.held = nil
}
