package l0

import (
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"baton/tests/harness"
	"baton/tests/tiny"
)

var update = flag.Bool("update", false, "write the golden files")

// startQMP starts a tiny guest with a QMP client.
func startQMP(t *testing.T, kernel string, args ...string) (*harness.Guest, *harness.QMP) {
	t.Helper()
	path := filepath.Join(shortDir(t), "qmp")
	g := start(t, kernel, append(args, "-qmp", "unix:"+path+",server=on,wait=off")...)
	return g, harness.DialQMP(t, harness.Context(t, limit), path)
}

// fails checks the error of a command.
func fails(t *testing.T, q *harness.QMP, command string, args any, want string) {
	t.Helper()
	if r, err := q.Execute(command, args); err == nil || err.Error() != want {
		t.Errorf("%s: %s, %v; want %s", command, r, err, want)
	}
}

// status checks query-status.
func status(t *testing.T, q *harness.QMP, want string) {
	t.Helper()
	got := string(q.Do("query-status", nil))
	if got != fmt.Sprintf(`{"status":%q,"running":%v}`, want, want == "running") {
		t.Errorf("status %s, want %s", got, want)
	}
}

// heard checks which events came since it was asked last.
func heard(t *testing.T, q *harness.QMP, want string) {
	t.Helper()
	var got []string
	for _, e := range q.Events {
		got = append(got, strings.TrimSpace(e.Event+" "+string(e.Data)))
	}
	if text := strings.Join(got, "; "); text != want {
		t.Errorf("events %s, want %s", text, want)
	}
	q.Events = nil
}

const needsReset = "GenericError: Resetting the Virtual Machine is required"

func TestQMPLife(t *testing.T) {
	g, q := startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo), "-S", "-name", "vm")
	status(t, q, "prelaunch")
	q.Do("stop", nil)
	status(t, q, "prelaunch")
	heard(t, q, "")
	if g.Serial.Len() != 0 {
		t.Errorf("it runs: %q", g.Serial)
	}
	q.Do("cont", nil)
	heard(t, q, "RESUME") // before the reply
	q.Do("cont", nil)
	heard(t, q, "")
	status(t, q, "running")
	g.WaitSerial(harness.Context(t, limit), "up\n")
	q.Do("stop", nil)
	heard(t, q, "STOP")
	q.Do("stop", nil)
	heard(t, q, "")
	status(t, q, "paused")
	q.Do("system_reset", nil)
	heard(t, q, `RESET {"guest":false,"reason":"host-qmp-system-reset"}`)
	status(t, q, "prelaunch")
	if got := g.Serial.String(); got != "up\n" {
		t.Errorf("it runs: %q", got)
	}
	q.Do("cont", nil)
	g.WaitSerial(harness.Context(t, limit), "up\nup\n")
	q.Do("system_reset", nil)
	heard(t, q, `RESUME; RESET {"guest":false,"reason":"host-qmp-system-reset"}`)
	g.WaitSerial(harness.Context(t, limit), "up\nup\nup\n")
	q.Do("system_powerdown", nil)
	heard(t, q, "POWERDOWN")
	q.Do("quit", nil)
	q.WaitEnd()
	heard(t, q, `SHUTDOWN {"guest":false,"reason":"host-qmp-quit"}`)
	ends(t, g, "host-qmp-quit")
}

