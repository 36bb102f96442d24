package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/journey"
	"baton/tests/nettool"
	"baton/vmm/timeline"
)

// The page, as a line of the output, does not come to the terminal; whatever else does comes at
// once, however it is cut.
func TestPageFilter(t *testing.T) {
	text := "one\ndemo\ndemo.html" + ":" + base64.StdEncoding.EncodeToString([]byte("<page>")) + "\npassword: "
	for size := 1; size < len(text); size++ {
		var out bytes.Buffer
		f := &pageFilter{out: &out}
		for rest := text; rest != ""; {
			n := min(size, len(rest))
			if _, err := f.Write([]byte(rest[:n])); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if out.String() != "one\ndemo\npassword: " || string(f.page) != "<page>" {
			t.Fatalf("%d bytes at a time: %q, page %q", size, &out, f.page)
		}
	}
}

// A page is large; what reads it must not take longer the more there is of it already.
func TestLargePage(t *testing.T) {
	f := &pageFilter{out: io.Discard}
	const size = 8 << 20
	text := pageMark + base64.StdEncoding.EncodeToString(make([]byte, size)) + "\n"
	if _, err := f.Write([]byte(text)); err != nil || len(f.page) != size {
		t.Fatalf("page of %d bytes, %v", len(f.page), err)
	}
}

func TestTable(t *testing.T) {
	trip := &journey.Trip{
		Way: "baton", Status: "completed", Plugged: 0.25,
		Phases: []timeline.Phase{{Name: "RAM", From: 1, To: 1.5}},
		Pings:  harness.Pings{Sent: 10, Lost: 1, Outages: []harness.Outage{{To: time.Time{}.Add(time.Second)}}},
		In:     nettool.DatagramResult{Lost: 3}, Out: nettool.DatagramResult{Doubled: 4},
	}
	rows := table([]*journey.Trip{trip})
	if got := strings.Join(rows[1], "|"); got != "baton|-|500|-|250|1 of 10|1000|3, 0|0, 4|0" {
		t.Error(got)
	}
	var b bytes.Buffer
	printTable(&b, rows)
	if !strings.Contains(b.String(), "  pings lost                            1 of 10\n") {
		t.Error(b.String())
	}
	b.Reset()
	if err := timeline.Write(&b, pageOf([]*journey.Trip{trip}, rows)); err != nil || !strings.Contains(b.String(), "<td>1 of 10</td>") {
		t.Error(err)
	}
}

func TestScene(t *testing.T) {
	var undone []string
	err := scene(t.Context(), "first", func(s *stage) {
		s.Cleanup(func() { undone = append(undone, "a") })
		s.Cleanup(func() {
			undone = append(undone, "b")
			s.Cleanup(func() { undone = append(undone, "c") })
		})
		s.Fatalf("it fails: %d", 7)
	})
	if err == nil || err.Error() != "first: it fails: 7" || strings.Join(undone, "") != "bca" {
		t.Errorf("%v, undone %v", err, undone)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := scene(ctx, "second", func(*stage) {}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
