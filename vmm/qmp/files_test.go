package qmp

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A client's files come in the order in which they were sent, and what no command took is
// closed with the connection.
func TestFiles(t *testing.T) {
	type args struct {
		File File
	}
	var got []*os.File
	s := NewServer(Config{
		Events: noEvents{}, Do: func(f func()) error { f(); return nil },
		Commands: []Command{New("take", func(a args) (bool, error) { got = append(got, a.File.File); return a.File.File != nil, nil })},
	})
	defer s.Close()
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	conn, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in := json.NewDecoder(conn)
	say := func(text, want string, fds ...int) {
		t.Helper()
		var oob []byte
		if fds != nil {
			oob = unix.UnixRights(fds...)
		}
		if _, _, err := conn.WriteMsgUnix([]byte(text), oob, nil); err != nil {
			t.Fatal(err)
		}
		var reply json.RawMessage
		if err := in.Decode(&reply); err != nil || want != "" && string(reply) != want {
			t.Errorf("%s: %s, %v; want %s", text, reply, err, want)
		}
	}
	if err := in.Decode(new(json.RawMessage)); err != nil {
		t.Fatal(err)
	}
	say(`{"execute":"qmp_capabilities"}`, `{"return":{}}`)
	say(`{"execute":"take"}`, `{"return":false}`)
	var ends []*os.File
	pipe := func() int {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, r)
		t.Cleanup(func() { r.Close(); w.Close() })
		return int(w.Fd())
	}
	say(`{"execute":"take"}`, `{"return":true}`, pipe(), pipe())
	say(`{"execute":"take"}`, `{"return":true}`)
	say(`{"execute":"take"}`, `{"return":false}`)
	for i, f := range got[1:3] {
		fmt.Fprint(f, i)
		text := make([]byte, 1)
		if _, err := io.ReadFull(ends[i], text); err != nil || string(text) != fmt.Sprint(i) {
			t.Errorf("file %d: read %q, %v", i, text, err)
		}
		f.Close()
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	say(`{"execute":"query-version"}`, "", int(w.Fd()))
	w.Close()
	conn.Close()
	if _, err := r.Read(make([]byte, 1)); err != io.EOF { // the last writer was the server's
		t.Error(err)
	}
}

type noEvents struct{}

func (noEvents) Poll(uint64) ([]Event, uint64, <-chan struct{}) { return nil, 1, nil }
