#include "textflag.h"

// x^(512+32) and x^(512-32) modulo Castagnoli's polynomial, bits reflected and shifted by one.
DATA constants<>+0(SB)/8, $0x740eef02
DATA constants<>+8(SB)/8, $0x9e4addf8
GLOBL constants<>(SB), RODATA, $16

// FOLD multiplies 16 bytes of the state by x^512 and adds those of p.
#define FOLD(off, state, t) \
	VPCLMULQDQ $0x00, X0, state, t     \
	VPCLMULQDQ $0x11, X0, state, state \
	VPXOR      off(SI), t, t           \
	VPXOR      t, state, state

// func fold(state *[blockSize]byte, p []byte)
TEXT ·fold(SB), NOSPLIT, $0-32
	MOVQ    state+0(FP), DI
	MOVQ    p_base+8(FP), SI
	MOVQ    p_len+16(FP), CX
	VMOVDQU constants<>(SB), X0
	VMOVDQU 0(DI), X1
	VMOVDQU 16(DI), X2
	VMOVDQU 32(DI), X3
	VMOVDQU 48(DI), X4

loop:
	FOLD(0, X1, X5)
	FOLD(16, X2, X6)
	FOLD(32, X3, X7)
	FOLD(48, X4, X8)
	ADDQ    $64, SI
	SUBQ    $64, CX
	JNE     loop
	VMOVDQU X1, 0(DI)
	VMOVDQU X2, 16(DI)
	VMOVDQU X3, 32(DI)
	VMOVDQU X4, 48(DI)
	RET