// The guest's own end with -no-shutdown is a machine that stands still.
func TestNoShutdown(t *testing.T) {
	for name, c := range map[string]struct {
		code   tiny.Code
		args   []string
		status string
		data   string
	}{
		"power off": {tiny.PowerOff, nil, "shutdown", `{"guest":true,"reason":"guest-shutdown"}`},
		"no-reboot": {tiny.Reset, []string{"-no-reboot"}, "shutdown", `{"guest":true,"reason":"guest-reset"}`},
	} {
		t.Run(name, func(t *testing.T) {
			g, q := startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), c.code, tiny.Halt), append(c.args, "-no-shutdown", "-S")...)
			for range 2 {
				q.Do("cont", nil)
				q.WaitEvent("RESUME")
				shutdown := q.WaitEvent("SHUTDOWN")
				q.WaitEvent("STOP") // after it
				if got := string(shutdown.Data); got != c.data {
					t.Errorf("SHUTDOWN %s, want %s", got, c.data)
				}
				status(t, q, c.status)
				fails(t, q, "cont", nil, needsReset)
				q.Do("stop", nil)
				status(t, q, c.status)
				q.Do("system_reset", nil)
				heard(t, q, `RESET {"guest":false,"reason":"host-qmp-system-reset"}`)
				status(t, q, "prelaunch")
			}
			q.Do("quit", nil)
			if code := g.Wait(harness.Context(t, limit)); code != 0 {
				t.Errorf("exit code %d: %s", code, g.Stderr)
			}
		})
	}
}

// A machine ends, and its clients hear why.
func TestQMPGuestEnds(t *testing.T) {
	g, q := startQMP(t, tiny.Kernel(t, tiny.PowerOff, tiny.Halt), "-S")
	q.Do("cont", nil)
	q.WaitEnd()
	heard(t, q, `RESUME; SHUTDOWN {"guest":true,"reason":"guest-shutdown"}`)
	ends(t, g, "guest-shutdown")
}

func TestQMPSocket(t *testing.T) {
	dir := shortDir(t)
	first, second := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	kernel := tiny.Kernel(t, tiny.Halt)
	g := start(t, kernel, "-qmp", "unix:"+first+",server,nowait", "-chardev", "socket,id=c,path="+second+",server=on,wait=off",
		"-mon", "chardev=c,mode=control", "-qmp", "tcp:127.0.0.1:0,server,nowait")
	var clients []*harness.QMP
	for _, path := range []string{first, first, second} { // several at once
		clients = append(clients, harness.DialQMP(t, harness.Context(t, limit), path))
	}
	if info, err := os.Stat(first); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for _, q := range clients {
		status(t, q, "running")
	}
	clients[0].Do("stop", nil)
	for _, q := range clients {
		q.WaitEvent("STOP")
	}
	// Another machine does not take the socket of this one.
	other := start(t, kernel, "-qmp", "unix:"+first+",server,nowait")
	if code := other.Wait(harness.Context(t, limit)); code != 1 || !strings.Contains(other.Stderr.String(), "another process listens on "+first) {
		t.Errorf("exit code %d: %s", code, other.Stderr)
	}
	g.Kill()
	g = start(t, kernel, "-qmp", "unix:"+first+",server,nowait")
	g.WaitEvent(harness.Context(t, limit), "RESUME")
	q := harness.DialQMP(t, harness.Context(t, limit), first) // what a dead one left is replaced
	q.Do("quit", nil)
	ends(t, g, "host-qmp-quit")
	missing(t, first)
}

// A client that talks without listening, and one that does not talk, hold up nobody.
func TestQMPBadClients(t *testing.T) {
	path := filepath.Join(shortDir(t), "qmp")
	g := start(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo), "-qmp", "unix:"+path+",server,nowait")
	q := harness.DialQMP(t, harness.Context(t, limit), path)
	flood, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer flood.Close()
	silent, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	go func() {
		line := []byte(strings.Repeat(`{"execute":"query-commands"}`, 1000))
		for {
			if _, err := flood.Write(line); err != nil {
				return
			}
		}
	}()
	for range 100 {
		q.Do("stop", nil)
		q.Do("cont", nil)
	}
	g.Type("alive\n")
	g.WaitSerial(harness.Context(t, limit), "alive")
	q.Do("quit", nil)
	ends(t, g, "host-qmp-quit")
}

