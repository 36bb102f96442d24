package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/therootcompany/xz"

	"baton/guest-images/guest"
)

// bootModules are loaded by an image's init, demandModules when somebody asks for them.
var (
	bootModules   = []string{"virtio_pci", "virtio_console", "virtio_net", "virtio_blk", "virtio_rng", "igbvf", "button"}
	demandModules = []string{"ext4", "e1000e", "igb", "pvpanic_mmio", "8021q", "crc32c_generic", "evdev"}
)

// kmod is a kernel module with the modules that have to be loaded before it, in order.
type kmod struct {
	name string
	path string // below the kernel's module directory
	deps []string
}

// modules knows the modules of one kernel.
type modules struct {
	dir     string
	byName  map[string]kmod
	builtin map[string]bool
}

func openModules(dir string) (*modules, error) {
	dep, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("read kernel modules: %w\ninstall the package linux-image-%s", err, filepath.Base(dir))
	}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("read kernel modules: %w", err)
	}
	m := &modules{dir: dir, byName: map[string]kmod{}, builtin: map[string]bool{}}
	for line := range strings.Lines(string(builtin)) {
		m.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	for line := range strings.Lines(string(dep)) {
		path, deps, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			return nil, fmt.Errorf("read %s/modules.dep: no colon in %q", dir, line)
		}
		k := kmod{name: moduleName(path), path: path}
		for _, d := range strings.Fields(deps) {
			k.deps = append(k.deps, moduleName(d))
		}
		slices.Reverse(k.deps) // depmod writes the one to load first last
		m.byName[k.name] = k
	}
	return m, nil
}

// moduleName turns a path such as kernel/drivers/char/hw_random/virtio-rng.ko.xz into the
// kernel's name of the module, virtio_rng.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// files returns the archive's files for the modules and what they depend on: the modules
// themselves, unpacked, and the list for the init.
func (m *modules) files(boot, demand []string) ([]file, error) {
	var list bytes.Buffer
	have := map[string][]byte{}
	add := func(kind string, names []string) error {
		for _, name := range names {
			name = moduleName(name)
			if m.builtin[name] {
				continue
			}
			k, ok := m.byName[name]
			if !ok {
				return fmt.Errorf("module %s: not in %s", name, m.dir)
			}
			fmt.Fprintln(&list, strings.Join(append([]string{kind, k.name}, k.deps...), " "))
			for _, n := range append([]string{k.name}, k.deps...) {
				if have[n] != nil {
					continue
				}
				var err error
				if have[n], err = m.read(m.byName[n].path); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if err := errors.Join(add("boot", boot), add("demand", demand)); err != nil {
		return nil, err
	}
	files := []file{{name: guest.ModuleDir + "/" + guest.List, data: list.Bytes(), mode: 0o644}}
	for name, data := range have {
		files = append(files, file{name: guest.ModuleDir + "/" + name + ".ko", data: data, mode: 0o644})
	}
	return files, nil
}

func (m *modules) read(path string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(m.dir, path))
	if err != nil || !strings.HasSuffix(path, ".xz") {
		return b, err
	}
	r, err := xz.NewReader(bytes.NewReader(b), 0)
	if err == nil {
		b, err = io.ReadAll(r)
	}
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", path, err)
	}
	return b, nil
}
