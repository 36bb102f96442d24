package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"

	"baton/kvm/guestmem"
)

// Fields of the setup header: Linux, Documentation/arch/x86/boot.rst.
const (
	hdrSetupSects    = 0x1f1
	hdrSyssize       = 0x1f4 // of the protected-mode code, in units of 16 bytes
	hdrMagic         = 0x202
	hdrVersion       = 0x206
	hdrCmdlineSize   = 0x238
	hdrPayloadOffset = 0x248 // from the start of the protected-mode code
	hdrPayloadLength = 0x24c
	hdrPrefAddress   = 0x258 // where the kernel would like to run
	setupHeaderEnd   = 0x268

	minBootProtocol = 0x020a // the first with a preferred address: Linux 2.6.31

	sizeTrailer  = 4         // Linux appends the unpacked size, which gzip has as its own end
	segmentAlign = 2 << 20   // offset of the first segment in a vmlinux
	maxWindow    = 128 << 20 // dictionary that a payload may ask for; no Linux asks for more
)

func isBzImage(head []byte) bool {
	return len(head) == setupHeaderEnd && string(head[hdrMagic:hdrMagic+4]) == "HdrS"
}

// loadBzImage loads the bzImage f of n bytes that begins with head.
func loadBzImage(mem *guestmem.Memory, m Map, kept cache, f *os.File, n uint64, head []byte) (image, error) {
	le := binary.LittleEndian
	u32 := func(off int) uint64 { return uint64(le.Uint32(head[off:])) }
	if v := le.Uint16(head[hdrVersion:]); v < minBootProtocol {
		return image{}, fmt.Errorf("boot protocol %d.%02d is too old: 2.10 is the first that works", v>>8, v&0xff)
	}
	sects := uint64(head[hdrSetupSects])
	if sects == 0 {
		sects = 4 // as the protocol has it
	}
	setup := (sects + 1) * 512
	off, length := setup+u32(hdrPayloadOffset), u32(hdrPayloadLength)
	if want := max(setup+u32(hdrSyssize)*16, off+length); want > n {
		return image{}, fmt.Errorf("truncated: its header promises %d bytes, the file has %d", want, n)
	}
	loaded := image{cmdlineMax: min(u32(hdrCmdlineSize), cmdlineMax)}
	if v, size := kept.open(f); v != nil {
		defer v.Close()
		if p, err := parseELF(v, size, m); err == nil {
			loaded.entry = p.entry
			loaded.end, err = p.place(mem)
			return loaded, err
		}
	}
	ram, err := mem.Bytes(0, m.Low.Size)
	if err != nil {
		return image{}, err
	}
	// Unpacked here, the segments of a usual kernel are in their places already.
	img := ramImage{ram: ram, base: legacyEnd}
	if pref := le.Uint64(head[hdrPrefAddress:]); pref >= legacyEnd+segmentAlign && pref < m.Low.Size {
		img.base = pref - segmentAlign
	}
	if img.size, err = unpack(ram[img.base:], io.NewSectionReader(f, int64(off), int64(length))); err != nil {
		return image{}, fmt.Errorf("unpack payload: %w", err)
	}
	p, err := parseELF(&img, img.size, m)
	if err != nil {
		return image{}, fmt.Errorf("unpacked payload: %w", err)
	}
	kept.store(f, ram[img.base:img.base+img.size])
	for _, s := range p.loads {
		if err := img.raise(s.Off, s.Paddr); err != nil {
			return image{}, err
		}
	}
	loaded.entry = p.entry
	loaded.end, err = p.place(mem)
	return loaded, err
}

// ramImage is an unpacked file in low RAM, among the places that its parts go to.
type ramImage struct {
	ram        []byte
	base, size uint64
}

// ReadAt implements io.ReaderAt. A part that is in its place is not copied.
func (r *ramImage) ReadAt(p []byte, off int64) (int, error) {
	if uint64(off) >= r.size {
		return 0, io.EOF
	}
	src := r.ram[r.base+uint64(off) : r.base+r.size]
	n := min(len(p), len(src))
	if n > 0 && &p[0] != &src[0] {
		copy(p, src[:n])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// raise moves the file up so far that its part at off need not move up to reach paddr.
func (r *ramImage) raise(off, paddr uint64) error {
	if paddr <= r.base+off {
		return nil
	}
	base := paddr - off
	if base+r.size > uint64(len(r.ram)) {
		return fmt.Errorf("its %d bytes do not fit between %#x and the end of RAM at %#x\ngive the guest more memory", r.size, base, len(r.ram))
	}
	copy(r.ram[base:], r.ram[r.base:r.base+r.size])
	r.base = base
	return nil
}

// errTooBig says that a payload is larger than the memory it is unpacked into.
type errTooBig int

func (e errTooBig) Error() string {
	return fmt.Sprintf("it does not fit into %d bytes of RAM\ngive the guest more memory", int(e))
}

// unpack unpacks the payload to the start of dst and returns its size in bytes.
func unpack(dst []byte, payload *io.SectionReader) (uint64, error) {
	if payload.Size() <= sizeTrailer {
		return 0, fmt.Errorf("it has only %d bytes", payload.Size())
	}
	head := make([]byte, 6)
	_, _ = payload.ReadAt(head, 0) // what is missing stays zero
	body := io.NewSectionReader(payload, 0, payload.Size()-sizeTrailer)
	has := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	var r io.Reader
	var err error
	method := fmt.Sprintf("an unknown method (% x)", head)
	switch {
	case has("\x28\xb5\x2f\xfd"):
		return unzstd(dst, body)
	case has("\x1f\x8b"):
		r, err = gzip.NewReader(payload)
	case has("\xfd7zXZ\x00"):
		r, err = xz.NewReader(body, maxWindow)
	case has("\x02\x21\x4c\x18"): // the legacy frame
		r = lz4.NewReader(body)
	case isELF(head): // CONFIG_KERNEL_UNCOMPRESSED
		r = payload
	case has("BZh"):
		method = "bzip2"
	case has("\x5d\x00\x00"):
		method = "lzma"
	case has("\x89LZO\x00"):
		method = "lzo"
	}
	if err != nil {
		return 0, err
	}
	if r == nil {
		return 0, fmt.Errorf("it is packed by %s\nuse a kernel packed by zstd, gzip, xz or lz4, or its vmlinux", method)
	}
	n := 0
	for n < len(dst) && err == nil {
		var k int
		k, err = r.Read(dst[n:])
		n += k
	}
	switch {
	case err == nil:
		return 0, errTooBig(len(dst))
	case err != io.EOF:
		return 0, fmt.Errorf("after %d bytes: %w", n, err)
	}
	return uint64(n), nil
}

// unzstd uses the decoder that works on whole buffers, which needs no window of its own:
// the input waits at the end of dst.
func unzstd(dst []byte, body *io.SectionReader) (uint64, error) {
	room := len(dst) - int(body.Size())
	if room <= 0 {
		return 0, errTooBig(len(dst))
	}
	in := dst[room:]
	if _, err := io.ReadFull(body, in); err != nil {
		return 0, err
	}
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow),
		zstd.WithDecoderMaxMemory(math.MaxInt64), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return 0, err
	}
	defer d.Close()
	out, err := d.DecodeAll(in, dst[:0:room])
	if errors.Is(err, zstd.ErrDecoderSizeExceeded) {
		return 0, errTooBig(room)
	}
	return uint64(len(out)), err
}
