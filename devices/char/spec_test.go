package char

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for s, want := range map[string]Spec{
		"stdio":     {Kind: Stdio},
		"mon:stdio": {Kind: Stdio, Monitor: true},
		"null":      {Kind: Null},
		"none":      {Kind: None},

		"file:/tmp/a,b:c":  {Kind: File, Path: "/tmp/a,b:c"},
		"unix:/s":          {Kind: Unix, Path: "/s"},
		"unix:a,,b,server": {Kind: Unix, Path: "a,b", Server: true, Wait: true},

		"unix:/s,server=on":                      {Kind: Unix, Path: "/s", Server: true, Wait: true},
		"unix:/s,server=on,wait=off":             {Kind: Unix, Path: "/s", Server: true},
		"unix:/s,server,nowait":                  {Kind: Unix, Path: "/s", Server: true},
		"unix:/s,nowait,server,wait":             {Kind: Unix, Path: "/s", Server: true, Wait: true},
		"unix:/s,server=off":                     {Kind: Unix, Path: "/s"},
		"unix:/s,wait=on":                        {Kind: Unix, Path: "/s"}, // a client has nobody to wait for
		"tcp:localhost:4444":                     {Kind: TCP, Path: "localhost:4444"},
		"tcp::4444,server=on,wait=on":            {Kind: TCP, Path: ":4444", Server: true, Wait: true},
		"tcp:[::1]:65535,server=on,wait=off":     {Kind: TCP, Path: "[::1]:65535", Server: true},
		"tcp:127.0.0.1:0,wait=off,server=on":     {Kind: TCP, Path: "127.0.0.1:0", Server: true},
		"telnet:127.0.0.1:5555,server,nowait":    {Kind: TCP, Telnet: true, Path: "127.0.0.1:5555", Server: true},
		"unix:/s,server=on,server=off,server=on": {Kind: Unix, Path: "/s", Server: true, Wait: true},
	} {
		if got, err := Parse(s); err != nil || got != want {
			t.Errorf("%q: got %+v, %v; want %+v", s, got, err, want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for s, want := range map[string]string{
		"":                      `unknown kind ""`,
		"sdtio":                 `unknown kind "sdtio"`,
		"telnet:4444":           `missing port`,
		"stdio:x":               `stdio takes nothing after the colon, not "x"`,
		"null:":                 `null takes nothing after the colon, not ""`,
		"mon:":                  `the monitor can share stdio only, not ""`,
		"mon:null":              `not "null"`,
		"file:":                 `the path is missing`,
		"file":                  `the path is missing`,
		"unix:":                 `the path is missing`,
		"unix:,server":          `the path is missing`,
		"unix:/s,":              `unknown option ""`,
		"unix:/s,sever":         `unknown option "sever"`,
		"unix:/s,server=yes":    `unknown option "server=yes"`,
		"tcp:localhost":         `missing port`,
		"tcp:::1:80":            `too many colons`,
		"tcp:localhost:http":    `port "http" is not a number from 0 to 65535`,
		"tcp:localhost:65536":   `port "65536"`,
		"tcp:localhost:1,delay": `unknown option "delay"`,
	} {
		spec, err := Parse(s)
		if err == nil {
			t.Errorf("%q: taken as %+v", s, spec)
			continue
		}
		for _, part := range []string{want, "accepted: stdio", "unix:PATH"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q: %q is not in the error: %v", s, part, err)
			}
		}
		if spec != (Spec{}) {
			t.Errorf("%q: an error and %+v", s, spec)
		}
	}
}

// FuzzParse checks that whatever is accepted can be opened as it says.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"mon:stdio", "file:/x", "unix:/a,,b,server=on,wait=off", "tcp:[::1]:1,server,nowait", ","} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		spec, err := Parse(s)
		if err != nil {
			return
		}
		hasPath := spec.Kind == File || spec.Kind == Unix || spec.Kind == TCP
		switch {
		case hasPath != (spec.Path != ""):
			t.Errorf("%q: path %q", s, spec.Path)
		case spec.Server && spec.Kind != Unix && spec.Kind != TCP, spec.Wait && !spec.Server, spec.Monitor && spec.Kind != Stdio:
			t.Errorf("%q: %+v makes no sense", s, spec)
		}
	})
}
