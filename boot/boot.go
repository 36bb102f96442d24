// Package boot puts a kernel, its initrd, command line and memory map into guest RAM and
// says in which state the first vCPU enters it.
//
// The kernel is unpacked here, on the host, and entered by PVH (Xen's x86/HVM direct boot
// ABI), so the guest spends no time in firmware or in its own decompressor:
//
//	bzImage ─ setup header ─> payload ─ zstd, gzip, xz, lz4 ─┐
//	vmlinux, any ELF with a PVH note ────────────────────────┴─> segments ─> guest RAM
//
//	0x6000    hvm_start_info, memory map, module list
//	0x7000    command line
//	0xe0000   ACPI tables
//	0xffff0   what resets the machine
//	p_paddr   kernel segments (Linux: from 16 MiB)
//	...       initrd, as high in low RAM as it goes
package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"baton/kvm/guestmem"
)

const (
	startInfoAddr = 0x6000 // with everything it points to, but for the command line
	memmapAddr    = startInfoAddr + 0x100
	modlistAddr   = startInfoAddr + 0x800
	cmdlineAddr   = 0x7000
	cmdlineMax    = 32<<10 - 1
	bootDataEnd   = cmdlineAddr + cmdlineMax + 1

	// initrdEnd is one above the initrd_addr_max that every x86-64 Linux declares.
	initrdEnd = 0x8000_0000
)

// Config is what to load.
type Config struct {
	Map     Map    // of the memory that Load writes to
	Kernel  string // path of a bzImage or of an ELF file with a PVH note
	Initrd  string // path, or empty for none
	Cmdline string
	ACPI    []byte // tables made for ACPIBase, the RSDP first; at most ACPISize bytes
	Cache   string // folder of unpacked kernels, made when needed; empty for none
}

// Entry says where the first vCPU begins; see CPU for its whole state.
type Entry struct {
	PC        uint64 // guest-physical address of the PVH entry point
	StartInfo uint64 // guest-physical address of hvm_start_info
}

// Load fills mem as cfg says. Every file is read straight into guest RAM. Errors name the
// file, the numbers that do not fit and what to do about it.
func Load(mem *guestmem.Memory, cfg Config) (Entry, error) {
	img, err := loadKernel(mem, cfg)
	if err != nil {
		return Entry{}, fmt.Errorf("load kernel %s: %w", cfg.Kernel, err)
	}
	if uint64(len(cfg.Cmdline)) > img.cmdlineMax {
		return Entry{}, fmt.Errorf("pass command line: %d bytes are more than the %d this kernel takes", len(cfg.Cmdline), img.cmdlineMax)
	}
	if strings.IndexByte(cfg.Cmdline, 0) >= 0 {
		return Entry{}, errors.New("pass command line: it contains a zero byte")
	}
	if len(cfg.ACPI) > ACPISize {
		return Entry{}, fmt.Errorf("load ACPI tables: %d bytes do not fit into %d", len(cfg.ACPI), ACPISize)
	}
	var initrd guestmem.Range
	if cfg.Initrd != "" {
		if initrd, err = loadInitrd(mem, cfg, img.end); err != nil {
			return Entry{}, fmt.Errorf("load initrd %s: %w", cfg.Initrd, err)
		}
	}
	if err := putBootData(mem, cfg, initrd); err != nil {
		return Entry{}, fmt.Errorf("write boot data: %w", err)
	}
	return Entry{PC: uint64(img.entry), StartInfo: startInfoAddr}, nil
}

// image is a loaded kernel.
type image struct {
	entry      uint32 // guest-physical PVH entry point
	end        uint64 // of the highest segment
	cmdlineMax uint64 // bytes, without the terminating zero
}

// loadKernel recognises the file's format and loads it.
func loadKernel(mem *guestmem.Memory, cfg Config) (image, error) {
	f, n, err := openRegular(cfg.Kernel)
	if err != nil {
		return image{}, err
	}
	defer f.Close()
	head := make([]byte, setupHeaderEnd)
	got, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return image{}, err
	}
	switch head = head[:got]; {
	case isBzImage(head):
		return loadBzImage(mem, cfg.Map, cache(cfg.Cache), f, n, head)
	case isELF(head):
		p, err := parseELF(f, n, cfg.Map)
		if err != nil {
			return image{}, err
		}
		top, err := p.place(mem)
		return image{entry: p.entry, end: top, cmdlineMax: cmdlineMax}, err
	default:
		return image{}, fmt.Errorf("not a kernel: it looks like %s\ngive a bzImage (Debian: /boot/vmlinuz-*) or an ELF file with a PVH note", looksLike(head))
	}
}

