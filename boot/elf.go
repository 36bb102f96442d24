package boot

import (
	"bufio"
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"baton/kvm/guestmem"
)

const (
	maxImage   = gib      // the most that is read, or unpacked, to find the segments
	maxHeaders = 64 << 10 // ELF header and program headers end within these bytes
	maxNote    = 64 << 10

	notePHYS32Entry = 18 // XEN_ELFNOTE_PHYS32_ENTRY: Xen's public/elfnote.h
)

// image is what loading the kernel yields.
type image struct {
	entry      uint32 // PVH entry point
	end        uint64 // end of the highest segment
	cmdlineMax uint64 // bytes, without the terminating zero
}

// segment is a program header, of either ELF class.
type segment struct {
	typ           elf.ProgType
	off, paddr    uint64
	filesz, memsz uint64
	note          []byte // of a PT_NOTE outside of all PT_LOAD
}

func isELF(head []byte) bool { return bytes.HasPrefix(head, []byte(elf.ELFMAG)) }

// loadELF reads an ELF file from a stream, without seeking and without a copy: each
// PT_LOAD goes from the reader to its place in guest RAM.
func loadELF(mem *guestmem.Memory, m Map, src io.Reader) (image, error) {
	r := bufio.NewReaderSize(&io.LimitedReader{R: src, N: maxImage}, maxHeaders)
	segs, err := readHeaders(r)
	if err != nil {
		return image{}, err
	}
	if err := checkSegments(segs, m); err != nil {
		return image{}, err
	}
	img := image{cmdlineMax: cmdlineMax}
	var pos uint64
	for i := range segs {
		s := &segs[i]
		if s.filesz == 0 && s.typ == elf.PT_NOTE || inLoad(segs, s) != nil {
			continue
		}
		if s.filesz != 0 {
			if s.off < pos {
				return image{}, fmt.Errorf("ELF segment at file offset %#x overlaps the one before it", s.off)
			}
			if _, err := io.CopyN(io.Discard, r, int64(s.off-pos)); err != nil {
				return image{}, truncated(err, s)
			}
			pos = s.off + s.filesz
		}
		if s.typ == elf.PT_NOTE {
			s.note = make([]byte, s.filesz)
			if _, err := io.ReadFull(r, s.note); err != nil {
				return image{}, truncated(err, s)
			}
			continue
		}
		p, err := mem.Bytes(s.paddr, s.memsz)
		if err != nil {
			return image{}, err
		}
		if _, err := io.ReadFull(r, p[:s.filesz]); err != nil {
			return image{}, truncated(err, s)
		}
		clear(p[s.filesz:])
		mem.MarkDirty(s.paddr, s.memsz)
		img.end = max(img.end, s.paddr+s.memsz)
	}
	img.entry, err = findEntry(mem, segs)
	return img, err
}

// readHeaders returns the PT_LOAD and PT_NOTE headers, sorted by file offset, and consumes
// nothing of r.
func readHeaders(r *bufio.Reader) ([]segment, error) {
	h, err := peek(r, binary.Size(elf.Header64{}))
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	class, machine := elf.Class(h[elf.EI_CLASS]), elf.Machine(le.Uint16(h[18:]))
	if elf.Data(h[elf.EI_DATA]) != elf.ELFDATA2LSB || machine != elf.EM_X86_64 && machine != elf.EM_386 {
		return nil, fmt.Errorf("ELF file for another machine (%v)", machine)
	}
	if t := elf.Type(le.Uint16(h[16:])); t != elf.ET_EXEC && t != elf.ET_DYN {
		return nil, fmt.Errorf("ELF file that is not a program (%v)", t)
	}
	var off uint64
	var entsize, n, want int
	switch class {
	case elf.ELFCLASS64:
		off, entsize, n = le.Uint64(h[32:]), int(le.Uint16(h[54:])), int(le.Uint16(h[56:]))
		want = binary.Size(elf.Prog64{})
	case elf.ELFCLASS32:
		off, entsize, n = uint64(le.Uint32(h[28:])), int(le.Uint16(h[42:])), int(le.Uint16(h[44:]))
		want = binary.Size(elf.Prog32{})
	default:
		return nil, fmt.Errorf("ELF file of unknown class %d", class)
	}
	if entsize != want {
		return nil, fmt.Errorf("ELF program headers of %d bytes instead of %d", entsize, want)
	}
	if off > maxHeaders || off+uint64(n*entsize) > maxHeaders {
		return nil, fmt.Errorf("ELF program headers at %#x are not in the first %d bytes", off, maxHeaders)
	}
	if h, err = peek(r, int(off)+n*entsize); err != nil {
		return nil, err
	}
	var segs []segment
	for p := h[off:]; len(p) >= entsize && n > 0; p, n = p[entsize:], n-1 {
		var s segment
		if class == elf.ELFCLASS64 {
			s = segment{typ: elf.ProgType(le.Uint32(p)), off: le.Uint64(p[8:]), paddr: le.Uint64(p[24:]),
				filesz: le.Uint64(p[32:]), memsz: le.Uint64(p[40:])}
		} else {
			s = segment{typ: elf.ProgType(le.Uint32(p)), off: uint64(le.Uint32(p[4:])), paddr: uint64(le.Uint32(p[12:])),
				filesz: uint64(le.Uint32(p[16:])), memsz: uint64(le.Uint32(p[20:]))}
		}
		if s.typ == elf.PT_LOAD && s.memsz != 0 || s.typ == elf.PT_NOTE {
			segs = append(segs, s)
		}
	}
	slices.SortStableFunc(segs, func(a, b segment) int { return cmp.Compare(a.off, b.off) })
	return segs, nil
}

