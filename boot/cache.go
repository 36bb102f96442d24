package boot

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// cache is a folder of unpacked kernels, empty for none. Unpacking takes longer than all
// else that happens before the guest's first instruction, and a host starts the same few
// kernels again and again. It is a wish: what cannot be read or written is as if it were
// not there.
type cache string

// cachedKernels is how many unpacked kernels are kept, those used last.
const cachedKernels = 4

// name is where the unpacked form of f is kept. It is made of all that changes when the
// file does, and so needs no look at its contents.
func (c cache) name(f *os.File) string {
	var st unix.Stat_t
	if c == "" || unix.Fstat(int(f.Fd()), &st) != nil {
		return ""
	}
	id := sha256.Sum256(fmt.Append(nil, st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim))
	return filepath.Join(string(c), fmt.Sprintf("%x.vmlinux", id[:12]))
}

// open returns the unpacked form of f and its size in bytes, or nil.
func (c cache) open(f *os.File) (*os.File, uint64) {
	name := c.name(f)
	if name == "" {
		return nil, 0
	}
	v, n, err := openRegular(name)
	if err != nil {
		return nil, 0
	}
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}, 0)
	return v, n
}

// store keeps data as the unpacked form of f, whole or not at all.
func (c cache) store(f *os.File, data []byte) {
	name := c.name(f)
	if name == "" || os.MkdirAll(string(c), 0o700) != nil {
		return
	}
	t, err := os.CreateTemp(string(c), "new-*")
	if err != nil {
		return
	}
	_, err = t.Write(data)
	if cerr := t.Close(); err == nil && cerr == nil && os.Rename(t.Name(), name) == nil {
		c.prune()
		return
	}
	_ = os.Remove(t.Name())
}

// prune removes all but the kernels used last.
func (c cache) prune() {
	names, _ := filepath.Glob(filepath.Join(string(c), "*.vmlinux"))
	used := make(map[string]fs.FileInfo, len(names))
	for _, n := range names {
		if i, err := os.Stat(n); err == nil {
			used[n] = i
		}
	}
	names = slices.DeleteFunc(names, func(n string) bool { return used[n] == nil })
	slices.SortFunc(names, func(a, b string) int { return used[b].ModTime().Compare(used[a].ModTime()) })
	for _, n := range names[min(cachedKernels, len(names)):] {
		_ = os.Remove(n)
	}
}
