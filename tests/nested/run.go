package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"baton/tests/nested/proto"
)

// runOptions are the flags of run and local.
type runOptions struct {
	suite, run, out, json, summary string
	limit                          time.Duration
	hosts                          int
}

func (o *runOptions) flags(fs *flag.FlagSet) {
	fs.StringVar(&o.suite, "suite", "", "only packages whose path matches `REGEX`")
	fs.StringVar(&o.run, "run", "", "only tests whose name matches `REGEX`, as go test's flag")
	fs.DurationVar(&o.limit, "limit", 10*time.Minute, "time `LIMIT` for one package")
	fs.IntVar(&o.hosts, "hosts", 1, "start `N` nested hosts, 1 or 2: of 2, which share a wire and a disk, the second one runs the same, with BATON_HOST=1 (run only)")
	fs.StringVar(&o.out, "out", "", "keep logs in `DIR`, also when all is well (run only)")
	fs.StringVar(&o.json, "json", "-", "write the events of go test -json to `FILE`; - is stdout")
	fs.StringVar(&o.summary, "summary", "", "write the result in half a line to `FILE`")
}

// A suite is one package of tests.
type suite struct{ pkg, dir string }

func (s suite) name() string { return path.Base(s.pkg) }

// suites lists the packages, among those that the patterns name, that have tests.
func (e env) suites(ctx context.Context, o runOptions, patterns []string) ([]suite, error) {
	only, err := regexp.Compile(o.suite)
	if err != nil {
		return nil, fmt.Errorf("-suite: %w", err)
	}
	args := append([]string{"list", "-f", "{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}\t{{.Dir}}{{end}}"}, patterns...)
	list, err := exec.CommandContext(ctx, "go", args...).Output()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return nil, fmt.Errorf("go list: %s", strings.TrimSpace(string(ee.Stderr)))
	} else if err != nil {
		return nil, err
	}
	var all []suite
	for line := range strings.Lines(string(list)) {
		pkg, dir, _ := strings.Cut(strings.TrimSpace(line), "\t")
		if pkg != "" && only.MatchString(pkg) {
			all = append(all, suite{pkg, dir})
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no package with tests among %q", patterns)
	}
	return all, nil
}

// runSuites runs the packages in a nested host, or here if BATON_TEST says that this
// machine's KVM and NICs can do it.
func (e env) runSuites(ctx context.Context, o runOptions, patterns []string) (int, error) {
	suites, err := e.suites(ctx, o, patterns)
	if err != nil {
		return 1, err
	}
	baton, err := e.baton(ctx)
	if err != nil {
		return 1, err
	}
	if os.Getenv("BATON_TEST") == "host" {
		if goQEMU() {
			if err := e.buildClients(ctx); err != nil {
				return 1, err
			}
		}
		return e.runOnHost(ctx, o, suites, baton)
	}
	if err := errors.Join(e.install(ctx), e.buildClients(ctx)); err != nil {
		return 1, err
	}
	bin := filepath.Join(e.cache, "suites")
	if err := os.RemoveAll(bin); err != nil {
		return 1, err
	}
	if err := e.build(ctx, append([]string{"test", "-c", "-o", bin + "/"}, paths(suites)...)...); err != nil {
		return 1, err
	}
	events, err := o.open()
	if err != nil {
		return 1, err
	}
	defer events.Close()
	m, err := e.start(ctx, false, o.out, o.hosts)
	if err != nil {
		return 1, err
	}
	defer m.close()

	r := newReport(true)
	stop := make(chan struct{})
	defer close(stop)
	go r.watch(stop)
	var problems []error
	for _, s := range suites {
		say("suite %s", short(s.pkg))
		if err := e.runSuite(ctx, m, s, o, baton, bin, r, events); err != nil {
			problems = append(problems, fmt.Errorf("suite %s: %w", short(s.pkg), err))
			if ctx.Err() != nil || errors.Is(err, errGone) { // there is no host for the other suites
				break
			}
		}
	}
	return e.conclude(ctx, m, o, r, problems)
}

