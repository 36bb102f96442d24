// Package badinput shows what baton says when the host does not have, or does not give,
// what a command line asks for: one clear error that names the object, exit code 1, and
// nothing left behind. What needs no host at all is in tests/cli.
package badinput

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"baton/tests/harness"
	"baton/tests/tiny"
)

func TestMain(m *testing.M) { harness.Main(m) }

const limit = time.Minute

// Scripts that run before baton, in a mount namespace of its own.
const (
	// ownDev has a /dev with little in it.
	ownDev = "mount -t tmpfs none /dev; mkdir /dev/net; mknod /dev/null c 1 3; "
	kvmDev = "mknod /dev/kvm c 10 232; "
	tunDev = "mknod /dev/net/tun c 10 200; "
)

// files are what the cases name, made once.
type files struct{ dir string }

func (f files) path(name string) string { return filepath.Join(f.dir, name) }

func (f files) write(t *testing.T, name string, data []byte, mode fs.FileMode) string {
	t.Helper()
	if err := os.WriteFile(f.path(name), data, mode); err != nil {
		t.Fatal(err)
	}
	return f.path(name)
}

func (f files) sparse(t *testing.T, name string, size int64) string {
	t.Helper()
	f.write(t, name, nil, 0o600)
	if err := os.Truncate(f.path(name), size); err != nil {
		t.Fatal(err)
	}
	return f.path(name)
}

func newFiles(t *testing.T) files {
	t.Helper()
	dir, err := os.MkdirTemp("", "bad") // short enough for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := files{dir}
	kernel := tiny.ELF(tiny.PowerOff)
	f.write(t, "kernel", kernel, 0o600)
	f.write(t, "cut", kernel[:len(kernel)-1], 0o600)
	f.write(t, "text", []byte("hello\n"), 0o600)
	f.write(t, "packed", packed(t), 0o600)
	f.sparse(t, "initrd", 1<<30)
	f.sparse(t, "disk", 1<<20)
	f.sparse(t, "other", 1<<20)
	f.sparse(t, "held", 1<<20)
	f.sparse(t, "odd", 1<<20+1)
	f.sparse(t, "empty", 0)
	f.write(t, "fails", []byte("#!/bin/sh\nexit 3\n"), 0o700)
	return f
}

// packed is the tests' kernel with a payload of a method that nobody knows.
func packed(t *testing.T) []byte {
	t.Helper()
	image, err := os.ReadFile(harness.Image(t, "vmlinuz"))
	if err != nil {
		t.Fatal(err)
	}
	payload := (int(image[0x1f1])+1)*512 + int(binary.LittleEndian.Uint32(image[0x248:]))
	copy(image[payload:], "unheard-of")
	return image
}

