package harness

import (
	"io"
	"net"
	"testing"
	"time"
)

func TestEcho(t *testing.T) {
	for _, broken := range []bool{false, true} {
		here, there := net.Pipe()
		enough := make(chan struct{}) // several chunks have gone round, or the other end has closed
		go func() {
			defer close(enough)
			buf := make([]byte, 100)
			for n := 0; ; n++ {
				k, err := io.ReadAtLeast(there, buf, 1)
				if err != nil {
					return
				}
				if !broken && n == 50 {
					return
				}
				if broken && n == 50 {
					buf[3]++
				}
				if _, err := there.Write(buf[:k]); err != nil {
					return
				}
			}
		}()
		e := newEcho(here)
		select {
		case <-enough:
		case <-time.After(20 * time.Second):
			t.Fatal("nothing comes back")
		}
		r := e.Stop()
		there.Close()
		if r.Chunks == 0 || r.Stall <= 0 || broken != (r.Err != nil) {
			t.Errorf("broken %v: %+v", broken, r)
		}
	}
}
