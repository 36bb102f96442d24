package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"

	"github.com/therootcompany/xz"

	"baton/tests/nested/proto"
)

// baseModules is what L1 loads, beside KVM's, in this order and each after what it needs.
// What a suite wants beyond that it gets by modprobe: /lib/modules is on the shared root.
var baseModules = []string{
	"virtio_console", "9p", "9pnet_virtio", "overlay",
	"vhost_net", "tun", "bridge", "veth",
	"vfio_iommu_type1", "vfio-pci", "igb", "igbvf", "e1000e",
}

// A kernel is an installed kernel image and the folder of its modules.
type kernel struct{ release, image, modules string }

// findKernel returns the newest installed kernel that has modules; "" as its release when
// there is none.
func findKernel(root string) kernel {
	images, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*-amd64"))
	sort.Slice(images, func(i, j int) bool { return versionLess(images[i], images[j]) })
	for i := len(images) - 1; i >= 0; i-- {
		release := strings.TrimPrefix(filepath.Base(images[i]), "vmlinuz-")
		k := kernel{release, images[i], filepath.Join(root, "lib/modules", release)}
		if _, err := os.Stat(filepath.Join(k.modules, "modules.dep")); err == nil {
			return k
		}
	}
	return kernel{}
}

// versionLess compares runs of digits by their value, all else by byte.
func versionLess(a, b string) bool {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			x, y := strings.TrimLeft(a[:na], "0"), strings.TrimLeft(b[:nb], "0")
			if len(x) != len(y) {
				return len(x) < len(y)
			}
			if x != y {
				return x < y
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			return a[0] < b[0]
		}
		a, b = a[1:], b[1:]
	}
	return len(a) < len(b)
}

func digits(s string) int {
	return len(s) - len(strings.TrimLeft(s, "0123456789"))
}

// moduleFiles returns the files of the named modules and of all that they need, needed
// ones first, as modules.dep has them: "file: needs, deepest last". A module that the
// kernel has built in has no file.
func moduleFiles(dep, builtin string, names []string) ([]string, error) {
	byName := map[string][]string{}
	for line := range strings.Lines(builtin) {
		byName[moduleName(strings.TrimSpace(line))] = nil
	}
	for line := range strings.Lines(dep) {
		file, needs, _ := strings.Cut(strings.TrimSpace(line), ":")
		byName[moduleName(file)] = append([]string{file}, strings.Fields(needs)...)
	}
	var files []string
	seen := map[string]bool{}
	for _, name := range names {
		chain, ok := byName[moduleName(name)]
		if !ok {
			return nil, fmt.Errorf("kernel module %s: this kernel has none", name)
		}
		for i := len(chain) - 1; i >= 0; i-- {
			if !seen[chain[i]] {
				seen[chain[i]] = true
				files = append(files, chain[i])
			}
		}
	}
	return files, nil
}

func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// buildInitramfs writes the initramfs of L1, with the named modules of kernel k and the
// program init, into the folder cache, unless it is there already, and returns its path.
func buildInitramfs(cache string, k kernel, modules []string, init string) (string, error) {
	dep, err := os.ReadFile(filepath.Join(k.modules, "modules.dep"))
	if err != nil {
		return "", err
	}
	builtin, err := os.ReadFile(filepath.Join(k.modules, "modules.builtin"))
	if err != nil {
		return "", err
	}
	program, err := os.ReadFile(init)
	if err != nil {
		return "", err
	}
	key := sha256.New()
	fmt.Fprint(key, k.release, modules, string(dep), len(program))
	key.Write(program)
	out := filepath.Join(cache, fmt.Sprintf("l1-%x.cpio", key.Sum(nil)[:8]))
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	files, err := moduleFiles(string(dep), string(builtin), modules)
	if err != nil {
		return "", err
	}

	var img bytes.Buffer
	w := newcWriter{w: &img}
	for _, d := range []string{"dev", "proc", "sys", "lower", "rw", "root", "modules"} {
		w.entry(d, 0o040755, nil)
	}
	w.entry("init", 0o100755, program)
	var list strings.Builder
	for _, f := range files {
		body, err := readModule(filepath.Join(k.modules, f))
		if err != nil {
			return "", err
		}
		name := "modules/" + moduleName(f) + ".ko"
		w.entry(name, 0o100644, body)
		fmt.Fprintln(&list, "/"+name)
	}
	w.entry(strings.TrimPrefix(proto.ModulesFile, "/"), 0o100644, []byte(list.String()))
	w.close()

	old, _ := filepath.Glob(filepath.Join(cache, "l1-*.cpio"))
	for _, f := range old {
		os.Remove(f)
	}
	return out, writeFile(out, img.Bytes())
}

// readModule reads a module, unpacked: the kernel's own unpacking is slow when emulated.
func readModule(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if !strings.HasSuffix(file, ".xz") {
		return io.ReadAll(f)
	}
	x, err := xz.NewReader(f, 0)
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", file, err)
	}
	return io.ReadAll(x)
}

// writeFile writes a file in one step, so that nobody sees half of it.
func writeFile(name string, data []byte) error {
	tmp := fmt.Sprintf("%s.%d", name, os.Getpid())
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}

// newcWriter writes the cpio format of an initramfs ("newc": Documentation/driver-api/early-userspace/buffer-format.rst).
type newcWriter struct {
	w   *bytes.Buffer
	ino int
}

func (c *newcWriter) entry(name string, mode int, data []byte) {
	c.ino++
	// magic ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
	fmt.Fprintf(c.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	c.pad()
	c.w.Write(data)
	c.pad()
}

func (c *newcWriter) pad() {
	for c.w.Len()%4 != 0 {
		c.w.WriteByte(0)
	}
}

func (c *newcWriter) close() { c.entry("TRAILER!!!", 0, nil) }
