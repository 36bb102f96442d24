package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ErrCancelled is the end of a migration that its user has called off: the guest runs on.
var ErrCancelled = errors.New("the migration was cancelled; the guest runs on where it was")

// pollTime is how often the machine is asked how far it is; a line that is not a terminal's
// comes every lineTime.
const (
	pollTime = 100 * time.Millisecond
	lineTime = time.Second
)

// migration is what is shown of query-migrate: QEMU's qapi/migration.json.
type migration struct {
	Status   string
	Error    string `json:"error-desc"`
	Total    int64  `json:"total-time"` // ms
	Expected *int64 `json:"expected-downtime"`
	Downtime *int64
	RAM      *struct {
		Total, Remaining, Transferred int64 // bytes
		DirtyRate                     int64 `json:"dirty-pages-rate"` // pages per second
		PageSize                      int64 `json:"page-size"`
		Passes                        int64 `json:"dirty-sync-count"`
		Mbps                          float64
	}
	Parts map[string]int64 `json:"x-downtime"` // of the downtime, in microseconds
}

// Migrate moves the guest of the machine at socket to uri, and shows how far it is. Settings
// are NAME=VALUE: of migrate-set-parameters, or of migrate-set-capabilities with on and off. The end of
// ctx cancels the migration: ErrCancelled. If out is a terminal, progress is one line there.
func Migrate(ctx context.Context, socket, uri string, settings []string, out io.Writer, terminal bool) error {
	c, err := Dial(context.Background(), socket, func(json.RawMessage) {})
	if err != nil {
		return err
	}
	defer c.conn.Close()
	if err := c.configure(settings); err != nil {
		return err
	}
	if err := c.execute("migrate", map[string]any{"uri": uri}, nil); err != nil {
		return err
	}
	var shown time.Time
	ticks := time.NewTicker(pollTime)
	defer ticks.Stop()
	cancelled := ctx.Done()
	for {
		var m migration
		if err := c.execute("query-migrate", nil, &m); err != nil {
			return fmt.Errorf("%s: the machine has ended, or has closed the connection (%w)", socket, err)
		}
		ended := slices.Contains([]string{"completed", "failed", "cancelled"}, m.Status)
		if terminal {
			fmt.Fprint(out, "\r\x1b[K") // back to the beginning, erase the line
		}
		switch {
		case ended:
			return m.summary(out)
		case terminal:
			fmt.Fprint(out, m.line())
		case time.Since(shown) >= lineTime:
			fmt.Fprintln(out, m.line())
			shown = time.Now()
		}
		select {
		case <-ticks.C:
		case <-cancelled:
			cancelled = nil
			if err := c.execute("migrate_cancel", nil, nil); err != nil {
				return err
			}
		}
	}
}

// execute runs a command and reads the part of its result that result, a pointer, has.
func (c *Conn) execute(command string, args, result any) error {
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	text, err := json.Marshal(request)
	if err != nil {
		return err
	}
	r, err := c.say(string(text))
	switch {
	case err != nil:
		return err
	case r.Error != nil:
		return fmt.Errorf("%s: %s", command, r.Error.Desc)
	case result == nil:
		return nil
	}
	return json.Unmarshal(r.Return, result)
}

// configure sets parameters and capabilities.
func (c *Conn) configure(settings []string) error {
	if len(settings) == 0 {
		return nil
	}
	var switches []struct{ Capability string }
	if err := c.execute("query-migrate-capabilities", nil, &switches); err != nil {
		return err
	}
	capabilities, parameters := []any{}, map[string]any{}
	for _, s := range settings {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			return fmt.Errorf("%s: want NAME=VALUE, such as max-bandwidth=1G or multifd=on", s)
		}
		isSwitch := slices.ContainsFunc(switches, func(w struct{ Capability string }) bool { return w.Capability == name })
		switch {
		case isSwitch && value != "on" && value != "off":
			return fmt.Errorf("%s: want on or off", s)
		case isSwitch:
			capabilities = append(capabilities, map[string]any{"capability": name, "state": value == "on"})
		case value == "on" || value == "off":
			parameters[name] = value == "on"
		default:
			parameters[name] = number(value)
		}
	}
	if err := c.execute("migrate-set-capabilities", map[string]any{"capabilities": capabilities}, nil); err != nil {
		return err
	}
	return c.execute("migrate-set-parameters", parameters, nil)
}

// number is the value as JSON has it: 1G and the like are numbers, words are strings.
func number(value string) any {
	digits := strings.TrimRight(value, "KMGT")
	n, err := strconv.ParseInt(digits, 10, 64)
	unit := strings.Index("KMGT", strings.TrimPrefix(value, digits))
	switch {
	case err != nil || len(value)-len(digits) > 1:
		return value
	case digits == value:
		return n
	case n>>(53-10*unit) != 0: // it would not fit
		return value
	}
	return n << (10 * (unit + 1))
}

// line is the progress.
func (m *migration) line() string {
	words := []string{m.Status}
	if r := m.RAM; r != nil {
		words = append(words, fmt.Sprintf("%3.0f MB/s", r.Mbps/8), size(r.Transferred)+" sent", size(r.Remaining)+" remaining", size(r.DirtyRate*r.PageSize)+"/s dirtied")
		if m.Expected != nil {
			words = append(words, fmt.Sprintf("%d ms downtime expected", *m.Expected))
		}
	}
	return strings.Join(append(words, seconds(m.Total)), ", ")
}

// summary says how it went.
func (m *migration) summary(out io.Writer) error {
	switch m.Status {
	case "cancelled":
		return ErrCancelled
	case "failed":
		return errors.New("migration failed: " + m.Error)
	}
	text := "completed in " + seconds(m.Total)
	if r := m.RAM; r != nil {
		text += fmt.Sprintf(", %s sent for %s in %d passes", size(r.Transferred), size(r.Total), r.Passes)
	}
	if m.Downtime != nil {
		text += fmt.Sprintf(", downtime %d ms", *m.Downtime)
	}
	var parts []string
	for _, name := range []string{"pause", "sync", "ram", "save", "load", "release", "commit"} {
		if us, ok := m.Parts[name]; ok {
			parts = append(parts, fmt.Sprintf("%s %.1f", name, float64(us)/1000))
		}
	}
	if parts != nil {
		text += " (" + strings.Join(parts, ", ") + ")"
	}
	_, err := fmt.Fprintln(out, text)
	return err
}

func seconds(ms int64) string { return fmt.Sprintf("%.1f s", float64(ms)/1000) }

// size is a number of bytes for people.
func size(n int64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
