package boot

import (
	"path/filepath"
	"testing"
	"time"

	"baton/kvm/guestmem"
)

// TestDebianKernel loads the kernel that this machine itself has.
func TestDebianKernel(t *testing.T) {
	kernels, _ := filepath.Glob("/boot/vmlinuz-*")
	if len(kernels) == 0 {
		t.Skip("no /boot/vmlinuz-*")
	}
	m, err := Layout(256<<20, 40)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := guestmem.New(m.RAM(), guestmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	start := time.Now()
	e, err := Load(mem, Config{Map: m, Kernel: kernels[0], Initrd: kernels[0], Cmdline: "console=ttyS0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: entry %#x, loaded in %v", kernels[0], e.PC, time.Since(start))
}
