package bench

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
)

// maxLost is how many lives a bench may lose on an emulated host.
const maxLost = 6

var lost int

// live has guests live through f, as a test of that name. What goes wrong there on an emulated
// host, which loses guests of either VMM now and then, is noted, and all starts again; what was
// recorded before stays. Anywhere else it is a failure.
func live(t *testing.T, name string, f func(testing.TB)) {
	for again := true; again; {
		again = false
		t.Run(name, func(t *testing.T) {
			l := &life{TB: t}
			t.Cleanup(func() { // when all that f did is undone
				if l.wrong == nil {
					return
				}
				text := strings.Join(l.wrong, "; ")
				if lost++; lost > maxLost || !emulated() {
					t.Error(text)
					return
				}
				again = true
				results.notef("%s started again: %s", t.Name(), text)
			})
			done := make(chan struct{})
			go func() {
				defer close(done)
				f(l)
			}()
			<-done
		})
	}
}

// emulated says whether this host's CPU is QEMU's TCG.
func emulated() bool {
	text, _ := os.ReadFile("/proc/cpuinfo")
	return bytes.Contains(text, []byte("QEMU TCG CPU"))
}

// A life is a testing.TB that does not fail but says what went wrong. It is for one goroutine.
type life struct {
	testing.TB
	wrong []string
}

func (l *life) Failed() bool { return l.wrong != nil }
func (l *life) Fail()        { l.wrong = append(l.wrong, "failed") }
func (l *life) FailNow()     { l.Fail(); runtime.Goexit() }
func (l *life) Error(args ...any) {
	l.Helper()
	text := strings.TrimSpace(fmt.Sprintln(args...))
	l.Log(text)
	l.wrong = append(l.wrong, text)
}
func (l *life) Errorf(format string, args ...any) { l.Helper(); l.Error(fmt.Sprintf(format, args...)) }
func (l *life) Fatal(args ...any)                 { l.Helper(); l.Error(args...); runtime.Goexit() }
func (l *life) Fatalf(format string, args ...any) {
	l.Helper()
	l.Error(fmt.Sprintf(format, args...))
	runtime.Goexit()
}
