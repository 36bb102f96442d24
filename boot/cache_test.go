package boot

import (
	"os"
	"path/filepath"
	"testing"
)

// TestCache loads a kernel from its packed form once, and then, until the file changes, from
// its unpacked one.
func TestCache(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "kernels")
	kernel := tempFile(t, bzImage(packZstd(t, testPayload()), nil))
	load := func() {
		t.Helper()
		m, mem := newMem(t, 64<<20)
		e, err := Load(mem, Config{Map: m, Kernel: kernel, Cache: dir})
		must(t, err)
		if e.PC != testEntry {
			t.Errorf("entry %#x, want %#x", e.PC, testEntry)
		}
		wantSegs(t, mem, testSegs())
	}
	kept := func() []string {
		t.Helper()
		names, err := filepath.Glob(filepath.Join(dir, "*"))
		must(t, err)
		return names
	}
	load()
	if k := kept(); len(k) != 1 {
		t.Fatalf("%d files are kept, want the unpacked kernel: %q", len(k), k)
	}
	packed, err := os.ReadFile(kernel)
	must(t, err)

	// The unpacked form serves: one with another byte in it shows.
	elf := testPayload()
	elf[len(elf)-1] ^= 0xff
	must(t, os.WriteFile(kept()[0], elf, 0o600))
	m, mem := newMem(t, 64<<20)
	_, err = Load(mem, Config{Map: m, Kernel: kernel, Cache: dir})
	must(t, err)
	segs := testSegs()
	last := segs[len(segs)-1]
	last.data[len(last.data)-1] ^= 0xff
	wantSegs(t, mem, segs)

	// A broken one is as good as none, and is replaced.
	must(t, os.WriteFile(kept()[0], []byte("\x7fELF"), 0o600))
	load()
	load()

	// A changed kernel is another one, and few are kept.
	for range 2 * cachedKernels {
		must(t, os.Remove(kernel))
		must(t, os.WriteFile(kernel, packed, 0o600))
		load()
	}
	if k := kept(); len(k) > cachedKernels {
		t.Errorf("%d files are kept, at most %d should be", len(k), cachedKernels)
	}
}

// TestCacheUnusable boots all the same where nothing can be kept.
func TestCacheUnusable(t *testing.T) {
	m, mem := newMem(t, 64<<20)
	kernel := tempFile(t, bzImage(packZstd(t, testPayload()), nil))
	_, err := Load(mem, Config{Map: m, Kernel: kernel, Cache: filepath.Join(kernel, "below-a-file")})
	must(t, err)
	wantSegs(t, mem, testSegs())
}
