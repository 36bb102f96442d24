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
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
)

func TestArchive(t *testing.T) {
	files := []file{
		{name: "/init", data: []byte("#!"), mode: 0o755},
		{name: "/lib/modules/a.ko", data: []byte("module"), mode: 0o644},
		{name: "/bin/sh", link: "busybox"},
	}
	b, err := archive(files)
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(files)
	if again, err := archive(files); err != nil || !bytes.Equal(b, again) {
		t.Errorf("other order of files, other archive (%v)", err)
	}
	var got []string
	r := cpio.Newc.Reader(bytes.NewReader(b))
	for {
		rec, err := r.ReadRecord()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		data := make([]byte, rec.FileSize)
		if _, err := rec.ReadAt(data, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if rec.UID != 0 || rec.GID != 0 || rec.MTime != 0 {
			t.Errorf("%s: owner %d:%d, time %d", rec.Name, rec.UID, rec.GID, rec.MTime)
		}
		got = append(got, fmt.Sprintf("%s %o %d,%d %s", rec.Name, rec.Mode, rec.Rmajor, rec.Rminor, data))
	}
	want := []string{
		"bin 40755 0,0 ", "bin/sh 120777 0,0 busybox", "dev 40755 0,0 ", "dev/console 20600 5,1 ", "dev/null 20666 1,3 ",
		"init 100755 0,0 #!", "lib 40755 0,0 ", "lib/modules 40755 0,0 ", "lib/modules/a.ko 100644 0,0 module",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if _, err := archive([]file{{name: "/init"}, {name: "/init"}}); err == nil || !strings.Contains(err.Error(), "/init twice") {
		t.Errorf("duplicate: %v", err)
	}
}

// An image is built when there is none, when an input has changed and when it was damaged.
func TestBuildOnlyWhenNeeded(t *testing.T) {
	builds := 0
	recipes["fake"] = func(options) ([]file, error) {
		builds++
		return []file{{name: "/init", data: []byte("x"), mode: 0o755}}, nil
	}
	defer delete(recipes, "fake")
	root := t.TempDir()
	o := options{out: t.TempDir(), kernel: "1.2.3", src: filepath.Join(root, "guest-images")}
	nettool := filepath.Join(root, "tests/nettool")
	if err := errors.Join(os.Mkdir(o.src, 0o755), os.MkdirAll(nettool, 0o755)); err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(o.out, "fake.cpio")
	source := filepath.Join(o.src, "main.go")
	write := func(name, data string) func() {
		return func() {
			if err := os.WriteFile(name, []byte(data), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, step := range []struct {
		name   string
		change func()
		build  bool
	}{
		{"first", func() {}, true},
		{"again", func() {}, false},
		{"new source", write(source, "package main"), true},
		{"new network tool", write(filepath.Join(nettool, "udp.go"), "package nettool"), true},
		{"again", func() {}, false},
		{"a test", write(filepath.Join(o.src, "main_test.go"), "package main"), false},
		{"damaged", write(img, "half"), true},
		{"other kernel", func() { o.kernel = "1.2.4" }, true},
		{"more modules", func() { o.modules = []string{"x"} }, true},
		{"again", func() {}, false},
	} {
		step.change()
		before := builds
		if err := build("fake", o); err != nil {
			t.Fatal(err)
		}
		if (builds != before) != step.build {
			t.Errorf("%s: built %v, want %v", step.name, builds != before, step.build)
		}
	}
	recipes["fake"] = func(options) ([]file, error) { return nil, errors.New("broken") }
	write(source, "package x")()
	if err := build("fake", o); err == nil {
		t.Error("a broken recipe is no error")
	}
	if b, err := os.ReadFile(img); err != nil || len(b) < 100 {
		t.Errorf("a broken recipe lost the image: %d bytes, %v", len(b), err)
	}
}

func TestRunRefuses(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want string
	}{
		{nil, "which image?"},
		{[]string{"-o", t.TempDir(), "-kernel", "1", "floppy"}, "image floppy: unknown\ngive test or demo"},
		{[]string{"-o", t.TempDir(), "-kernel", "no-such-kernel", "test"}, "install the package linux-image-no-such-kernel"},
	} {
		if err := run(tc.args); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: %v, want %q", tc.args, err, tc.want)
		}
	}
}

func TestNewestKernel(t *testing.T) {
	dir := t.TempDir()
	if _, err := newestKernel(dir); err == nil || !strings.Contains(err.Error(), "install linux-image-amd64") {
		t.Errorf("no kernel: %v", err)
	}
	for _, name := range []string{"vmlinuz-6.9.13-amd64", "vmlinuz-6.12.9+deb12-amd64", "vmlinuz-6.12.10+deb12-amd64", "vmlinuz-6.1.0-40-amd64"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if v, err := newestKernel(dir); err != nil || v != "6.12.10+deb12-amd64" {
		t.Errorf("newest is %q, %v", v, err)
	}
}

func TestBusyboxFiles(t *testing.T) {
	if f, err := busyboxFiles("/no/such/busybox"); f != nil || err != nil {
		t.Errorf("missing: %v, %v", f, err)
	}
	if _, err := busyboxFiles("/bin/sh"); err == nil || !strings.Contains(err.Error(), "needs shared libraries\ninstall busybox-static") {
		t.Errorf("dynamic: %v", err)
	}
}
