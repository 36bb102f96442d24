package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

// demoFiles: an init that shows the machine and leaves the user at a shell, and the u-root
// commands of package tools as one program.
func demoFiles(o options) ([]file, error) {
	init, err := goBuild(o, "./cmds/demoinit")
	if err != nil {
		return nil, err
	}
	mods, err := moduleFiles(o)
	if err != nil {
		return nil, err
	}
	box, err := urootFiles(o)
	if err != nil {
		return nil, err
	}
	own := []file{{name: "/init", data: init, mode: 0o755}, {name: "/bin/lspci", link: "../init"}}
	return slices.Concat(own, mods, box), nil
}

const urootCommands = "github.com/u-root/u-root/cmds/"

// urootFiles builds the commands that package tools imports, and their links.
func urootFiles(o options) ([]file, error) {
	imports, err := output(o, "go", "list", "-e", "-tags=tools", `-f={{join .Imports "\n"}}`, "./tools")
	if err != nil {
		return nil, err
	}
	cmds := slices.DeleteFunc(strings.Fields(imports), func(p string) bool { return !strings.HasPrefix(p, urootCommands) })
	dir, err := os.MkdirTemp("", "guest-images-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bb := filepath.Join(dir, "bb")
	// goshsmall: the shell's own line editor waits for a terminal's answers, which a script
	// on the serial port does not give.
	makebb := []string{"go", "run", "github.com/u-root/gobusybox/src/cmd/makebb", "-go-build-tags", "goshsmall", "-gen-dir", filepath.Join(dir, "src"), "-o", bb}
	if _, err := output(o, append(makebb, cmds...)...); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(bb)
	files := []file{{name: "/bin/bb", data: b, mode: 0o755}, {name: "/bin/sh", link: "gosh"}}
	for _, c := range cmds {
		files = append(files, file{name: "/bin/" + filepath.Base(c), link: "bb"})
	}
	return files, err
}

func moduleFiles(o options) ([]file, error) {
	m, err := openModules(filepath.Join(o.root, "lib/modules", o.kernel))
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
	if _, err := output(o, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", out, pkg); err != nil {
		return nil, err
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
	applets, err := output(options{}, path, "--list")
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
