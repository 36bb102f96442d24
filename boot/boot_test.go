package boot

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLoadBzImage(t *testing.T) {
	for _, method := range []string{"zstd", "gzip", "xz", "lz4", "none"} {
		t.Run(method, func(t *testing.T) {
			m, mem := newMem(t, 64*mib)
			fill(t, mem, 0xe0_0000, 8*mib)
			e, err := Load(mem, Config{Map: m, Kernel: tempFile(t, bzImage(packed(t, method), nil))})
			if err != nil {
				t.Fatal(err)
			}
			if e.PC != testEntry {
				t.Errorf("entry %#x, want %#x", e.PC, testEntry)
			}
			wantSegs(t, mem, testSegs())
		})
	}
}

// Where the preferred address misleads, or there is none, segments still end up right.
func TestLoadBzImageElsewhere(t *testing.T) {
	far := []seg{
		{0x1000, 0x200_0000, 4096, bytes.Repeat([]byte{1}, 4096)},
		{0x2000, 0x180_0000, 8192, bytes.Repeat([]byte{2}, 4096)},
		{0x4000, 0x200_1000, 4096, bytes.Repeat([]byte{3}, 4096)},
	}
	for _, pref := range []uint64{0, 0x100_0000, 0x210_0000, 1 << 40} {
		m, mem := newMem(t, 64*mib)
		img := bzImage(kernelELF(elf.ELFCLASS64, 0x200_0000, far...), func(b []byte) {
			binary.LittleEndian.PutUint64(b[hdrPrefAddress:], pref)
		})
		if _, err := Load(mem, Config{Map: m, Kernel: tempFile(t, img)}); err != nil {
			t.Fatalf("preferred address %#x: %v", pref, err)
		}
		wantSegs(t, mem, far)
	}
}

func TestLoadELF(t *testing.T) {
	for _, class := range []elf.Class{elf.ELFCLASS32, elf.ELFCLASS64} {
		m, mem := newMem(t, 64*mib)
		segs := []seg{{0x1000, 0x10_0000, 0x3000, code(5000)}, {0x400, 0x20_0000, 16, code(16)}}
		fill(t, mem, 0x10_0000, 2*mib)
		e, err := Load(mem, Config{Map: m, Kernel: tempFile(t, kernelELF(class, 0x10_0004, segs...))})
		if err != nil {
			t.Fatalf("%v: %v", class, err)
		}
		if e.PC != 0x10_0004 {
			t.Errorf("%v: entry %#x", class, e.PC)
		}
		wantSegs(t, mem, segs)
	}
}

