// Package tiny makes kernels of a few instructions: PVH ELF files in flat 32-bit protected
// mode. They run on every KVM, kvm_pvm's emulator included, and start in milliseconds, so
// that what a suite shows of the VMM alone needs no Linux.
package tiny

import (
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"baton/devices/chipset"
)

var le = binary.LittleEndian

// Code is machine code that can be put anywhere, a piece of a kernel.
type Code []byte

const (
	base   = 0x10_0000 // where the kernel lies and begins
	header = 0x1000    // in the file, before the code
)

// Pieces of kernels.
var (
	// Halt stops for ever: hlt; jmp back.
	Halt = Code{0xf4, 0xeb, 0xfd}
	// Spin runs for ever: jmp to itself.
	Spin = Code{0xeb, 0xfe}
	// TripleFault is an undefined instruction, ud2, for a CPU that has no IDT.
	TripleFault = Code{0x0f, 0x0b}
	// PowerOff enters S5 by the ACPI sleep control register.
	PowerOff = Out(chipset.SleepControlPort, 1<<5|chipset.SleepTypeS5<<2)
	// Reset writes the reset control register.
	Reset = Out(chipset.ResetPort, chipset.ResetValue)
	// Panic tells pvpanic that the kernel has panicked.
	Panic = Out(chipset.PanicPort, 1)
	// Echo writes to COM1 what it reads there, for ever.
	Echo = Code{
		0x66, 0xba, 0xfd, 0x03, // wait: mov $0x3fd, %dx
		0xec,       //       in (%dx), %al
		0xa8, 0x01, //       test $1, %al
		0x74, 0xf7, //       jz wait
		0xb2, 0xf8, //       mov $0xf8, %dl
		0xec,       //       in (%dx), %al
		0xee,       //       out %al, (%dx)
		0xeb, 0xf1, //       jmp wait
	}
)

// Out writes a byte to a port: mov, mov, out.
func Out(port uint16, v byte) Code {
	return Code{0x66, 0xba, byte(port), byte(port >> 8), 0xb0, v, 0xee}
}

// Write stores the low width bytes of v, 1, 2 or 4 of them, at a physical address.
func Write(addr uint32, width int, v uint32) Code {
	at := le.AppendUint32(nil, addr)
	value := le.AppendUint32(nil, v)[:width]
	switch width {
	case 1:
		return slices.Concat(Code{0xc6, 0x05}, at, value)
	case 2:
		return slices.Concat(Code{0x66, 0xc7, 0x05}, at, value)
	}
	return slices.Concat(Code{0xc7, 0x05}, at, value)
}

// Read loads width bytes, 1, 2, 4 or 8 of them, from a physical address.
func Read(addr uint32, width int) Code {
	at := le.AppendUint32(nil, addr)
	switch width {
	case 1:
		return append(Code{0x8a, 0x05}, at...)
	case 2:
		return append(Code{0x66, 0x8b, 0x05}, at...)
	case 8:
		return append(Code{0x0f, 0x6f, 0x05}, at...) // movq to %mm0
	}
	return append(Code{0x8b, 0x05}, at...)
}

// WriteMM stores the 8 bytes that Read got last.
func WriteMM(addr uint32) Code { return le.AppendUint32(Code{0x0f, 0x7f, 0x05}, addr) }

// OutN writes the low width bytes of v, 1, 2 or 4 of them, to a port.
func OutN(port uint16, width int, v uint32) Code {
	c := append(Code{0x66, 0xba, byte(port), byte(port >> 8)}, le.AppendUint32([]byte{0xb8}, v)...)
	return append(c, map[int]Code{1: {0xee}, 2: {0x66, 0xef}, 4: {0xef}}[width]...)
}

// InN reads width bytes, 1, 2 or 4 of them, from a port.
func InN(port uint16, width int) Code {
	return append(Code{0x66, 0xba, byte(port), byte(port >> 8)}, map[int]Code{1: {0xec}, 2: {0x66, 0xed}, 4: {0xed}}[width]...)
}

// Sum adds up double words at the given addresses, so that their order matters, and writes
// the sum to COM1 as eight letters from A to P.
func Sum(addrs []uint32) Code {
	c := Code{0x31, 0xc0} // xor %eax, %eax
	for _, a := range addrs {
		c = append(c, 0xc1, 0xc0, 5) //  rol $5, %eax
		c = append(c, 0x03, 0x05)    //  add a, %eax
		c = le.AppendUint32(c, a)
	}
	for range 8 {
		c = append(c,
			0xc1, 0xc0, 4, //            rol $4, %eax
			0x89, 0xc1, //               mov %eax, %ecx
			0x24, 0x0f, 0x04, 'A', //    and $15, %al; add $'A', %al
			0x66, 0xba, 0xf8, 0x03, 0xee, // mov $0x3f8, %dx; out %al, (%dx)
			0x89, 0xc8) //               mov %ecx, %eax
	}
	return c
}

// Twice runs first, and after a reset then: the byte that it keeps at 2 MiB is still there,
// for RAM outlives a reset.
func Twice(first, then Code) Code {
	c := Code{
		0xb0, 0x01, //                   mov $1, %al
		0x86, 0x05, 0, 0, 0x20, 0x00, // xchg %al, 0x200000
		0x84, 0xc0, //                   test %al, %al
		0x0f, 0x85, //                   jnz then
	}
	c = le.AppendUint32(c, uint32(len(first)))
	return slices.Concat(c, first, then)
}

// Say writes text to COM1.
func Say(text string) Code {
	var c Code
	for _, b := range []byte(text) {
		c = append(c, Out(chipset.COM1Port, b)...)
	}
	return c
}

// Kernel writes a kernel that runs the pieces one after the other and returns its path.
func Kernel(t testing.TB, pieces ...Code) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(name, ELF(slices.Concat(pieces...)), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// ELF returns the file: headers, the PVH note, the code as one segment.
func ELF(code Code) []byte {
	note := le.AppendUint32(nil, 4)
	note = le.AppendUint32(note, 4)
	note = le.AppendUint32(note, 18) // XEN_ELFNOTE_PHYS32_ENTRY
	note = append(note, "Xen\x00"...)
	note = le.AppendUint32(note, base)
	h := elf.Header32{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS32), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_386), Version: 1, Entry: base,
		Phoff: 52, Ehsize: 52, Phentsize: 32, Phnum: 2, Shentsize: 40,
	}
	loads := []elf.Prog32{
		{Type: uint32(elf.PT_NOTE), Off: 0x800, Filesz: uint32(len(note)), Memsz: uint32(len(note)), Align: 4},
		{Type: uint32(elf.PT_LOAD), Off: header, Vaddr: base, Paddr: base, Filesz: uint32(len(code)), Memsz: uint32(len(code)), Flags: uint32(elf.PF_R | elf.PF_X)},
	}
	file := make([]byte, header, header+len(code))
	for _, part := range []struct {
		at   int
		data any
	}{{0, h}, {52, loads}, {0x800, note}} {
		if _, err := binary.Encode(file[part.at:], le, part.data); err != nil {
			panic(err) // structures of fixed size that fit
		}
	}
	return append(file, code...)
}
