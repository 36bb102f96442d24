package vmm

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestLogBudget(t *testing.T) {
	var out bytes.Buffer
	h := (&logHandler{w: &out, budget: new(logBudget)}).WithAttrs([]slog.Attr{slog.Int("n", 1)})
	start := time.Unix(1000, 0)
	record := func(at time.Duration) {
		if err := h.Handle(context.Background(), slog.NewRecord(start.Add(at), slog.LevelWarn, "guest", 0)); err != nil {
			t.Fatal(err)
		}
	}
	for range 1000 {
		record(0)
	}
	if n := strings.Count(out.String(), "baton: warning: guest n=1\n"); n != logBurst || n*len("baton: warning: guest n=1\n") != out.Len() {
		t.Errorf("%d of 1000 records were written, want %d", n, logBurst)
	}
	out.Reset()
	for range 50 {
		record(time.Second)
	}
	if want := "baton: 800 messages were left out\n" + strings.Repeat("baton: warning: guest n=1\n", logRate); out.String() != want {
		t.Errorf("a second later:\n%s", &out)
	}
	out.Reset()
	record(time.Hour)
	if want := "baton: 40 messages were left out\nbaton: warning: guest n=1\n"; out.String() != want {
		t.Errorf("an hour later:\n%s", &out)
	}
}
