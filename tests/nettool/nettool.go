// Package nettool measures a network between two ends that both run it, the peer's and the guest's:
// TCP throughput, where a sender counts what the receiver confirms, not what went into its own
// socket buffers; and numbered datagrams. Guests build it into their images, from another module.
package nettool

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Result is one measurement.
type Result struct {
	Bytes   uint64  `json:"bytes"` // received and confirmed by the peer
	Seconds float64 `json:"seconds"`
	MbitPS  float64 `json:"mbit_s"`
}

// Serve accepts senders on l until it is closed: it drops what a connection carries and
// answers its end with the number of bytes, 8 bytes big endian.
func Serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go Receive(c)
	}
}

// Receive serves one sender until it ends.
func Receive(c net.Conn) {
	defer c.Close()
	if n, err := drain(c); err == nil {
		_, _ = c.Write(binary.BigEndian.AppendUint64(nil, n))
	}
}

// drain reads into one large buffer: io.Copy's 32 KiB cost a slow guest too many calls.
func drain(r io.Reader) (total uint64, err error) {
	buf := make([]byte, 256<<10)
	for {
		n, err := r.Read(buf)
		total += uint64(n)
		if err == io.EOF {
			return total, nil
		} else if err != nil {
			return total, err
		}
	}
}

// Send sends for d over several streams at once.
func Send(addr string, streams int, d time.Duration) (Result, error) {
	if streams < 1 || d <= 0 {
		return Result{}, fmt.Errorf("send to %s: %d streams for %v make no measurement", addr, streams, d)
	}
	var conns []*net.TCPConn
	for range streams {
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			return Result{}, err
		}
		defer c.Close()
		conns = append(conns, c.(*net.TCPConn))
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var res Result
	var failed error
	start := time.Now()
	for _, c := range conns {
		wg.Go(func() {
			n, err := stream(c, start.Add(d))
			mu.Lock()
			defer mu.Unlock()
			res.Bytes += n
			if err != nil {
				failed = err
			}
		})
	}
	wg.Wait()
	res.Seconds = time.Since(start).Seconds()
	res.MbitPS = float64(res.Bytes) * 8 / 1e6 / res.Seconds
	return res, failed
}

func stream(c *net.TCPConn, until time.Time) (uint64, error) {
	_ = c.SetDeadline(until.Add(10 * time.Second)) // a peer that is gone ends the run
	for buf := make([]byte, 256<<10); time.Now().Before(until); {
		if _, err := c.Write(buf); err != nil {
			return 0, err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	var n [8]byte
	_, err := io.ReadFull(c, n[:])
	return binary.BigEndian.Uint64(n[:]), err
}
