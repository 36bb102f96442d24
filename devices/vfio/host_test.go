package vfio

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fakeHost is a sysfs with a group of two functions, the first of them igbvf's, and a
// kernel that binds as it is told.
type fakeHost struct {
	host
	t      *testing.T
	refuse string // the file whose write fails
}

const (
	vf    = "0000:01:10.0"
	other = "0000:01:10.2"
)

func newHost(t *testing.T) *fakeHost {
	dir := t.TempDir()
	h := &fakeHost{t: t}
	h.host = host{sys: filepath.Join(dir, "sys"), state: filepath.Join(dir, "run"), write: h.poke}
	members := filepath.Join(h.sys, "kernel/iommu_groups/7/devices")
	must(t, os.MkdirAll(members, 0o755))
	for _, d := range []string{"igbvf", Driver, "pci-stub"} {
		must(t, os.MkdirAll(filepath.Join(h.sys, "bus/pci/drivers", d), 0o755))
	}
	for _, bdf := range []string{vf, other} {
		must(t, os.MkdirAll(h.device(bdf), 0o755))
		must(t, os.Symlink("../../../../kernel/iommu_groups/7", h.device(bdf, "iommu_group")))
		must(t, os.Symlink(h.device(bdf), filepath.Join(members, bdf)))
	}
	h.link(vf, "igbvf")
	return h
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (h *fakeHost) link(bdf, driver string) {
	os.Remove(h.device(bdf, "driver"))
	if driver != "" {
		must(h.t, os.Symlink("../../drivers/"+driver, h.device(bdf, "driver")))
	}
}

// poke is the kernel: what a write to a file of sysfs does.
func (h *fakeHost) poke(path, text string) error {
	name := filepath.Base(path)
	if name == h.refuse {
		return errors.New("refused")
	}
	override := func(bdf string) string { return h.device(bdf, "driver_override") }
	switch name {
	case "driver_override":
		return os.WriteFile(path, []byte(text), 0o644)
	case "unbind":
		h.link(text, "")
	case "bind":
		h.link(text, filepath.Base(filepath.Dir(path)))
	case "drivers_probe":
		if d, err := os.ReadFile(override(text)); err == nil && h.driver(text) == "" {
			h.link(text, strings.TrimSpace(string(d)))
		}
	}
	return nil
}

func TestParseHost(t *testing.T) {
	for in, want := range map[string]string{
		"01:10.0": vf, "0000:01:10.0": vf, "ABCD:0F:1f.7": "abcd:0f:1f.7",
		"": "", "1:10.0": "", "01:10": "", "01:20.0": "", "01:10.8": "", "0000:01:10.0/..": "", "../01:10.0": "",
	} {
		if got, err := ParseHost(in); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	h := newHost(t)
	if got, err := ParseSysfs(h.device(vf)); got != vf {
		t.Errorf("sysfsdev: %q, %v", got, err)
	}
	for _, bad := range []string{h.sys, h.device("nothing")} {
		if got, err := ParseSysfs(bad); err == nil {
			t.Errorf("sysfsdev=%s: %q", bad, got)
		}
	}
}

func TestGroup(t *testing.T) {
	h := newHost(t)
	number, members, err := h.group(vf)
	if number != "7" || strings.Join(members, " ") != vf+" "+other || err != nil {
		t.Errorf("group %s of %v, %v", number, members, err)
	}
	for driver, want := range map[string]string{"": "", "pci-stub": "", "mlx5_vfio_pci": "", "e1000e": other + " by e1000e"} {
		h.link(vf, Driver)
		h.link(other, driver)
		err := h.viable(number, members)
		if (err != nil) != (want != "") || err != nil && !strings.Contains(err.Error(), "group 7 is not viable: "+want+"\n") {
			t.Errorf("with the other one's driver %q: %v", driver, err)
		}
	}
	if _, _, err := h.group("0000:02:00.0"); err == nil || !strings.Contains(err.Error(), "no such PCI function\n") {
		t.Errorf("absent: %v", err)
	}
	must(t, os.Remove(h.device(vf, "iommu_group")))
	if _, _, err := h.group(vf); err == nil || !strings.Contains(err.Error(), "no IOMMU group\n") {
		t.Errorf("without an IOMMU: %v", err)
	}
}

func TestBind(t *testing.T) {
	for _, was := range []string{"igbvf", ""} {
		h := newHost(t)
		h.link(vf, was)
		b, err := h.bind(vf)
		must(t, err)
		if d := h.driver(vf); d != Driver {
			t.Errorf("driver %q", d)
		}
		if done, err := h.recover(); done != nil || err != nil {
			t.Errorf("recovered %v (%v), which somebody has", done, err)
		}
		if _, err := h.bind(vf); err == nil || !strings.Contains(err.Error(), "another baton has it") {
			t.Errorf("bind what another one will give back: %v", err)
		}
		must(t, b.restore())
		override, _ := os.ReadFile(h.device(vf, "driver_override"))
		if d := h.driver(vf); d != was || string(override) != "\n" {
			t.Errorf("driver %q, was %q; override %q", d, was, override)
		}
		if left, _ := os.ReadDir(h.state); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func TestRecover(t *testing.T) {
	h := newHost(t)
	if done, err := h.recover(); done != nil || err != nil {
		t.Errorf("nothing to do: %v, %v", done, err)
	}
	b, err := h.bind(vf)
	must(t, err)
	must(t, b.file.Close()) // as when its process is killed
	must(t, os.WriteFile(filepath.Join(h.state, other), nil, 0o644))
	must(t, os.WriteFile(filepath.Join(h.state, "junk"), []byte("igbvf\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(h.state, "0000:03:00.0"), []byte("igbvf\n"), 0o644)) // is gone
	done, err := h.recover()
	if strings.Join(done, " ") != vf+" 0000:03:00.0" || err != nil || h.driver(vf) != "igbvf" || h.driver(other) != "" {
		t.Errorf("recovered %v, %v; drivers %q, %q", done, err, h.driver(vf), h.driver(other))
	}
	if left, _ := os.ReadDir(h.state); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBindFails(t *testing.T) {
	for _, file := range []string{"driver_override", "unbind", "drivers_probe"} {
		h := newHost(t)
		h.refuse = file
		if _, err := h.bind(vf); err == nil || !strings.Contains(err.Error(), "bind it to vfio-pci: refused") {
			t.Errorf("%s: %v", file, err)
		}
		if d := h.driver(vf); d != "igbvf" {
			t.Errorf("%s failed: driver %q", file, d)
		}
	}
	h := newHost(t)
	must(t, os.Remove(filepath.Join(h.sys, "bus/pci/drivers", Driver)))
	if _, err := h.bind(vf); err == nil || !strings.Contains(err.Error(), "\nmodprobe vfio-pci") {
		t.Errorf("without the module: %v", err)
	}
}

// A function that somebody else has bound stays so.
func TestBindBound(t *testing.T) {
	h := newHost(t)
	h.link(vf, Driver)
	if b, err := h.bind(vf); b != nil || err != nil {
		t.Errorf("%v, %v", b, err)
	}
}

func TestVFs(t *testing.T) {
	const pf = "0000:01:00.0"
	h := newHost(t)
	net := func(bdf, name, flags string) {
		must(t, os.MkdirAll(h.device(bdf, "net", name), 0o755))
		must(t, os.MkdirAll(filepath.Join(h.sys, "class/net", name), 0o755))
		must(t, os.Symlink(h.device(bdf), filepath.Join(h.sys, "class/net", name, "device")))
		must(t, os.WriteFile(filepath.Join(h.sys, "class/net", name, "flags"), []byte(flags+"\n"), 0o644))
	}
	must(t, os.MkdirAll(h.device(pf), 0o755))
	if _, err := h.vfs(pf); err == nil || !strings.Contains(err.Error(), "there are none\necho N > ") {
		t.Errorf("without VFs: %v", err)
	}
	for i, bdf := range []string{vf, other} {
		must(t, os.Symlink("../"+bdf, h.device(pf, fmt.Sprintf("virtfn%d", i))))
		must(t, os.Symlink("../"+pf, h.device(bdf, "physfn")))
	}
	if _, _, err := h.parent(other); err == nil || !strings.Contains(err.Error(), "has no interface") {
		t.Errorf("PF without a driver: %v", err)
	}
	net(pf, "eth0", "0x1003")
	net(vf, "eth1", "0x1003")
	h.link(other, Driver)
	want := []VF{{vf, 0, "igbvf", "eth1", true}, {other, 1, Driver, "", false}}
	for _, name := range []string{pf, "01:00.0", "eth0"} {
		if got, err := h.vfs(name); !slices.Equal(got, want) || err != nil {
			t.Errorf("VFs of %s: %v, %v", name, got, err)
		}
	}
	must(t, os.WriteFile(filepath.Join(h.sys, "class/net/eth1/flags"), []byte("0x1002\n"), 0o644))
	if got, err := h.vfs("eth0"); err != nil || got[0].Up {
		t.Errorf("one that is down: %v, %v", got, err)
	}
	if link, i, err := h.parent(other); link != "eth0" || i != 1 || err != nil {
		t.Errorf("parent: %s, %d, %v", link, i, err)
	}
	for _, bad := range []string{"", "eth9", "../net/eth0", "0000:09:00.0"} {
		if got, err := h.vfs(bad); err == nil {
			t.Errorf("VFs of %q: %v", bad, got)
		}
	}
	if got, err := h.pool("eth9+eth0"); err != nil || len(got) != 2 || got[1].BDF != other {
		t.Errorf("a pool of which one PF is there: %v, %v", got, err)
	}
	if got, err := h.pool("eth8+eth9"); err == nil || !strings.Contains(err.Error(), "eth8: ") || !strings.Contains(err.Error(), "eth9: ") {
		t.Errorf("a pool of nothing: %v, %v", got, err)
	}
	if _, _, err := h.parent(pf); err == nil {
		t.Error("the PF is a VF")
	}
}

func TestHolder(t *testing.T) {
	proc := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(proc, "42/fd"), 0o755))
	must(t, os.WriteFile(filepath.Join(proc, "42/comm"), []byte("qemu-system-x86\n"), 0o644))
	must(t, os.Symlink("/dev/vfio/7", filepath.Join(proc, "42/fd/9")))
	for file, want := range map[string]string{"/dev/vfio/7": "process 42 (qemu-system-x86) has it", "/dev/vfio/8": "another process has it"} {
		if got := holder(proc, file); got != want {
			t.Errorf("%s: %s, want %s", file, got, want)
		}
	}
}
