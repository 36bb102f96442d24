package lint

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/fstest"
)

func TestRepository(t *testing.T) {
	problems, err := Check(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Error(p)
	}
}

// TestKept looks at what is tracked, and at what would be with the next commit.
func TestKept(t *testing.T) {
	out, err := exec.Command("git", "-C", "../..", "ls-files", "-zco", "--exclude-standard").Output()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		if _, err := os.Stat("../../" + name); err == nil { // not one that has just been deleted
			names = append(names, name)
		}
	}
	if len(names) < 100 {
		t.Errorf("git knows %d files only", len(names))
	}
	problems, err := CheckKept(os.DirFS("../.."), names)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Error(p)
	}
}

func TestCheckKept(t *testing.T) {
	fsys := fstest.MapFS{
		"core":            {Data: []byte("\x7fELF\x00")},
		"large.txt":       {Data: bytes.Repeat([]byte("a"), MaxBytes+1)},
		"a/testdata/good": {Data: []byte("\x00")},
		"good.txt":        {Data: []byte("\xff")},
	}
	problems, err := CheckKept(fsys, []string{"a/testdata/good", "core", "good.txt", "large.txt"})
	if err != nil || len(problems) != 2 || problems[0].File != "core" || problems[1].File != "large.txt" {
		t.Errorf("problems: %v, %v", problems, err)
	}
}

func TestImports(t *testing.T) {
	for _, tt := range []struct {
		file, imported string
		want           string // part of the finding; "" if it is fine
	}{
		{"main.go", "baton/vmm", ""},
		{"main.go", "baton/vmm/qmp", ""},
		{"main.go", "baton/kvm", "main may import vmm"},
		{"vmm/machine.go", "baton/kvm", ""},
		{"vmm/machine.go", "baton/devices/pci", ""},
		{"vmm/qmp/server.go", "baton/vmm", "nothing of ours"},
		{"vmm/machine.go", "baton", "against the arrows"},
		{"vmm/machine.go", "baton/tests/harness", "against the arrows"},
		{"devices/pci/msix.go", "baton/devices", ""},
		{"devices/virtio/net/net.go", "baton/devices/virtio", ""},
		{"devices/virtio/queue.go", "baton/kvm/guestmem", ""},
		{"devices/virtio/queue.go", "baton/kvm", "devices may import kvm/guestmem"},
		{"devices/vfio/vfio.go", "baton/vmm", "against the arrows"},
		{"migrate/source.go", "baton/migrate/wire", ""},
		{"migrate/source.go", "baton/kvm/guestmem", ""},
		{"migrate/source.go", "baton/devices", "against the arrows"},
		{"boot/acpi/aml.go", "baton/kvm", "against the arrows"},
		{"boot/load.go", "github.com/klauspost/compress/zstd", ""},
		{"kvm/vm.go", "golang.org/x/sys/unix", ""},
		{"kvm/vm.go", "github.com/bobuhiro11/gokvm/kvm", ""},
		{"kvm/vm.go", "github.com/bobuhiro11/gokvm/machine", "beside the standard library"},
		{"kvm/vm.go", "golang.org/x/term", "beside the standard library"},
		{"kvm/vm.go", "baton/kvm/guestmem", "nothing of ours"},
		{"kvm/guestmem/mem.go", "baton/kvm", "nothing of ours"},
		{"kvm/guestmem/mem.go", "golang.org/x/sys/cpu", ""},
		{"kvm/guestmem/mem.go", "encoding/binary", ""},
		{"kvm/ioctl_unsafe.go", "unsafe", ""},
		{"kvm/ioctl.go", "unsafe", "unsafe"},
		{"tests/harness/net.go", "github.com/vishvananda/netlink", ""},
		{"other/x.go", "fmt", "no rule"},
	} {
		got := checkImport(tt.file, tt.imported)
		if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s imports %s: %q, want %q", tt.file, tt.imported, got, tt.want)
		}
	}
}

func TestCheck(t *testing.T) {
	files := func(src string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(src)} }
	fsys := fstest.MapFS{
		"kvm/vm.go":      files("package kvm\n\nimport (\n\t\"fmt\"\n\t\"baton/vmm\"\n)\n"),
		"kvm/vm_test.go": files("package kvm\nimport \"baton/vmm\"\n"),
		"boot/long.go":   files("package boot\n" + strings.Repeat("//\n", MaxLines)),
		"boot/names.go": files("package boot\nfunc Bare() {}\n// Said is.\nfunc Said() {}\ntype t struct{}\nfunc (*t) Hidden() {}\n" +
			"// T is.\ntype T[X any] struct{}\nfunc (*T[X]) Method() {}\nfunc (T[X]) String() string { return \"\" }\nconst (\n\tA = 1 // is\n\tB = 2\n)\n"),
		"boot/testdata/x.go":     files("package x\nimport \"baton/vmm\"\n"),
		"guest-images/go.mod":    files("module x\n"),
		"guest-images/a/main.go": files("package main\nimport \"unsafe\"\n"),
		".cache/x.go":            files("package x\nimport \"unsafe\"\n"),
	}
	problems, err := Check(fsys)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"boot/long.go:601: 601 lines", "boot/names.go:2: Bare has no comment", "boot/names.go:9: Method has", "boot/names.go:13: B has", "kvm/vm.go:5: imports baton/vmm"}
	if len(problems) != len(want) {
		t.Fatalf("problems: %v", problems)
	}
	for i, p := range problems {
		if !strings.HasPrefix(p.String(), want[i]) {
			t.Errorf("problem %d: %s, want %s...", i, p, want[i])
		}
	}
}
