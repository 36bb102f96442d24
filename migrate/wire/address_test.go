package wire

import "testing"

func TestParseURI(t *testing.T) {
	for _, good := range []string{"tcp:host:4444", "tcp:0.0.0.0:0", "tcp:[::1]:5", "tcp::4444", "unix:/tmp/a:b", "fd:m", "exec:cat > x", "file:/a/b", "file:/a,offset=4096"} {
		a, err := ParseURI(good)
		if err != nil || a.String() != good {
			t.Errorf("%s: %v, %v", good, a, err)
		}
	}
	if a, err := ParseURI("file:/a,offset=0x1000"); err != nil || a.Offset != 4096 || a.Path != "/a" {
		t.Errorf("%+v, %v", a, err)
	}
	for bad, want := range map[string]string{
		"":                  "unknown migration protocol: ",
		"bogus:1":           "unknown migration protocol: bogus:1",
		"tcp:host":          "address tcp:host: missing port in address",
		"tcp:host:":         "address tcp:host:: no port",
		"unix:":             "address unix:: no path",
		"fd:":               "address fd:: no name",
		"exec: ":            "address exec: : no command",
		"file:":             "address file:: no path",
		"file:a,offset=-1":  "address file:a,offset=-1: offset is no number of bytes",
		"file:a,offset=1 2": "address file:a,offset=1 2: offset is no number of bytes",
	} {
		if a, err := ParseURI(bad); err == nil || err.Error() != want {
			t.Errorf("%s: %v, %v; want %s", bad, a, err, want)
		}
	}
}
