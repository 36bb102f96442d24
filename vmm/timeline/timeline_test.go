package timeline

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
)

const sourceLog = `{"timestamp":{"seconds":99,"microseconds":0},"event":"RESUME","seq":1}
{"timestamp":{"seconds":100,"microseconds":0},"event":"MIGRATION","data":{"status":"setup"}}
{"timestamp":{"seconds":100,"microseconds":10000},"event":"UNPLUG_PRIMARY","data":{"device-id":"primary0"}}
{"timestamp":{"seconds":100,"microseconds":10100},"event":"FAILOVER_STATE","data":{"device-id":"primary0","from":"primary","state":"unplugging"}}
{"timestamp":{"seconds":100,"microseconds":95000},"event":"FAILOVER_STATE","data":{"device-id":"primary0","from":"unplugging","state":"standby"}}
{"timestamp":{"seconds":100,"microseconds":95500},"event":"MIGRATION","data":{"status":"active"}}

{"timestamp":{"seconds":101,"microseconds":0},"event":"STOP"}
{"return":{}}
`

const targetLog = `{"timestamp":{"seconds":101,"microseconds":50000},"event":"RESUME"}
{"timestamp":{"seconds":101,"microseconds":60000},"event":"FAILOVER_STATE","data":{"device-id":"<b>","state":"plugging"}}
{"timestamp":{"seconds":101,"microseconds":260000},"event":"FAILOVER_STATE","data":{"device-id":"<b>","state":"primary"}}
`

func read(t *testing.T, log string) []Event {
	t.Helper()
	events, err := ReadEvents(strings.NewReader(log))
	if err != nil {
		t.Fatal(err)
	}
	return events
}

func TestPhases(t *testing.T) {
	var got []string
	for _, p := range Phases(read(t, sourceLog), read(t, targetLog)) {
		got = append(got, fmt.Sprintf("%s %.1f", p.Name, 1000*(p.To-p.From)))
	}
	want := "all of it 1260.0, primary taken away 85.0, RAM 904.5, stop to resume 50.0, primary plugged 200.0"
	if s := strings.Join(got, ", "); s != want {
		t.Errorf("%s, want %s", s, want)
	}
	if p := Phases(nil, nil); p != nil {
		t.Errorf("of nothing: %v", p)
	}
}

func TestErrors(t *testing.T) {
	for _, log := range []string{"x", `{"event":"A"} {}`, `{"event":"A","timestamp":{"seconds":1e300}}`, `{"event":"A","timestamp":{"seconds":-1}}`} {
		if _, err := ReadEvents(strings.NewReader("\n" + log)); err == nil || !strings.Contains(err.Error(), "line 2: ") {
			t.Errorf("%q: %v", log, err)
		}
	}
	for _, series := range []string{"x", "1", "1,x", "NaN,1", "1,Inf", ",", "1e300,1"} {
		if _, err := ReadPoints(strings.NewReader(series)); err == nil {
			t.Errorf("%q: no error", series)
		}
	}
}

// draw checks that a page is well formed and looks nothing up elsewhere.
func draw(t testing.TB, p Page) string {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, p); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for _, bad := range []string{"http", "src=", "href", "<script", "NaN"} {
		if strings.Contains(text, bad) {
			t.Fatalf("%q is in the page", bad)
		}
	}
	for i, part := range strings.Split(text, "<svg")[1:] {
		d := xml.NewDecoder(strings.NewReader("<svg" + part[:strings.Index(part, "</svg>")+6]))
		for {
			if _, err := d.Token(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("drawing %d: %v", i, err)
			}
		}
	}
	return text
}

func TestPage(t *testing.T) {
	points, err := ReadPoints(strings.NewReader("101.01,\n100.5,0.5\n100.6,0.7\n101.1,40\n5,5\n"))
	if err != nil || len(points) != 5 || !math.IsNaN(points[3].Value) {
		t.Fatal(points, err)
	}
	text := draw(t, Page{
		Title: "a & b", Notes: []string{"a <note>"},
		Table: [][]string{{"head"}, {"<cell>"}},
		Acts:  []Act{{"act one", []Side{{"source", read(t, sourceLog)}, {"<target>", read(t, targetLog)}}, []Series{{"ping, ms", points}, {"empty", nil}}}},
	})
	for _, want := range []string{
		"<title>a &amp; b</title>", "a &lt;note&gt;", "&lt;target&gt;", "<td>stop to resume</td><td>1.063 s</td><td>50.0</td>",
		"failover state plugging &lt;b&gt;", "migration setup", `fill="#2a2"`, `fill="#06c"`, ">stop<", ">resume<", ">plug<", ">unplug<",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in the page", want)
		}
	}
	if strings.Contains(text, "99.000") || strings.Contains(text, "-1.0") {
		t.Error("the page begins before the migration")
	}
	draw(t, Page{})
	draw(t, Page{Acts: []Act{{}, {Sides: []Side{{"a", nil}, {"b", nil}}}}})
}

func FuzzPage(f *testing.F) {
	f.Add(`{"timestamp":{"seconds":1},"event":"STOP"}`, `{"timestamp":{"seconds":2},"event":"RESUME"}`, "1,2\n3,\n")
	f.Fuzz(func(t *testing.T, source, target, series string) {
		var a Act
		for _, log := range []string{source, target} {
			events, _ := ReadEvents(strings.NewReader(log))
			a.Sides = append(a.Sides, Side{"x", events})
		}
		points, _ := ReadPoints(strings.NewReader(series))
		a.Series = []Series{{"s", points}}
		if err := Write(io.Discard, Page{Acts: []Act{a}}); err != nil {
			t.Fatal(err)
		}
	})
}
