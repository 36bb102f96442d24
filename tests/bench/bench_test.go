package bench

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"baton/tests/harness"
)

// runs is how often each VMM is measured.
const runs = 5

var results report

func TestMain(m *testing.M) {
	results.Where = "in the nested host"
	if !harness.Nested() {
		results.Where = "on this machine"
	}
	if out, err := exec.Command(harness.QEMU, "--version").Output(); err == nil {
		version, _, _ := strings.Cut(string(out), "\n")
		results.Where += ", beside " + version
	}
	harness.Main(save{m})
}

// save is a testing.M that writes the results when the tests are through.
type save struct{ *testing.M }

func (s save) Run() int {
	code := s.M.Run()
	dir := os.Getenv(harness.EnvArtifacts)
	if dir == "" || len(results.figures) == 0 {
		return code
	}
	for name, write := range map[string]func(io.Writer) error{
		"table.txt": results.writeTable, "results.json": results.writeJSON,
	} {
		f, err := os.Create(filepath.Join(dir, name))
		if err == nil {
			err = errors.Join(write(f), f.Close())
		}
		if err != nil {
			fmt.Println("results:", err)
			code = max(code, 1)
		}
	}
	return code
}

// A contender is a VMM and the options that it needs to be the same machine as the other.
type contender struct {
	name, vmm string
	args      []string
	values    func(*figure) *[]float64
}

// contenders returns baton and QEMU, the latter with that CPU.
func contenders(t testing.TB, cpu string) []contender {
	qemu := []string{"-machine", "q35", "-enable-kvm", "-cpu", cpu, "-nodefaults", "-display", "none"}
	return []contender{
		{"baton", harness.Baton(t), nil, func(f *figure) *[]float64 { return &f.Baton }},
		{"QEMU", harness.QEMU, qemu, func(f *figure) *[]float64 { return &f.Peer }},
	}
}

// record adds one value, and tells who watches.
func record(t testing.TB, c contender, name, unit string, goal target, value float64) {
	t.Helper()
	v := c.values(results.figure(name, unit, goal))
	*v = append(*v, value)
	t.Attr(c.name, fmt.Sprintf("%s: %s %s (%d.)", name, number(value), unit, len(*v)))
}