// QMP as a client, waited for as a server, and on stdio.
func TestQMPElsewhere(t *testing.T) {
	kernel := tiny.Kernel(t, tiny.Halt)
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network+" client", func(t *testing.T) {
			address := map[string]string{"unix": filepath.Join(shortDir(t), "qmp"), "tcp": "127.0.0.1:0"}[network]
			l, err := net.Listen(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			g := start(t, kernel, "-qmp", network+":"+l.Addr().String())
			conn, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprint(conn, `{"execute":"qmp_capabilities"}{"execute":"quit"}`)
			if text := readAll(t, conn); !strings.HasPrefix(text, `{"QMP":{"version":`) || !strings.Contains(text, `"host-qmp-quit"`) {
				t.Errorf("heard %s", text)
			}
			ends(t, g, "host-qmp-quit")
		})
	}
	// A reply of more than 64 KiB, to one of two clients.
	t.Run("tcp server", func(t *testing.T) {
		address := "127.0.0.1:" + freePort(t)
		g := start(t, kernel, "-qmp", "tcp:"+address+",server=on,wait=off")
		g.WaitEvent(harness.Context(t, limit), "RESUME")
		long := strings.Repeat("long", 100<<10)
		for _, id := range []string{"short", long} {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, `{"execute":"qmp_capabilities"}{"execute":"query-name","id":%q}`, id)
			if id == long {
				fmt.Fprint(conn, `{"execute":"quit"}`)
				if text := readAll(t, conn); !strings.Contains(text, `{"return":{},"id":"`+id+`"}`) {
					t.Errorf("heard %d bytes: %.300s", len(text), text)
				}
			}
		}
		ends(t, g, "host-qmp-quit")
	})
	t.Run("wait", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "qmp")
		g := start(t, kernel, "-qmp", "unix:"+path+",server")
		harness.WaitFile(t, harness.Context(t, limit), path)
		if got := names(t, g); got != "" {
			t.Errorf("it did not wait: %s", got)
		}
		q := harness.DialQMP(t, harness.Context(t, limit), path)
		q.Do("quit", nil)
		ends(t, g, "host-qmp-quit")
	})
	t.Run("stdio", func(t *testing.T) {
		g := start(t, kernel, "-serial", "null", "-qmp", "stdio")
		g.Type(`{"execute":"qmp_capabilities"}`)
		g.WaitSerial(harness.Context(t, limit), `{"return":{}}`)
		g.Type("{'execute':'quit'}")
		ends(t, g, "host-qmp-quit")
	})
}

// A golden of what there is: commands and events.
func TestQMPSchema(t *testing.T) {
	_, q := startQMP(t, tiny.Kernel(t, tiny.Halt))
	var schema []map[string]any
	if err := json.Unmarshal(q.Do("query-qmp-schema", nil), &schema); err != nil {
		t.Fatal(err)
	}
	byName := map[string]map[string]any{}
	for _, s := range schema {
		byName[s["name"].(string)] = s
	}
	var show func(name string, depth int) string
	show = func(name string, depth int) string {
		s := byName[name]
		switch s["meta-type"] {
		case "array":
			return "[" + show(s["element-type"].(string), depth) + "]"
		case "enum":
			return fmt.Sprint(s["values"])
		case "object":
			var members []string
			for _, m := range s["members"].([]any) {
				m := m.(map[string]any)
				name := m["name"].(string)
				if _, optional := m["default"]; optional {
					name += "?"
				}
				if depth > 6 {
					return "..."
				}
				members = append(members, name+": "+show(m["type"].(string), depth+1))
			}
			return "{" + strings.Join(members, ", ") + "}"
		case nil:
			t.Fatalf("nothing describes %s", name)
		}
		return name
	}
	var b strings.Builder
	for _, s := range schema {
		switch s["meta-type"] {
		case "command":
			fmt.Fprintf(&b, "%s %s\n  -> %s\n", s["name"], show(s["arg-type"].(string), 0), show(s["ret-type"].(string), 0))
		case "event":
			fmt.Fprintf(&b, "event %s %s\n", s["name"], show(s["arg-type"].(string), 0))
		}
	}
	file := filepath.Join("testdata", "qmp-schema.txt")
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want, err := os.ReadFile(file); err != nil || string(want) != b.String() {
		t.Errorf("%s (go test -update writes it): %v; the schema is\n%s", file, err, &b)
	}
}
