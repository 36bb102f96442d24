package guest

import (
	"os"
	"path/filepath"
	"testing"
)

// TestPCITree has a root port with a NIC behind it, a free one, and a function without a driver.
func TestPCITree(t *testing.T) {
	root := t.TempDir()
	add := func(path, class, vendor, device, driver string) {
		t.Helper()
		dir := filepath.Join(root, "sys/devices/pci0000:00", path)
		must(t, os.MkdirAll(dir, 0o755))
		for name, v := range map[string]string{"class": class, "vendor": vendor, "device": device} {
			must(t, os.WriteFile(filepath.Join(dir, name), []byte("0x"+v+"\n"), 0o644))
		}
		if driver != "" {
			must(t, os.Symlink("/sys/bus/pci/drivers/"+driver, filepath.Join(dir, "driver")))
		}
		must(t, os.MkdirAll(root+pciDevices, 0o755))
		must(t, os.Symlink(dir, filepath.Join(root+pciDevices, filepath.Base(path))))
	}
	add("0000:00:02.0/0000:01:00.0", "020000", "1af4", "1041", "virtio-pci")
	add("0000:00:02.0", "060400", "1b36", "000c", "pcieport")
	add("0000:00:03.0", "060400", "1b36", "000c", "pcieport")
	add("0000:00:00.0", "060000", "8086", "29c0", "")
	must(t, os.Symlink("/nowhere", filepath.Join(root+pciDevices, "0000:00:04.0"))) // unplugged just now
	got, err := PCITree(root)
	must(t, err)
	want := "0000:00:00.0 class 060000 id 8086:29c0 -\n" +
		"0000:00:02.0 class 060400 id 1b36:000c pcieport\n" +
		"  0000:01:00.0 class 020000 id 1af4:1041 virtio-pci\n" +
		"0000:00:03.0 class 060400 id 1b36:000c pcieport\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