// conclude keeps or removes what a run left and says the result.
func (e env) conclude(ctx context.Context, m *machine, o runOptions, r *report, problems []error) (int, error) {
	if ctx.Err() != nil {
		os.RemoveAll(m.out)
		return 130, errors.New("interrupted")
	}
	err := errors.Join(problems...)
	ok := r.ok() && err == nil
	if ok && o.out == "" {
		os.RemoveAll(m.out)
	} else {
		say("logs and serial output: %s", m.out)
	}
	err = errors.Join(err, o.conclude(r, "in the nested host"))
	if !ok || err != nil {
		return 1, err
	}
	return 0, nil
}

// conclude says the result, in a file too if one is asked for.
func (o runOptions) conclude(r *report, where string) error {
	line := fmt.Sprintf("%s %s", r, where)
	say("%s", line)
	if o.summary == "" {
		return nil
	}
	return os.WriteFile(o.summary, []byte(line+"\n"), 0o644)
}

// open opens the file that the events go to.
func (o runOptions) open() (*os.File, error) {
	if o.json == "-" {
		return os.Stdout, nil
	}
	return os.Create(o.json)
}

// baton returns the binary under test, built here unless BATON_BIN names one.
func (e env) baton(ctx context.Context) (string, error) {
	if bin := os.Getenv("BATON_BIN"); bin != "" {
		return filepath.Abs(bin)
	}
	bin := filepath.Join(e.cache, "baton")
	return bin, e.build(ctx, "build", "-o", bin, ".")
}

// buildClients builds the clients that suites bring along, as .cache/bin/NAME.
func (e env) buildClients(ctx context.Context) error {
	return e.build(ctx, "build", "-C", filepath.Join(e.repo, "tests", "suites", "control", "goqemu"), "-o", filepath.Join(e.cache, "bin", "goqemu"), ".")
}

func paths(suites []suite) (p []string) {
	for _, s := range suites {
		p = append(p, s.pkg)
	}
	return p
}

// runSuite runs one package's test binary in L1, in its own folder as go test does, and
// turns what it prints into events here, where test2json costs nothing.
func (e env) runSuite(ctx context.Context, m *machine, s suite, o runOptions, baton, bin string, r *report, events io.Writer) error {
	artifacts := filepath.Join(m.out, s.name())
	if err := os.MkdirAll(artifacts, 0o755); err != nil {
		return err
	}
	convert := exec.Command("go", "tool", "test2json", "-t", "-p", s.pkg)
	convert.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt is ours to handle
	in, err := convert.StdinPipe()
	if err != nil {
		return err
	}
	out, err := convert.StdoutPipe()
	if err != nil {
		return err
	}
	convert.Stderr = os.Stderr
	if err := convert.Start(); err != nil {
		return err
	}
	read := make(chan error, 1)
	go func() { read <- r.read(out, events) }()

	argv := []string{
		filepath.Join(bin, s.name()+".test"), "-test.v=test2json", "-test.paniconexit0", "-test.timeout=" + o.limit.String(),
	}
	if o.run != "" {
		argv = append(argv, "-test.run="+o.run)
	}
	// The test binary knows the limit and says which test hangs; L1, and after that we, step
	// in if it cannot.
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit+time.Minute, fmt.Errorf("no end in %v", o.limit+time.Minute))
	defer cancel()
	c := proto.Command{
		Argv: argv, Dir: s.dir, LimitSeconds: (o.limit + 20*time.Second).Seconds(),
		Env: environ("BATON_BIN="+baton, "BATON_ARTIFACTS="+path.Join(proto.OutDir, s.name()), "BATON_REPO="+e.repo),
	}
	other := func() error { return nil }
	if m.other != nil {
		other = m.other.runBeside(ctx, c, filepath.Join(artifacts, "host-1.log"))
		c.Env = append(c.Env, "BATON_HOST=0")
	}
	x, err := m.run(ctx, c, in, in)
	err = errors.Join(err, other())
	if err != nil || x.Code != 0 || x.Killed {
		// As go test adds: test2json does not know the exit code. \x16 marks a line of the framework's.
		fmt.Fprintf(in, "\n\x16FAIL\t%s\n", s.pkg)
	}
	in.Close()
	rerr := <-read
	return errors.Join(err, rerr, convert.Wait(), exitProblem(x))
}