// looksLike names the kind of file that begins with head.
func looksLike(head []byte) string {
	for _, k := range []struct {
		off         int
		magic, name string
	}{
		{0x38, "ARM\x64", "an arm64 kernel"},
		{0, "MZ", "an EFI program"},
		{0, "\x1f\x8b", "a gzip file"},
		{0, "\xfd7zXZ", "an xz file"},
		{0, "\x28\xb5\x2f\xfd", "a zstd file"},
		{0, "070701", "a cpio archive, perhaps an initrd"},
		{0, "QFI\xfb", "a qcow2 disk image"},
		{0, "!<arch>", "an ar archive or Debian package"},
		{0, "#!", "a script"},
		{0x1fe, "\x55\xaa", "a disk image"},
	} {
		if len(head) > k.off && bytes.HasPrefix(head[k.off:], []byte(k.magic)) {
			return k.name
		}
	}
	switch {
	case len(head) == 0:
		return "an empty file"
	case utf8.Valid(head) && bytes.IndexByte(head, 0) < 0:
		return "a text file"
	}
	return "nothing known"
}

func loadInitrd(mem *guestmem.Memory, cfg Config, kernelEnd uint64) (guestmem.Range, error) {
	f, n, err := openRegular(cfg.Initrd)
	if err != nil {
		return guestmem.Range{}, err
	}
	defer f.Close()
	if n == 0 {
		return guestmem.Range{}, errors.New("the file is empty")
	}
	top, floor := min(cfg.Map.Low.End(), initrdEnd), (max(kernelEnd, legacyEnd)+page-1)&^(page-1)
	if room := top - min(floor, top); n > room {
		return guestmem.Range{}, fmt.Errorf("its %d bytes do not fit into the %d between the kernel and %#x\ngive the guest %d MiB more memory",
			n, room, top, (n-room+1<<20-1)>>20)
	}
	r := guestmem.Range{Base: (top - n) &^ (page - 1), Size: n}
	p, err := mem.Bytes(r.Base, n)
	if err != nil {
		return r, err
	}
	if _, err := io.ReadFull(f, p); err != nil {
		return r, fmt.Errorf("read %d bytes: %w", n, err)
	}
	mem.MarkDirty(r.Base, n)
	return r, nil
}

// startInfo, memmapEntry and modlistEntry are hvm_start_info version 1, hvm_memmap_table_entry
// and hvm_modlist_entry of Xen's public/arch-x86/hvm/start_info.h.
type startInfo struct {
	Magic, Version, Flags, NrModules               uint32
	ModlistAddr, CmdlineAddr, RSDPAddr, MemmapAddr uint64
	MemmapEntries, _                               uint32
}

type memmapEntry struct {
	Addr, Size uint64
	Type       MemType
	_          uint32
}

type modlistEntry struct{ Addr, Size, CmdlineAddr, _ uint64 }

const startInfoMagic = 0x336ec578 // XEN_HVM_START_MAGIC_VALUE

// putBootData writes all that the kernel finds through the start info.
func putBootData(mem *guestmem.Memory, cfg Config, initrd guestmem.Range) error {
	var memmap []memmapEntry
	for _, e := range cfg.Map.E820() {
		memmap = append(memmap, memmapEntry{Addr: e.Base, Size: e.Size, Type: e.Type})
	}
	si := startInfo{
		Magic: startInfoMagic, Version: 1, CmdlineAddr: cmdlineAddr,
		MemmapAddr: memmapAddr, MemmapEntries: uint32(len(memmap)),
	}
	if len(cfg.ACPI) != 0 {
		si.RSDPAddr = ACPIBase
	}
	if initrd.Size != 0 {
		si.NrModules, si.ModlistAddr = 1, modlistAddr
	}
	for _, d := range []struct {
		at   int64
		data any
	}{
		{startInfoAddr, si},
		{memmapAddr, memmap},
		{modlistAddr, modlistEntry{Addr: initrd.Base, Size: initrd.Size}},
		{cmdlineAddr, append([]byte(cfg.Cmdline), 0)},
		{ACPIBase, cfg.ACPI},
		{resetVector, resetCode},
	} {
		b, err := binary.Append(nil, binary.LittleEndian, d.data)
		if err != nil {
			return err
		}
		if _, err := mem.WriteAt(b, d.at); err != nil {
			return err
		}
	}
	return nil
}

// openRegular opens a file for reading and returns its size in bytes.
func openRegular(path string) (*os.File, uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, errors.Unwrap(err)
	}
	fi, err := f.Stat()
	switch {
	case err != nil:
	case fi.IsDir():
		err = errors.New("is a directory")
	case !fi.Mode().IsRegular():
		err = fmt.Errorf("is not a regular file (%s)", fi.Mode().Type())
	default:
		return f, uint64(fi.Size()), nil
	}
	f.Close()
	return nil, 0, err
}
