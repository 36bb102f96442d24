package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// daemonEnv tells a process that it is the one in the background.
const daemonEnv = "BATON_DAEMON"

// ErrDaemon is what Daemonize returns after a daemon that has said itself why it failed.
var ErrDaemon = errors.New("the machine did not start")

// IsDaemon says whether this process was started by Daemonize. What it starts is not.
func IsDaemon() bool {
	defer os.Unsetenv(daemonEnv)
	return os.Getenv(daemonEnv) != ""
}

// Daemonize runs the command line args once more in a session of its own, as -daemonize
// does, and returns when the machine is ready for its clients. Until then the daemon has
// this process's stderr, and the end of ctx ends it. It stays in this folder, for a reset reads the
// kernel again.
func Daemonize(ctx context.Context, args []string) error {
	ready, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("daemonize: %w", err)
	}
	defer ready.Close()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), daemonEnv+"=1")
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("daemonize: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(unix.SIGTERM) })
	defer stop()
	if _, err := ready.Read(make([]byte, 1)); err == nil {
		return cmd.Process.Release()
	} else if err != io.EOF {
		return fmt.Errorf("daemonize: %w", err)
	}
	if cmd.Wait() != nil {
		return ErrDaemon
	}
	return nil // told to end before it was ready
}

// letGo tells the process that waits in Daemonize that the machine is ready, and gives back
// what the daemon has of its terminal.
func letGo() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	if _, err := os.Stdout.Write([]byte{'\n'}); err != nil {
		return fmt.Errorf("daemonize: %w", err)
	}
	return errors.Join(
		os.NewSyscallError("dup", unix.Dup3(int(null.Fd()), unix.Stdout, 0)),
		os.NewSyscallError("dup", unix.Dup3(int(null.Fd()), unix.Stderr, 0)),
	)
}
