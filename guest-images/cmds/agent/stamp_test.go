package main

import (
	"encoding/binary"
	"hash/crc32"
	"net"
	"strings"
	"testing"
)

func TestStamp(t *testing.T) {
	p := make([]byte, pageSize)
	fill(p, 7, 3)
	if err := compare(p, 7, 3); err != nil {
		t.Error(err)
	}
	for _, bad := range []func(){
		func() { p[4095] ^= 1 },
		func() { fill(p, 8, 3) },
		func() { fill(p, 7, 2) },
		func() { clear(p[2048:]) },
	} {
		fill(p, 7, 3)
		bad()
		if compare(p, 7, 3) == nil {
			t.Error("a bad page is taken for a good one")
		}
	}
}

func TestStampRAM(t *testing.T) {
	if _, err := stampRAM([]string{"1", "100"}); err != nil {
		t.Fatal(err)
	}
	if _, err := stampRAM([]string{"1", "100"}); err == nil {
		t.Error("twice")
	}
	for {
		c, err := checkStamps(nil)
		if err != nil {
			t.Fatal(err)
		}
		if c := c.(stampCheck); c.Writes > 20 && c.Pages == 256 {
			break
		}
	}
	stamps.ram.mu.Lock()
	stamps.ram.shadow[5]++
	stamps.ram.mu.Unlock()
	if _, err := checkStamps(nil); err == nil || !strings.Contains(err.Error(), "page 5") {
		t.Error(err)
	}
}

func TestStampTCP(t *testing.T) {
	here, there := net.Pipe()
	var s tcpStamps
	done := make(chan bool)
	go func() { s.receive(there); close(done) }()
	chunk := make([]byte, chunkSize)
	send := func(number uint32, spoil bool) {
		binary.BigEndian.PutUint32(chunk, number)
		binary.BigEndian.PutUint32(chunk[chunkSize-4:], crc32.ChecksumIEEE(chunk[:chunkSize-4]))
		if spoil {
			chunk[100] ^= 1
		}
		if _, err := here.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint32(130) {
		send(i, false)
	}
	send(130, true)
	here.Close()
	<-done
	if s.bytes.Load() != 131*chunkSize || s.err == nil || !strings.Contains(s.err.Error(), "chunk 130: checksum") {
		t.Errorf("%d bytes, %v", s.bytes.Load(), s.err)
	}
}
