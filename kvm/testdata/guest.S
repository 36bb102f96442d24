# Guests of a few instructions, in flat 32-bit protected mode. Each starts at a fixed
# offset, which guest_test.go knows by name.
#
#	as --32 -o guest.o guest.S && ld -m elf_i386 -Ttext 0x1000 --oformat binary -o guest.bin guest.o

	.code32
	.globl _start
_start:

	.org 0x000		# pio: counts EAX up on port DX, for ever
1:	out	%al, (%dx)
	inc	%eax
	jmp	1b

	.org 0x020		# echo: reads a double word from port DX, writes it back + 1
1:	in	(%dx), %eax
	inc	%eax
	out	%eax, (%dx)
	jmp	1b

	.org 0x040		# string: writes ECX bytes at ESI to port DX, then halts
	cld
	rep outsb
	hlt

	.org 0x060		# mmio: stores EAX at EBX, reads a byte back, stores it at EBX+1
1:	mov	%eax, (%ebx)
	mov	(%ebx), %al
	mov	%al, 1(%ebx)
	jmp	1b

	.org 0x080		# spin: counts at EBX, for ever
1:	incl	(%ebx)
	jmp	1b

	.org 0x0a0		# dirty: writes to one byte in each of ECX pages from EBX on, then port DX
1:	incb	(%ebx)
	add	$0x1000, %ebx
	loop	1b
	out	%al, (%dx)
	hlt

	.org 0x0c0		# halt: until an interrupt, for ever
	movl	$0x1ff, 0xfee000f0	# SVR: LAPIC on
	sti
	out	%al, (%dx)		# ready
1:	hlt
	jmp	1b

	.org 0x100		# handler of every vector: reports on port 0x21, ends it, waits for the
	mov	$0x21, %dx	# next (without IRET, which KVM cannot emulate in protected mode)
	out	%al, (%dx)
	movl	$0, 0xfee000b0		# EOI
	mov	$0x8000, %esp
	sti
1:	hlt
	jmp	1b

	.org 0x130		# fault: an undefined instruction without an IDT is a triple fault
	ud2

	.org 0x140
