package wire

import (
	"hash/crc32"
	"time"
)

// updateCRC is crc32.Update with Castagnoli's polynomial, by the CPU's instruction or by
// tables, whichever is faster here: a CPU that is emulated, as in a nested host, may take 100 times
// as long for the instruction as a real one.
var updateCRC = fasterCRC()

func byInstruction(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli, p) }

// fasterCRC tries both on 32 KiB, which takes a CPU with the instruction some microseconds.
func fasterCRC() func(uint32, []byte) uint32 {
	p := make([]byte, 32<<10)
	took := func(f func(uint32, []byte) uint32) time.Duration {
		f(0, p[:64])
		start := time.Now()
		f(0, p)
		return time.Since(start)
	}
	if took(byInstruction) <= took(byTables) {
		return byInstruction
	}
	return byTables
}

// tables are those of the slicing-by-8 algorithm: tables[i][b] is the CRC of the byte b and i
// zero bytes after it.
var tables = func() (t [8][256]uint32) {
	t[0] = *crc32.MakeTable(crc32.Castagnoli)
	for b := range t[0] {
		for i := 1; i < len(t); i++ {
			t[i][b] = t[0][t[i-1][b]&0xff] ^ t[i-1][b]>>8
		}
	}
	return t
}()

func byTables(crc uint32, p []byte) uint32 {
	crc = ^crc
	for ; len(p) >= 8; p = p[8:] {
		crc ^= le.Uint32(p)
		crc = tables[0][p[7]] ^ tables[1][p[6]] ^ tables[2][p[5]] ^ tables[3][p[4]] ^
			tables[4][crc>>24] ^ tables[5][crc>>16&0xff] ^ tables[6][crc>>8&0xff] ^ tables[7][crc&0xff]
	}
	for _, b := range p {
		crc = tables[0][byte(crc)^b] ^ crc>>8
	}
	return ^crc
}
