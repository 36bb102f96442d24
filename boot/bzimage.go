package boot

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"unicode/utf8"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"

	"baton/kvm/guestmem"
)

// Fields of the setup header: Linux, Documentation/arch/x86/boot.rst.
const (
	hdrSetupSects    = 0x1f1
	hdrSyssize       = 0x1f4 // protected-mode code, in units of 16 bytes
	hdrMagic         = 0x202 // "HdrS"
	hdrVersion       = 0x206
	hdrCmdlineSize   = 0x238
	hdrPayloadOffset = 0x248 // from the start of the protected-mode code
	hdrPayloadLength = 0x24c
	setupHeaderEnd   = 0x268

	minBootProtocol = 0x0208 // the first with a payload offset: Linux 2.6.26

	maxWindow = 128 << 20 // dictionary that a payload may ask for; Linux uses no more
)

func isBzImage(head []byte) bool {
	return len(head) == setupHeaderEnd && string(head[hdrMagic:hdrMagic+4]) == "HdrS"
}

// loadBzImage unpacks the payload of the bzImage f of n bytes into its ELF loader.
func loadBzImage(mem *guestmem.Memory, m Map, f *os.File, n uint64, head []byte) (image, error) {
	le := binary.LittleEndian
	if v := le.Uint16(head[hdrVersion:]); v < minBootProtocol {
		return image{}, fmt.Errorf("boot protocol %d.%02d is too old (2.08 needed)", v>>8, v&0xff)
	}
	setup := (max(uint64(head[hdrSetupSects]), 1) + 1) * 512
	if setup == 2*512 && head[hdrSetupSects] == 0 {
		setup = 5 * 512 // 0 means 4 sectors, for old times' sake
	}
	if want := setup + uint64(le.Uint32(head[hdrSyssize:]))*16; n+15 < want {
		return image{}, fmt.Errorf("truncated: its header promises %d bytes, the file has %d", want, n)
	}
	off, length := setup+uint64(le.Uint32(head[hdrPayloadOffset:])), uint64(le.Uint32(head[hdrPayloadLength:]))
	if off+length > n {
		return image{}, fmt.Errorf("truncated: its payload ends at byte %d, the file has %d", off+length, n)
	}
	if length < 8 {
		return image{}, fmt.Errorf("its payload has only %d bytes", length)
	}
	r, err := unpack(io.NewSectionReader(f, int64(off), int64(length)), length)
	if err != nil {
		return image{}, err
	}
	defer r.Close()
	img, err := loadELF(mem, m, r)
	if err != nil {
		return image{}, err
	}
	// The rest holds no segment, but the checksum that covers them all.
	if _, err := io.Copy(io.Discard, io.LimitReader(r, maxImage)); err != nil {
		return image{}, fmt.Errorf("unpack payload: %w", err)
	}
	if c := uint64(le.Uint32(head[hdrCmdlineSize:])); c != 0 {
		img.cmdlineMax = min(c, cmdlineMax)
	}
	return img, nil
}

// sizeTrailer is the length of the unpacked size that Linux appends to a payload. Gzip has
// it as a part of its own format.
const sizeTrailer = 4

// unpack returns the unpacked payload of length bytes.
func unpack(payload io.ReadSeeker, length uint64) (io.ReadCloser, error) {
	magic := make([]byte, 6)
	if _, err := io.ReadFull(payload, magic); err != nil {
		return nil, err
	}
	if _, err := payload.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	body := io.LimitReader(payload, int64(length-sizeTrailer))
	wrap := func(r io.Reader, err error) (io.ReadCloser, error) {
		if err != nil {
			return nil, fmt.Errorf("unpack payload: %w", err)
		}
		return io.NopCloser(r), nil
	}
	has := func(s string) bool { return bytes.HasPrefix(magic, []byte(s)) }
	switch {
	case has("\x28\xb5\x2f\xfd"):
		d, err := zstd.NewReader(body, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, fmt.Errorf("unpack payload: %w", err)
		}
		return d.IOReadCloser(), nil
	case has("\x1f\x8b"):
		d, err := gzip.NewReader(payload)
		return wrap(d, err)
	case has("\xfd7zXZ\x00"):
		d, err := xz.NewReader(body, maxWindow)
		return wrap(d, err)
	case has("\x02\x21\x4c\x18"):
		return wrap(lz4.NewReader(body), nil)
	case isELF(magic): // CONFIG_KERNEL_UNCOMPRESSED
		return wrap(payload, nil)
	}
	method := fmt.Sprintf("an unknown method (magic % x)", magic)
	switch {
	case has("BZh"):
		method = "bzip2"
	case has("\x5d\x00\x00"):
		method = "lzma"
	case has("\x89LZO\x00"):
		method = "lzo"
	}
	return nil, fmt.Errorf("its payload is packed by %s\nuse a kernel packed by zstd, gzip, xz or lz4, or its vmlinux", method)
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
		{0, "BZh", "a bzip2 file"},
		{0, "070701", "a cpio archive (an initrd?)"},
		{0, "QFI\xfb", "a qcow2 disk image"},
		{0, "!<arch>", "a Debian package or ar archive"},
		{0, "PK\x03\x04", "a zip file"},
		{0, "#!", "a script"},
		{0x1fe, "\x55\xaa", "a disk image"},
	} {
		if len(head) >= k.off && bytes.HasPrefix(head[k.off:], []byte(k.magic)) {
			return k.name
		}
	}
	if utf8.Valid(head) && !bytes.ContainsRune(head, 0) {
		return "a text file"
	}
	return "data of an unknown kind"
}
