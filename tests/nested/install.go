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
	"slices"
	"strings"
)

// A need is something that the nested host or its suites call, and the Debian package it
// comes in.
type need struct {
	pkg  string
	have func() bool
}

// sbin is where some of the programs are; a user's PATH may lack it.
const sbin = "/usr/sbin"

func program(name string) func() bool {
	return func() bool {
		_, err := exec.LookPath(name)
		if err != nil {
			_, err = exec.LookPath(filepath.Join(sbin, name))
		}
		return err == nil
	}
}

func goQEMU() bool {
	_, err := os.Stat("/usr/share/gocode/src/github.com/digitalocean/go-qemu/go.mod")
	return err == nil
}

// needs lists what the release with the given codename has to install.
func needs(codename string) []need {
	kernelPkg := "linux-image-amd64"
	if codename == "bookworm" {
		kernelPkg = "linux-image-6.12-amd64" // its linux-image-amd64 is 6.1
	}
	return []need{
		{qemuPkg, haveQEMU},
		{kernelPkg, haveKernel},
		{"iproute2", program("ip")},
		{"iputils-ping", program("ping")},
		{"iperf3", program("iperf3")},
		{"busybox-static", program("busybox")}, // of the guests' images
		{"kmod", program("modprobe")},
		{"pciutils", program("lspci")},
		{"ethtool", program("ethtool")},
		{"acpica-tools", program("iasl")},
		{"inetutils-telnet", program("telnet")},
		{"golang-github-digitalocean-go-qemu-dev", goQEMU}, // the suite of monitors
		{"python3", program("python3")},                    // QEMU's qmp-shell
		{"xz-utils", program("xz")},                        // its source package
	}
}

const (
	qemuPkg   = "qemu-system-x86"
	qemuMajor = 8 // the first with the igb device
)

func haveQEMU() bool {
	out, err := exec.Command(qemu, "--version").Output()
	return err == nil && qemuVersion(string(out)) >= qemuMajor
}

var versionText = regexp.MustCompile(`version (\d+)\.`)

// qemuVersion returns the major version in what qemu --version prints, 0 if there is none.
func qemuVersion(out string) (major int) {
	if m := versionText.FindStringSubmatch(out); m != nil {
		fmt.Sscan(m[1], &major)
	}
	return major
}

func haveKernel() bool {
	k := findKernel("/")
	return k.release != "" && !versionLess(k.release, "6.12")
}

// install makes sure that everything needed is there. It installs what is missing when it
// may and names it when it may not.
func (e env) install(ctx context.Context) error {
	if err := installPackages(ctx); err != nil {
		return err
	}
	return e.installQMPShell(ctx)
}

func installPackages(ctx context.Context) error {
	codename := osRelease("VERSION_CODENAME")
	var missing []string
	for _, n := range needs(codename) {
		if !n.have() {
			missing = append(missing, n.pkg)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	list := strings.Join(missing, " ")
	switch {
	case osRelease("ID") != "debian":
		return fmt.Errorf("this machine lacks what these Debian packages hold: %s\ninstall them (QEMU %d or newer, Linux 6.12 or newer) or use Debian 12 or 13", list, qemuMajor)
	case os.Geteuid() != 0:
		return fmt.Errorf("missing packages: %s\nas root, `go run ./tests/nested install` installs them", list)
	}
	say("nested host: installing %s", list)
	var log bytes.Buffer
	apt := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "-y", "-o", "DPkg::Lock::Timeout=120"}, args...)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		cmd.Stdout, cmd.Stderr = &log, &log
		p := startProgress("nested host: apt-get " + args[0])
		defer p.end()
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, log.String())
		}
		return nil
	}
	args := []string{"install", "--no-install-recommends"}
	if codename == "bookworm" && slices.Contains(missing, qemuPkg) {
		if err := addBackports("/etc/apt", codename); err != nil {
			return err
		}
		// Only QEMU and what it needs come from there; "pkg/suite" would not take its libraries along.
		if err := errors.Join(apt("update"), apt("install", "--no-install-recommends", "-t", codename+"-backports", qemuPkg)); err != nil {
			return err
		}
		missing = slices.DeleteFunc(missing, func(p string) bool { return p == qemuPkg })
	} else if err := apt("update"); err != nil {
		return err
	}
	if len(missing) > 0 {
		if err := apt(append(args, missing...)...); err != nil {
			return err
		}
	}
	for _, n := range needs(codename) {
		if !n.have() {
			return fmt.Errorf("package %s is installed but not what is needed (QEMU %d, Linux 6.12)", n.pkg, qemuMajor)
		}
	}
	return nil
}

// osRelease returns a field of /etc/os-release.
func osRelease(key string) string {
	b, _ := os.ReadFile("/etc/os-release")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+"="); ok {
			return strings.Trim(strings.TrimSpace(v), `"`)
		}
	}
	return ""
}

// addBackports gives apt the backports suite by copying the machine's own entry for the
// release with another suite name: same mirror, same key. It does nothing when the suite
// is there.
func addBackports(etc, codename string) error {
	var names []string
	for _, pattern := range []string{"sources.list", "sources.list.d/*.list", "sources.list.d/*.sources"} {
		found, _ := filepath.Glob(filepath.Join(etc, pattern))
		names = append(names, found...)
	}
	var entry, ext string
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		derive, e := deriveOneLine, ".list"
		if strings.HasSuffix(name, ".sources") {
			derive, e = deriveDeb822, ".sources"
		}
		got, have := derive(string(b), codename)
		if have {
			return nil
		}
		if entry == "" && got != "" {
			entry, ext = got, e
		}
	}
	if entry == "" {
		return fmt.Errorf("no apt source for %s in %s\nadd %s-backports to apt's sources", codename, etc, codename)
	}
	return os.WriteFile(filepath.Join(etc, "sources.list.d", "baton-backports"+ext), []byte(entry), 0o644)
}

// deriveOneLine looks for the release in a file of one-line entries,
//
//	deb [options] URI SUITE COMPONENT...
//
// and returns its entry with the backports suite, or that the suite is there already.
func deriveOneLine(text, codename string) (entry string, have bool) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 4 || f[0] != "deb" {
			continue
		}
		i := 1
		if strings.HasPrefix(f[i], "[") {
			for i < len(f) && !strings.HasSuffix(f[i], "]") {
				i++
			}
			i++
		}
		if i+2 >= len(f) { // URI, suite and at least one component
			continue
		}
		switch f[i+1] {
		case codename + "-backports":
			return "", true
		case codename:
			if entry == "" {
				f[i+1] += "-backports"
				entry = strings.Join(f, " ") + "\n"
			}
		}
	}
	return entry, false
}

// deriveDeb822 does the same for the deb822 format: stanzas of "Key: value" lines.
func deriveDeb822(text, codename string) (entry string, have bool) {
	for stanza := range strings.SplitSeq(text, "\n\n") {
		var out []string
		matches, disabled := false, false
		for line := range strings.Lines(stanza) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			switch strings.ToLower(key) {
			case "enabled":
				disabled = strings.TrimSpace(value) == "no"
			case "suites":
				suites := strings.Fields(value)
				if slices.Contains(suites, codename+"-backports") {
					have = true
				}
				matches = slices.Contains(suites, codename)
				line = "Suites: " + codename + "-backports\n"
			}
			out = append(out, strings.TrimRight(line, "\n"))
		}
		if have && !disabled {
			return "", true
		}
		have = false
		if matches && !disabled && entry == "" {
			entry = strings.TrimSpace(strings.Join(out, "\n")) + "\n"
		}
	}
	return entry, false
}
