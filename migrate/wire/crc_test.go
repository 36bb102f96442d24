package wire

import (
	"bytes"
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
		if got := byTables(start, q); got != want {
			t.Fatalf("%d bytes from %#x: %#x, want %#x", len(q), start, got, want)
		}
	}
}

// TestDigest: what is on the wire stays what it is, page by page or at once, and two errors in one lane do not
// make up for one another.
func TestDigest(t *testing.T) {
	p := make([]byte, 4*pageSize)
	for i := range p {
		p[i] = byte(i * i >> 3)
	}
	var once, pages digest
	once.add(p)
	for q := p; len(q) > 0; q = q[pageSize:] {
		pages.add(q[:pageSize])
	}
	if got := once.update(7); once != pages {
		t.Errorf("%#x, %v", got, once == pages)
	}
	for bit := range 64 {
		for second := 64; second < 3*64; second += 64 {
			q := bytes.Clone(p)
			q[bit/8] ^= 1 << (bit % 8)
			q[second+bit/8] ^= 1 << (bit % 8)
			var d digest
			if d.add(q); d == once {
				t.Errorf("bit %d, there and %d bytes after it: not noticed", bit, second)
			}
		}
	}
}
