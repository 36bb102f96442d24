package wire

import (
	"hash/crc32"
	"sync"
	"time"
)

// updateCRC is crc32.Update with Castagnoli's polynomial, by the CPU's instruction or, where that
// is slow, by tables: an emulated CPU, as in a nested host, takes 100 times as long for the
// instruction as a real one.
func updateCRC(crc uint32, p []byte) uint32 {
	if slowInstruction() {
		return byTables(crc, p)
	}
	return byInstruction(crc, p)
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

// tables are those of the slicing algorithm, for two bytes at a time, as loads cost most where
// instructions are emulated: tables[i][v] is the CRC of the two bytes v and 2i zero bytes after them.
var tables = sync.OnceValue(func() *[4][1 << 16]uint32 {
	t := new([4][1 << 16]uint32)
	for v := range t[0] {
		t[0][v] = byByte(byByte(uint32(v), 0), 0)
		for i := 1; i < len(t); i++ {
			t[i][v] = byByte(byByte(t[i-1][v], 0), 0)
		}
	}
	return t
})

func byByte(crc uint32, b byte) uint32 { return castagnoli[byte(crc)^b] ^ crc>>8 }

func byTables(crc uint32, p []byte) uint32 {
	t := tables()
	crc = ^crc
	for ; len(p) >= 8; p = p[8:] {
		v := le.Uint64(p) ^ uint64(crc)
		crc = t[3][uint16(v)] ^ t[2][uint16(v>>16)] ^ t[1][uint16(v>>32)] ^ t[0][uint16(v>>48)]
	}
	for _, b := range p {
		crc = byByte(crc, b)
	}
	return ^crc
}
