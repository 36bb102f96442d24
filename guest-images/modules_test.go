package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// moduleTree makes a kernel's module directory.
func moduleTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range map[string]string{
		"modules.dep": "kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko\n" +
			"kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko\n" +
			"kernel/net/core/failover.ko:\n" +
			"kernel/drivers/char/hw_random/virtio-rng.ko:\n",
		"modules.builtin":                             "kernel/drivers/char/virtio_console.ko\n",
		"kernel/drivers/net/virtio_net.ko":            "virtio_net",
		"kernel/drivers/net/net_failover.ko":          "net_failover",
		"kernel/net/core/failover.ko":                 "failover",
		"kernel/drivers/char/hw_random/virtio-rng.ko": "virtio_rng",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestModuleFiles(t *testing.T) {
	m, err := openModules(moduleTree(t))
	if err != nil {
		t.Fatal(err)
	}
	files, err := m.files([]string{"virtio_net", "virtio_console", "virtio-rng"}, []string{"net_failover"})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, f := range files {
		got[f.name] = string(f.data)
	}
	want := map[string]string{
		"/lib/modules/list": "boot virtio_net failover net_failover\nboot virtio_rng\n" +
			"demand net_failover failover\n",
		"/lib/modules/virtio_net.ko":   "virtio_net",
		"/lib/modules/net_failover.ko": "net_failover",
		"/lib/modules/failover.ko":     "failover",
		"/lib/modules/virtio_rng.ko":   "virtio_rng",
	}
	if len(got) != len(want) {
		t.Errorf("%d files, want %d", len(got), len(want))
	}
	for name, data := range want {
		if got[name] != data {
			t.Errorf("%s: %q, want %q", name, got[name], data)
		}
	}
}

func TestModulesRefuse(t *testing.T) {
	dir := moduleTree(t)
	m, err := openModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.files([]string{"floppy"}, nil); err == nil || !strings.Contains(err.Error(), "module floppy: not in "+dir) {
		t.Errorf("unknown module: %v", err)
	}
	if _, err := openModules(t.TempDir()); err == nil || !strings.Contains(err.Error(), "install the package linux-image-") {
		t.Errorf("no modules: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "modules.dep"), []byte("no colon\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := openModules(dir); err == nil || !strings.Contains(err.Error(), "no colon in") {
		t.Errorf("damaged modules.dep: %v", err)
	}
}

func TestReadPackedModule(t *testing.T) {
	if _, err := exec.LookPath("xz"); err != nil {
		t.Skip("no xz")
	}
	dir := moduleTree(t)
	plain := filepath.Join(dir, "m.ko")
	if err := os.WriteFile(plain, []byte("module"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("xz", "--check=crc32", plain).CombinedOutput(); err != nil {
		t.Fatalf("xz: %v: %s", err, out)
	}
	m := &modules{dir: dir}
	if b, err := m.read("m.ko.xz"); err != nil || string(b) != "module" {
		t.Errorf("%q, %v", b, err)
	}
	if err := os.WriteFile(plain+".xz", []byte("not xz"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := m.read("m.ko.xz"); err == nil || !strings.Contains(err.Error(), "unpack m.ko.xz") {
		t.Errorf("damaged: %v", err)
	}
}
