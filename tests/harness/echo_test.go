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
		go func() {
			buf := make([]byte, 100)
			for n := 0; ; n++ {
				k, err := io.ReadAtLeast(there, buf, 1)
				if err != nil {
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
		for begin := time.Now(); time.Since(begin) < 20*time.Second; {
			e.mu.Lock()
			enough := e.result.Chunks > 3 && !broken || e.result.Err != nil
			e.mu.Unlock()
			if enough {
				break
			}
			time.Sleep(time.Millisecond)
		}
		there.Close()
		if r := e.Stop(); r.Chunks == 0 || r.Stall <= 0 || broken && r.Err == nil {
			t.Errorf("broken %v: %+v", broken, r)
		}
	}
}
