package acpi

import (
	"encoding/binary"
	"slices"
	"strings"

	"baton/kvm/guestmem"
)

// An AML writer: each function returns the bytes of one term, as ACPI 6.5, chapter 20
// defines it, and takes the bytes of the terms inside. Names of four characters or less
// are padded; a path is written as in ASL.

// Opcodes, ACPI 6.5, table 20.3.
const (
	opZero, opOne                              = 0x00, 0x01
	opName                                     = 0x08
	opByte, opWord, opDWord, opString, opQWord = 0x0a, 0x0b, 0x0c, 0x0d, 0x0e
	opScope, opBuffer, opPackage, opMethod     = 0x10, 0x11, 0x12, 0x14
	opDualName, opMultiName                    = 0x2e, 0x2f
	opExt                                      = 0x5b
	opLocal0, opArg0                           = 0x60, 0x68
	opStore, opShiftLeft, opAnd, opOr          = 0x70, 0x79, 0x7b, 0x7d
	opNotify                                   = 0x86
	opCreateDWordField                         = 0x8a
	opLNot, opLEqual                           = 0x92, 0x93
	opIf, opElse, opReturn                     = 0xa0, 0xa1, 0xa4

	extOpRegion, extField, extDevice = 0x80, 0x81, 0x82
)

var (
	local0     = []byte{opLocal0}
	nothing    = []byte{opZero} // a target that is left out
	arg0, arg1 = []byte{opArg0}, []byte{opArg0 + 1}
	arg2, arg3 = []byte{opArg0 + 2}, []byte{opArg0 + 3}
)

// integer is an integer constant in its shortest form.
func integer(v uint64) []byte {
	switch le := binary.LittleEndian; {
	case v <= 1:
		return []byte{opZero + byte(v)}
	case v < 1<<8:
		return []byte{opByte, byte(v)}
	case v < 1<<16:
		return le.AppendUint16([]byte{opWord}, uint16(v))
	case v < 1<<32:
		return le.AppendUint32([]byte{opDWord}, uint32(v))
	default:
		return le.AppendUint64([]byte{opQWord}, v)
	}
}

// eisaID is a compressed ID such as PNP0A08: three letters of five bits, four hex digits
// (ACPI 6.5, 19.6.36).
func eisaID(id string) []byte {
	v := uint32(id[0]&0x1f)<<26 | uint32(id[1]&0x1f)<<21 | uint32(id[2]&0x1f)<<16
	for i, shift := 3, 12; i < 7; i, shift = i+1, shift-4 {
		v |= uint32(strings.IndexByte("0123456789ABCDEF", id[i])) << shift
	}
	return binary.BigEndian.AppendUint32([]byte{opDWord}, v)
}

// text is a string constant.
func text(s string) []byte { return slices.Concat([]byte{opString}, []byte(s), []byte{0}) }

// path is a name string (ACPI 6.5, 20.2.2).
func path(s string) []byte {
	rest := strings.TrimLeft(s, `\^`)
	out := []byte(s[:len(s)-len(rest)])
	segments := strings.Split(rest, ".")
	switch len(segments) {
	case 1:
	case 2:
		out = append(out, opDualName)
	default:
		out = append(out, opMultiName, byte(len(segments)))
	}
	for _, seg := range segments {
		out = append(out, (seg + "____")[:4]...)
	}
	return out
}

// packageLength encodes n, less than 1<<28 (ACPI 6.5, 20.2.4).
func packageLength(n int) []byte {
	if n < 1<<6 {
		return []byte{byte(n)}
	}
	out := []byte{byte(n & 0x0f)}
	for n >>= 4; n > 0; n >>= 8 {
		out = append(out, byte(n))
	}
	out[0] |= byte(len(out)-1) << 6
	return out
}

// packaged is opcode, length, parts; the length counts itself.
func packaged(opcode []byte, parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	n := len(body) + 1
	for len(packageLength(n)) != n-len(body) {
		n++
	}
	return slices.Concat(opcode, packageLength(n), body)
}

func op(code byte, args ...[]byte) []byte { return slices.Concat([]byte{code}, slices.Concat(args...)) }

func name(p string, value []byte) []byte { return op(opName, path(p), value) }

func scope(p string, body ...[]byte) []byte {
	return packaged([]byte{opScope}, path(p), slices.Concat(body...))
}

func device(p string, body ...[]byte) []byte {
	return packaged([]byte{opExt, extDevice}, path(p), slices.Concat(body...))
}

