package hmp

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMigrate(t *testing.T) {
	f := &machine{results: map[string]string{
		"query-migrate": `{"status":"completed","total-time":27,"downtime":5,"setup-time":1,"blocked-reasons":["it rains"],
			"ram":{"total":67641344,"multifd-bytes":0,"pages-per-second":7,"page-size":4096,"remaining":0,"mbps":221.824923,"transferred":720931,"duplicate":16393,"dirty-pages-rate":3,"normal-bytes":495616,"normal":121,"dirty-sync-count":2}}`,
		"query-migrate-capabilities": `[{"capability":"events","state":true},{"capability":"multifd","state":false}]`,
		"query-migrate-parameters":   `{"max-bandwidth":134217728,"cpu-throttle-tailslow":false,"multifd-compression":"none"}`,
	}}
	names := []string{"migrate", "migrate_cancel", "migrate-continue", "migrate-incoming", "migrate-recover", "migrate-set-capabilities", "migrate-set-parameters"}
	for name := range f.results {
		names = append(names, name)
	}
	m := New(Config{Commands: names, Execute: f.execute, Do: func(do func()) error { do(); return nil }})
	for _, c := range []struct{ line, want, asked string }{
		{"migrate -d tcp:h:1", "", `migrate {"uri":"tcp:h:1"}`},
		{"migrate tcp:h:1", "", `migrate {"uri":"tcp:h:1"}`},
		{"migrate -b tcp:h:1", "Error: what is -b?\n", ""},
		{"migrate -d", "Error: what is -d?\n", ""},
		{"migrate_cancel", "", "migrate_cancel null"},
		{"migrate_continue pre-switchover", "", `migrate-continue {"state":"pre-switchover"}`},
		{"migrate_incoming unix:x", "", `migrate-incoming {"uri":"unix:x"}`},
		{"migrate_recover unix:x", "", `migrate-recover {"uri":"unix:x"}`},
		{"migrate_set_capability multifd on", "", `migrate-set-capabilities {"capabilities":[{"capability":"multifd","state":true}]}`},
		{"migrate_set_capability multifd yes", "Error: want 'on' or 'off'\n", ""},
		{"migrate_set_parameter max-bandwidth 2G", "", `migrate-set-parameters {"max-bandwidth":2147483648}`},
		{"migrate_set_parameter max-bandwidth 7", "", `migrate-set-parameters {"max-bandwidth":7}`},
		{"migrate_set_parameter max-bandwidth 7GG", "Error: 7GG is no number\n", ""},
		{"migrate_set_parameter max-bandwidth 99999999999T", "Error: 99999999999T is no number\n", ""},
		{"migrate_set_parameter max-bandwidth x", "Error: x is no number\n", ""},
		{"migrate_set_parameter cpu-throttle-tailslow on", "", `migrate-set-parameters {"cpu-throttle-tailslow":true}`},
		{"migrate_set_parameter multifd-compression s2", "", `migrate-set-parameters {"multifd-compression":"s2"}`},
		{"info migrate", `Outgoing migration blocked:
  it rains
Migration status: completed
total time: 27 ms
downtime: 5 ms
setup: 1 ms
transferred ram: 704 kbytes
throughput: 221.82 mbps
remaining ram: 0 kbytes
total ram: 66056 kbytes
duplicate: 16393 pages
normal: 121 pages
normal bytes: 484 kbytes
dirty sync count: 2
page size: 4 kbytes
multifd bytes: 0 kbytes
pages-per-second: 7
dirty pages rate: 3 pages
`, ""},
		{"info migrate_capabilities", "events: on\nmultifd: off\n", ""},
		{"info migrate_parameters", "max-bandwidth: 134217728\ncpu-throttle-tailslow: false\nmultifd-compression: none\n", ""},
	} {
		f.calls = nil
		if d := cmp.Diff(c.want, m.Run(c.line)); d != "" {
			t.Errorf("%s:\n%s", c.line, d)
		}
		if c.asked != "" && !slices.Contains(f.calls, c.asked) || c.asked == "" && len(f.calls) > 1 {
			t.Errorf("%s: asked %q, want %s", c.line, f.calls, c.asked)
		}
	}
	f.results["query-migrate"] = "{}"
	if text := m.Run("info migrate"); text != "" {
		t.Errorf("before the first one: %q", text)
	}
	f.results["query-migrate"] = `{"status":"failed","error-desc":"no"}`
	if text := m.Run("info migrate"); text != "Migration status: failed (no)\n" {
		t.Errorf("%q", text)
	}
}
