// Command l1 is the first process of the nested host. It loads the modules that the
// initramfs brought, makes the root of L0 its own (9p, read only, under a tmpfs overlay)
// and then runs what L0 asks for over a virtio-serial port (package proto).
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"baton/tests/nested/proto"
)

func main() {
	err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "l1:", err)
	}
	unix.Sync()
	// With -no-reboot a restart ends QEMU at once; a power-off would take the way through ACPI.
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// maxFiles is how many files a process of L1 may have open: as many as under systemd.
const maxFiles = 512 << 10

func run() error {
	s := setup{}
	// A service manager would do so; a kernel alone leaves 4096.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: maxFiles, Max: maxFiles}); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	s.mount("proc", "/proc", "proc", 0, "")
	s.mount("sysfs", "/sys", "sysfs", 0, "")
	s.mount("devtmpfs", "/dev", "devtmpfs", 0, "")
	s.loadModules()
	port, err := openPort(proto.Port)
	if err != nil {
		return errors.Join(append(s.errs, err)...)
	}
	if err := s.enterRoot(); err != nil {
		return errors.Join(append(s.errs, err)...)
	}
	s.linkUp("lo")
	vm := s.holdVM()
	defer runtime.KeepAlive(vm)

	l := link{enc: json.NewEncoder(port)}
	var ready proto.Ready
	for _, e := range s.errs {
		ready.Notes = append(ready.Notes, e.Error())
	}
	if err := l.send(proto.Message{Ready: &ready}); err != nil {
		return err
	}
	for dec := json.NewDecoder(bufio.NewReader(port)); ; {
		var c proto.Command
		if err := dec.Decode(&c); err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("read command: %w", err)
		}
		e := execute(c, &l)
		e.Running = sweep()
		if err := l.send(proto.Message{Exit: &e}); err != nil {
			return err
		}
	}
}

// A link serializes the messages of several writers.
type link struct {
	mu  sync.Mutex
	enc *json.Encoder
}

func (l *link) send(m proto.Message) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.enc.Encode(m)
}

// openPort finds the virtio-serial port by its name; there is no udev to make a link of it.
func openPort(name string) (*os.File, error) {
	ports, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, p := range ports {
		b, err := os.ReadFile(p)
		if err == nil && strings.TrimSpace(string(b)) == name {
			return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(p)), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("virtio-serial port %s: not found among %q", name, ports)
}
