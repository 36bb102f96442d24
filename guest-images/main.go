// Command guest-images builds the initramfs images of tests and demo:
//
//	go run . [-o DIR] [-root DIR] [-kernel VERSION] [-modules A,B] test|demo...
//
//	cmds/agent, ../tests/nettool ─ go build ─> /init ────────┐
//	u-root commands ─ busybox-style ─> /bin (demo) ──────────┤
//	busybox-static of the build host ─> /bin/busybox (test) ─┼─> DIR/test.cpio, DIR/demo.cpio
//	/lib/modules/VERSION ─ modules.dep ─> /lib/modules ──────┘
//	/boot/vmlinuz-VERSION <── symbolic link ────────────────────> DIR/vmlinuz
//
// An image is built again only when one of its inputs has changed. The same inputs make
// the same bytes. Images are not compressed: what the guest saves on reading it loses,
// several times, on unpacking.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guest-images:", err)
		os.Exit(1)
	}
}

// options say what to build, from what.
type options struct {
	out, kernel string
	root        string   // directory that has the kernel's /boot and /lib/modules
	modules     []string // beyond the usual ones, loaded at boot
	src         string   // directory of this module
}

var recipes = map[string]func(options) ([]file, error){"test": testFiles, "demo": demoFiles}

func run(args []string) error {
	var o options
	var mods string
	fl := flag.NewFlagSet("guest-images", flag.ContinueOnError)
	fl.StringVar(&o.out, "o", "", "write to this `directory` (default .cache/images of the repository)")
	fl.StringVar(&o.root, "root", "/", "look for kernels in this `directory`'s boot and lib/modules, as an unpacked package has them")
	fl.StringVar(&o.kernel, "kernel", "", "use the modules of this kernel `version` (default the newest)")
	fl.StringVar(&mods, "modules", "", "load these modules too, a `list` with commas")
	if err := fl.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if fl.NArg() == 0 {
		return errors.New("which image? give test, demo or both")
	}
	o.modules = strings.FieldsFunc(mods, func(r rune) bool { return r == ',' })
	gomod, err := output(o, "go", "env", "GOMOD")
	if err != nil {
		return err
	}
	if o.src = filepath.Dir(strings.TrimSpace(gomod)); filepath.Base(o.src) != "guest-images" {
		return errors.New("run this in the directory guest-images")
	}
	if o.out == "" {
		o.out = filepath.Join(o.src, "../.cache/images")
	}
	if o.kernel == "" {
		if o.kernel, err = newestKernel(filepath.Join(o.root, "boot")); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	for _, name := range fl.Args() {
		if recipes[name] == nil {
			return fmt.Errorf("image %s: unknown\ngive test or demo", name)
		}
		if err := build(name, o); err != nil {
			return fmt.Errorf("image %s: %w", name, err)
		}
	}
	link := filepath.Join(o.out, "vmlinuz")
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	target, err := filepath.Abs(filepath.Join(o.root, "boot/vmlinuz-"+o.kernel))
	if err != nil {
		return err
	}
	return os.Symlink(target, link)
}

// newestKernel returns the highest version among the kernels in dir. Times say nothing
// here: a package's files have that of its build.
func newestKernel(dir string) (string, error) {
	kernels, _ := filepath.Glob(filepath.Join(dir, "vmlinuz-*"))
	if len(kernels) == 0 {
		return "", fmt.Errorf("no kernel in %s\ninstall linux-image-amd64, or name one by -kernel", dir)
	}
	newest := slices.MaxFunc(kernels, func(a, b string) int { return slices.Compare(numbers(a), numbers(b)) })
	return strings.TrimPrefix(filepath.Base(newest), "vmlinuz-"), nil
}

// numbers returns the runs of digits in the base of a path.
func numbers(path string) (n []int) {
	isNoDigit := func(r rune) bool { return r < '0' || r > '9' }
	for _, digits := range strings.FieldsFunc(filepath.Base(path), isNoDigit) {
		v, _ := strconv.Atoi(digits) // a number beyond int is its greatest value
		n = append(n, v)
	}
	return n
}

// build makes DIR/name.cpio unless DIR/name.key says that its inputs are the same.
func build(name string, o options) error {
	img, keyFile := filepath.Join(o.out, name+".cpio"), filepath.Join(o.out, name+".key")
	key, err := inputKey(name, o)
	if err != nil {
		return err
	}
	old, _ := os.ReadFile(keyFile)
	if have, err := os.ReadFile(img); err == nil && string(old) == key+" "+digest(have)+"\n" {
		fmt.Printf("%s: up to date\n", img)
		return nil
	}
	files, err := recipes[name](o)
	if err != nil {
		return err
	}
	b, err := archive(files)
	if err != nil {
		return err
	}
	if err := errors.Join(writeFile(img, b), writeFile(keyFile, []byte(key+" "+digest(b)+"\n"))); err != nil {
		return err
	}
	fmt.Printf("%s: %d files, %.1f MiB\n", img, len(files), float64(len(b))/(1<<20))
	return nil
}

// inputKey is a hash over all that the image is made from: the source, the Go release, the kernel's modules, busybox and the options.
func inputKey(name string, o options) (string, error) {
	h := sha256.New()
	goVersion, err := output(o, "go", "version")
	if err != nil {
		return "", err
	}
	fmt.Fprintf(h, "%s %s %s %q\n", name, goVersion, o.kernel, o.modules)
	inputs := []string{busyboxPath, filepath.Join(o.root, "lib/modules", o.kernel, "modules.dep"), filepath.Join(o.root, "boot/vmlinuz-"+o.kernel)}
	other := map[string]string{"test": "demoinit", "demo": "agent"}[name] // the other image's init
	for _, dir := range []string{o.src, filepath.Join(o.src, "../tests/nettool")} {
		err = errors.Join(err, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && d.Name() == other {
				return fs.SkipDir
			}
			if err == nil && d.Type().IsRegular() && !strings.HasSuffix(path, "_test.go") {
				inputs = append(inputs, path)
			}
			return err
		}))
	}
	for _, path := range inputs {
		b, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		fmt.Fprintf(h, "%s %s\n", strings.TrimPrefix(path, o.src), digest(b))
	}
	return hex.EncodeToString(h.Sum(nil)), err
}

func digest(b []byte) string {
	d := sha256.Sum256(b)
	return hex.EncodeToString(d[:])
}

// output runs a program in this module's directory and returns its standard output.
// Whatever Go builds is static and for any x86-64.
func output(o options, argv ...string) (string, error) {
	var out, errOut bytes.Buffer
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = o.src, &out, &errOut
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1", "GOFLAGS=")
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.String(), nil
}
