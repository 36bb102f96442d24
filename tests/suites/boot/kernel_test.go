package boot

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"baton/tests/harness"
)

// Fields of the setup header: Documentation/arch/x86/boot.rst.
const (
	setupSects    = 0x1f1
	payloadOffset = 0x248
	payloadLength = 0x24c
)

// unpack returns the tests' kernel as it is, a bzImage, where in it the payload begins, and
// what is packed there: the ELF file vmlinux.
func unpack(t *testing.T) (image []byte, at int, vmlinux []byte) {
	t.Helper()
	image, err := os.ReadFile(harness.Image(t, "vmlinuz"))
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	at = (int(image[setupSects])+1)*512 + int(le.Uint32(image[payloadOffset:]))
	payload := image[at : at+int(le.Uint32(image[payloadLength:]))]
	packed, size := payload[:len(payload)-4], le.Uint32(payload[len(payload)-4:])
	r, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	vmlinux, err = r.DecodeAll(packed, make([]byte, 0, size))
	if err != nil || len(vmlinux) != int(size) {
		t.Fatalf("unpack %d bytes: got %d, want %d (%v)", len(packed), len(vmlinux), size, err)
	}
	return image, at, vmlinux
}

// repackLZ4 writes the tests' kernel to a file, packed as CONFIG_KERNEL_LZ4 does it: lz4's
// old format, then the size (scripts/Makefile.lib).
func repackLZ4(t *testing.T, name string) {
	t.Helper()
	image, at, vmlinux := unpack(t)
	var packed bytes.Buffer
	w := lz4.NewWriter(&packed)
	if err := w.Apply(lz4.LegacyOption(true), lz4.CompressionLevelOption(lz4.Fast)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(vmlinux); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	payload := binary.LittleEndian.AppendUint32(packed.Bytes(), uint32(len(vmlinux)))
	binary.LittleEndian.PutUint32(image[payloadLength:], uint32(len(payload)))
	write(t, name, append(image[:at:at], payload...))
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
