// Command agent is the test image's /init: it brings up a minimal userspace and runs what
// the test on the host asks for (package proto) on the virtio-serial port org.baton.agent,
// or on /dev/hvc0 where there is no such port.
//
// It does not reap orphans: wait4(-1) would take the children that os/exec waits for.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"baton/guest-images/guest"
	"baton/guest-images/proto"
)

const (
	portName  = "org.baton.agent"
	maxOutput = 8 << 20 // bytes of stdout, and of stderr, that an answer carries
)

func main() {
	mountErr := guest.Mount()
	guest.Ready()
	report(mountErr)
	report(guest.LoadBoot())
	_, err := guest.SetAddr("lo", "127.0.0.1/8")
	report(err)
	report(os.WriteFile("/proc/sys/kernel/sysrq", []byte("1"), 0))
	os.Setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
	os.Setenv("HOME", "/")
	for {
		report(serve())
		time.Sleep(100 * time.Millisecond)
	}
}

func report(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
	}
}

// serve opens the agent's port and answers requests until the port goes away.
func serve() error {
	path := waitPort(2 * time.Second)
	// Not os.OpenFile, which would make it non-blocking: a port whose host end is closed
	// polls as hung up, for ever.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := makeRaw(fd); err != nil && !errors.Is(err, unix.ENOTTY) {
		return fmt.Errorf("make %s raw: %w", path, err)
	}
	return fmt.Errorf("serve on %s: %w", path, proto.Serve(port{f}, handle))
}

// port outlives its host's end. While that is closed, as on the way to another host, reads
// end at once, and there is no event for its return; what runs goes on, and its answer
// waits in the write.
type port struct{ *os.File }

// Read gives an empty line for the end of the input, which also ends a broken one.
func (p port) Read(b []byte) (int, error) {
	n, err := p.File.Read(b)
	if err == io.EOF && len(b) > 0 {
		time.Sleep(5 * time.Millisecond)
		b[0] = '\n'
		return 1, nil
	}
	return n, err
}

// waitPort returns the device of the agent's port, or of the first console when there is
// no such port within d.
func waitPort(d time.Duration) string {
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if b, _ := os.ReadFile(n); strings.TrimSpace(string(b)) == portName {
				return "/dev/" + filepath.Base(filepath.Dir(n))
			}
		}
		if _, err := os.Stat("/dev/hvc0"); err == nil && time.Since(start) > d {
			return "/dev/hvc0"
		}
	}
}

func makeRaw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag &^= unix.ICRNL | unix.INLCR | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG | unix.IEXTEN
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}

func handle(ctx context.Context, req proto.Request) proto.Response {
	if strings.HasPrefix(req.Argv[0], "@") {
		return runVerb(req.Argv[0], req.Argv[1:])
	}
	return runProgram(ctx, req)
}

func runProgram(ctx context.Context, req proto.Request) proto.Response {
	var out, errOut limitedBuffer
	cmd := exec.CommandContext(ctx, req.Argv[0], req.Argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(req.Stdin), &out, &errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // for a grandchild that keeps the pipes open
	err := cmd.Run()
	r := proto.Response{Stdout: out.String(), Stderr: errOut.String()}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		r.Exit, r.Error = -1, fmt.Sprintf("run %s: time limit of %d ms", req.Argv[0], req.TimeoutMS)
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		r.Exit = exit.ExitCode()
	case err != nil:
		r.Exit, r.Error = -1, fmt.Sprintf("run %s: %v", req.Argv[0], err)
	}
	return r
}

// limitedBuffer keeps the first maxOutput bytes and drops the rest.
type limitedBuffer struct{ bytes.Buffer }

func (b *limitedBuffer) Write(p []byte) (int, error) {
	b.Buffer.Write(p[:min(len(p), maxOutput-b.Len())])
	return len(p), nil
}

// ReadFrom hides that of bytes.Buffer, which knows no limit.
func (b *limitedBuffer) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{b}, r)
}
