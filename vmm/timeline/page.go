package timeline

import (
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"math"
	"strings"
)

// Page is what is drawn.
type Page struct {
	Title string
	Table [][]string // shown above all, the first row as its head
	Acts  []Act
	Notes []string
}

// Act is one guest's way.
type Act struct {
	Title  string
	Sides  []Side // source and target, as a rule
	Series []Series
}

var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{{.Title}}</title>
<style>
body{font:15px/1.4 system-ui,sans-serif;margin:1em auto;padding:0 .8em;max-width:52em;color:#111;background:#fff}
h1{font-size:1.25em}h2{font-size:1.1em;margin:2em 0 .3em}h3{font-size:1em;margin:1.2em 0 .3em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.15em .9em .15em 0;text-align:left;border-bottom:1px solid #ccc;font-size:.9em}
svg{width:100%;height:auto;display:block}.way{max-width:38em}
.wide{overflow-x:auto}text{font:11px system-ui,sans-serif;fill:#111}.dim{fill:#777}
@media print{body{max-width:none;margin:0;font-size:11px}svg{break-inside:avoid}h2,h3{break-after:avoid}}
</style></head><body>
<h1>{{.Title}}</h1>
{{define "table"}}<div class="wide"><table>{{range $i, $row := .}}<tr>{{range $row}}{{if $i}}<td>{{.}}</td>{{else}}<th>{{.}}</th>{{end}}{{end}}</tr>
{{end}}</table></div>{{end}}
{{with .Table}}{{template "table" .}}{{end}}
{{range .Notes}}<p>{{.}}</p>
{{end}}{{range .Drawings}}{{with .Title}}<h2>{{.}}</h2>
{{end}}{{with .Phases}}{{template "table" .}}{{end}}
{{range .Plots}}<h3>{{.Name}}</h3>
{{.SVG}}
{{end}}<h3>Events</h3>
<div class="way">{{.Way}}</div>
{{end}}</body></html>
`))

type plot struct {
	Name string
	SVG  template.HTML
}

// Write draws the page.
func Write(w io.Writer, p Page) error {
	drawings := []drawing{}
	for _, a := range p.Acts {
		drawings = append(drawings, a.draw())
	}
	return page.Execute(w, struct {
		Page
		Drawings []drawing
	}{p, drawings})
}

type drawing struct {
	Title  string
	Phases [][]string
	Plots  []plot
	Way    template.HTML
}

func (a *Act) draw() drawing {
	from, to := window(a.Sides)
	d := drawing{Title: a.Title, Way: way(a.Sides, from, to)}
	if len(a.Sides) > 1 {
		d.Phases = [][]string{{"Phase", "from", "ms"}}
		for _, ph := range Phases(a.Sides[0].Events, a.Sides[1].Events) {
			d.Phases = append(d.Phases, []string{ph.Name, seconds(ph.From - from), fmt.Sprintf("%.1f", 1000*(ph.To-ph.From))})
		}
	}
	marks := switches(a.Sides)
	for _, s := range a.Series {
		d.Plots = append(d.Plots, plot{s.Name, s.draw(from, to, marks)})
	}
	return d
}

func seconds(s float64) string { return fmt.Sprintf("%.3f s", s) }

// mark is a moment at which the guest's frames begin to go another way.
type mark struct {
	at   float64
	name string
}

// switches are the switch points that the events tell of.
func switches(sides []Side) (list []mark) {
	for i, s := range sides {
		for j := range s.Events {
			e := &s.Events[j]
			switch {
			case e.Name == "STOP" && i == 0:
				list = append(list, mark{e.Time, "stop"})
			case e.Name == "RESUME" && i > 0:
				list = append(list, mark{e.Time, "resume"})
			case e.Name == "UNPLUG_PRIMARY":
				list = append(list, mark{e.Time, "unplug"})
			case e.Name == "FAILOVER_SWITCHED":
				list = append(list, mark{e.Time, "to " + e.text("to")})
			case e.Name == "FAILOVER_STATE" && e.text("state") == "plugging":
				list = append(list, mark{e.Time, "plug"})
			}
		}
	}
	return list
}

// svg writes the elements of one drawing.
type svg struct{ strings.Builder }

func (b *svg) f(format string, args ...any) { fmt.Fprintf(b, format+"\n", args...) }

func (b *svg) text(x, y float64, class, text string) {
	b.f(`<text x="%.1f" y="%.1f" class="%s">%s</text>`, x, y, class, template.HTMLEscapeString(text))
}

// html is the drawing with its size in units, of which a phone is about 400 wide.
func (b *svg) html(width, height float64) template.HTML {
	return template.HTML(fmt.Sprintf("<svg viewBox=\"0 0 %.0f %.0f\" role=\"img\">\n%s</svg>", width, height, b.String()))
}

const (
	plotWidth, plotHeight = 420, 170
	plotLeft, plotRight   = 34, 416
	plotTop, plotBottom   = 30, 150
)

// draw draws a series over time. Values that did not come are ticks at the bottom.
func (s *Series) draw(from, to float64, marks []mark) template.HTML {
	var b svg
	highest := 0.0
	var points []Point
	for _, p := range s.Points {
		if p.Time >= from && p.Time <= to {
			points = append(points, p)
			highest = max(highest, orZero(p.Value))
		}
	}
	highest = nice(highest)
	x := func(t float64) float64 { return plotLeft + (t-from)/(to-from)*(plotRight-plotLeft) }
	y := func(v float64) float64 { return plotBottom - v/highest*(plotBottom-plotTop) }
	for _, v := range []float64{0, highest / 2, highest} {
		b.f(`<path d="M%d %.1fH%d" stroke="#ddd"/>`, plotLeft, y(v), plotRight)
		b.text(2, y(v)+4, "dim", fmt.Sprintf("%.3g", v))
	}
	for t := 0.0; t <= to-from; t += nice((to-from)/5) / 2 {
		b.text(x(from+t)-6, plotBottom+14, "dim", fmt.Sprintf("%.3g s", t))
	}
	row := 0
	for _, m := range marks {
		if m.at < from || m.at > to {
			continue
		}
		b.f(`<path d="M%.1f %dV%d" stroke="#b40" stroke-dasharray="3 2"/>`, x(m.at), plotTop-4, plotBottom)
		b.text(min(x(m.at)+1, plotRight-40), float64(8+10*(row%3)), "", m.name)
		row++
	}
	var line, missing strings.Builder
	open := false
	for _, p := range points {
		if math.IsNaN(p.Value) {
			fmt.Fprintf(&missing, "M%.1f %dv-6", x(p.Time), plotBottom)
			open = false
			continue
		}
		if open {
			line.WriteByte('L')
		} else {
			line.WriteByte('M')
		}
		fmt.Fprintf(&line, "%.1f %.1f", x(p.Time), y(p.Value))
		open = true
	}
	b.f(`<path d="%s" fill="none" stroke="#06c" stroke-linecap="round"/>`, line.String())
	b.f(`<path d="%s" fill="none" stroke="#d00"/>`, missing.String())
	return b.html(plotWidth, plotHeight)
}

// nice is a round number that is not less.
func nice(v float64) float64 {
	if v <= 0 || math.IsInf(v, 0) {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(v)))
	for _, m := range []float64{1, 2, 5} {
		if v <= m*power {
			return m * power
		}
	}
	return 10 * power
}

const (
	wayWidth  = 420
	wayStep   = 14  // between two lines of text
	wayTop    = 34  // below the names of the sides
	wayColumn = 205 // of the second side
	wayMin    = 300 // height
)

// way draws the events, time going down, a column for each side: bars for what the guest and
// its primary do there, and a label for each event.
func way(sides []Side, from, to float64) template.HTML {
	var b svg
	n := 0
	for _, s := range sides {
		k := 0
		for _, e := range s.Events {
			if e.Time >= from {
				k++
			}
		}
		n = max(n, k)
	}
	height := max(float64(n)*wayStep*1.3, wayMin)
	y := func(t float64) float64 { return wayTop + (min(max(t, from), to)-from)/(to-from)*height }
	bottom := wayTop + height
	for i := range sides {
		left := float64(i * wayColumn)
		b.text(left+40, 12, "", sides[i].Name)
		b.f(`<text x="%.1f" y="26" class="dim"><tspan fill="#2a2">▮</tspan> guest runs <tspan fill="#06c">▮</tspan> primary</text>`, left+40)
		for _, bar := range bars(sides[i].Events, to) {
			if bar.to >= from {
				b.f(`<rect x="%.1f" y="%.1f" width="6" height="%.1f" fill="%s"/>`, left+bar.column*9+40-22, y(bar.from), max(y(bar.to)-y(bar.from), 1), bar.colour)
			}
		}
		label := float64(wayTop) - wayStep
		for j := range sides[i].Events {
			e := &sides[i].Events[j]
			if e.Time < from {
				continue
			}
			at := y(e.Time)
			label = max(at+4, label+wayStep)
			b.f(`<path d="M%.1f %.1fh6L%.1f %.1f" fill="none" stroke="#999" stroke-width=".6"/>`, left+36, at, left+50, label-4)
			b.text(left+52, label, "", e.label(from))
			bottom = max(bottom, label)
		}
	}
	for t := 0.0; t <= to-from; t += nice((to-from)/8) / 2 {
		b.text(0, y(from+t)+4, "dim", fmt.Sprintf("%.2g", t))
	}
	return b.html(wayWidth, bottom+12)
}

// label is an event in a few words.
func (e *Event) label(from float64) string {
	words := []string{fmt.Sprintf("%.3f", e.Time-from), strings.ToLower(strings.ReplaceAll(e.Name, "_", " "))}
	for _, key := range []string{"status", "pass", "state", "to", "point", "outage-ms", "device-id", "device", "reason"} {
		switch v := e.Data[key].(type) {
		case nil:
		case string:
			words = append(words, v)
		default:
			text, _ := json.Marshal(v)
			words = append(words, string(text))
		}
	}
	text := []rune(strings.Join(words, " "))
	if len(text) > 34 {
		text = append(text[:33], '…')
	}
	return string(text)
}

// bar is a time in which something was so.
type bar struct {
	from, to float64
	column   float64 // 0 the guest, 1 its primary
	colour   string
}

func bars(events []Event, end float64) (list []bar) {
	open := map[float64]*bar{}
	change := func(column, at float64, colour string) {
		if b := open[column]; b != nil {
			b.to = at
			list = append(list, *b)
			delete(open, column)
		}
		if colour != "" {
			open[column] = &bar{from: at, column: column, colour: colour}
		}
	}
	for i := range events {
		switch e := &events[i]; e.Name {
		case "RESUME":
			change(0, e.Time, "#2a2")
		case "STOP", "SHUTDOWN":
			change(0, e.Time, "")
		case "FAILOVER_STATE":
			change(1, e.Time, map[string]string{"plugging": "#fc6", "primary": "#06c", "unplugging": "#c6f", "failed": "#d00"}[e.text("state")])
		}
	}
	for _, column := range []float64{0, 1} {
		change(column, end, "")
	}
	return list
}
