package main

import (
	"fmt"
	"os"
	"sync"
	"time"
)

// A progress says on stderr that something is under way: after 2 s for the first time,
// then ever more seldom, so that nobody has to wonder and no log fills up.
type progress struct {
	start time.Time
	stop  chan struct{}
	done  sync.WaitGroup
}

// startProgress begins; what is the line, without its time.
func startProgress(what string) *progress {
	p := &progress{start: time.Now(), stop: make(chan struct{})}
	p.done.Go(func() {
		for next := 2 * time.Second; ; next *= 2 {
			select {
			case <-p.stop:
				return
			case <-time.After(time.Until(p.start.Add(next))):
				say("%s … %d s", what, int(next.Seconds()))
			}
		}
	})
	return p
}

// end stops it and returns how long it took. It may be called more than once.
func (p *progress) end() time.Duration {
	select {
	case <-p.stop:
	default:
		close(p.stop)
	}
	p.done.Wait()
	return time.Since(p.start)
}

// say prints a line for people; stdout belongs to the test events.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}
