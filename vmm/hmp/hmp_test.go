package hmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// machine is a table of commands that remembers what it was told.
type machine struct {
	results map[string]string // JSON
	calls   []string
}

func (f *machine) execute(command string, args map[string]any) (any, error) {
	text, _ := json.Marshal(args)
	f.calls = append(f.calls, command+" "+string(text))
	if command == "netdev_del" {
		return nil, errors.New("Device 'x' not found")
	}
	return json.RawMessage(f.results[command]), nil
}

// results are of QEMU's schema, qapi/*.json.
var results = map[string]string{
	"query-status":    `{"status": "prelaunch", "running": false}`,
	"query-version":   `{"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "baton v0"}`,
	"query-cpus-fast": `[{"cpu-index": 0, "thread-id": 17}, {"cpu-index": 1, "thread-id": 18}]`,
	"query-block": `[{"device": "drive0", "qdev": "/machine/peripheral/d", "inserted": {"file": "disk.raw", "drv": "raw", "ro": false}},
		{"device": "", "inserted": {"file": "b c.raw", "drv": "raw", "ro": true, "node-name": "n"}}]`,
	"query-pci": `[{"bus": 0, "devices": [
		{"bus": 0, "slot": 0, "function": 0, "class_info": {"class": 1536, "desc": "Host bridge"}, "id": {"vendor": 32902, "device": 10688}, "qdev_id": "", "regions": []},
		{"bus": 0, "slot": 10, "function": 1, "class_info": {"class": 1540}, "id": {"vendor": 6966, "device": 12}, "qdev_id": "root1", "regions": [],
		 "pci_bridge": {"bus": {"number": 0, "secondary": 1, "subordinate": 2, "memory_range": {"base": 4261412864, "limit": 4263509983}, "prefetchable_range": {"base": 1, "limit": 2}, "io_range": {"base": 0, "limit": 0}},
		  "devices": [{"bus": 1, "slot": 0, "function": 0, "class_info": {"class": 512, "desc": "Ethernet controller"}, "id": {"vendor": 6900, "device": 4161, "subsystem": 4352, "subsystem-vendor": 6900}, "qdev_id": "net1",
			"regions": [{"bar": 1, "type": "memory", "address": 4261412864, "size": 4096, "prefetch": false, "mem_type_64": false},
				{"bar": 4, "type": "memory", "address": 274877906944, "size": 16384, "prefetch": true, "mem_type_64": true},
				{"bar": 2, "type": "memory", "address": -1, "size": 16384, "prefetch": false, "mem_type_64": true},
				{"bar": 0, "type": "io", "address": 49152, "size": 32}]}]}}]}]`,
}

func newMonitor(leave ...string) (*Monitor, *machine) {
	f := &machine{results: results}
	names := []string{"cont", "stop", "quit", "system_reset", "system_powerdown", "netdev_add", "netdev_del", "set_link"}
	for name := range results {
		names = append(names, name)
	}
	names = slices.DeleteFunc(names, func(n string) bool { return slices.Contains(leave, n) })
	return New(Config{
		Commands: names, Execute: f.execute,
		Views: []View{{"qtree", "the device tree", func() string { return "bus: pcie.0\n" }}},
		Do:    func(do func()) error { do(); return nil },
	}), f
}

// TestAnswers compares what the monitor says with testdata/answers.txt; UPDATE=1 writes it.
func TestAnswers(t *testing.T) {
	m, _ := newMonitor()
	var b strings.Builder
	for _, line := range []string{
		"help", "help stop", "? s", "help info", "help nope", "info", "info status", "info version", "info cpus", "info block",
		"info pci", "info qtree", "info nope", "nope", "stop now", "set_link", "set_link a maybe", "set_link a on", "netdev_del x",
		`"stop`, `"a\q"`, "", "   ",
	} {
		fmt.Fprintf(&b, "(qemu) %s\n%s", line, m.Run(line))
	}
	golden := filepath.Join("testdata", "answers.txt")
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Error(diff)
	}
}

// TestCalls: what of QMP's a line becomes.
func TestCalls(t *testing.T) {
	for line, want := range map[string]string{
		"stop":             "stop null",
		"s":                "stop null",
		"c":                "cont null",
		"q":                "quit null",
		"system_powerdown": "system_powerdown null",
		"set_link n1 off":  `set_link {"name":"n1","up":false}`,
		"netdev_del x":     `netdev_del {"id":"x"}`,
		`netdev_add tap,id=n,script=/a,,b,vhost=on,queues=2`: `netdev_add {"id":"n","queues":2,"script":"/a,b","type":"tap","vhost":true}`,
		`netdev_add "type=tap,id=n,script=a \"b\"",vhost`:    `netdev_add {"id":"n","script":"a \"b\"","type":"tap","vhost":true}`,
		"netdev_add tap,id=n,id=m":                           "",
		"set_link n1 up":                                     "",
	} {
		m, f := newMonitor()
		m.Run(line)
		if got := strings.Join(f.calls, "\n"); got != want {
			t.Errorf("%s: %s, want %s", line, got, want)
		}
	}
}

// What the machine cannot do is not offered.
func TestLeftOut(t *testing.T) {
	m, f := newMonitor("set_link", "query-pci")
	for _, line := range []string{"set_link a on", "info pci"} {
		if got := m.Run(line); !strings.HasPrefix(got, "unknown command: '") || f.calls != nil {
			t.Errorf("%s: %s, calls %q", line, got, f.calls)
		}
	}
	if all := m.Run("help") + m.Run("info"); strings.Contains(all, "set_link") || strings.Contains(all, "info pci") {
		t.Error(all)
	}
}

func TestComplete(t *testing.T) {
	m, _ := newMonitor()
	for line, want := range map[string]string{
		"in": "info ", "info st": "info status ", "info ": "info |block cpus pci qtree status version",
		"sy": "system_|system_powerdown system_reset", "help net": "help netdev_|netdev_add netdev_del", "zz": "zz", "stop x": "stop x", "q": "quit ",
		"": "|cont help info netdev_add netdev_del quit set_link stop system_powerdown system_reset",
	} {
		longer, choices := m.Complete(line)
		if got := strings.TrimSuffix(longer+"|"+strings.Join(choices, " "), "|"); got != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

func FuzzLine(f *testing.F) {
	for _, s := range []string{"info status", `netdev_add "a\"b",x`, "set_link a on", "a\tb \x00", `"\n"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		m, calls := newMonitor()
		text := m.Run(line)
		if text != "" && !strings.HasSuffix(text, "\n") {
			t.Errorf("%q: half a line: %q", line, text)
		}
		if len(calls.calls) > 1 {
			t.Errorf("%q: %q", line, calls.calls)
		}
		words, err := Split(line)
		if err != nil {
			return
		}
		for i, w := range words {
			words[i] = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(w) + `"`
		}
		again, err := Split(strings.Join(words, " "))
		if want, _ := Split(line); err != nil || !slices.Equal(again, want) {
			t.Errorf("%q: %q, quoted it is %q (%v)", line, want, again, err)
		}
		if longer, _ := m.Complete(line); utf8.ValidString(line) && !strings.HasPrefix(longer, line) {
			t.Errorf("%q is completed to %q", line, longer)
		}
	})
}