// method is a serialized method.
func method(p string, args byte, body ...[]byte) []byte {
	return packaged([]byte{opMethod}, path(p), []byte{args | 1<<3}, slices.Concat(body...))
}

func packageOf(elements ...[]byte) []byte {
	return packaged([]byte{opPackage}, []byte{byte(len(elements))}, slices.Concat(elements...))
}

func buffer(data []byte) []byte {
	return packaged([]byte{opBuffer}, integer(uint64(len(data))), data)
}

// call calls a method.
func call(p string, args ...[]byte) []byte { return slices.Concat(path(p), slices.Concat(args...)) }

// portRegister is an operation region of I/O ports with one 32-bit field over it.
func portRegister(region, field string, port uint16) []byte {
	const systemIO, dwordAccessWriteAsZeros = 1, 3 | 2<<5
	return slices.Concat(
		op(opExt, []byte{extOpRegion}, path(region), []byte{systemIO}, integer(uint64(port)), integer(4)),
		packaged([]byte{opExt, extField}, path(region), []byte{dwordAccessWriteAsZeros}, path(field), packageLength(32)))
}

func createDWordField(source []byte, offset uint64, field string) []byte {
	return op(opCreateDWordField, source, integer(offset), path(field))
}

func store(value, target []byte) []byte     { return op(opStore, value, target) }
func shiftLeft(a []byte, n uint64) []byte   { return op(opShiftLeft, a, integer(n), nothing) }
func or(a, b, target []byte) []byte         { return op(opOr, a, b, target) }
func and(a, b, target []byte) []byte        { return op(opAnd, a, b, target) }
func orInto(target []byte, v uint64) []byte { return or(target, integer(v), target) }
func equal(a, b []byte) []byte              { return op(opLEqual, a, b) }
func notEqual(a, b []byte) []byte           { return op(opLNot, equal(a, b)) }
func notify(p string, v uint64) []byte      { return op(opNotify, path(p), integer(v)) }
func giveBack(v []byte) []byte              { return op(opReturn, v) }

func when(cond []byte, body ...[]byte) []byte {
	return packaged([]byte{opIf}, cond, slices.Concat(body...))
}

func otherwise(body ...[]byte) []byte { return packaged([]byte{opElse}, body...) }

// Resource descriptors, ACPI 6.5, 6.4.

// resources is a resource template.
func resources(descriptors ...[]byte) []byte {
	return buffer(append(slices.Concat(descriptors...), 0x79, 0)) // end tag, checksum not given
}

// ports is a fixed range of I/O ports.
func ports(base uint16, n byte) []byte {
	const decode16 = 1
	le := binary.LittleEndian
	return append(le.AppendUint16(le.AppendUint16([]byte{0x47, decode16}, base), base), 1, n)
}

// isaIRQ is an edge-triggered, active-high ISA interrupt.
func isaIRQ(n int) []byte { return binary.LittleEndian.AppendUint16([]byte{0x22}, 1<<n) }

// interrupt is a level-triggered, active-high, exclusive interrupt.
func interrupt(gsi uint32) []byte {
	const consumer = 1 << 0
	return binary.LittleEndian.AppendUint32([]byte{0x89, 6, 0, consumer, 1}, gsi)
}

// memory32 is a fixed range of memory below 4 GiB.
func memory32(r guestmem.Range) []byte {
	const readWrite = 1
	le := binary.LittleEndian
	return le.AppendUint32(le.AppendUint32([]byte{0x86, 9, 0, readWrite}, uint32(r.Base)), uint32(r.Size))
}

// What an address space descriptor describes, with its type-specific flags.
var (
	windowMemory = [2]byte{0, 1} // read-write, non-cacheable
	windowPorts  = [2]byte{1, 3} // the entire range
	windowBuses  = [2]byte{2, 0}
)

// window is a range that a bridge produces, in an address space descriptor of 16, 32 or 64
// bits.
func window(kind [2]byte, bits int, r guestmem.Range) []byte {
	const minFixedMaxFixed = 1<<2 | 1<<3
	tag := map[int]byte{16: 0x88, 32: 0x87, 64: 0x8a}[bits]
	out := []byte{tag, byte(3 + 5*bits/8), 0, kind[0], minFixedMaxFixed, kind[1]}
	for _, v := range []uint64{0, r.Base, r.Base + r.Size - 1, 0, r.Size} { // granularity, min, max, translation, length
		out = append(out, binary.LittleEndian.AppendUint64(nil, v)[:bits/8]...)
	}
	return out
}
