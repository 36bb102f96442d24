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

// TestDigest: the digest is that of the package comment, of pages one by one or at once, and the same bit wrong
// in two words does not go unseen.
func TestDigest(t *testing.T) {
	p := make([]byte, 4*pageSize)
	for i := range p {
		p[i] = byte(i * i >> 3)
	}
	var want digest
	for n := range len(p) / 8 {
		want[n%4] += le.Uint64(p[n*8:])
		want[4+n%4] += want[n%4]
		if n%4 == 3 {
			want[(n/4+3)%4] += want[n/4%4] >> 29
		}
	}
	var once, pages digest
	once.add(p)
	for q := p; len(q) > 0; q = q[pageSize:] {
		pages.add(q[:pageSize])
	}
	if once != want || pages != want {
		t.Errorf("%#x at once, %#x by pages, want %#x", once, pages, want)
	}
	sum := uint64(0)
	for _, w := range want {
		sum = (sum ^ w) * 0x9e3779b97f4a7c15
		sum ^= sum >> 32
	}
	if got := once.sum(); got != uint32(sum) {
		t.Errorf("sum %#x, want %#x", got, uint32(sum))
	}
	for bit := range 64 {
		for second := 8; second < pageSize; second += 8 {
			q := bytes.Clone(p)
			q[bit/8] ^= 1 << (bit % 8)
			q[second+bit/8] ^= 1 << (bit % 8)
			var d digest
			if d.add(q); d == once || d.sum() == once.sum() {
				t.Errorf("bit %d, there and %d bytes after it: not noticed", bit, second)
			}
		}
	}
}
