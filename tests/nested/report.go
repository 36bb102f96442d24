package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// A testEvent is one line of `go test -json` (go doc test2json; build-* events: go help buildjson).
type testEvent struct {
	Action     string
	Package    string
	ImportPath string // of build events
	Test       string
	Elapsed    float64
	Output     string
	Key, Value string // of an attribute: testing.T.Attr
}

// A report reads test events and tells people what matters in them: each result, all that
// a failed test printed, why a test was skipped, and, while nothing happens, what runs.
type report struct {
	print func(format string, args ...any)
	each  bool // a line for each test, not only for each package

	mu      sync.Mutex
	last    time.Time // of a line
	running map[testID]time.Time
	output  map[testID][]string
	build   map[string][]string
	skips   []string

	passed, failed int
	broken         int // packages that failed without a failed test
	failedIn       map[string]bool
}

type testID struct{ pkg, test string }

func newReport(each bool) *report {
	return &report{
		print: say, each: each, running: map[testID]time.Time{}, output: map[testID][]string{},
		build: map[string][]string{}, failedIn: map[string]bool{},
	}
}

// read copies the events to w as they come and takes them in, to the end of r.
func (r *report) read(src io.Reader, w io.Writer) error {
	lines := bufio.NewReader(src)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			if _, err := w.Write(line); err != nil {
				return err
			}
			var e testEvent
			if json.Unmarshal(line, &e) == nil {
				r.event(e)
			} else {
				r.print("%s", strings.TrimRight(string(line), "\n"))
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *report) say(format string, args ...any) {
	r.last = time.Now()
	r.print(format, args...)
}

func (r *report) event(e testEvent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "run", "start":
		r.running[id] = time.Now()
	case "output":
		r.output[id] = append(r.output[id], e.Output)
	case "attr":
		r.say("      %s: %s", e.Key, e.Value)
	case "build-output":
		r.build[e.ImportPath] = append(r.build[e.ImportPath], e.Output)
	case "build-fail":
		r.say("FAIL  %s: does not build\n%s", e.ImportPath, indent(r.build[e.ImportPath]))
	case "pass", "fail", "skip":
		r.result(id, e)
		delete(r.running, id)
		delete(r.output, id)
	}
}

func (r *report) result(id testID, e testEvent) {
	name := short(e.Package)
	if e.Test == "" {
		r.unfinished(e.Package)
		switch {
		case e.Action == "fail" && !r.failedIn[e.Package]:
			r.broken++
			r.say("FAIL  %s\n%s", name, indent(r.output[id]))
		case e.Action == "fail":
			r.say("FAIL  %s", name)
		case !r.each:
			r.say("%-5s %s (%.1f s)", word[e.Action], name, e.Elapsed)
		}
		return
	}
	switch e.Action {
	case "pass":
		r.passed++
	case "skip":
		r.skips = append(r.skips, fmt.Sprintf("skip  %s %s: %s", name, e.Test, reason(r.output[id])))
		r.say("%s", r.skips[len(r.skips)-1])
		return
	case "fail":
		r.failed++
		r.failedIn[e.Package] = true
		r.say("FAIL  %s %s (%.1f s)\n%s", name, e.Test, e.Elapsed, indent(r.output[id]))
		return
	}
	if r.each && !strings.Contains(e.Test, "/") {
		r.say("ok    %s %s (%.1f s)", name, e.Test, e.Elapsed)
	}
}

// unfinished counts as failed the tests that were under way when their package ended.
func (r *report) unfinished(pkg string) {
	for id, since := range r.running {
		if id.pkg != pkg || id.test == "" {
			continue
		}
		delete(r.running, id)
		r.result(id, testEvent{Action: "fail", Package: pkg, Test: id.test, Elapsed: time.Since(since).Seconds()})
	}
}

// A package without tests is "skip" too.
var word = map[string]string{"pass": "ok", "skip": "none"}

// current names the test, or the package, that runs longest, for a line of progress.
func (r *report) current() string {
	var longest testID
	var since time.Time
	for id, t := range r.running {
		better := longest.test == "" && id.test != "" || (longest.test == "") == (id.test == "") && t.Before(since)
		if since.IsZero() || better {
			longest, since = id, t
		}
	}
	if since.IsZero() {
		return "building"
	}
	return fmt.Sprintf("%s, %d s", strings.TrimSpace(short(longest.pkg)+" "+longest.test), int(time.Since(since).Seconds()))
}

// watch says what runs whenever nothing was reported for a while, until stop is closed.
func (r *report) watch(stop <-chan struct{}) {
	const every = 10 * time.Second
	tick := time.NewTicker(every / 2)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			r.mu.Lock()
			if time.Since(r.last) >= every {
				r.say("      … %s", r.current())
			}
			r.mu.Unlock()
		}
	}
}

// ok says whether all that ran passed and something ran.
func (r *report) ok() bool { return r.failed == 0 && r.broken == 0 && r.passed > 0 }

// String is the result in half a line.
func (r *report) String() string {
	s := fmt.Sprintf("%d tests passed", r.passed)
	if r.failed > 0 {
		s += fmt.Sprintf(", %d FAILED", r.failed)
	}
	if r.broken > 0 {
		s += fmt.Sprintf(", %d packages BROKEN", r.broken)
	}
	if len(r.skips) > 0 {
		s += fmt.Sprintf(", %d skipped", len(r.skips))
	}
	return s
}

// reason finds what t.Skip said: the line that names a place in a file.
func reason(output []string) string {
	for i := len(output) - 1; i >= 0; i-- {
		if line := strings.TrimSpace(output[i]); line != "" && !strings.HasPrefix(line, "--- ") && !strings.HasPrefix(line, "=== ") {
			return line
		}
	}
	return "no reason given"
}

func indent(lines []string) string {
	text := strings.TrimRight(strings.Join(lines, ""), "\n")
	return "      " + strings.ReplaceAll(text, "\n", "\n      ")
}

func short(pkg string) string { return strings.TrimPrefix(pkg, "baton/") }
