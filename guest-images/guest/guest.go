// Package guest is what the images' inits share: mounts, kernel modules, the PCI tree.
package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ModuleDir holds an image's kernel modules and the file List.
const ModuleDir = "/lib/modules"

// List names the modules: lines of "boot NAME DEPENDENCY..." in the order of loading, or
// "demand NAME DEPENDENCY..." for those that wait until they are asked for.
const List = "list"

// Mount mounts what every program expects. It fails for no single file system's sake.
func Mount() error {
	var errs []error
	for _, m := range []struct{ fs, dir, opts string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"devpts", "/dev/pts", "ptmxmode=666"},
		{"tmpfs", "/dev/shm", ""},
		{"tmpfs", "/run", ""},
		{"tmpfs", "/tmp", ""},
	} {
		_ = os.MkdirAll(m.dir, 0o755)
		if err := unix.Mount(m.fs, m.dir, m.fs, 0, m.opts); err != nil {
			errs = append(errs, fmt.Errorf("mount %s: %w", m.dir, err))
		}
	}
	return errors.Join(errs...)
}

// Ready tells the console that userspace runs, with the seconds since the kernel began.
func Ready() {
	up, _ := os.ReadFile("/proc/uptime")
	sec, _, _ := strings.Cut(string(up), " ")
	fmt.Printf("BATON-READY uptime=%s\n", sec)
}

// LoadBoot loads all modules of the list's boot lines.
func LoadBoot() error { return load(func(kind, _ string) bool { return kind == "boot" }) }

// LoadModule loads the named module of the image and what it depends on.
func LoadModule(name string) error {
	found := false
	err := load(func(_, n string) bool {
		found = found || n == name
		return n == name
	})
	if err == nil && !found {
		err = fmt.Errorf("load module %s: not in this image", name)
	}
	return err
}

func load(want func(kind, name string) bool) error {
	list, err := os.ReadFile(filepath.Join(ModuleDir, List))
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(list)) {
		f := strings.Fields(line)
		if len(f) < 2 || !want(f[0], f[1]) {
			continue
		}
		for _, name := range append(f[2:len(f):len(f)], f[1]) {
			if err := insert(name); err != nil && err != unix.EEXIST {
				errs = append(errs, fmt.Errorf("load module %s: %w", name, err))
			}
		}
	}
	return errors.Join(errs...)
}

func insert(name string) error {
	f, err := os.Open(filepath.Join(ModuleDir, name+".ko"))
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

const pciDevices = "/sys/bus/pci/devices"

// PCITree describes the PCI functions below sysfs's root (normally "") as lspci -t does:
// one line each, indented below its bridge, with class, IDs and driver.
func PCITree(root string) (string, error) {
	links, err := filepath.Glob(root + pciDevices + "/*")
	if err != nil {
		return "", err
	}
	var paths []string
	for _, l := range links {
		if path, err := filepath.EvalSymlinks(l); err == nil { // else it was unplugged since
			paths = append(paths, path)
		}
	}
	slices.Sort(paths) // a bridge's directory comes before, and holds, what is behind it
	var b strings.Builder
	for _, path := range paths {
		attr := func(name string) string {
			v, _ := os.ReadFile(filepath.Join(path, name))
			return strings.TrimPrefix(strings.TrimSpace(string(v)), "0x")
		}
		driver, _ := os.Readlink(filepath.Join(path, "driver"))
		if driver = filepath.Base(driver); driver == "." {
			driver = "-"
		}
		// The path of a function behind a bridge runs through the bridge's directory.
		depth := strings.Count(path[strings.LastIndex(path, "/pci")+1:], "/") - 1
		fmt.Fprintf(&b, "%s%s class %s id %s:%s %s\n", strings.Repeat("  ", depth),
			filepath.Base(path), attr("class"), attr("vendor"), attr("device"), driver)
	}
	return b.String(), nil
}
