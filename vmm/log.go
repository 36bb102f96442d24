package vmm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"
)

// openLog returns the log that goes to a file (-D), which is appended to, or to stderr.
func openLog(path string) (_ *slog.Logger, done func(), err error) {
	if path == "" {
		return slog.New(&logHandler{w: os.Stderr, budget: new(logBudget)}), func() {}, nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, nil, fmt.Errorf("open log: %w", err)
	}
	return slog.New(&logHandler{w: f, budget: new(logBudget)}), func() { _ = f.Close() }, nil
}

// logHandler writes records as `baton: warning: message key=value`, in one write each.
type logHandler struct {
	w      io.Writer
	attrs  []byte
	budget *logBudget
}

// A guest can make baton complain as often as it likes; it must not fill the host's disk.
const (
	logBurst = 200 // records that may come at once
	logRate  = 10  // records in a second, in the long run
)

// logBudget counts how many records may still be written.
type logBudget struct {
	mu      sync.Mutex
	spent   float64
	last    time.Time
	dropped int
}

// take asks for one record at that time; dropped is how many were refused before it.
func (b *logBudget) take(now time.Time) (dropped int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spent = max(0, b.spent-logRate*now.Sub(b.last).Seconds())
	b.last = now
	if b.spent+1 > logBurst {
		b.dropped++
		return 0, false
	}
	b.spent++
	dropped, b.dropped = b.dropped, 0
	return dropped, true
}

func (h *logHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (h *logHandler) Handle(_ context.Context, r slog.Record) error {
	dropped, ok := h.budget.take(r.Time)
	if !ok {
		return nil
	}
	var b bytes.Buffer
	if dropped > 0 {
		fmt.Fprintf(&b, "baton: %d messages were left out\n", dropped)
	}
	b.WriteString("baton: ")
	switch {
	case r.Level >= slog.LevelError:
		b.WriteString("error: ")
	case r.Level >= slog.LevelWarn:
		b.WriteString("warning: ")
	}
	b.WriteString(r.Message)
	b.Write(h.attrs)
	r.Attrs(func(a slog.Attr) bool { fmt.Fprintf(&b, " %s=%v", a.Key, a.Value); return true })
	b.WriteByte('\n')
	_, err := h.w.Write(b.Bytes())
	return err
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	b := bytes.NewBuffer(bytes.Clone(h.attrs))
	for _, a := range attrs {
		fmt.Fprintf(b, " %s=%v", a.Key, a.Value)
	}
	return &logHandler{h.w, b.Bytes(), h.budget}
}

// WithGroup is not used: keys are flat.
func (h *logHandler) WithGroup(string) slog.Handler { return h }

// lineLogger logs what the guest writes to the debug port, a line at a time.
type lineLogger struct {
	log *slog.Logger

	mu   sync.Mutex
	line []byte
}

// maxDebugLine bounds a line of the debug port, in bytes.
const maxDebugLine = 512

func (l *lineLogger) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range p {
		if c != '\n' {
			l.line = append(l.line, c)
		}
		if c == '\n' || len(l.line) == maxDebugLine {
			l.log.Info("guest: " + fmt.Sprintf("%q", l.line))
			l.line = l.line[:0]
		}
	}
	return len(p), nil
}
