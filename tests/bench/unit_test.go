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

func TestOwnMemory(t *testing.T) {
	const guest = "7f0000000000-7f0000100000 rw-p 00000000 00:00 0 \nSize:  1024 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 900 kB\nVmFlags: rd wr\n"
	const other = "400000-500000 r-xp 00000000 00:01 7   /bin/vmm\nSize:  100 kB\nShared_Clean: 50 kB\nPrivate_Clean: 8 kB\nPrivate_Dirty: 4 kB\n"
	for _, tt := range []struct {
		name, smaps string
		want        uint64
		ok          bool
	}{
		{"usual", other + guest + other, 24 << 10, true},
		{"a reservation of that size", guest + strings.Replace(guest, "rw-p", "---p", 1) + other, 912 << 10, true},
		{"no guest", other, 0, false},
		{"two of that size", guest + guest, 0, false},
		{"nonsense", guest + "Size: x kB\n", 0, false},
	} {
		got, err := ownMemory(strings.NewReader(tt.smaps), 1<<20)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("%s: %d, %v; want %d", tt.name, got, err, tt.want)
		}
	}
}
