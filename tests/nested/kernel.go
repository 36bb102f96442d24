package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// oldKernel makes sure that Debian 12's own Linux, 6.1, is in the cache, unpacked and not
// installed: a second kernel for guests. Other releases do not have it.
func (e env) oldKernel(ctx context.Context) error {
	dir := filepath.Join(e.cache, "linux-6.1")
	if found, _ := filepath.Glob(filepath.Join(dir, "boot/vmlinuz-6.1.*")); len(found) > 0 {
		return nil
	}
	if osRelease("VERSION_CODENAME") != "bookworm" {
		say("nested host: only Debian 12 has Linux 6.1; the suites that boot it as a guest are skipped")
		return nil
	}
	tmp, err := os.MkdirTemp(e.cache, "linux-6.1-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	p := startProgress("nested host: fetching Linux 6.1 for guests")
	defer p.end()
	run := func(name string, args ...string) (string, error) {
		var out, log bytes.Buffer
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = tmp, &out, &log
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":"+sbin)
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("fetch Linux 6.1: %s %s: %w\n%s", name, strings.Join(args, " "), err, log.String())
		}
		return out.String(), nil
	}
	text, err := run("apt-cache", "show", "--no-all-versions", "linux-image-amd64")
	if err != nil {
		return err
	}
	pkg := kernelPackage(text)
	if !strings.HasPrefix(pkg, "linux-image-6.1.") {
		return fmt.Errorf("fetch Linux 6.1: linux-image-amd64 depends on %q\nit has to be bookworm's own: see apt-cache policy linux-image-amd64", pkg)
	}
	if _, err := run("apt-get", "-q", "download", pkg); err != nil {
		return err
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("fetch Linux 6.1: apt-get has left %q", debs)
	}
	_, err = run("dpkg-deb", "-x", debs[0], ".")
	if err == nil {
		_, err = run("depmod", "-b", tmp, strings.TrimPrefix(pkg, "linux-image-"))
	}
	if err := errors.Join(err, os.Remove(debs[0]), os.Chmod(tmp, 0o755)); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// kernelPackage returns the package that the first entry of apt-cache show depends on.
func kernelPackage(text string) string {
	for line := range strings.Lines(text) {
		if deps, ok := strings.CutPrefix(line, "Depends:"); ok {
			first, _, _ := strings.Cut(strings.TrimSpace(deps), " ")
			return strings.TrimSuffix(first, ",")
		}
	}
	return ""
}
