package wire

import (
	"math/rand/v2"
	"testing"
)

func TestCRC(t *testing.T) {
	p := make([]byte, 4096)
	rand.NewChaCha8([32]byte{}).Read(p)
	for range 1000 {
		from := rand.IntN(len(p))
		q := p[from : from+rand.IntN(len(p)-from+1)]
		start := rand.Uint32()
		if got, want := byTables(start, q), byInstruction(start, q); got != want {
			t.Fatalf("%d bytes from %#x: %#x, want %#x", len(q), start, got, want)
		}
	}
}
