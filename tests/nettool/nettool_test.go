package nettool

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestSend(t *testing.T) {
	l := listen(t)
	go func() { _ = Serve(l) }()
	for _, streams := range []int{1, 4} {
		r, err := Send(l.Addr().String(), streams, 50*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		if r.Bytes == 0 || r.Seconds < 0.05 {
			t.Errorf("%d streams: %+v", streams, r)
		}
		if want := float64(r.Bytes) * 8 / 1e6 / r.Seconds; r.MbitPS != want {
			t.Errorf("%d streams: %v Mbit/s, want %v", streams, r.MbitPS, want)
		}
	}
}

// Bytes are those that the receiver says it got.
func TestSendCountsConfirmedBytes(t *testing.T) {
	l := listen(t)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(io.Discard, c)
		_, _ = c.Write([]byte{0, 0, 0, 0, 0, 0, 0x30, 0x39})
	}()
	if r, err := Send(l.Addr().String(), 1, time.Millisecond); err != nil || r.Bytes != 12345 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestSendRefuses(t *testing.T) {
	l := listen(t)
	addr := l.Addr().String()
	if _, err := Send(addr, 0, time.Second); err == nil || !strings.Contains(err.Error(), "no measurement") {
		t.Errorf("no streams: %v", err)
	}
	if _, err := Send(addr, 1, 0); err == nil {
		t.Error("no time: no error")
	}
	go func() { // a receiver that goes away without its count
		if c, err := l.Accept(); err == nil {
			c.Close()
		}
	}()
	if _, err := Send(addr, 1, 10*time.Millisecond); err == nil {
		t.Error("no confirmation: no error")
	}
}
