package migrate

import (
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"time"
)

// stampedConn sends chunks that the guest's agent checks (@tcp-stamp): number, random bytes,
// checksum.
type stampedConn struct{ net.Conn }

const chunkSize = 16 << 10

func dialStamped(addr string) (*stampedConn, error) {
	c, err := net.DialTimeout("tcp", addr, 10*time.Second)
	return &stampedConn{c}, err
}

// send sends rate bytes per second until stop is closed, and returns how many it has sent. A
// guest that is away for a while is no error: TCP sends again.
func (c *stampedConn) send(rate float64, stop <-chan struct{}) (sent int64) {
	defer c.Close()
	go func() {
		<-stop
		c.SetDeadline(time.Unix(1, 0))
	}()
	random := rand.NewChaCha8([32]byte{})
	chunk := make([]byte, chunkSize)
	pause := time.NewTimer(0)
	defer pause.Stop()
	start := time.Now()
	for n := uint32(0); ; n++ {
		_, _ = random.Read(chunk)
		binary.BigEndian.PutUint32(chunk, n)
		binary.BigEndian.PutUint32(chunk[chunkSize-4:], crc32.ChecksumIEEE(chunk[:chunkSize-4]))
		if _, err := c.Write(chunk); err != nil {
			return sent
		}
		sent += chunkSize
		pause.Reset(time.Duration(float64(sent)/rate*float64(time.Second)) - time.Since(start))
		select {
		case <-pause.C:
		case <-stop:
			return sent
		}
	}
}
