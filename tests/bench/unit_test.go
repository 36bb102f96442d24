package bench

import (
	"strings"
	"testing"
)

func TestTargets(t *testing.T) {
	for _, tt := range []struct {
		f   figure
		met bool
	}{
		{figure{Target: target{MaxRatio: 0.6}, Baton: []float64{9, 6, 1}, Peer: []float64{10}}, true},
		{figure{Target: target{MaxRatio: 0.6}, Baton: []float64{6, 7}, Peer: []float64{10}}, false},
		{figure{Target: target{MinRatio: 0.9}, Baton: []float64{9}, Peer: []float64{10}}, true},
		{figure{Target: target{MinRatio: 0.9}, Baton: []float64{8}, Peer: []float64{10}}, false},
		{figure{Target: target{Max: 20, MaxRatio: 0.5}, Baton: []float64{21}, Peer: []float64{50}}, false},
		{figure{Target: target{Max: 20}, Peer: []float64{50}}, false}, // nothing was measured
	} {
		r := tt.f.result()
		if r.Met == nil || *r.Met != tt.met {
			t.Errorf("%+v: %+v, want met %v", tt.f, r, tt.met)
		}
	}
	if r := (figure{Baton: []float64{1}}).result(); r.Met != nil {
		t.Error("met without a target")
	}
}

func TestLine(t *testing.T) {
	if base, slope, off := line([]float64{1, 2, 3}, []float64{10, 12, 14}); base != 8 || slope != 2 || off != 0 {
		t.Errorf("%v + %v x, off by %v", base, slope, off)
	}
	if base, slope, off := line([]float64{1, 2, 3}, []float64{3, 0, 3}); base != 2 || slope != 0 || off != 2 {
		t.Errorf("%v + %v x, off by %v", base, slope, off)
	}
}

func TestTable(t *testing.T) {
	r := report{Where: "somewhere"}
	f := r.figure("speed", "m/s", target{MinRatio: 0.9})
	f.Baton, f.Peer = []float64{10, 30, 20}, []float64{40}
	if r.figure("speed", "m/s", target{}) != f {
		t.Error("a second figure of the same name")
	}
	r.notef("a note")
	var text, data strings.Builder
	if err := r.writeTable(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"somewhere", "speed, m/s", "20.0 (10.0 to 30.0)", "0.50", "ratio at least 0.9", "NO", "* a note"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
	if err := r.writeJSON(&data); err != nil || !strings.Contains(data.String(), `"met": false`) {
		t.Errorf("%v\n%s", err, data.String())
	}
}

func TestLife(t *testing.T) {
	l := &life{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if l.Errorf("guest %d", 1); !l.Failed() {
			t.Error("not failed after an error")
		}
		l.Fatal("gone", 2)
		t.Error("goes on after the end")
	}()
	<-done
	if got := strings.Join(l.wrong, "; "); got != "guest 1; gone 2" {
		t.Errorf("wrong: %q", got)
	}
}
