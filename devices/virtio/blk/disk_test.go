package blk

import (
	"bufio"

	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, size int64, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, path string
		o          Options
		want       []string
	}{
		{"missing", filepath.Join(dir, "none"), Options{}, []string{"no such file", "\ncreate an empty one with: truncate"}},
		{"directory", dir, Options{}, []string{"neither a file nor a block device"}},
		{"directory, read-only", dir, Options{ReadOnly: true}, []string{"neither a file nor a block device"}},
		{"fifo", fifo, Options{}, []string{"neither a file nor a block device"}},
		{"character device", "/dev/null", Options{}, []string{"neither a file nor a block device"}},
		{"empty", file("empty", 0, 0o600), Options{}, []string{"is empty", "\ngive it a size"}},
		{"odd size", file("odd", 1000, 0o600), Options{}, []string{"1000 bytes is not a multiple of 512", "\nround it up"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := Open(tt.path, tt.o)
			if err == nil {
				t.Fatal("opened", d)
			}
			for _, want := range append(tt.want, "disk "+tt.path+": ") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q, want %q", err, want)
				}
			}
		})
	}
	for _, err := range []error{unix.EACCES, unix.EROFS, unix.EPERM} {
		if got := openError("x", Options{}, err).Error(); !strings.Contains(got, "\nmake it writable for this user, or add readonly=on") {
			t.Errorf("%v: %q", err, got)
		}
		if got := openError("x", Options{ReadOnly: true}, err).Error(); strings.Contains(got, "readonly=on") {
			t.Errorf("%v: %q", err, got)
		}
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		first, second Options
		conflict      bool
	}{
		{Options{}, Options{}, true},
		{Options{}, Options{ReadOnly: true}, true},
		{Options{ReadOnly: true}, Options{}, true},
		{Options{ReadOnly: true}, Options{ReadOnly: true}, false},
	} {
		d, err := Open(path, tt.first)
		if err != nil {
			t.Fatal(err)
		}
		e, err := Open(path, tt.second)
		switch {
		case (err != nil) != tt.conflict:
			t.Errorf("%+v: %v", tt, err)
		case err == nil:
			_ = e.Close()
		case !strings.Contains(err.Error(), "already in use by another device of this machine"):
			t.Errorf("%+v: %v", tt, err)
		}
		_ = d.Close()
		if e, err = Open(path, tt.second); err != nil {
			t.Errorf("%+v: after close: %v", tt, err)
		} else {
			_ = e.Close()
		}
	}
}

// TestLockHelper is the other process of TestLockedByProcess.
func TestLockHelper(t *testing.T) {
	path := os.Getenv("BLK_TEST_LOCK")
	if path == "" {
		t.Skip("only a part of TestLockedByProcess")
	}
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	_, _ = os.Stdout.WriteString("locked\n")
	_, _ = os.Stdin.Read(make([]byte, 1))
}

func TestLockedByProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestLockHelper$")
	cmd.Env = append(os.Environ(), "BLK_TEST_LOCK="+path)
	stdin, _ := cmd.StdinPipe()
	stdout, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "locked\n" {
		t.Fatal(line, err)
	}
	_, err := Open(path, Options{})
	want := "disk " + path + ": locked by another process (pid " + strconv.Itoa(cmd.Process.Pid) + ")"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	_ = stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if d, err := Open(path, Options{}); err != nil {
		t.Errorf("the process is gone: %v", err)
	} else {
		_ = d.Close()
	}
}