// The offsets are those of Xen's public/arch-x86/hvm/start_info.h.
func TestStartInfo(t *testing.T) {
	m, mem := newMem(t, 3072*mib)
	initrd := bytes.Repeat([]byte("initrd"), 1000)
	acpi := bytes.Repeat([]byte("ACPI"), 100)
	e, err := Load(mem, Config{
		Map: m, Kernel: tempFile(t, testPayload()), Initrd: tempFile(t, initrd),
		Cmdline: "console=ttyS0 quiet", ACPI: acpi,
	})
	if err != nil {
		t.Fatal(err)
	}
	u32 := func(gpa uint64) uint64 { v, err := mem.Load32(gpa); must(t, err); return uint64(v) }
	u64 := func(gpa uint64) uint64 { return u32(gpa) | u32(gpa+4)<<32 }
	si := e.StartInfo
	if u32(si) != 0x336ec578 || u32(si+4) != 1 || u32(si+8) != 0 {
		t.Errorf("magic %#x version %d flags %#x", u32(si), u32(si+4), u32(si+8))
	}
	wantBytes(t, mem, u64(si+24), []byte("console=ttyS0 quiet\x00"))
	if got := u64(si + 32); got != ACPIBase {
		t.Errorf("RSDP at %#x", got)
	}
	wantBytes(t, mem, ACPIBase, acpi)
	wantBytes(t, mem, 0xf_fff0, resetCode)
	memmap, n := u64(si+40), u32(si+48)
	if want := m.E820(); n != uint64(len(want)) {
		t.Errorf("%d memory map entries, want %d", n, len(want))
	} else {
		for i, w := range want {
			at := memmap + uint64(i)*24
			if u64(at) != w.Base || u64(at+8) != w.Size || u32(at+16) != uint64(w.Type) {
				t.Errorf("memory map entry %d is not %+v", i, w)
			}
		}
	}
	if u32(si+12) != 1 {
		t.Fatalf("%d modules", u32(si+12))
	}
	mod := u64(si + 16)
	if u64(mod)%page != 0 || u64(mod) != (initrdEnd-6000)&^(page-1) || u64(mod+8) != 6000 || u64(mod+16) != 0 {
		t.Errorf("module at %#x, %d bytes", u64(mod), u64(mod+8))
	}
	wantBytes(t, mem, u64(mod), initrd)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestEntryCPU(t *testing.T) {
	s := Entry{PC: 0x1234, StartInfo: 0x6000}.CPU()
	if s.RIP != 0x1234 || s.RBX != 0x6000 || s.RFLAGS != 2 || s.CR0 != 0x11 {
		t.Errorf("registers %+v", s)
	}
	// docs/misc/pvh.pandoc: flat 32-bit code and data, TR an active 32-bit TSS of 0x67.
	for name, g := range map[string]Segment{"CS": s.CS, "data": s.Data} {
		if g.Base != 0 || g.Limit != 0xffffffff || g.Gran != 1 || g.DB != 1 || g.Long != 0 || g.Present != 1 || g.System != 1 || g.DPL != 0 {
			t.Errorf("%s is not flat: %+v", name, g)
		}
	}
	if s.CS.Type != 0xb || s.Data.Type != 3 {
		t.Errorf("types %#x and %#x", s.CS.Type, s.Data.Type)
	}
	if s.TR.Type != 0xb || s.TR.Limit != 0x67 || s.TR.System != 0 || s.TR.Present != 1 {
		t.Errorf("TR %+v", s.TR)
	}
}

func TestLoadRefuses(t *testing.T) {
	payload := testPayload()
	elf64 := func(segs ...seg) []byte { return kernelELF(elf.ELFCLASS64, 0x10_0000, segs...) }
	edit := func(b []byte, off int, v ...byte) []byte {
		b = bytes.Clone(b)
		copy(b[off:], v)
		return b
	}
	ok := seg{0x1000, 0x10_0000, 4096, code(4096)}
	big := make([]byte, 60*mib)
	zst := packed(t, "zstd")
	for _, tc := range []struct {
		name   string
		kernel []byte
		want   string
	}{
		{"empty", nil, "not a kernel: it looks like an empty file\ngive a bzImage"},
		{"text", []byte("hello, world\n"), "a text file"},
		{"script", []byte("#!/bin/sh\n"), "a script"},
		{"gzip", packed(t, "gzip"), "a gzip file"},
		{"cpio", []byte("070701000000"), "cpio archive"},
		{"noise", []byte{0xff, 0, 1}, "nothing known"},
		{"disk", edit(make([]byte, 4096), 0x1fe, 0x55, 0xaa), "a disk image"},
		{"arm64", edit(make([]byte, 4096), 0x38, 'A', 'R', 'M', 0x64), "an arm64 kernel"},
		{"old protocol", bzImage(payload, func(b []byte) { b[hdrVersion] = 9 }), "boot protocol 2.09 is too old"},
		{"bzImage cut short", bzImage(zst, nil)[:1500], "truncated: its header promises"},
		{"payload beyond the end", bzImage(zst, func(b []byte) { b[hdrPayloadLength+3] = 1 }), "truncated: its header promises"},
		{"payload of nothing", bzImage(nil, nil), "unpack payload: it has only 0 bytes"},
		{"bzip2", bzImage(packed(t, "bzip2"), nil), "packed by bzip2\nuse a kernel packed by zstd"},
		{"lzma", bzImage([]byte("\x5d\x00\x00\x80\x00\xff\xff\xff"), nil), "packed by lzma"},
		{"lzo", bzImage([]byte("\x89LZO\x00\x0d\x0a\x1a"), nil), "packed by lzo"},
		{"unknown method", bzImage([]byte("abcdefgh"), nil), "an unknown method (61 62 63 64 65 66)"},
		{"damaged zstd", bzImage(edit(zst, len(zst)/2, 1, 2, 3, 4), nil), "unpack payload: "},
		{"damaged xz", bzImage(edit(packed(t, "xz"), 100, 1, 2, 3, 4), nil), "unpack payload: "},
		{"damaged gzip", bzImage(edit(packed(t, "gzip"), 100, 1, 2, 3, 4), nil), "unpack payload: "},
		{"damaged lz4", bzImage(edit(packed(t, "lz4"), 4, 0xff, 0xff), nil), "unpack payload: "},
		{"payload not ELF", bzImage(packZstd(t, []byte("some text, and a bit more of it")), nil), "unpacked payload: read 31 bytes of ELF"},
		{"zstd bomb", bzImage(packZstd(t, make([]byte, 70*mib)), nil), "does not fit into"},
		{"uncompressed too big", bzImage(append(bytes.Clone(payload), big...), nil), "does not fit into"},
		{"no room to raise", bzImage(append(elf64(seg{0x1000, 0x3f0_0000, 4096, code(4096)}), big[:2*mib]...), nil), "give the guest more memory"},
		{"no note", kernelELF(elf.ELFCLASS64, 0, ok), "no PVH entry point (ELF note 18 of Xen)\nbuild the kernel with CONFIG_PVH=y"},
		{"no segment", elf64(), "without a segment to load"},
		{"arm ELF", edit(elf64(ok), 18, byte(elf.EM_AARCH64)), "another machine (EM_AARCH64)"},
		{"big endian", edit(elf64(ok), elf.EI_DATA, 2), "ELF"},
		{"ELF header only", elf64(ok)[:40], "read 40 bytes of ELF"},
		{"ELF cut short", elf64(ok)[:6000], "truncated: a segment takes 4096 bytes from 4096 on, the file has 6000"},
		{"section headers cut off", edit(edit(elf64(ok), 40, 0, 0, 0x10), 60, 1), "truncated: its section headers are at byte 1048576, the file has 8192"},
		{"too many segments", elf64(make([]seg, 65)...), "66 program headers, more than 64"},
		{"offset overflow", edit(elf64(ok), 64+56+8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), ""},
		{"file more than memory", elf64(seg{0x1000, 0x10_0000, 100, code(4096)}), "has more bytes in the file"},
		{"too big for RAM", elf64(seg{0x1000, 0x10_0000, 64 * mib, nil}), "is not in RAM, which ends at 0x4000000\ngive the guest more memory"},
		{"in the legacy hole", elf64(seg{0x1000, 0xb_0000, 4096, nil}), "is not in RAM"},
		{"wraps around", elf64(seg{0x1000, 0x10_0000, ^uint64(0), nil}), "is not in RAM"},
		{"on the boot data", elf64(seg{0x1000, 0x6800, 4096, nil}), "overlaps the boot data at 0x6000-0xf000"},
		{"overlap", elf64(ok, seg{0x2000, 0x10_0800, 4096, nil}), "ELF segment 0x100800+0x1000 overlaps ELF segment 0x100000+0x1000"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, mem := newMem(t, 64*mib)
			name := tempFile(t, tc.kernel)
			_, err := Load(mem, Config{Map: m, Kernel: name})
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.HasPrefix(err.Error(), "load kernel "+name+": ") {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestLoadRefusesFiles(t *testing.T) {
	dir := t.TempDir()
	kernel := tempFile(t, testPayload())
	sock := filepath.Join(dir, "gone")
	for _, tc := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"missing", Config{Kernel: sock}, "load kernel " + sock + ": no such file or directory"},
		{"directory", Config{Kernel: dir}, "is a directory"},
		{"device", Config{Kernel: os.DevNull}, "is not a regular file"},
		{"initrd missing", Config{Kernel: kernel, Initrd: sock}, "load initrd " + sock + ": no such file"},
		{"initrd empty", Config{Kernel: kernel, Initrd: tempFile(t, nil)}, "the file is empty"},
		{"initrd too big", Config{Kernel: kernel, Initrd: tempFile(t, make([]byte, 50*mib))},
			"its 52428800 bytes do not fit into the 50286592 between the kernel and 0x4000000\ngive the guest 3 MiB more memory"},
		{"command line with a zero", Config{Kernel: kernel, Cmdline: "a\x00b"}, "contains a zero byte"},
		{"command line too long", Config{Kernel: kernel, Cmdline: strings.Repeat("x", cmdlineMax+1)}, "32768 bytes are more than the 32767"},
		{"too long for bzImage", Config{Kernel: tempFile(t, bzImage(testPayload(), nil)), Cmdline: strings.Repeat("x", 2048)},
			"2048 bytes are more than the 2047 this kernel takes"},
		{"too much ACPI", Config{Kernel: kernel, ACPI: make([]byte, ACPISize+1)}, "131057 bytes do not fit into 131056"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, mem := newMem(t, 64*mib)
			tc.cfg.Map = m
			if _, err := Load(mem, tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

// An initrd that fits to the byte is loaded, one byte more is not.
func TestInitrdFits(t *testing.T) {
	m, mem := newMem(t, 64*mib)
	kernel := tempFile(t, testPayload())
	room := 64*mib - 0x100_b000
	for n, fits := range map[int]bool{room: true, room + 1: false} {
		_, err := Load(mem, Config{Map: m, Kernel: kernel, Initrd: tempFile(t, make([]byte, n))})
		if (err == nil) != fits {
			t.Errorf("initrd of %d bytes: %v", n, err)
		}
	}
}

func FuzzLoad(f *testing.F) {
	for _, class := range []elf.Class{elf.ELFCLASS32, elf.ELFCLASS64} {
		k := kernelELF(class, 0x10_0000, seg{0x400, 0x10_0000, 4096, code(64)})
		f.Add(k)
		f.Add(bzImage(k, nil))
		f.Add(bzImage(packZstd(f, k), nil))
	}
	m, mem := newMem(f, 64*mib)
	name := filepath.Join(f.TempDir(), "kernel")
	f.Fuzz(func(t *testing.T, kernel []byte) {
		if err := os.WriteFile(name, kernel, 0o644); err != nil {
			t.Fatal(err)
		}
		e, err := Load(mem, Config{Map: m, Kernel: name})
		if err == nil && (e.StartInfo != startInfoAddr || e.PC > 1<<32) {
			t.Errorf("entry %+v", e)
		}
	})
}

func FuzzUnpack(f *testing.F) {
	for _, method := range []string{"zstd", "gzip", "xz", "lz4"} {
		f.Add(packed(f, method))
	}
	dst := make([]byte, 4*mib)
	f.Fuzz(func(t *testing.T, payload []byte) {
		n, err := unpack(dst, section(payload))
		if err == nil && n > uint64(len(dst)) {
			t.Errorf("%d bytes in %d", n, len(dst))
		}
	})
}

func FuzzPVHNote(f *testing.F) {
	f.Add(pvhNoteBytes(0x1234))
	f.Fuzz(func(t *testing.T, b []byte) { pvhNote(b) })
}
