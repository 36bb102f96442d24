package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// QEMU is the program to compare with.
const QEMU = "qemu-system-x86_64"

// A GuestConfig says how to start a guest. Args are everything but the plumbing that the
// harness adds: the serial port on stdio unless they say -serial, the agent's port, and
// the event log.
type GuestConfig struct {
	Name    string // of its files among the artifacts; "guest" if empty
	VMM     string // Baton(t) if empty
	Args    []string
	NoAgent bool
	Host    *Host // whose namespace the VMM runs in; nil: the host under test
	// TripleFault says that the test has the guest triple-fault.
	TripleFault bool
}

// A Guest is a running VMM process.
type Guest struct {
	Serial *Log      // what the guest writes to its serial port
	Stderr *Log      // what the VMM says
	Events *EventLog // empty if the VMM is not baton

	t testing.TB
	*process
}

// process is what all views of a guest share.
type process struct {
	name    string
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	started time.Time
	ended   chan struct{} // closed when the process is gone and its output is read
	code    int

	agentOnce sync.Once
	listener  *net.UnixListener
	agent     *agent
	agentErr  error
}

// In returns the same guest for a subtest, which its methods then end in the case of failure.
func (g *Guest) In(t testing.TB) *Guest {
	v := *g
	v.t = t
	return &v
}

// Start starts a guest. When the test ends the process is killed, and if it failed the
// test's log has the end of what guest and VMM said.
func Start(t testing.TB, c GuestConfig) *Guest {
	t.Helper()
	if c.Name == "" {
		c.Name = "guest"
	}
	if c.VMM == "" {
		c.VMM = Baton(t)
	}
	isQEMU := strings.HasPrefix(filepath.Base(c.VMM), "qemu")
	g := &Guest{
		Serial: NewLog(), Stderr: NewLog(), Events: NewEventLog(),
		t: t, process: &process{name: c.Name, ended: make(chan struct{})},
	}
	args := slices.Clone(c.Args)
	if !slices.Contains(args, "-serial") {
		args = append(args, "-serial", "stdio")
	}
	if !c.NoAgent {
		args = append(args, g.listen()...)
	}
	var pipes []*os.File // the child's ends
	if !isQEMU {
		// /proc/self/fd/3 is a pipe: it can be read to its end without polling, as a file cannot.
		args = append(args, "-event-log", "/proc/self/fd/3")
	}
	g.cmd = exec.Command(c.VMM, args...)
	if c.Host != nil { // which execs the VMM: it is the same process
		g.cmd = exec.Command("ip", append([]string{"netns", "exec", c.Host.Name, c.VMM}, args...)...)
	}
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}

	dir := Artifacts(t)
	var copies sync.WaitGroup
	collect := func(suffix string, log io.Writer) *os.File {
		r, w, err := os.Pipe()
		must(t, "pipe", err)
		f, err := os.Create(filepath.Join(dir, c.Name+suffix))
		must(t, "log", err)
		pipes = append(pipes, w)
		copies.Go(func() {
			io.Copy(io.MultiWriter(log, f), r)
			r.Close()
			f.Close()
		})
		return w
	}
	g.cmd.Stdout = collect(".serial.log", g.Serial)
	g.cmd.Stderr = collect(".stderr.log", g.Stderr)
	if !isQEMU {
		g.cmd.ExtraFiles = []*os.File{collect(".events", g.Events)}
	}
	stdin, err := g.cmd.StdinPipe()
	must(t, "stdin", err)
	g.stdin = stdin

	g.started = time.Now()
	err = startOnLastingThread(g.cmd)
	for _, p := range pipes {
		p.Close()
	}
	must(t, "start "+c.VMM, err)
	go func() {
		g.cmd.Wait()
		copies.Wait()
		g.code = g.cmd.ProcessState.ExitCode()
		why := fmt.Errorf("%s ended: %v", g.name, g.cmd.ProcessState)
		g.Serial.Close(why)
		g.Stderr.Close(why)
		g.Events.Close(why)
		if g.listener != nil {
			g.listener.Close()
		}
		close(g.ended)
	}()
	if Nested() && !isQEMU && !c.NoAgent && !c.TripleFault {
		go g.endOnTripleFault()
	}
	t.Cleanup(func() {
		if t.Failed() {
			// One that is about to end has something to say.
			select {
			case <-g.ended:
			case <-time.After(time.Second):
			}
		}
		g.Kill()
		if t.Failed() {
			t.Logf("%s: %s: %v\nserial:\n%s\nstderr:\n%s", g.name, g.cmd, g.cmd.ProcessState, g.Serial.Tail(30), g.Stderr.Tail(30))
		}
	})
	return g
}

