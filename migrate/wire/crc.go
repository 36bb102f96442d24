package wire

import (
	"hash/crc32"
	"sync"
	"time"
)

// updateCRC is crc32.Update with Castagnoli's polynomial, by the CPU's instruction or, where that
// is slow, by others: an emulated CPU, as in a nested host, takes 100 times as long for the
// instruction as a real one. Carry-less multiplication is no way out there: QEMU does it by SSE
// instructions between AVX ones, to which some CPUs take 20 times as long as well.
func updateCRC(crc uint32, p []byte) uint32 {
	switch {
	case !slowInstruction():
		return byInstruction(crc, p)
	case len(p) < 2*pageSize: // a part of the rest would be as long
		return byTables(crc, p)
	}
	return byFolding(crc, p)
}

func byInstruction(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli, p) }

// slowInstruction says whether a byte takes longer than a nanosecond.
var slowInstruction = sync.OnceValue(func() bool {
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

// folds is the degree of a multiple of the polynomial with few terms, x^209 + x^144 + x^54 + x^39 +
// x^14 + 1. Squared six times, it says the same of words of 64 bits: one is worth as much as itself added
// to those that come 65, 155, 170, 195 and 209 words later.
const folds = 209

// byFolding moves what all words but the last 209 are worth to those, for which five loads a word do,
// and takes these by tables. P has a word at least.
func byFolding(crc uint32, p []byte) uint32 {
	var v [folds + 512]uint64 // words, and what has been moved to them
	v[0] = uint64(^crc)       // is moved to the first word, and to no other
	n := 0
	for words := len(p) / 8; words > 0; words -= n {
		copy(v[:folds], v[n:])
		n = min(words, len(v)-folds)
		in, out := asWords(p)[:n], v[folds:][:n]
		a, b, c, d, e := v[folds-65:][:n], v[folds-155:][:n], v[folds-170:][:n], v[folds-195:][:n], v[:n]
		for i := range out {
			out[i] = in[i] ^ a[i] ^ b[i] ^ c[i] ^ d[i] ^ e[i]
		}
		p = p[n*8:]
	}
	last := v[n:][:folds]
	rest := [folds]uint64(last)
	for _, d := range [...]int{65, 155, 170, 195} { // what came from the last themselves stays there
		from, to := last[:folds-d], rest[d:]
		for i := range from {
			to[i] ^= from[i]
		}
	}
	var bytes [folds * 8]byte
	for i, w := range rest {
		le.PutUint64(bytes[i*8:], w)
	}
	return byTables(byTables(^uint32(0), bytes[:]), p)
}
