package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"baton/tests/harness"
	"baton/tests/journey"
	"baton/vmm/timeline"
)

// pageMark begins the line by which the half of the demo that is in the nested host, whose
// files are lost, hands demo.html to the other one.
const pageMark = "demo.html:"

// ways are the contenders.
func ways() []journey.Way {
	return []journey.Way{
		{Name: "baton, cooperative", Unplug: "cooperative"},
		{Name: "baton, surprise", Unplug: "surprise"},
		{Name: "QEMU", VMM: harness.QEMU},
	}
}

// journeys has each contender move a guest from one host's NIC to another's, and returns the
// page about that.
func journeys(ctx context.Context) error {
	repo, err := os.Getwd()
	if err != nil {
		return err
	}
	for name, value := range map[string]string{harness.EnvTest: "nested", harness.EnvRepo: repo, harness.EnvBaton: filepath.Join(repo, "baton")} {
		os.Setenv(name, value)
	}
	heading("A guest with a VF moves from one host's NIC to another's")
	fmt.Printf("  pinged every 5 ms and exchanging %d datagrams a second each way with a peer on the wire\n", journey.UDPRate())
	var trips []*journey.Trip
	for _, way := range ways() {
		fmt.Printf("  %s …\n", way.Name)
		trip, err := travel(ctx, way)
		if err != nil && ctx.Err() == nil { // the emulation of nested SVM makes guests of any VMM fail now and then
			fmt.Printf("  %s: again, because of: %v\n", way.Name, err)
			trip, err = travel(ctx, way)
		}
		if err != nil {
			return err
		}
		fmt.Printf("  %-20s %s; %d of %d pings lost, longest gap %.0f ms\n", way.Name+":", trip.Status, trip.Pings.Lost, trip.Pings.Sent, gap(trip))
		trips = append(trips, trip)
	}
	rows := table(trips)
	heading("Figures")
	printTable(os.Stdout, rows)
	var b bytes.Buffer
	if err := timeline.Write(&b, pageOf(trips, rows)); err != nil {
		return err
	}
	fmt.Println(pageMark + base64.StdEncoding.EncodeToString(b.Bytes()))
	return nil
}

// travel is one contender's trip.
func travel(ctx context.Context, way journey.Way) (trip *journey.Trip, err error) {
	err = scene(ctx, way.Name, func(s *stage) {
		ctx := harness.Context(s, 150*time.Second)
		w := journey.NewWorld(s)
		from := w.Boot(ctx, way)
		to := w.Start(ctx, way, 1, true)
		trip = w.Travel(ctx, way, from, to)
		if trip.Status != "completed" {
			s.Errorf("the migration %s: %s", trip.Status, trip.Query)
		}
	})
	return trip, err
}

func gap(t *journey.Trip) float64 { return t.Pings.Longest().Duration().Seconds() * 1000 }

// table has a row for each trip.
func table(trips []*journey.Trip) [][]string {
	rows := [][]string{{"", "unplug ms", "RAM ms", "stop to resume ms", "then primary after ms", "pings lost", "longest gap ms", "datagrams lost in, out", "doubled in, out", "TCP, longest stall ms"}}
	ms := func(s float64) string {
		if s < 0 {
			return "-"
		}
		return fmt.Sprintf("%.0f", 1000*s)
	}
	for _, t := range trips {
		rows = append(rows, []string{
			t.Way, ms(t.Phase("primary taken away")), ms(t.Phase("RAM")), ms(t.Phase("stop to resume")), ms(t.Plugged),
			fmt.Sprintf("%d of %d", t.Pings.Lost, t.Pings.Sent), fmt.Sprintf("%.0f", gap(t)),
			fmt.Sprintf("%d, %d", t.In.Lost, t.Out.Lost), fmt.Sprintf("%d, %d", t.In.Doubled, t.Out.Doubled), ms(t.TCP.Stall.Seconds()),
		})
	}
	return rows
}

// printTable prints one column for each trip, which a terminal has room for.
func printTable(w io.Writer, rows [][]string) {
	for column := range rows[0] {
		fmt.Fprintf(w, "  %-24s", rows[0][column])
		for _, row := range rows[1:] {
			fmt.Fprintf(w, " %20s", row[column])
		}
		fmt.Fprintln(w)
	}
}

func pageOf(trips []*journey.Trip, rows [][]string) timeline.Page {
	p := timeline.Page{
		Title: "A guest with a VF moves to another host", Table: rows,
		Notes: []string{fmt.Sprintf("All in one run, on the same NICs, with the same guest: %s. The peer pings every 5 ms and exchanges %d datagrams a second each way with the guest. Red ticks are pings without an answer.",
			time.Now().Format("2006-01-02 15:04"), journey.UDPRate())},
	}
	for _, t := range trips {
		p.Acts = append(p.Acts, timeline.Act{
			Title: t.Way,
			Sides: []timeline.Side{{Name: "source", Events: t.Source}, {Name: "target", Events: t.Target}},
			Series: []timeline.Series{
				{Name: "ping, round trip in ms", Points: t.PingSeries},
				{Name: "datagrams from the guest, a second", Points: t.Rate},
			},
		})
	}
	return p
}

// pageFilter passes lines on and keeps the page.
type pageFilter struct {
	out  io.Writer
	line []byte
	page []byte
}

func (f *pageFilter) Write(p []byte) (int, error) {
	for _, c := range p {
		f.line = append(f.line, c)
		mark := f.line[:min(len(f.line), len(pageMark))]
		if isPage := strings.HasPrefix(pageMark, string(mark)); isPage && c != '\n' {
			continue
		} else if isPage {
			page, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(f.line[len(mark):])))
			if err != nil {
				return 0, err
			}
			f.page = page
		} else if _, err := f.out.Write(f.line); err != nil {
			return 0, err
		}
		f.line = f.line[:0]
	}
	return len(p), nil
}