// endOnTripleFault ends a guest that has triple-faulted: its test would wait in vain.
func (g *Guest) endOnTripleFault() {
	if _, err := g.Stderr.Wait(context.Background(), 0, "guest triple fault"); err != nil {
		return // it has ended
	}
	g.Kill()
}

// listen prepares the socket of the agent's port and returns the options for it.
func (g *Guest) listen() []string {
	// Not t.TempDir: its names are too long for a socket.
	dir, err := os.MkdirTemp("", "agent")
	must(g.t, "agent", err)
	undo(g.t, "agent", func() error { return os.RemoveAll(dir) })
	path := filepath.Join(dir, "sock")
	g.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(g.t, "agent", err)
	return []string{
		"-chardev", "socket,id=agent,path=" + path,
		"-device", "virtio-serial-pci,id=agent-bus",
		"-device", "virtserialport,bus=agent-bus.0,chardev=agent,name=" + AgentPort,
	}
}

// startOnLastingThread starts a process from a thread that lives as long as this process
// does: the kernel sends Pdeathsig when the parent's *thread* ends.
func startOnLastingThread(cmd *exec.Cmd) error {
	startOnce.Do(func() {
		go func() {
			runtime.LockOSThread()
			for f := range starts {
				f()
			}
		}()
	})
	done := make(chan error)
	starts <- func() { done <- cmd.Start() }
	return <-done
}

var (
	startOnce sync.Once
	starts    = make(chan func())
)

// Name is that of its files among the artifacts.
func (g *Guest) Name() string { return g.name }

// PID is the VMM's process id.
func (g *Guest) PID() int { return g.cmd.Process.Pid }

// Started is when the process was started.
func (g *Guest) Started() time.Time { return g.started }

// WaitSerial returns the first match, with its submatches, of the pattern in what the
// guest has written to its serial port or writes before ctx ends; else the test ends.
func (g *Guest) WaitSerial(ctx context.Context, pattern string) []string {
	g.t.Helper()
	m, err := g.Serial.Wait(ctx, 0, pattern)
	must(g.t, g.name+": serial", err)
	return m
}

// WaitEvent returns the first event of that name, past or future; else the test ends.
func (g *Guest) WaitEvent(ctx context.Context, name string) Event {
	g.t.Helper()
	e, err := g.Events.WaitEvent(ctx, 0, name, nil)
	must(g.t, g.name, err)
	return e
}

// Type writes to the guest's serial port.
func (g *Guest) Type(text string) {
	g.t.Helper()
	_, err := io.WriteString(g.stdin, text)
	must(g.t, g.name+": type", err)
}

// Run runs a program, or an agent's verb such as @lspci, in the guest. An error says that
// it could not be run or did not end before ctx; the program's own failure is Result.Exit.
func (g *Guest) Run(ctx context.Context, argv ...string) (Result, error) {
	g.agentOnce.Do(func() { g.agent, g.agentErr = g.accept(ctx) })
	if g.agentErr != nil {
		return Result{}, g.agentErr
	}
	return g.agent.run(ctx, "", argv)
}

func (g *Guest) accept(ctx context.Context) (*agent, error) {
	if g.listener == nil {
		return nil, errors.New("agent: this guest was started without")
	}
	if d, ok := ctx.Deadline(); ok {
		g.listener.SetDeadline(d)
	}
	conn, err := g.listener.Accept()
	if err != nil {
		return nil, fmt.Errorf("agent: the VMM does not open its chardev: %w", err)
	}
	g.t.Cleanup(func() { conn.Close() })
	return newAgent(conn), nil
}

// Output runs a program in the guest and returns what it prints; if that fails, or the
// program does, the test ends.
func (g *Guest) Output(ctx context.Context, argv ...string) string {
	g.t.Helper()
	r, err := g.Run(ctx, argv...)
	must(g.t, g.name, err)
	if r.Exit != 0 {
		g.t.Fatalf("%s: %v: exit code %d\n%s%s", g.name, argv, r.Exit, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// Signal sends the VMM a signal.
func (g *Guest) Signal(sig os.Signal) {
	g.t.Helper()
	must(g.t, g.name+": signal", g.cmd.Process.Signal(sig))
}

// Ended is closed when the VMM has ended.
func (g *Guest) Ended() <-chan struct{} { return g.ended }

// Wait returns the VMM's exit code, -1 if a signal ended it; if it has not ended when ctx
// has, the test ends.
func (g *Guest) Wait(ctx context.Context) int {
	g.t.Helper()
	select {
	case <-g.ended:
		return g.code
	case <-ctx.Done():
		g.t.Fatalf("%s: still runs: %v", g.name, context.Cause(ctx))
		return 0
	}
}

// Kill ends the VMM, and what it started, at once and waits for the end.
func (g *Guest) Kill() {
	select {
	case <-g.ended:
	default:
		syscall.Kill(-g.PID(), syscall.SIGKILL)
		<-g.ended
	}
}
