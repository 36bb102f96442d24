package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"baton/tests/nested/proto"
)

func TestVersionLess(t *testing.T) {
	order := []string{"6.1.0-9", "6.1.0-41", "6.9.12", "6.12", "6.12.9", "6.12.0117+deb12", "6.12.117+deb13", "10.0"}
	for i, a := range order {
		for j, b := range order {
			if got := versionLess(a, b); got != (i < j) {
				t.Errorf("versionLess(%q, %q) = %v", a, b, got)
			}
		}
	}
}

func TestFindKernel(t *testing.T) {
	root := t.TempDir()
	write := func(name string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if k := findKernel(root); k.release != "" {
		t.Errorf("found %q where there is none", k.release)
	}
	for _, release := range []string{"6.1.0-41-amd64", "6.9.1-amd64", "6.12.117+deb12-amd64"} {
		write("boot/vmlinuz-" + release)
		write("lib/modules/" + release + "/modules.dep")
	}
	write("boot/vmlinuz-7.0-amd64") // its modules were removed
	if k := findKernel(root); k.release != "6.12.117+deb12-amd64" {
		t.Errorf("found %q", k.release)
	}
}

func TestModuleFiles(t *testing.T) {
	const dep = `kernel/a/kvm-amd.ko.xz: kernel/a/ccp.ko.xz kernel/a/kvm.ko.xz kernel/a/irqbypass.ko.xz
kernel/a/kvm.ko.xz: kernel/a/irqbypass.ko.xz
kernel/a/irqbypass.ko.xz:
kernel/a/ccp.ko.xz:
kernel/a/vfio-pci.ko.xz: kernel/a/irqbypass.ko.xz
`
	const builtin = "kernel/b/virtio_console.ko\n"
	got, err := moduleFiles(dep, builtin, []string{"virtio-console", "kvm_amd", "vfio-pci"})
	want := []string{"irqbypass", "kvm", "ccp", "kvm-amd", "vfio-pci"}
	for i := range want {
		want[i] = "kernel/a/" + want[i] + ".ko.xz"
	}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
	if _, err := moduleFiles(dep, builtin, []string{"zfs"}); err == nil {
		t.Error("an unknown module is no error")
	}
}

// TestNewc reads the archive back by the fixed-width header of the format.
func TestNewc(t *testing.T) {
	var b bytes.Buffer
	w := newcWriter{w: &b}
	w.entry("dev", 0o040755, nil)
	w.entry("init", 0o100755, []byte("hello"))
	w.close()
	var got []string
	for p := b.Bytes(); len(p) > 0; {
		field := func(i int) (v int) {
			if _, err := fmt.Sscanf(string(p[6+8*i:14+8*i]), "%08x", &v); err != nil {
				t.Fatal(err)
			}
			return v
		}
		if string(p[:6]) != "070701" {
			t.Fatalf("magic %q", p[:6])
		}
		mode, size, namesize := field(1), field(6), field(11)
		name := string(p[110 : 110+namesize-1])
		p = p[(110+namesize+3)&^3:]
		got = append(got, fmt.Sprintf("%s %o %q", name, mode, p[:size]))
		p = p[(size+3)&^3:]
	}
	want := []string{`dev 40755 ""`, `init 100755 "hello"`, `TRAILER!!! 0 ""`}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestQEMUArgs(t *testing.T) {
	line := strings.Join(qemuArgs(machineConfig{accel: "tcg", out: "/tmp/a,b", more: 2048}), " ")
	for _, want := range []string{"-accel tcg,thread=multi", "-cpu max,la57=off", "-m 2688,", "size=2048M", "path=/tmp/a,,b/serial.log", "igb,netdev=h1,bus=rp1,mac=52:54:00:00:00:02", "e1000e,netdev=h2"} {
		if !strings.Contains(line, want) {
			t.Errorf("no %q in %s", want, line)
		}
	}
	line = strings.Join(qemuArgs(machineConfig{accel: "tcg", host: 1, shared: "/tmp/a", wire: [2]int{7, 8}}), " ")
	for _, want := range []string{"mac=52:54:00:00:01:02", "local.port=8,remote.type=inet,remote.host=127.0.0.1,remote.port=7", "file=/tmp/a/disk", "share-rw=on"} {
		if !strings.Contains(line, want) {
			t.Errorf("no %q in %s", want, line)
		}
	}
	if line := strings.Join(qemuArgs(machineConfig{accel: "kvm"}), " "); strings.Contains(line, "tcg") || !strings.Contains(line, "-cpu host") {
		t.Error("with KVM:", line)
	}
}

func TestQEMUVersion(t *testing.T) {
	for text, want := range map[string]int{
		"QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright": 10,
		"QEMU emulator version 7.2.19 (Debian 1:7.2+dfsg-7)":             7,
		"": 0,
	} {
		if got := qemuVersion(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}

func TestAddBackports(t *testing.T) {
	const (
		deb822 = `Types: deb
# a note
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /k.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
`
		deb822Out = `Types: deb
# a note
URIs: http://mirror.example/debian
Suites: bookworm-backports
Components: main
Signed-By: /k.gpg
`
		disabled   = "Enabled: no\nTypes: deb\nURIs: http://x.example\nSuites: bookworm\nComponents: main\n"
		oneLine    = "# deb http://old.example bookworm main\ndeb [signed-by=/k.gpg arch=amd64] http://mirror.example/debian bookworm main contrib\n"
		oneLineOut = "deb [signed-by=/k.gpg arch=amd64] http://mirror.example/debian bookworm-backports main contrib\n"
	)
	for _, tt := range []struct {
		name, file, text string
		written, want    string
		fails            bool
	}{
		{"deb822", "sources.list.d/debian.sources", deb822, "baton-backports.sources", deb822Out, false},
		{"one line", "sources.list", oneLine, "baton-backports.list", oneLineOut, false},
		{"has it, deb822", "sources.list.d/b.sources", deb822 + "\n" + deb822Out, "", "", false},
		{"has it, one line", "sources.list", oneLine + oneLineOut, "", "", false},
		{"disabled", "sources.list.d/b.sources", disabled, "", "", true},
		{"other release", "sources.list", strings.ReplaceAll(oneLine, "bookworm", "trixie"), "", "", true},
		{"odd lines", "sources.list", "deb\ndeb [x\ndeb [x] u bookworm\ndeb-src u bookworm main\n", "", "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			etc := t.TempDir()
			if err := errors.Join(os.Mkdir(filepath.Join(etc, "sources.list.d"), 0o755),
				os.WriteFile(filepath.Join(etc, tt.file), []byte(tt.text), 0o644)); err != nil {
				t.Fatal(err)
			}
			if err := addBackports(etc, "bookworm"); (err != nil) != tt.fails {
				t.Fatalf("error: %v", err)
			}
			found, _ := filepath.Glob(filepath.Join(etc, "sources.list.d/baton-*"))
			if tt.written == "" {
				if len(found) != 0 {
					t.Errorf("wrote %v", found)
				}
				return
			}
			got, err := os.ReadFile(filepath.Join(etc, "sources.list.d", tt.written))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, string(got)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

// events renders test events, given as "action package test text".
func events(list ...string) *bytes.Buffer {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for _, l := range list {
		f := append(strings.SplitN(l, " ", 4), "", "", "")
		enc.Encode(testEvent{Action: f[0], Package: f[1], Test: f[2], Output: f[3]})
	}
	return &b
}

func TestSourcePackage(t *testing.T) {
	const targets = `http://mirror/debian/ bookworm-backports main Debian Backports
http://mirror/debian/ bookworm main Debian
http://mirror/debian/ bookworm contrib Debian
https://example.com/apt stable main Example
`
	const keys = "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror/debian/ "
	if got, want := sourceEntries(targets), keys+"bookworm-backports main\n"+keys+"bookworm main\n"; got != want {
		t.Errorf("entries\n%s, want\n%s", got, want)
	}
	if got := releases(targets, "qemu/"); !slices.Equal(got, []string{"qemu/bookworm-backports", "qemu/bookworm"}) {
		t.Errorf("releases %q", got)
	}
	const uris = `Need to get 39.6 MB of source archives.
'http://mirror/q/qemu_10.0.2.dsc' qemu_10.0.2.dsc 11887 SHA256:a9
'http://mirror/q/qemu_10.0.2%2bds.orig.tar.xz' qemu_10.0.2+ds.orig.tar.xz 39449628 SHA256:09
'http://mirror/q/qemu_10.0.2.debian.tar.xz' qemu_10.0.2.debian.tar.xz 139220 SHA256:dd
`
	if uri, hash := originalTar(uris); uri != "http://mirror/q/qemu_10.0.2%2bds.orig.tar.xz" || hash != "SHA256:09" {
		t.Errorf("%s %s", uri, hash)
	}
	if uri, _ := originalTar("nothing"); uri != "" {
		t.Errorf("found %s", uri)
	}
}

func TestReport(t *testing.T) {
	for _, tt := range []struct {
		name   string
		events []string
		ok     bool
		result string
		says   []string
	}{
		{"all well", []string{"start baton/a", "run baton/a T1", "pass baton/a T1", "pass baton/a"}, true,
			"1 tests passed", []string{"ok    a T1"}},
		{"a failure shows its output", []string{"run a T1", "output a T1 wrong", "fail a T1", "fail a"}, false,
			"0 tests passed, 1 FAILED", []string{"FAIL  a T1", "      wrong"}},
		{"a skip shows its reason", []string{"run a T1", "output a T1 === RUN T1\n", "output a T1 x.go:1: no KVM\n", "skip a T1", "run a T2", "pass a T2", "pass a"}, true,
			"1 tests passed, 1 skipped", []string{"skip  a T1: x.go:1: no KVM"}},
		{"only skips are no success", []string{"skip a T1", "pass a"}, false, "0 tests passed, 1 skipped", nil},
		{"a crash counts for the test that ran", []string{"run a T1", "pass a T1", "run a T2", "output a T2 panic: x", "fail a"}, false,
			"1 tests passed, 1 FAILED", []string{"FAIL  a T2", "panic: x"}},
		{"no test failed but the package did", []string{"run a T1", "pass a T1", "output a  exit status 3", "fail a"}, false,
			"1 tests passed, 1 packages BROKEN", []string{"exit status 3"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newReport(true)
			var said strings.Builder
			r.print = func(format string, args ...any) { fmt.Fprintf(&said, format+"\n", args...) }
			in := events(tt.events...)
			want := in.String()
			var copied bytes.Buffer
			if err := r.read(in, &copied); err != nil {
				t.Fatal(err)
			}
			if copied.String() != want {
				t.Error("events were not passed on as they are")
			}
			if r.ok() != tt.ok || r.String() != tt.result {
				t.Errorf("ok %v, %q; want %v, %q", r.ok(), r, tt.ok, tt.result)
			}
			for _, s := range tt.says {
				if !strings.Contains(said.String(), s) {
					t.Errorf("does not say %q:\n%s", s, &said)
				}
			}
		})
	}
}

func TestReportCurrent(t *testing.T) {
	r := newReport(true)
	if got := r.current(); got != "building" {
		t.Errorf("before anything: %q", got)
	}
	past := time.Now().Add(-3 * time.Second)
	r.running[testID{"baton/a", ""}] = past.Add(-time.Minute)
	r.running[testID{"baton/a", "T1"}] = past
	r.running[testID{"baton/a", "T2"}] = past.Add(time.Second)
	if got := r.current(); got != "a T1, 3 s" {
		t.Errorf("%q", got)
	}
}

func TestExitProblem(t *testing.T) {
	for want, x := range map[string]proto.Exit{
		"":                              {Code: 1},
		"killed at its limit":           {Code: 137, Killed: true, Error: "killed"},
		"no such file":                  {Code: 127, Error: "no such file"},
		"exit code 3":                   {Code: 3},
		"left running: sleep 9 (pid 4)": {Running: []string{"sleep 9 (pid 4)"}},
	} {
		got := ""
		if err := exitProblem(x); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%+v: %q, want %q", x, got, want)
		}
	}
}

func TestEnviron(t *testing.T) {
	t.Setenv("TMPDIR", "/somewhere/else")
	t.Setenv("PATH", "/bin")
	env := environ("A=1")
	if slices.Contains(env, "TMPDIR=/somewhere/else") || !slices.Contains(env, "TMPDIR=/run/tmp") || !slices.Contains(env, "A=1") || !slices.Contains(env, "PATH=/bin:"+sbin) {
		t.Error(env)
	}
}

// TestGone is an emulator that ends under a suite: one error says so, with its last words.
func TestGone(t *testing.T) {
	m := &machine{enc: json.NewEncoder(io.Discard), messages: make(chan proto.Message), out: t.TempDir()}
	if err := os.WriteFile(filepath.Join(m.out, "qemu.log"), []byte("qemu: no more memory\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	close(m.messages)
	_, err := m.run(t.Context(), proto.Command{Argv: []string{"disk.test"}}, io.Discard, io.Discard)
	if want := "nested host: QEMU ended by itself while disk.test ran\n    qemu: no more memory"; !errors.Is(err, errGone) || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

func TestKernelPackage(t *testing.T) {
	const show = "Package: linux-image-amd64\nVersion: 6.1.192-2\nDepends: linux-image-6.1.0-56-amd64 (= 6.1.192-2)\nDescription: Depends: x\n"
	for text, want := range map[string]string{show: "linux-image-6.1.0-56-amd64", "Depends: a, b\n": "a", "": ""} {
		if got := kernelPackage(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
