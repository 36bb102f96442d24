package boot

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	kzstd "github.com/klauspost/compress/zstd"

	"baton/kvm/guestmem"
)

// update rewrites testdata by the system's packers, with the options that Linux uses.
var update = flag.Bool("update", false, "pack testdata again")

// seg is a PT_LOAD of a synthetic kernel.
type seg struct {
	off, paddr, memsz uint64
	data              []byte
}

// kernelELF builds an ELF file with a PVH note between the headers and the segments.
func kernelELF(class elf.Class, entry uint32, segs ...seg) []byte {
	note := pvhNoteBytes(entry)
	const noteOff = 0x300
	type ph struct {
		typ                       elf.ProgType
		off, paddr, filesz, memsz uint64
	}
	phs := []ph{{elf.PT_NOTE, noteOff, 0, uint64(len(note)), uint64(len(note))}}
	if entry == 0 {
		phs = nil
	}
	for _, s := range segs {
		phs = append(phs, ph{elf.PT_LOAD, s.off, s.paddr, uint64(len(s.data)), s.memsz})
	}
	ident := [16]byte{0x7f, 'E', 'L', 'F', byte(class), 1, 1}
	var b []byte
	if class == elf.ELFCLASS64 {
		b = mustAppend(b, elf.Header64{Ident: ident, Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1,
			Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: uint16(len(phs)), Shentsize: 64})
		for _, p := range phs {
			b = mustAppend(b, elf.Prog64{Type: uint32(p.typ), Off: p.off, Vaddr: 0xffff_ffff_8000_0000 + p.paddr, Paddr: p.paddr, Filesz: p.filesz, Memsz: p.memsz})
		}
	} else {
		b = mustAppend(b, elf.Header32{Ident: ident, Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_386), Version: 1,
			Phoff: 52, Ehsize: 52, Phentsize: 32, Phnum: uint16(len(phs)), Shentsize: 40})
		for _, p := range phs {
			b = mustAppend(b, elf.Prog32{Type: uint32(p.typ), Off: uint32(p.off), Paddr: uint32(p.paddr), Filesz: uint32(p.filesz), Memsz: uint32(p.memsz)})
		}
	}
	put := func(off uint64, data []byte) {
		b = append(b, make([]byte, max(0, int(off)+len(data)-len(b)))...)
		copy(b[off:], data)
	}
	put(noteOff, note)
	for _, s := range segs {
		put(s.off, s.data)
	}
	return b
}

// pvhNoteBytes is a foreign note, then the PVH note.
func pvhNoteBytes(entry uint32) []byte {
	b := mustAppend(nil, []uint32{4, 5, 1})
	b = append(b, "GNU\x00descr\x00\x00\x00"...)
	b = mustAppend(b, []uint32{4, 4, 18})
	b = append(b, "Xen\x00"...)
	return mustAppend(b, entry)
}

func mustAppend(b []byte, v any) []byte {
	b, err := binary.Append(b, binary.LittleEndian, v)
	if err != nil {
		panic(err)
	}
	return b
}

// code returns n bytes that the x86 filter of xz changes: calls to the same place.
func code(n int) []byte {
	b := make([]byte, 0, n+8)
	for len(b) < n {
		b = append(b, 0x90, 0xe8)
		b = binary.LittleEndian.AppendUint32(b, uint32(0x1000-len(b)))
	}
	return b[:n]
}

// testSegs are like Linux's: in place, then two that move down, with a .bss.
func testSegs() []seg {
	return []seg{
		{0x20_0000, 0x100_0000, 8192, code(8192)},
		{0x20_3000, 0x100_2000, 4096, bytes.Repeat([]byte("data"), 1024)},
		{0x20_5000, 0x100_3000, 0x8000, []byte("before the zeroes")},
	}
}

const testEntry = 0x100_0010

func testPayload() []byte { return kernelELF(elf.ELFCLASS64, testEntry, testSegs()...) }

// bzImage wraps a packed payload. Fields that matter can be changed by edit.
func bzImage(payload []byte, edit func([]byte)) []byte {
	const setup = 2 * 512
	b := make([]byte, setup+0x100)
	b[hdrSetupSects] = 1
	copy(b[hdrMagic:], "HdrS")
	le := binary.LittleEndian
	le.PutUint16(b[hdrVersion:], 0x20f)
	le.PutUint32(b[hdrCmdlineSize:], 2047)
	le.PutUint64(b[hdrPrefAddress:], 0x100_0000)
	le.PutUint32(b[hdrPayloadOffset:], 0x100)
	le.PutUint32(b[hdrPayloadLength:], uint32(len(payload)))
	b = append(b, payload...)
	b = append(b, make([]byte, -(len(b)-setup)&15)...)
	le.PutUint32(b[hdrSyssize:], uint32((len(b)-setup)/16))
	if edit != nil {
		edit(b)
	}
	return b
}

// packers are the commands of Linux's scripts/Makefile.lib.
var packers = []struct {
	name string
	argv []string
	size bool // append the unpacked size
}{
	{"gzip", []string{"gzip", "-n", "-9"}, false},
	{"xz", []string{"xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB"}, true},
	{"lz4", []string{"lz4", "-l", "-9", "-", "-"}, true},
	{"zstd", []string{"zstd", "-22", "--ultra"}, true},
	{"bzip2", []string{"bzip2", "-9"}, true},
}

// packed returns the payload as packed by the named method, from testdata.
func packed(t testing.TB, name string) []byte {
	t.Helper()
	for _, p := range packers {
		file := filepath.Join("testdata", "payload."+name)
		if p.name != name {
			continue
		}
		if *update {
			cmd := exec.Command(p.argv[0], p.argv[1:]...)
			cmd.Stdin = bytes.NewReader(testPayload())
			out, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			if p.size {
				out = binary.LittleEndian.AppendUint32(out, uint32(len(testPayload())))
			}
			if err := os.WriteFile(file, out, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	return testPayload()
}

func newMem(t testing.TB, ram uint64) (Map, *guestmem.Memory) {
	t.Helper()
	m, err := Layout(ram, 40)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := guestmem.New(m.RAM(), guestmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mem.Close(); err != nil {
			t.Error(err)
		}
	})
	return m, mem
}

func tempFile(t testing.TB, data []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

func wantBytes(t *testing.T, mem *guestmem.Memory, gpa uint64, want []byte) {
	t.Helper()
	got, err := mem.Bytes(gpa, uint64(len(want)))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		t.Errorf("guest memory at %#x: differs from byte %#x on: % x, want % x",
			gpa, i, got[i:min(i+16, len(got))], want[i:min(i+16, len(want))])
	}
}

func wantSegs(t *testing.T, mem *guestmem.Memory, segs []seg) {
	t.Helper()
	for _, s := range segs {
		wantBytes(t, mem, s.paddr, append(bytes.Clone(s.data), make([]byte, int(s.memsz)-len(s.data))...))
	}
}

// fill makes RAM dirty, as it is after a reboot.
func fill(t *testing.T, mem *guestmem.Memory, gpa, n uint64) {
	t.Helper()
	b, err := mem.Bytes(gpa, n)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		b[i] = 0xa5
	}
}

// packZstd packs b and appends its size, as Linux does.
func packZstd(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := kzstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return binary.LittleEndian.AppendUint32(w.EncodeAll(b, nil), uint32(len(b)))
}

func section(b []byte) *io.SectionReader {
	return io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b)))
}
