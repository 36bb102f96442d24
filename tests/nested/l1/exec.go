package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"baton/tests/nested/proto"
)

// execute runs one command to its end.
func execute(c proto.Command, l *link) proto.Exit {
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	if c.LimitSeconds > 0 {
		ctx, cancel = context.WithTimeout(ctx, time.Duration(c.LimitSeconds*float64(time.Second)))
	}
	defer cancel()
	if len(c.Argv) == 0 {
		return proto.Exit{Code: 127, Error: "no command"}
	}
	for _, kv := range c.Env {
		if path, ok := strings.CutPrefix(kv, "PATH="); ok {
			os.Setenv("PATH", path) // where exec looks for the program
		}
	}
	cmd := exec.CommandContext(ctx, c.Argv[0], c.Argv[1:]...)
	cmd.Dir, cmd.Env = c.Dir, c.Env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if c.TTY {
		tty, err := openConsole(c.Rows, c.Cols)
		if err != nil {
			return proto.Exit{Code: 126, Error: err.Error()}
		}
		defer tty.Close()
		cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
		cmd.SysProcAttr.Setctty = true
	} else {
		cmd.Stdout, cmd.Stderr = output{l, false}, output{l, true}
	}
	// A process that keeps the pipe open must not keep the command from ending.
	cmd.WaitDelay = 2 * time.Second
	err := cmd.Run()
	e := proto.Exit{Killed: ctx.Err() != nil}
	var ee *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &ee):
		e.Code = ee.ExitCode()
		if ws, ok := ee.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			e.Code, e.Error = 128+int(ws.Signal()), ws.Signal().String()
		}
	case errors.Is(err, exec.ErrWaitDelay):
		e.Error = err.Error()
	default:
		e.Code, e.Error = 127, err.Error()
	}
	return e
}

type output struct {
	l      *link
	stderr bool
}

func (o output) Write(p []byte) (int, error) {
	return len(p), o.l.send(proto.Message{Output: &proto.Output{Stderr: o.stderr, Data: p}})
}

func openConsole(rows, cols uint16) (*os.File, error) {
	tty, err := os.OpenFile("/dev/ttyS0", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	if rows > 0 && cols > 0 {
		err = unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	}
	return tty, err
}

// sweep kills what a command left running and says what that was. Each command finds L1
// as the one before did.
func sweep() (left []string) {
	reap(false)
	dirs, _ := os.ReadDir("/proc")
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		argv, _ := os.ReadFile("/proc/" + d.Name() + "/cmdline")
		if len(argv) == 0 {
			continue // a kernel thread, or dead
		}
		words := strings.Fields(strings.ReplaceAll(string(argv), "\x00", " "))
		left = append(left, fmt.Sprintf("%s (pid %d)", strings.Join(words[:min(len(words), 4)], " "), pid))
	}
	if len(left) > 0 {
		unix.Kill(-1, unix.SIGKILL)
		reap(true)
	}
	return left
}

// reap collects the dead among what the kernel handed to process 1. With wait it returns
// when none is left; all have been killed.
func reap(wait bool) {
	flags := unix.WNOHANG
	if wait {
		flags = 0
	}
	for {
		pid, err := unix.Wait4(-1, nil, flags, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid == 0 {
			return
		}
	}
}
