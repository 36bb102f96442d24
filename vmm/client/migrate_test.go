package client

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
)

// machine answers query-migrate with the given replies, one after the other, and everything
// else with success.
func machine(t *testing.T, replies ...string) (path string, asked *[]string) {
	asked = new([]string)
	return serve(t, greeting, func(request string) string {
		switch {
		case strings.Contains(request, `"query-migrate"`):
			r := replies[0]
			if len(replies) > 1 {
				replies = replies[1:]
			}
			return r
		case strings.Contains(request, "query-migrate-capabilities"):
			return `{"return":[{"capability":"multifd","state":false}]}`
		}
		if !strings.Contains(request, "qmp_capabilities") {
			*asked = append(*asked, request)
		}
		return `{"return":{}}`
	}), asked
}

const active = `{"return":{"status":"active","total-time":1500,"expected-downtime":30,
	"ram":{"total":268435456,"transferred":104857600,"remaining":52428800,"dirty-pages-rate":1024,"page-size":4096,"mbps":800.4,"dirty-sync-count":2}}}`

func TestMigrate(t *testing.T) {
	const line = "active, 100 MB/s, 100 MiB sent, 50 MiB remaining, 4096 KiB/s dirtied, 30 ms downtime expected, 1.5 s"
	for name, c := range map[string]struct {
		replies   []string
		terminal  bool
		out, fail string
	}{
		"completed": {[]string{`{"return":{"status":"setup"}}`, active, `{"return":{"status":"completed","total-time":2345,"downtime":12,"x-downtime":{"pause":1234,"ram":10000,"commit":50},
			"ram":{"total":268435456,"transferred":115343360,"dirty-sync-count":3}}}`}, false,
			"setup, 0.0 s\ncompleted in 2.3 s, 110 MiB sent for 256 MiB in 3 passes, downtime 12 ms (pause 1.2, ram 10.0, commit 0.1)\n", ""},
		"terminal": {[]string{active, `{"return":{"status":"completed","total-time":2345}}`}, true,
			"\r\x1b[K" + line + "\r\x1b[Kcompleted in 2.3 s\n", ""},
		"failed": {[]string{active, `{"return":{"status":"failed","error-desc":"it rains"}}`}, false, line + "\n", "migration failed: it rains"},
		"gone":   {[]string{active, ""}, false, line + "\n", "the machine has ended"},
	} {
		t.Run(name, func(t *testing.T) {
			path, _ := machine(t, c.replies...)
			var out bytes.Buffer
			err := Migrate(t.Context(), path, "tcp:x:1", nil, &out, c.terminal)
			if out.String() != c.out {
				t.Errorf("%q, want %q", &out, c.out)
			}
			if c.fail == "" && err != nil || c.fail != "" && (err == nil || !strings.Contains(err.Error(), c.fail)) {
				t.Errorf("%v, want %q", err, c.fail)
			}
		})
	}
}

func TestMigrateCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	path, asked := machine(t, active, `{"return":{"status":"cancelling"}}`, `{"return":{"status":"cancelled"}}`)
	cancel()
	if err := Migrate(ctx, path, "tcp:x:1", nil, &bytes.Buffer{}, true); !errors.Is(err, ErrCancelled) {
		t.Error(err)
	}
	if want := []string{`{"arguments":{"uri":"tcp:x:1"},"execute":"migrate"}`, `{"execute":"migrate_cancel"}`}; !slices.Equal(*asked, want) {
		t.Errorf("asked %s", *asked)
	}
}

func TestMigrateSettings(t *testing.T) {
	path, asked := machine(t, `{"return":{"status":"completed"}}`)
	if err := Migrate(t.Context(), path, "u", []string{"multifd=on", "max-bandwidth=2G", "cpu-throttle-tailslow=off", "multifd-compression=zstd", "downtime-limit=100"}, &bytes.Buffer{}, false); err != nil {
		t.Fatal(err)
	}
	want := []string{`{"arguments":{"capabilities":[{"capability":"multifd","state":true}]},"execute":"migrate-set-capabilities"}`,
		`{"arguments":{"cpu-throttle-tailslow":false,"downtime-limit":100,"max-bandwidth":2147483648,"multifd-compression":"zstd"},"execute":"migrate-set-parameters"}`,
		`{"arguments":{"uri":"u"},"execute":"migrate"}`}
	if !slices.Equal(*asked, want) {
		t.Errorf("asked %s", *asked)
	}
	for _, bad := range []string{"multifd", "multifd=3"} {
		path, _ := machine(t, "")
		if err := Migrate(t.Context(), path, "u", []string{bad}, &bytes.Buffer{}, false); err == nil || !strings.HasPrefix(err.Error(), bad) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestNumber(t *testing.T) {
	for text, want := range map[string]any{"1": int64(1), "3K": int64(3072), "1T": int64(1 << 40), "-1": int64(-1), "x": "x", "": "", "1KK": "1KK", "K": "K", "1X": "1X", "99999999T": "99999999T"} {
		if got := number(text); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}
