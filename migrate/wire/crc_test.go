package wire

import (
	"hash/crc32"
	"math/rand/v2"
	"testing"
)

// The checksum is crc32's, whatever the length.
func TestCRC(t *testing.T) {
	p := make([]byte, 4096)
	rand.NewChaCha8([32]byte{}).Read(p)
	for range 1000 {
		from := rand.IntN(len(p))
		q := p[from : from+rand.IntN(len(p)-from+1)]
		start := rand.Uint32()
		if got, want := updateCRC(start, q), crc32.Update(start, castagnoli, q); got != want {
			t.Fatalf("%d bytes from %#x: %#x, want %#x", len(q), start, got, want)
		}
	}
}
