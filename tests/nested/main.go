// Command nested runs programs and test suites in the nested host: a machine, emulated by
// QEMU where KVM cannot carry it, with a real KVM, vhost-net, VFIO, an IOMMU and two
// SR-IOV NICs, for machines that have none of these.
//
//	L0  this machine: compiles, starts QEMU, shows results
//	└─ L1  the nested host: stock Debian kernel, L0's files under an overlay (nested/l1)
//	   └─ L2  guests of baton, or of QEMU for comparison
//
// One process is one nested host: when it ends, by whatever cause, L1 ends with it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/term"

	"baton/tests/nested/proto"
)

const usage = `usage: go run ./tests/nested COMMAND

  shell [CMD ARG...]     a shell, or another program that wants a terminal, in the nested host
  exec [--] CMD ARG...   one command in it, with its output and its exit code
  run [flags] PKG...     compile test packages here, run them there
  local [flags] PKG...   run test packages here, under the race detector, with the same report
  install                install what this machine lacks (root), or name it; fetch Linux 6.1 for guests

Flags of run and local:
`

func init() {
	// QEMU dies with the thread that started it (machine.boot), so that must be the main one.
	runtime.LockOSThread()
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	code, err := command(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "nested:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func command(ctx context.Context, args []string) (int, error) {
	var o runOptions
	fs := flag.NewFlagSet("nested", flag.ContinueOnError)
	o.flags(fs)
	fs.Usage = func() { fmt.Fprint(fs.Output(), usage); fs.PrintDefaults() }
	if len(args) == 0 {
		fs.Usage()
		return 2, nil
	}
	name, args := args[0], args[1:]
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0, nil
	case err != nil:
		return 2, nil // flag has said it
	}
	e, err := newEnv()
	if err != nil {
		return 1, err
	}
	switch name {
	case "shell":
		return e.shell(ctx, fs.Args())
	case "exec":
		return e.exec(ctx, fs.Args())
	case "run":
		return e.runSuites(ctx, o, fs.Args())
	case "local":
		return e.runLocal(ctx, o, fs.Args())
	case "install":
		return 0, errors.Join(e.install(ctx), e.oldKernel(ctx))
	}
	fs.Usage()
	return 2, fmt.Errorf("unknown command %q", name)
}

// An env is where things are on L0.
type env struct {
	repo  string // root of the main module
	cache string // the one folder for what can be made again
}

func newEnv() (env, error) {
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	repo := filepath.Dir(strings.TrimSpace(string(mod)))
	if err != nil || repo == "." || repo == "/dev" {
		return env{}, fmt.Errorf("no module: run this inside the repository")
	}
	e := env{repo, filepath.Join(repo, ".cache")}
	return e, os.MkdirAll(e.cache, 0o755)
}

// runDir returns the folder for what one run leaves: out, or a new one if that is "".
func (e env) runDir(out string) (string, error) {
	if out == "" {
		return os.MkdirTemp(e.cache, "run-")
	}
	out, err := filepath.Abs(out)
	if err != nil {
		return "", err
	}
	return out, os.MkdirAll(out, 0o755)
}

// start brings up a nested host, or two that share a wire and a disk, installing what it takes, with
// the logs in out. The caller closes it and removes its folder m.out.
func (e env) start(ctx context.Context, tty bool, out string, hosts int) (*machine, error) {
	if err := e.install(ctx); err != nil {
		return nil, err
	}
	c := machineConfig{qemu: qemu, kernel: findKernel("/"), accel: chooseAccel(), tty: tty, more: moreRAM(hosts)}
	program := filepath.Join(e.cache, "l1")
	if err := e.build(ctx, "build", "-o", program, "./tests/nested/l1"); err != nil {
		return nil, err
	}
	var err error
	if c.accel == "tcg" {
		if c.qemu, err = e.emulator(); err != nil {
			return nil, err
		}
	}
	modules := slices.Concat([]string{kvmModule(c.accel)}, baseModules)
	if c.initramfs, err = buildInitramfs(e.cache, c.kernel, modules, program); err != nil {
		return nil, err
	}
	if c.out, err = e.runDir(out); err != nil {
		return nil, err
	}
	if hosts > 1 {
		c.shared = c.out
		var free []net.PacketConn
		for i := range c.wire {
			p, err := net.ListenPacket("udp", "127.0.0.1:0")
			if err != nil {
				return nil, err
			}
			c.wire[i] = p.LocalAddr().(*net.UDPAddr).Port
			free = append(free, p)
		}
		for _, p := range free {
			p.Close()
		}
		if err := os.WriteFile(filepath.Join(c.shared, "disk"), make([]byte, sharedDisk), 0o600); err != nil {
			return nil, err
		}
	}
	m, err := boot(ctx, c)
	if err == nil && hosts > 1 {
		c.host, c.out = 1, filepath.Join(c.shared, "host-1")
		if err = os.MkdirAll(c.out, 0o755); err == nil {
			m.other, err = boot(ctx, c)
		}
		if err != nil {
			m.close()
		}
		c.out = c.shared
	}
	switch {
	case err != nil && ctx.Err() != nil:
		os.RemoveAll(c.out)
	case err != nil:
		err = fmt.Errorf("%w\nlogs: %s", err, c.out)
	}
	return m, err
}

// sharedDisk is the size of the disk that two nested hosts share, in bytes.
const sharedDisk = 64 << 20

// build runs the go command for what L1 executes: static, since L1's C library is L0's but
// an initramfs has none.
func (e env) build(ctx context.Context, args ...string) error {
	p := startProgress("compiling")
	defer p.end()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = e.repo
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go %s: %w", args[0], err)
	}
	return nil
}

// environ is what programs in L1 see: our environment, with L1's own temporary folder and
// the system's programs in reach.
func environ(extra ...string) []string {
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "TMPDIR=") || strings.HasPrefix(kv, "PATH=")
	})
	return slices.Concat(env, []string{"PATH=" + os.Getenv("PATH") + ":" + sbin, "TMPDIR=/run/tmp", "BATON_TEST=nested"}, extra)
}

func (e env) shell(ctx context.Context, argv []string) (int, error) {
	if len(argv) == 0 {
		argv = []string{"bash"}
	}
	fd := int(os.Stdin.Fd())
	if !term.IsTerminal(fd) {
		return 1, errors.New("shell: no terminal; use exec")
	}
	m, err := e.start(ctx, true, "", 1)
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(m.out)
	// QEMU sets the terminal to raw mode and has no chance to set it back when it is killed.
	if state, err := term.GetState(fd); err == nil {
		defer term.Restore(fd, state)
	}
	defer m.close()
	cols, rows, _ := term.GetSize(fd)
	say("nested host: the repository is here, as a copy: what you write stays in this shell\r")
	x, err := m.run(ctx, proto.Command{
		Argv: argv, Dir: e.repo, Env: environ(), TTY: true, Rows: uint16(rows), Cols: uint16(cols),
	}, os.Stdout, os.Stderr)
	return x.Code, err
}

func (e env) exec(ctx context.Context, argv []string) (int, error) {
	if len(argv) == 0 {
		return 2, errors.New("exec: no command")
	}
	dir, err := os.Getwd()
	if err != nil {
		return 1, err
	}
	m, err := e.start(ctx, false, "", 1)
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(m.out)
	defer m.close()
	x, err := m.run(ctx, proto.Command{Argv: argv, Dir: dir, Env: environ()}, os.Stdout, os.Stderr)
	if x.Error != "" {
		say("nested host: %s: %s", argv[0], x.Error)
	}
	return x.Code, err
}
