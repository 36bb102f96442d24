package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// qmpShell is where QEMU's own client of QMP is in the cache: its source package's
// scripts/qmp and the Python modules beside it. No binary package has them.
const qmpShell = "qmp-shell"

// installQMPShell gets QEMU's qmp-shell out of the release's source package.
func (e env) installQMPShell(ctx context.Context) error {
	dir := filepath.Join(e.cache, qmpShell)
	if _, err := os.Stat(filepath.Join(dir, "scripts", "qmp", "qmp-shell")); err == nil {
		return nil
	}
	if osRelease("ID") != "debian" {
		return fmt.Errorf("QEMU's qmp-shell is missing: put scripts/qmp and python/qemu of its source into %s", dir)
	}
	p := startProgress("nested host: QEMU's source package, for qmp-shell")
	defer p.end()
	work, err := os.MkdirTemp(e.cache, "qemu-source-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	command := func(name string, args ...string) (string, error) {
		var out, log bytes.Buffer
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = work, &out, &log
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("get qmp-shell: %s: %w\n%s", name, err, log.String())
		}
		return out.String(), nil
	}
	targets, err := command("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)", "Created-By: Packages")
	if err != nil {
		return err
	}
	// Sources of its own, so that the machine's stay as they are.
	sources := filepath.Join(work, "sources.list")
	apt := func(args ...string) (string, error) {
		return command("apt-get", append([]string{"-q", "-o", "Dir::Etc::sourcelist=" + sources, "-o", "Dir::Etc::sourceparts=" + work,
			"-o", "Dir::State::lists=" + work + "/lists", "-o", "APT::Sandbox::User=root"}, args...)...)
	}
	err = errors.Join(os.WriteFile(sources, []byte(sourceEntries(targets)), 0o644), os.MkdirAll(filepath.Join(work, "lists", "partial"), 0o755))
	if err != nil {
		return err
	}
	if _, err := apt("update"); err != nil {
		return err
	}
	// The newest version that is really there: a mirror may be behind its own index.
	const tar = "qemu.tar.xz"
	var problems error
	for _, version := range append([]string{"qemu"}, releases(targets, "qemu/")...) {
		files, err := apt("source", "--print-uris", version)
		if err == nil {
			uri, hash := originalTar(files)
			_, err = command("/usr/lib/apt/apt-helper", "-o", "APT::Sandbox::User=root", "download-file", uri, tar, hash)
		}
		if err == nil {
			problems = nil
			break
		}
		problems = errors.Join(problems, err)
	}
	if problems != nil {
		return problems
	}
	out := filepath.Join(work, qmpShell)
	if err := os.Mkdir(out, 0o755); err != nil {
		return err
	}
	if _, err := command("tar", "-xf", tar, "-C", out, "--strip-components=1", "--wildcards", "*/python/qemu/qmp", "*/scripts/qmp/qmp-shell"); err != nil {
		return err
	}
	return os.Rename(out, dir)
}

// releases lists the suites in the same lines, each after the prefix.
func releases(targets, prefix string) (list []string) {
	for line := range strings.Lines(targets) {
		if f := strings.Fields(line); len(f) > 3 && f[2] == "main" && f[3] == "Debian" {
			list = append(list, prefix+f[1])
		}
	}
	return list
}

// sourceEntries makes one-line entries of source packages from lines of "URI suite component
// origin", where apt has binary packages of Debian from.
func sourceEntries(targets string) string {
	const keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
	var b strings.Builder
	for line := range strings.Lines(targets) {
		f := strings.Fields(line)
		if len(f) < 4 || f[2] != "main" || f[3] != "Debian" {
			continue
		}
		fmt.Fprintf(&b, "deb-src [signed-by=%s] %s %s main\n", keys, f[0], f[1])
	}
	return b.String()
}

var sourceFile = regexp.MustCompile(`(?m)^'([^']*)' \S+\.orig\.tar\.xz \d+ (\S+:\S+)$`)

// originalTar returns address and hash of the upstream source in what apt-get source
// --print-uris says.
func originalTar(uris string) (uri, hash string) {
	if m := sourceFile.FindStringSubmatch(uris); m != nil {
		return m[1], m[2]
	}
	return "", ""
}
