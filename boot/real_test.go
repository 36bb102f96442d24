package boot

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	kzstd "github.com/klauspost/compress/zstd"
)

// TestDebianKernel loads this machine's own kernel into the smallest guest that has to
// boot it, and compares with the payload as a streaming decoder unpacks it.
func TestDebianKernel(t *testing.T) {
	kernels, _ := filepath.Glob("/boot/vmlinuz-*")
	if len(kernels) == 0 {
		t.Skip("no /boot/vmlinuz-*")
	}
	m, mem := newMem(t, 128*mib)
	start := time.Now()
	e, err := Load(mem, Config{Map: m, Kernel: kernels[0], Initrd: kernels[0], Cmdline: "console=ttyS0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: entry %#x, loaded in %v", kernels[0], e.PC, time.Since(start))

	k, err := os.ReadFile(kernels[0])
	must(t, err)
	off := (int(k[hdrSetupSects])+1)*512 + int(binary.LittleEndian.Uint32(k[hdrPayloadOffset:]))
	payload := k[off:][:binary.LittleEndian.Uint32(k[hdrPayloadLength:])-sizeTrailer]
	d, err := kzstd.NewReader(bytes.NewReader(payload), kzstd.WithDecoderMaxWindow(maxWindow))
	must(t, err)
	defer d.Close()
	vmlinux, err := io.ReadAll(d)
	if err != nil {
		t.Skipf("not packed by zstd: %v", err)
	}
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	must(t, err)
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD {
			wantBytes(t, mem, p.Paddr, append(vmlinux[p.Off:p.Off+p.Filesz:p.Off+p.Filesz], make([]byte, p.Memsz-p.Filesz)...))
		}
	}
}
