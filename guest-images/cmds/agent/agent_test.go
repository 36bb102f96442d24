package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"baton/guest-images/proto"
)

func do(argv ...string) proto.Response {
	return handle(context.Background(), proto.Request{Argv: argv})
}

func TestRunProgram(t *testing.T) {
	r := handle(context.Background(), proto.Request{Argv: []string{"sh", "-c", "cat; echo err >&2; exit 3"}, Stdin: "in"})
	if r.Exit != 3 || r.Stdout != "in" || r.Stderr != "err\n" || r.Error != "" {
		t.Errorf("got %+v", r)
	}
	if r := do("/does/not/exist"); r.Exit != -1 || !strings.Contains(r.Error, "no such file") {
		t.Errorf("missing program: %+v", r)
	}
	if r := do("sh", "-c", "kill -9 $$"); r.Exit != -1 || !strings.Contains(r.Error, "signal: killed") {
		t.Errorf("killed program: %+v", r)
	}
}

// At the time limit the whole process group goes, and what was printed is kept.
func TestRunProgramTimeLimit(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	r := handle(ctx, proto.Request{Argv: []string{"sh", "-c", "echo begun; sleep 60 & sleep 60"}, TimeoutMS: 300})
	if r.Exit != -1 || r.Stdout != "begun\n" || r.Error != "run sh: time limit of 300 ms" {
		t.Errorf("got %+v", r)
	}
	if d := time.Since(start); d > 20*time.Second {
		t.Errorf("took %v", d)
	}
}

func TestLimitedBuffer(t *testing.T) {
	r := do("sh", "-c", "head -c 9000000 /dev/zero")
	if r.Exit != 0 || len(r.Stdout) != maxOutput {
		t.Errorf("%d bytes, %+v", len(r.Stdout), r.Error)
	}
}

func TestVerbs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("contents"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		argv       []string
		exit       int
		out, error string
	}{
		{[]string{"@cat", file}, 0, "contents", ""},
		{[]string{"@cat", file + "x"}, 1, "", "no such file"},
		{[]string{"@cat"}, -1, "", "usage: @cat FILE"},
		{[]string{"@nope"}, -1, "", "no verb @nope"},
		{[]string{"@addr", "eth9", "10.0.0.1"}, 1, "", "invalid CIDR"},
		{[]string{"@addr", "eth9", "fe80::1/64"}, 1, "", "not an IPv4 address"},
		{[]string{"@addr", "02:00:00:00:00:99", "10.0.0.1/24"}, 1, "", "no interface has the MAC"},
		{[]string{"@ping", "127.0.0.1", "many", "1"}, 1, "", "invalid syntax"},
		{[]string{"@ping", "127.0.0.1", "1", "-1"}, 1, "", "invalid syntax"},
		{[]string{"@blkread", file, "100", "1", "seq", "1"}, 1, "", "not a multiple of 512"},
		{[]string{"@blkread", file, "512", "1", "upwards", "1"}, 1, "", "neither random nor seq"},
		{[]string{"@tcp-send", "127.0.0.1:1", "0", "1"}, 1, "", "no measurement"},
		{[]string{"@modprobe", "x"}, 1, "", "@modprobe: "},
	} {
		r := do(tc.argv...)
		if r.Exit != tc.exit || r.Stdout != tc.out || !strings.Contains(r.Error, tc.error) || (tc.error == "") != (r.Error == "") {
			t.Errorf("%q: %+v", tc.argv, r)
		}
	}
}

func TestEcho(t *testing.T) {
	address, err := tcpEcho([]string{"127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", strings.TrimSpace(address.(string)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestTCPVerbs(t *testing.T) {
	r := do("@tcp-serve", "127.0.0.1:0")
	if r.Error != "" {
		t.Fatal(r.Error)
	}
	r = do("@tcp-send", strings.TrimSpace(r.Stdout), "2", "0.05")
	var res struct {
		Bytes  uint64
		MbitPS float64 `json:"mbit_s"`
	}
	if err := json.Unmarshal([]byte(r.Stdout), &res); err != nil || res.Bytes == 0 || res.MbitPS <= 0 {
		t.Errorf("%+v: %v", r, err)
	}
}

func TestBlkRead(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 64<<10), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, order := range []string{"seq", "random"} {
		r := do("@blkread", file, "4096", "40", order, "20")
		if strings.Contains(r.Error, "invalid argument") {
			t.Skip("this file system has no O_DIRECT")
		}
		var res blkResult
		if err := json.Unmarshal([]byte(r.Stdout), &res); err != nil || res.Ops != 40 || res.Bytes != 40*4096 || res.IOPS <= 0 {
			t.Errorf("%s: %+v: %v", order, r, err)
		}
	}
	if r := do("@blkread", file, "131072", "1", "seq", "1"); !strings.Contains(r.Error, "less than a block") {
		t.Errorf("block larger than the disk: %+v", r)
	}
}

func TestPing(t *testing.T) {
	r := do("@ping", "127.0.0.1", "3", "1")
	if strings.Contains(r.Error, "operation not permitted") {
		t.Skip("raw sockets need CAP_NET_RAW")
	}
	var res pingResult
	if err := json.Unmarshal([]byte(r.Stdout), &res); err != nil || res.Sent != 3 || res.Received != 3 || len(res.RTT) != 3 {
		t.Errorf("%+v: %v", r, err)
	}
}

// RFC 1071: the sum over a message with its checksum is all ones.
func TestEchoRequest(t *testing.T) {
	for _, id := range []uint16{0, 0xf7ff, 0xffff} {
		sum := uint32(0)
		for p := echoRequest(id, 0xfffe); len(p) > 0; p = p[2:] {
			sum += uint32(binary.BigEndian.Uint16(p))
		}
		if sum = sum&0xffff + sum>>16; sum != 0xffff {
			t.Errorf("id %#x: sum %#x", id, sum)
		}
	}
}

// The port turns the end of input, which its host's end closed means, into empty lines.
func TestPortOutlivesItsHost(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 8)
	for range 2 {
		if n, err := (port{f}).Read(b); n != 1 || err != nil || b[0] != '\n' {
			t.Errorf("read %d bytes, %q, %v", n, b[:n], err)
		}
	}
}
