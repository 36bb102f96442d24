package client

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const greeting = `{"QMP": {"version": {}, "capabilities": []}}`

// serve answers each request with what answer returns, after a greeting; "" hangs up.
func serve(t *testing.T, greeting string, answer func(request string) string) (path string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "client")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintln(conn, greeting)
		for in := bufio.NewScanner(conn); in.Scan(); {
			reply := answer(in.Text())
			if strings.Contains(in.Text(), "qmp_capabilities") {
				reply = `{"return": {}}`
			}
			if reply == "" {
				return
			}
			fmt.Fprintln(conn, reply)
		}
	}()
	return path
}

func TestRun(t *testing.T) {
	for _, tc := range []struct {
		line, reply, request, want string
		err                        error
	}{
		{"info status", `{"return":"VM status: running\r\n"}`, `{"arguments":{"command-line":"info status"},"execute":"human-monitor-command"}`, "VM status: running\n", nil},
		{"netdev_del x", `{"return":"Error: Device 'x' not found\r\n"}`, "", "Error: Device 'x' not found\n", ErrFailed},
		{"nope", `{"return":"unknown command: 'nope'\r\n"}`, "", "unknown command: 'nope'\n", ErrFailed},
		{"info status", `{"error":{"class":"CommandNotFound","desc":"no HMP here"}}`, "", "Error: no HMP here\n", ErrFailed},
		{` {"execute":"stop"}`, `{"return":{}}`, `{"execute":"stop"}`, "{\"return\":{}}\n", nil},
		{`{"execute":"stop"}`, `{"error":{"class":"GenericError","desc":"x"}}`, "", `{"error":{"class":"GenericError","desc":"x"}}` + "\n", ErrFailed},
		{`{"execute":`, "", "", "this is not JSON: {\"execute\":\n", ErrFailed},
		{"stop", "", "", "", io.EOF},
		{"stop", "}", "", "", nil},
		{"", "", "", "", nil},
	} {
		var asked string
		path := serve(t, greeting, func(r string) string { asked = r; return tc.reply })
		c, err := Dial(t.Context(), path, func(json.RawMessage) {})
		if err != nil {
			t.Fatal(err)
		}
		text, err := c.Run(tc.line)
		if tc.reply == "}" {
			if err == nil || text != "" {
				t.Errorf("%s: %q, %v", tc.line, text, err)
			}
			continue
		}
		if text != tc.want || !errors.Is(err, tc.err) || tc.request != "" && asked != tc.request {
			t.Errorf("%s: %q, %v, want %q, %v; asked %s", tc.line, text, err, tc.want, tc.err, asked)
		}
	}
}

func TestNotQMP(t *testing.T) {
	for _, greeting := range []string{"baton's monitor", "{}"} {
		path := serve(t, greeting, func(string) string { return "" })
		if _, err := Dial(t.Context(), "unix:"+path, nil); err == nil || !strings.Contains(err.Error(), "nobody there speaks QMP") {
			t.Errorf("%q: %v", greeting, err)
		}
	}
}

func TestMonitorScript(t *testing.T) {
	path := serve(t, greeting, func(r string) string {
		if strings.Contains(r, "bad") {
			return `{"return":"Error: bad\r\n"}`
		}
		return `{"timestamp":{"seconds":1,"microseconds":2},"event":"STOP"}{"return":"good\r\n"}`
	})
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("one\n\nbad\ntwo"), 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(script)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var out bytes.Buffer
	if err := Monitor(t.Context(), path, "", in, &out); !errors.Is(err, ErrFailed) || out.String() != "good\nError: bad\ngood\n" {
		t.Errorf("%v: %q", err, &out)
	}
}

func TestEventLine(t *testing.T) {
	for in, want := range map[string]string{
		`{"timestamp":{"seconds":0,"microseconds":7},"event":"RESET","data":{"guest":true}}`: `000007 RESET {"guest":true}`,
		`{"timestamp":{"seconds":0,"microseconds":7},"event":"STOP","seq":3}`:                "000007 STOP",
		"[": "[",
	} {
		if got := line(json.RawMessage(in)); !strings.HasSuffix(got, want) {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

func TestEventsOfBadFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(file, []byte(`{"event":"STOP"}`+"\nrubbish\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Events(t.Context(), file, true, &out); err == nil || !strings.Contains(err.Error(), `not an event: "rubbish\n"`) || out.String() != "{\"event\":\"STOP\"}\n" {
		t.Errorf("%v: %q", err, &out)
	}
}