// checkSegments makes sure that every segment lies in RAM the guest may use, clear of the
// boot data and of the other segments.
func checkSegments(segs []segment, m Map) error {
	var taken []guestmem.Range
	for _, s := range segs {
		switch {
		case s.off > maxImage || s.filesz > maxImage || s.off+s.filesz > maxImage:
			return fmt.Errorf("ELF segment at file offset %#x with %#x bytes ends beyond 1 GiB", s.off, s.filesz)
		case s.typ == elf.PT_NOTE && s.filesz > maxNote:
			return fmt.Errorf("ELF notes of %d bytes are more than %d", s.filesz, maxNote)
		case s.typ == elf.PT_NOTE:
			continue
		case s.filesz > s.memsz:
			return fmt.Errorf("ELF segment at %#x has more bytes in the file (%#x) than in memory (%#x)", s.paddr, s.filesz, s.memsz)
		}
		fits := slices.ContainsFunc(m.E820(), func(e MemRange) bool {
			return e.Type == MemRAM && s.paddr >= e.Base && s.paddr-e.Base <= e.Size && s.memsz <= e.Size-(s.paddr-e.Base)
		})
		if !fits {
			return fmt.Errorf("ELF segment %#x+%#x is not in RAM (0x0-%#x, %#x-%#x, %#x-%#x)\ngive the guest more memory",
				s.paddr, s.memsz, legacyBase, legacyEnd, end(m.Low), uint64(HighRAM), end(m.High))
		}
		if s.paddr < bootDataEnd && s.paddr+s.memsz > startInfoAddr {
			return fmt.Errorf("ELF segment %#x+%#x overlaps the boot data at %#x-%#x\nlink the kernel at 1 MiB or above", s.paddr, s.memsz, startInfoAddr, bootDataEnd)
		}
		for _, o := range taken {
			if s.paddr < end(o) && o.Base < s.paddr+s.memsz {
				return fmt.Errorf("ELF segments %#x+%#x and %#x+%#x overlap", o.Base, o.Size, s.paddr, s.memsz)
			}
		}
		taken = append(taken, guestmem.Range{Base: s.paddr, Size: s.memsz})
	}
	if len(taken) == 0 {
		return errors.New("ELF file without a loadable segment")
	}
	return nil
}

// inLoad returns the PT_LOAD whose file contents hold the PT_NOTE s, if any.
func inLoad(segs []segment, s *segment) *segment {
	if s.typ != elf.PT_NOTE {
		return nil
	}
	i := slices.IndexFunc(segs, func(l segment) bool {
		return l.typ == elf.PT_LOAD && s.off >= l.off && s.off+s.filesz <= l.off+l.filesz
	})
	if i < 0 {
		return nil
	}
	return &segs[i]
}

// findEntry looks for the PVH note in the notes that were read, or loaded with a segment.
func findEntry(mem *guestmem.Memory, segs []segment) (uint32, error) {
	for i := range segs {
		s := &segs[i]
		if s.typ != elf.PT_NOTE {
			continue
		}
		note := s.note
		if l := inLoad(segs, s); l != nil && s.filesz != 0 {
			var err error
			if note, err = mem.Bytes(l.paddr+s.off-l.off, s.filesz); err != nil {
				return 0, err
			}
		}
		if pc, ok := pvhNote(note); ok {
			return pc, nil
		}
	}
	return 0, errors.New("no PVH entry point (Xen ELF note 18)\nbuild the kernel with CONFIG_PVH=y; distribution kernels have it")
}

// pvhNote walks ELF notes: name size, description size, type, then both padded to 4 bytes.
func pvhNote(b []byte) (uint32, bool) {
	le := binary.LittleEndian
	for len(b) >= 12 {
		namesz, descsz, typ := uint64(le.Uint32(b)), uint64(le.Uint32(b[4:])), le.Uint32(b[8:])
		name := uint64(12)
		desc := name + (namesz+3)&^3
		next := desc + (descsz+3)&^3
		if desc+descsz > uint64(len(b)) {
			return 0, false
		}
		if typ == notePHYS32Entry && string(b[name:name+namesz]) == "Xen\x00" && descsz >= 4 {
			return le.Uint32(b[desc:]), true // 4 bytes, or 8 of which the upper are zero
		}
		b = b[min(next, uint64(len(b))):]
	}
	return 0, false
}

func peek(r *bufio.Reader, n int) ([]byte, error) {
	b, err := r.Peek(n)
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("truncated: the ELF headers take %d bytes, the image has %d", n, len(b))
	}
	return b, err
}

func truncated(err error, s *segment) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("truncated: the image ends before %#x, where the segment at file offset %#x does", s.off+s.filesz, s.off)
	}
	return err
}
