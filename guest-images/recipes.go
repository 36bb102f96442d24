package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// busyboxPath is where Debian's busybox-static puts it.
const busyboxPath = "/bin/busybox"

// testFiles: the agent as /init, the modules, and busybox for a test's convenience.
func testFiles(o options) ([]file, error) {
	init, err := goBuild(o, "./cmds/agent")
	if err != nil {
		return nil, err
	}
	mods, err := moduleFiles(o)
	if err != nil {
		return nil, err
	}
	box, err := busyboxFiles(busyboxPath)
	if err != nil {
		return nil, err
	}
	return slices.Concat([]file{{name: "/init", data: init, mode: 0o755}}, mods, box), nil
}

func demoFiles(o options) ([]file, error) { return nil, errors.New("not here yet") }

func moduleFiles(o options) ([]file, error) {
	m, err := openModules(filepath.Join("/lib/modules", o.kernel))
	if err != nil {
		return nil, err
	}
	return m.files(slices.Concat(bootModules, o.modules), demandModules)
}

// goBuild compiles a package of this module into a static program without traces of where
// it was built.
func goBuild(o options, pkg string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "guest-images-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "out")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", out, pkg)
	cmd.Dir = o.src
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1", "GOFLAGS=")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w\n%s", pkg, err, msg)
	}
	return os.ReadFile(out)
}

// busyboxFiles returns busybox with a link for each of its applets, or nothing where the
// build host has none that is static.
func busyboxFiles(path string) ([]file, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(os.Stderr, "guest-images: no %s, so the image has no shell\ninstall busybox-static\n", path)
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer f.Close()
	if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return nil, fmt.Errorf("%s needs shared libraries\ninstall busybox-static", path)
	}
	applets, err := output(path, "--list")
	if err != nil {
		return nil, err
	}
	files := []file{{name: "/bin/busybox", data: b, mode: 0o755}}
	for _, a := range strings.Fields(applets) {
		if a != "busybox" {
			files = append(files, file{name: "/bin/" + a, link: "busybox"})
		}
	}
	return files, nil
}

func modTime(path string) time.Time {
	fi, err := os.Stat(path)
	if err != nil {
		return time.Time{}
	}
	return fi.ModTime()
}