func TestRefused(t *testing.T) {
	f := newFiles(t)
	holder := harness.Start(t, harness.GuestConfig{Name: "holder", NoAgent: true, Args: []string{
		"-kernel", tiny.Kernel(t, tiny.Halt), "-drive", "file=" + f.path("held") + ",format=raw",
		"-netdev", "tap,id=n,ifname=busy0,queues=2", "-device", "virtio-net-pci,netdev=n,mq=on",
		"-chardev", "socket,id=c,path=" + f.path("taken") + ",server=on,wait=off",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=c"}})
	holder.WaitEvent(harness.Context(t, limit), "RESUME")
	harness.Tap(t, "single0", 1)
	harness.Tap(t, "multi0", 2)
	refused, err := net.Listen("unix", f.path("refused"))
	if err != nil {
		t.Fatal(err)
	}
	refused.(*net.UnixListener).SetUnlinkOnClose(false)
	refused.Close()

	kernel := []string{"-kernel", f.path("kernel")}
	tap := func(options string) []string {
		return append(kernel, "-netdev", "tap,id=t,"+options, "-device", "virtio-net-pci,netdev=t,mq=on")
	}
	disk := func(name string) []string { return append(kernel, "-drive", "file="+f.path(name)+",format=raw,id=d") }
	for _, tc := range []struct {
		name   string
		before string // script
		args   []string
		want   []string
	}{
		{"no kvm", ownDev + tunDev, kernel, []string{"open /dev/kvm: no such file", "modprobe"}},
		{"kvm is not for us", ownDev + tunDev + kvmDev + "chmod 0 /dev/kvm; set -- setpriv --bounding-set=-dac_override --inh-caps=-dac_override \"$@\"", kernel,
			[]string{"open /dev/kvm: permission denied", "group"}},
		{"no tun", ownDev + kvmDev, kernel, []string{"netdev left", "open /dev/net/tun: no such file", "modprobe tun"}},
		{"no vhost-net", ownDev + kvmDev + tunDev, tap("vhost=on"), []string{"netdev t", "open /dev/vhost-net: no such file", "modprobe vhost_net", "vhost=off"}},
		{"no huge pages", "", append(kernel, "-m", "64M", "-object", "memory-backend-memfd,id=m,size=64M,hugetlb=on", "-machine", "memory-backend=m"), []string{"huge pages", "nr_hugepages"}},

		{"kernel cut short", "", []string{"-kernel", f.path("cut")}, []string{"load kernel " + f.path("cut"), "truncated"}},
		{"kernel is text", "", []string{"-kernel", f.path("text")}, []string{"load kernel " + f.path("text"), "not a kernel", "a text file"}},
		{"kernel is a disk", "", []string{"-kernel", f.path("disk")}, []string{"load kernel " + f.path("disk"), "not a kernel"}},
		{"packed by a method unknown", "", []string{"-kernel", f.path("packed"), "-m", "512"}, []string{"load kernel " + f.path("packed"), "unknown method (75 6e 68 65 61 72)", "zstd"}},
		{"initrd does not fit", "", append(kernel, "-initrd", f.path("initrd"), "-m", "512"), []string{"load initrd " + f.path("initrd"), "do not fit", "MiB more memory"}},
		{"initrd is empty", "", append(kernel, "-initrd", f.path("empty")), []string{"load initrd " + f.path("empty"), "is empty"}},

		{"tap is busy", "", tap("ifname=busy0,queues=2"), []string{"netdev t", "open TAP busy0: device or resource busy", "another program has it open"}},
		{"tap has one queue", "", tap("ifname=single0,queues=2"), []string{"netdev t", "open TAP single0: it has a single queue and 2 are asked for", "ip tuntap add"}},
		{"tap has several queues", "", tap("ifname=multi0"), []string{"netdev t", "open TAP multi0: it is multi-queue and one queue is asked for"}},
		{"tap is none", "", tap("ifname=lo"), []string{"netdev t", "open TAP lo: an interface of this name exists", "is no TAP"}},
		{"tap cannot be made", "set -- setpriv --bounding-set=-net_admin --inh-caps=-net_admin \"$@\"", tap("ifname=new0"),
			[]string{"netdev t", "open TAP new0: operation not permitted", "CAP_NET_ADMIN", "ip tuntap add dev new0"}},
		{"script fails", "", tap("ifname=new0,script=" + f.path("fails")), []string{"netdev t", "script " + f.path("fails") + " new0: exit status 3"}},

		{"disk is odd", "", disk("odd"), []string{"disk " + f.path("odd"), "1048577 bytes is not a multiple of 512", "truncate"}},
		{"disk is empty", "", disk("empty"), []string{"disk " + f.path("empty"), "is empty"}},
		{"disk cannot be written", "mount --bind " + f.dir + " " + f.dir + "; mount -o remount,bind,ro " + f.dir, disk("other"), []string{"drive d", f.path("other"), "cannot be written", "readonly=on"}},
		{"disk is held", "", disk("held"), []string{"disk " + f.path("held"), fmt.Sprintf("locked by another process (pid %d)", holder.PID())}},
		{"disk is there twice", "", append(disk("other"), "-drive", "file="+f.path("other")+",format=raw,id=e"), []string{"disk " + f.path("other"), "in use by another device of this machine"}},

		{"socket is taken", "", append(kernel, "-chardev", "socket,id=s,path="+f.path("taken")+",server=on,wait=off", "-device", "virtserialport,chardev=s"), []string{"another process listens on " + f.path("taken")}},
		{"nobody listens", "", append(kernel, "-chardev", "socket,id=s,path="+f.path("refused"), "-device", "virtserialport,chardev=s"), []string{f.path("refused"), "connection refused", "server=on"}},
		{"console has no folder", "", append(kernel, "-serial", "file:"+f.path("no/where")), []string{"serial port", f.path("no/where"), "no such file"}},
		{"pidfile has no folder", "", append(kernel, "-pidfile", f.path("no/pid")), []string{"write pid file", f.path("no/pid"), "no such file"}},
		{"event log has no folder", "", append(kernel, "-event-log", f.path("no/log")), []string{"create event log", f.path("no/log"), "no such file"}},
		{"log has no folder", "", append(kernel, "-D", f.path("no/log")), []string{"open log", f.path("no/log"), "no such file"}},

		{"all at once", "", append(disk("held"), "-kernel", f.path("cut"), "-drive", "file="+f.path("odd")+",format=raw", "-netdev", "tap,id=t,ifname=single0,queues=2", "-device", "virtio-net-pci,netdev=t,mq=on",
			"-netdev", "tap,id=u,script="+f.path("fails"), "-device", "virtio-net-pci,netdev=u", "-serial", "file:"+f.path("no/where")),
			[]string{f.path("held"), f.path("cut"), f.path("odd"), "single0", "netdev u", f.path("no/where")}},
	} {
		t.Run(tc.name, func(t *testing.T) { f.refused(t, tc.before, tc.args, tc.want) })
	}
}

// refused runs baton with args, and with much that it could leave behind.
func (f files) refused(t *testing.T, before string, args, want []string) {
	t.Helper()
	left := append([]string{"-netdev", "tap,id=left,ifname=left0", "-device", "virtio-net-pci,netdev=left", "-drive", "file=" + f.path("disk") + ",format=raw",
		"-chardev", "socket,id=left,path=" + f.path("left") + ",server=on,wait=off", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=left"}, args...)
	if !strings.Contains(strings.Join(args, " "), "-pidfile") {
		left = append(left, "-pidfile", f.path("pid"))
	}
	argv := append([]string{"-m", "sh", "-ec", before + "\nexec \"$@\"", "sh", harness.Baton(t)}, left...)
	cmd := exec.CommandContext(harness.Context(t, limit), "unshare", argv...)
	var out, text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &text
	err := cmd.Run()
	if code := cmd.ProcessState.ExitCode(); code != 1 || out.Len() != 0 {
		t.Errorf("exit code %d (%v), stdout %q", code, err, &out)
	}
	for _, w := range want {
		if !strings.Contains(text.String(), w) {
			t.Errorf("no %q in the error:\n%s", w, &text)
		}
	}
	if n := strings.Count(text.String(), "\nbaton: ") + 1; n > len(want) {
		t.Errorf("%d errors:\n%s", n, &text)
	}
	for _, word := range []string{"panic", "goroutine", "context canceled", "%!"} {
		if strings.Contains(text.String(), word) {
			t.Errorf("%q in the error:\n%s", word, &text)
		}
	}
	for _, name := range []string{"left0", "new0"} {
		if _, err := netlink.LinkByName(name); !errors.As(err, new(netlink.LinkNotFoundError)) {
			t.Errorf("interface %s was left behind (%v)", name, err)
		}
	}
	for _, name := range []string{"pid", "left"} {
		if _, err := os.Lstat(f.path(name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was left behind (%v)", name, err)
			os.Remove(f.path(name))
		}
	}
	if err := lockable(f.path("disk")); err != nil {
		t.Errorf("the disk's lock was left behind: %v", err)
	}
}

// lockable tries the lock that a machine takes on its disks.
func lockable(name string) error {
	file, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
}

// Everything that the cases above have beside their error is right.
func TestAccepted(t *testing.T) {
	f := newFiles(t)
	g := harness.Start(t, harness.GuestConfig{NoAgent: true, Args: []string{"-kernel", f.path("kernel"),
		"-netdev", "tap,id=left,ifname=left0", "-device", "virtio-net-pci,netdev=left", "-drive", "file=" + f.path("disk") + ",format=raw",
		"-chardev", "socket,id=left,path=" + f.path("left") + ",server=on,wait=off", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=left", "-pidfile", f.path("pid")}})
	if code := g.Wait(harness.Context(t, limit)); code != 0 || g.Stderr.String() != "" {
		t.Errorf("exit code %d: %s", code, g.Stderr)
	}
}
