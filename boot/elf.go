package boot

import (
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
	maxNotes        = 64 << 10
	maxSegments     = 64 // Linux has 5
	notePHYS32Entry = 18 // XEN_ELFNOTE_PHYS32_ENTRY: Xen, public/elfnote.h
)

// program is a checked ELF file: its segments lie in RAM, apart from each other.
type program struct {
	entry uint32 // guest-physical PVH entry point
	loads []*elf.Prog
}

func isELF(head []byte) bool { return bytes.HasPrefix(head, []byte(elf.ELFMAG)) }

// parseELF reads the headers and the PVH note of an ELF file of n bytes, of either class.
func parseELF(src io.ReaderAt, n uint64, m Map) (program, error) {
	f, err := elf.NewFile(io.NewSectionReader(src, 0, int64(n)))
	if err != nil {
		var h elf.Header64
		_ = binary.Read(io.NewSectionReader(src, 0, int64(n)), binary.LittleEndian, &h)
		if h.Ident[elf.EI_CLASS] == byte(elf.ELFCLASS64) && h.Shoff > n { // they end most ELF files
			return program{}, fmt.Errorf("truncated: its section headers are at byte %d, the file has %d", h.Shoff, n)
		}
		return program{}, fmt.Errorf("read %d bytes of ELF: %w", n, err)
	}
	if len(f.Progs) > maxSegments {
		return program{}, fmt.Errorf("ELF file with %d program headers, more than %d", len(f.Progs), maxSegments)
	}
	if f.Data != elf.ELFDATA2LSB || f.Machine != elf.EM_X86_64 && f.Machine != elf.EM_386 {
		return program{}, fmt.Errorf("ELF file for another machine (%v)", f.Machine)
	}
	p, found := program{}, false
	for _, s := range f.Progs {
		switch {
		case s.Type != elf.PT_LOAD && s.Type != elf.PT_NOTE:
		case s.Off+s.Filesz < s.Off || s.Off+s.Filesz > n:
			return program{}, fmt.Errorf("truncated: a segment takes %d bytes from %d on, the file has %d", s.Filesz, s.Off, n)
		case s.Type == elf.PT_LOAD && s.Memsz != 0:
			if err := checkSegment(s, p.loads, m); err != nil {
				return program{}, err
			}
			p.loads = append(p.loads, s)
		case s.Type == elf.PT_NOTE && !found:
			notes := make([]byte, min(s.Filesz, maxNotes))
			if _, err := s.ReadAt(notes, 0); err != nil && len(notes) != 0 {
				return program{}, fmt.Errorf("read ELF notes: %w", err)
			}
			p.entry, found = pvhNote(notes)
		}
	}
	switch {
	case !found:
		return program{}, errors.New("no PVH entry point (ELF note 18 of Xen)\nbuild the kernel with CONFIG_PVH=y; distributions do")
	case len(p.loads) == 0:
		return program{}, errors.New("ELF file without a segment to load")
	}
	slices.SortStableFunc(p.loads, func(a, b *elf.Prog) int { return cmp.Compare(a.Off, b.Off) })
	return p, nil
}

// checkSegment makes sure that s lies in RAM, clear of the boot data and of others.
func checkSegment(s *elf.Prog, others []*elf.Prog, m Map) error {
	name := fmt.Sprintf("ELF segment %#x+%#x", s.Paddr, s.Memsz)
	var top uint64
	inRAM := false
	for _, e := range m.E820() {
		if e.Type == MemRAM {
			top = e.Range.End()
			inRAM = inRAM || s.Paddr >= e.Base && s.Paddr <= top && s.Memsz <= top-s.Paddr
		}
	}
	switch {
	case s.Filesz > s.Memsz:
		return fmt.Errorf("%s has more bytes in the file: %#x", name, s.Filesz)
	case !inRAM:
		return fmt.Errorf("%s is not in RAM, which ends at %#x\ngive the guest more memory, or link the kernel at 1 MiB or above", name, top)
	case s.Paddr < bootDataEnd && s.Paddr+s.Memsz > startInfoAddr:
		return fmt.Errorf("%s overlaps the boot data at %#x-%#x\nlink the kernel at 1 MiB or above", name, startInfoAddr, bootDataEnd)
	}
	for _, o := range others {
		if s.Paddr < o.Paddr+o.Memsz && o.Paddr < s.Paddr+s.Memsz {
			return fmt.Errorf("%s overlaps ELF segment %#x+%#x", name, o.Paddr, o.Memsz)
		}
	}
	return nil
}

// place loads the segments and returns the end of the highest one. Their source may be
// the same memory as long as none has to move up: in file order, each then fills only
// what it or an earlier one has left.
func (p program) place(mem *guestmem.Memory) (highest uint64, err error) {
	for _, s := range p.loads {
		b, err := mem.Bytes(s.Paddr, s.Memsz)
		if err != nil {
			return 0, err
		}
		if _, err := s.ReadAt(b[:s.Filesz], 0); err != nil && s.Filesz != 0 {
			return 0, fmt.Errorf("read ELF segment at %#x: %w", s.Off, err)
		}
	}
	for _, s := range p.loads { // only now: what is zeroed here may have been a source
		b, err := mem.Bytes(s.Paddr, s.Memsz)
		if err != nil {
			return 0, err
		}
		clear(b[s.Filesz:])
		mem.MarkDirty(s.Paddr, s.Memsz)
		highest = max(highest, s.Paddr+s.Memsz)
	}
	return highest, nil
}

// pvhNote walks ELF notes: name size, description size, type, then both padded to 4 bytes.
func pvhNote(b []byte) (entry uint32, ok bool) {
	le := binary.LittleEndian
	for len(b) >= 12 {
		namesz, descsz, typ := uint64(le.Uint32(b)), uint64(le.Uint32(b[4:])), le.Uint32(b[8:])
		desc := 12 + (namesz+3)&^3
		if desc+descsz > uint64(len(b)) {
			break
		}
		if typ == notePHYS32Entry && string(b[12:12+namesz]) == "Xen\x00" && descsz >= 4 {
			return le.Uint32(b[desc:]), true // of 4 bytes or 8, the upper ones zero
		}
		b = b[min(desc+(descsz+3)&^3, uint64(len(b))):]
	}
	return 0, false
}
