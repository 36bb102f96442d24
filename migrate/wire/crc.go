package wire

import (
	"hash/crc32"

	"golang.org/x/sys/cpu"
)

// blockSize is what fold takes at a time.
const blockSize = 64

// updateCRC is crc32.Update with Castagnoli's polynomial, as fast as that where the CPU has an
// instruction for it, and ten times as fast where the instruction is emulated, as in a nested host.
func updateCRC(crc uint32, p []byte) uint32 {
	if len(p) < 4*blockSize || !cpu.X86.HasAVX || !cpu.X86.HasPCLMULQDQ {
		return crc32.Update(crc, castagnoli, p)
	}
	var state [blockSize]byte
	copy(state[:], p)
	le.PutUint32(state[:], le.Uint32(state[:])^^crc)
	n := len(p) / blockSize * blockSize
	fold(&state, p[blockSize:n])
	crc = crc32.Update(^uint32(0), castagnoli, state[:])
	return crc32.Update(crc, castagnoli, p[n:])
}

// fold replaces state with other bytes that have the same remainder as state with p, of whole
// blocks, after it: Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
// Instruction, Intel 2009.
//
//go:noescape
func fold(state *[blockSize]byte, p []byte)
