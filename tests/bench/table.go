package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// A figure is one thing that is measured, with what each run of each VMM gave.
type figure struct {
	Name   string    `json:"name"`
	Unit   string    `json:"unit"`
	Target target    `json:"target,omitzero"`
	Baton  []float64 `json:"baton"`
	Peer   []float64 `json:"qemu"`
}

// A target is what the medians have to meet. Zero fields ask for nothing.
type target struct {
	MaxRatio float64 `json:"max_ratio,omitzero"` // of baton's median to QEMU's
	MinRatio float64 `json:"min_ratio,omitzero"`
	Max      float64 `json:"max,omitzero"` // of baton's median, in the figure's unit
}

func (t target) String() string {
	var s []string
	if t.Max != 0 {
		s = append(s, fmt.Sprintf("at most %v", t.Max))
	}
	if t.MaxRatio != 0 {
		s = append(s, fmt.Sprintf("ratio at most %v", t.MaxRatio))
	}
	if t.MinRatio != 0 {
		s = append(s, fmt.Sprintf("ratio at least %v", t.MinRatio))
	}
	return strings.Join(s, ", ")
}

// A result is a figure's medians and what they mean.
type result struct {
	figure
	BatonMedian float64 `json:"baton_median"`
	PeerMedian  float64 `json:"qemu_median"`
	Ratio       float64 `json:"ratio"`
	Met         *bool   `json:"met,omitempty"` // nil without a target
}

func (f figure) result() result {
	r := result{figure: f, BatonMedian: median(f.Baton), PeerMedian: median(f.Peer)}
	if r.PeerMedian != 0 {
		r.Ratio = r.BatonMedian / r.PeerMedian
	}
	if t := f.Target; t != (target{}) {
		met := len(f.Baton) > 0 && len(f.Peer) > 0 &&
			(t.Max == 0 || r.BatonMedian <= t.Max) &&
			(t.MaxRatio == 0 || r.Ratio <= t.MaxRatio) && r.Ratio >= t.MinRatio
		r.Met = &met
	}
	return r
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// A report is all figures of a run, in the order of their first value.
type report struct {
	Where   string    `json:"where"`
	Notes   []string  `json:"notes"`
	Results []result  `json:"results"`
	figures []*figure // their sources
}

// figure returns the one of that name, a new one if there is none.
func (r *report) figure(name, unit string, t target) *figure {
	for _, f := range r.figures {
		if f.Name == name {
			return f
		}
	}
	f := &figure{Name: name, Unit: unit, Target: t}
	r.figures = append(r.figures, f)
	return f
}

func (r *report) notef(format string, args ...any) {
	r.Notes = append(r.Notes, fmt.Sprintf(format, args...))
}

// writeTable writes it for people. A range is that of the single runs.
func (r *report) writeTable(w io.Writer) error {
	fmt.Fprintf(w, "\n%s; medians (least to most)\n\n", r.Where)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "figure\tbaton\tQEMU\tratio\ttarget\tmet")
	for _, f := range r.figures {
		x := f.result()
		met := "-"
		if x.Met != nil {
			met = map[bool]string{true: "yes", false: "NO"}[*x.Met]
		}
		fmt.Fprintf(tw, "%s, %s\t%s\t%s\t%.2f\t%s\t%s\n", f.Name, f.Unit, spread(f.Baton), spread(f.Peer), x.Ratio, f.Target, met)
	}
	err := tw.Flush()
	for _, n := range r.Notes {
		fmt.Fprintf(w, "\n* %s\n", strings.ReplaceAll(n, "\n", "\n  "))
	}
	return err
}

func spread(v []float64) string {
	if len(v) == 0 {
		return "none"
	}
	return fmt.Sprintf("%s (%s to %s)", number(median(v)), number(slices.Min(v)), number(slices.Max(v)))
}

// number shows three digits that matter.
func number(v float64) string {
	switch {
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func (r *report) writeJSON(w io.Writer) error {
	r.Results = nil
	for _, f := range r.figures {
		r.Results = append(r.Results, f.result())
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