// runBeside runs in the second host what the first one does. The function that it returns waits for
// the end, which is near when the first one's has come.
func (m *machine) runBeside(ctx context.Context, c proto.Command, log string) (wait func() error) {
	ctx, stop := context.WithCancelCause(ctx)
	done := make(chan error, 1)
	c.Env = append(slices.Clone(c.Env), "BATON_HOST=1")
	go func() {
		out, err := os.Create(log)
		if err != nil {
			done <- err
			return
		}
		defer out.Close()
		x, err := m.run(ctx, c, out, out)
		if err == nil && x.Code != 0 {
			err = fmt.Errorf("exit code %d", x.Code)
		}
		done <- err
	}()
	return func() error {
		late := time.AfterFunc(time.Minute, func() { stop(errors.New("no end after the first one's")) })
		defer late.Stop()
		defer stop(nil)
		if err := <-done; err != nil {
			return fmt.Errorf("the second host: %w\nlog: %s", err, log)
		}
		return nil
	}
}

// exitProblem is what is wrong with how a test binary ended that its events do not say.
func exitProblem(x proto.Exit) error {
	var errs []error
	switch {
	case x.Killed:
		errs = append(errs, errors.New("killed at its limit"))
	case x.Error != "":
		errs = append(errs, errors.New(x.Error))
	case x.Code > 2: // 1: a test failed, 2: it panicked; both are in the events
		errs = append(errs, fmt.Errorf("exit code %d", x.Code))
	}
	if len(x.Running) > 0 {
		errs = append(errs, fmt.Errorf("left running: %s", strings.Join(x.Running, ", ")))
	}
	return errors.Join(errs...)
}

// runOnHost runs the packages here, one at a time: they share the host's network.
func (e env) runOnHost(ctx context.Context, o runOptions, suites []suite, baton string) (code int, err error) {
	out, err := e.runDir(o.out)
	if err != nil {
		return 1, err
	}
	defer func() {
		if code == 0 && o.out == "" {
			os.RemoveAll(out)
		} else {
			say("logs: %s", out)
		}
	}()
	environ := []string{"BATON_BIN=" + baton, "BATON_REPO=" + e.repo, "BATON_ARTIFACTS=" + out}
	return e.goTest(ctx, o, "on this host", environ, append([]string{"-count=1", "-p=1"}, paths(suites)...))
}

// runLocal runs packages here, under the race detector.
func (e env) runLocal(ctx context.Context, o runOptions, patterns []string) (int, error) {
	suites, err := e.suites(ctx, o, patterns)
	if err != nil {
		return 1, err
	}
	return e.goTest(ctx, o, "here under the race detector", []string{"CGO_ENABLED=1"}, append([]string{"-race"}, paths(suites)...))
}

func (e env) goTest(ctx context.Context, o runOptions, where string, environ, args []string) (int, error) {
	events, err := o.open()
	if err != nil {
		return 1, err
	}
	defer events.Close()
	args = append([]string{"test", "-json", "-timeout=" + o.limit.String(), "-run=" + o.run}, args...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = append(os.Environ(), environ...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 1, err
	}
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	r := newReport(false)
	stop := make(chan struct{})
	defer close(stop)
	go r.watch(stop)
	err = r.read(out, events)
	if werr := cmd.Wait(); werr != nil && r.ok() {
		err = errors.Join(err, fmt.Errorf("go test: %w", werr))
	}
	if ctx.Err() != nil {
		return 130, errors.New("interrupted")
	}
	err = errors.Join(err, o.conclude(r, where))
	if err != nil || !r.ok() {
		return 1, err
	}
	return 0, nil
}
