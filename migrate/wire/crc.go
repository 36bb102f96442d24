package wire

import (
	"hash/crc32"
	"sync"
	"time"
)

// updateCRC is crc32.Update with Castagnoli's polynomial, by the CPU's instruction or, where that
// is slow, by tables.
func updateCRC(crc uint32, p []byte) uint32 {
	if SlowCRC() {
		return byTables(crc, p)
	}
	return byInstruction(crc, p)
}

func byInstruction(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli, p) }

// SlowCRC says whether a byte takes the CPU's instruction longer than a nanosecond: an emulated CPU, as in a
// nested host, takes 100 times as long as a real one. Carry-less multiplication is no way out there: QEMU does it by
// SSE instructions between AVX ones, to which some CPUs take 20 times as long as well.
var SlowCRC = sync.OnceValue(func() bool {
	p := make([]byte, 8<<10)
	best := time.Hour
	for range 4 {
		start := time.Now()
		byInstruction(0, p)
		best = min(best, time.Since(start))
	}
	return best > time.Duration(len(p))
})

// tables are those of the slicing algorithm, for 16 bytes at a time: tables[i][v] is the CRC of the
// byte v and i zero bytes after it. Larger ones do not stay in a CPU's caches.
var tables = sync.OnceValue(func() *[16][256]uint32 {
	t := new([16][256]uint32)
	for v := range t[0] {
		t[0][v] = castagnoli[v]
		for i := 1; i < len(t); i++ {
			t[i][v] = byByte(t[i-1][v], 0)
		}
	}
	return t
})

func byByte(crc uint32, b byte) uint32 { return castagnoli[byte(crc)^b] ^ crc>>8 }

func byTables(crc uint32, p []byte) uint32 {
	t := tables()
	crc = ^crc
	for ; len(p) >= 16; p = p[16:] {
		v, w := le.Uint64(p)^uint64(crc), le.Uint64(p[8:])
		crc = t[15][byte(v)] ^ t[14][byte(v>>8)] ^ t[13][byte(v>>16)] ^ t[12][byte(v>>24)] ^
			t[11][byte(v>>32)] ^ t[10][byte(v>>40)] ^ t[9][byte(v>>48)] ^ t[8][v>>56] ^
			t[7][byte(w)] ^ t[6][byte(w>>8)] ^ t[5][byte(w>>16)] ^ t[4][byte(w>>24)] ^
			t[3][byte(w>>32)] ^ t[2][byte(w>>40)] ^ t[1][byte(w>>48)] ^ t[0][w>>56]
	}
	for _, b := range p {
		crc = byByte(crc, b)
	}
	return ^crc
}

// A digest stands for pages where a CRC of all of them would take longer than to send them: see the package
// comment. Four sums of words, four sums of those, so that the order counts, and shifts by which high bits reach
// low ones: of multiplications, rotations and carry-less products an emulated CPU makes ten times as many
// instructions. Each step is a bijection of the state, so that one word that has changed always shows in the digest. What
// has changed passes the sum of that with a chance of 1 in 2^32; a CRC of the pages themselves would be sure to see
// short errors.
type digest [8]uint64

// add goes on with whole pages.
func (d *digest) add(p []byte) {
	a, b, c, e := d[0], d[1], d[2], d[3]
	aa, bb, cc, ee := d[4], d[5], d[6], d[7]
	for w := asWords(p); len(w) >= 16; w = w[16:] {
		a, b, c, e = a+w[0], b+w[1], c+w[2], e+w[3]
		aa, bb, cc, ee = aa+a, bb+b, cc+c, ee+e
		e += a >> 29
		a, b, c, e = a+w[4], b+w[5], c+w[6], e+w[7]
		aa, bb, cc, ee = aa+a, bb+b, cc+c, ee+e
		a += b >> 29
		a, b, c, e = a+w[8], b+w[9], c+w[10], e+w[11]
		aa, bb, cc, ee = aa+a, bb+b, cc+c, ee+e
		b += c >> 29
		a, b, c, e = a+w[12], b+w[13], c+w[14], e+w[15]
		aa, bb, cc, ee = aa+a, bb+b, cc+c, ee+e
		c += e >> 29
	}
	*d = digest{a, b, c, e, aa, bb, cc, ee}
}

// sum makes 32 bits of the digest, by steps that are bijections as well, but for the last, which takes the low half. Eight
// multiplications for a page do not count; a CRC by tables took half as long as the page.
func (d *digest) sum() uint32 {
	h := uint64(0)
	for _, w := range d {
		h = (h ^ w) * digestFactor
		h ^= h >> 32
	}
	return uint32(h)
}

// digestFactor is 2^64 divided by the golden ratio, odd.
const digestFactor = 0x9e3779b97f4a7c15
