package harness

import (
	"errors"
	"os"
	"testing"
	"time"
)

func TestPinger(t *testing.T) {
	fd, err := pingSocket([4]byte{127, 0, 0, 1})
	if errors.Is(err, os.ErrPermission) {
		t.Skip("needs root")
	} else if err != nil {
		t.Fatal(err)
	}
	p := newPinger(t, fd, time.Millisecond)
	if err := p.Wait(Context(t, 10*time.Second), 50); err != nil {
		t.Fatal(err)
	}
	p.Stop()
	if r := p.Pings(); r.Lost != 0 || r.Longest().Duration() <= 0 || r.Sent <= 50 || len(r.Outages) != r.Sent-1 {
		t.Errorf("%v, %d outages", r, len(r.Outages))
	}
}

func TestPings(t *testing.T) {
	at := func(ms int) time.Time { return time.Unix(0, int64(ms)*int64(time.Millisecond)) }
	p := &Pinger{}
	for i := range 20 {
		p.sent = append(p.sent, at(i+1))
		heard := at(i + 1)
		switch {
		case i >= 5 && i < 9: // lost
			heard = time.Time{}
		case i == 9: // held
			heard = at(13)
		case i >= 18: // under way
			heard = time.Time{}
		}
		p.heard = append(p.heard, heard)
	}
	r := p.Pings()
	if o := r.Longest(); r.Sent != 18 || r.Lost != 4 || o.From != at(5) || o.To != at(11) || o.Lost != 4 {
		t.Errorf("%v, %v", r, o)
	}
}
