package l0

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// daemonize runs baton -daemonize and waits for its end, which is that of its output too.
func daemonize(t *testing.T, args ...string) (code int, output string) {
	t.Helper()
	cmd := exec.Command(harness.Baton(t), append(args, "-daemonize")...)
	stop := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	defer stop.Stop()
	out, _ := cmd.CombinedOutput()
	return cmd.ProcessState.ExitCode(), string(out)
}

func TestDaemonize(t *testing.T) {
	dir := shortDir(t)
	pidfile, path, serial := filepath.Join(dir, "pid"), filepath.Join(dir, "qmp"), filepath.Join(dir, "serial")
	code, out := daemonize(t, "-kernel", tiny.Kernel(t, tiny.Say("up\n"), tiny.Halt), "-k", "fr",
		"-qmp", "unix:"+path+",server,nowait", "-pidfile", pidfile, "-serial", "file:"+serial)
	if code != 0 || strings.Count(out, "\n") != 1 || !strings.Contains(out, "there is no display") {
		t.Fatalf("exit code %d: %s", code, out)
	}
	text, err := os.ReadFile(pidfile) // it is there, as is all else
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	fmt.Sscan(string(text), &pid)
	t.Cleanup(func() {
		if t.Failed() && pid > 0 {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	if sid, _, errno := syscall.RawSyscall(syscall.SYS_GETSID, uintptr(pid), 0, 0); errno != 0 || int(sid) != pid {
		t.Errorf("daemon %d is in session %d, %v", pid, sid, errno)
	}
	for fd := range 3 {
		if file, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err != nil || file != os.DevNull {
			t.Errorf("fd %d is %s, %v", fd, file, err)
		}
	}
	q := harness.DialQMP(t, harness.Context(t, limit), path)
	status(t, q, "running")
	daemon, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(daemon)
	q.Do("quit", nil)
	q.WaitEnd()
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(daemon), Events: unix.POLLIN}}, int(limit.Milliseconds())); n != 1 {
		t.Fatalf("the daemon does not end: %v", err)
	}
	missing(t, pidfile)
	if text, err := os.ReadFile(serial); err != nil || string(text) != "up\n" {
		t.Errorf("serial %q, %v", text, err)
	}
}

// What goes wrong is said by who was called, not by a daemon that nobody hears.
func TestDaemonizeFails(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(bad, []byte("no kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		want string
		args []string
	}{
		{"a daemon has no terminal", []string{"-kernel", bad, "-serial", "stdio"}},
		{bad, []string{"-kernel", bad}},
		{"bind: no such file", []string{"-kernel", tiny.Kernel(t, tiny.Halt), "-monitor", "unix:/nonexistent/s,server,nowait"}},
	} {
		code, out := daemonize(t, tc.args...)
		if code != 1 || strings.Count(out, tc.want) != 1 {
			t.Errorf("%q: exit code %d: %s", tc.args, code, out)
		}
	}
}

// Ctrl-C while it waits for a client ends both.
func TestDaemonizeInterrupted(t *testing.T) {
	path := filepath.Join(shortDir(t), "qmp")
	cmd := exec.Command(harness.Baton(t), "-kernel", tiny.Kernel(t, tiny.Halt), "-qmp", "unix:"+path+",server", "-daemonize")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	harness.WaitFile(t, harness.Context(t, limit), path)
	cmd.Process.Signal(syscall.SIGINT)
	waitFor(t, cmd)
	missing(t, path)
}
