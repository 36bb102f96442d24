package wire

import (
	"math/rand/v2"
	"testing"
)

func TestCRC(t *testing.T) {
	p := make([]byte, 40000)
	rand.NewChaCha8([32]byte{}).Read(p)
	for range 1000 {
		from := rand.IntN(len(p) - 8)
		q := p[from : from+8+rand.IntN(len(p)-from-7)]
		start := rand.Uint32()
		want := byInstruction(start, q)
		for _, f := range []func(uint32, []byte) uint32{byTables, byFolding} {
			if got := f(start, q); got != want {
				t.Fatalf("%d bytes from %#x: %#x, want %#x", len(q), start, got, want)
			}
		}
	}
}
