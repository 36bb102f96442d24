package nettool

import (
	"testing"
	"time"
)

func TestDatagrams(t *testing.T) {
	d := &Datagrams{comes: make(chan struct{})}
	now := time.Now()
	for i, n := range []uint64{5, 6, 8, 7, 7, 11} {
		d.take(n, now.Add(time.Duration(i)*time.Millisecond))
	}
	if r := d.Result(); r != (DatagramResult{Received: 6, Lost: 2, Doubled: 1, Reordered: 1, GapMicros: 1000}) {
		t.Errorf("%+v", r)
	}
	if err := d.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	for at, rate := range d.Rate() {
		if want := float64(now.UnixMicro()) / 1e6; at != want || rate != 6/rateStep.Seconds() {
			t.Errorf("at %v %v a second, want 6 in %v at %v", at, rate, rateStep, want)
		}
	}
}

func TestDatagramsBothWays(t *testing.T) {
	a, err := StartDatagrams("127.0.0.1:46811", "127.0.0.1:46812", 1000)
	if err != nil {
		t.Skip(err)
	}
	b, err := StartDatagrams("127.0.0.1:46812", "127.0.0.1:46811", 1000)
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); a.Result().Received < 20 || b.Result().Received < 20; {
		if time.Since(begin) > 20*time.Second {
			t.Fatal("nothing comes")
		}
	}
	if r := b.Stop(); r.Lost != 0 || r.Doubled != 0 {
		t.Errorf("%+v", r)
	}
	a.Stop()
}
