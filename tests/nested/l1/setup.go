package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"baton/kvm"
	"baton/tests/nested/proto"
)

// A setup collects what went wrong; a missing file system or module is a note to L0, not
// an end, because many suites do without it.
type setup struct{ errs []error }

func (s *setup) check(what string, err error) bool {
	if err != nil {
		s.errs = append(s.errs, fmt.Errorf("%s: %w", what, err))
	}
	return err == nil
}

func (s *setup) mount(source, target, fstype string, flags uintptr, data string) bool {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return s.check("mount "+target, err)
	}
	return s.check("mount "+target, unix.Mount(source, target, fstype, flags, data))
}

func (s *setup) loadModules() {
	list, err := os.ReadFile(proto.ModulesFile)
	if !s.check("module list", err) {
		return
	}
	for _, path := range strings.Fields(string(list)) {
		f, err := os.Open(path)
		if !s.check("module", err) {
			continue
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != unix.EEXIST {
			s.check("load "+path, err)
		}
		f.Close()
	}
}

// enterRoot makes L0's root, with a tmpfs on top for what L1 writes, the root of this
// process, and mounts what a running system has.
func (s *setup) enterRoot() error {
	const p9 = "trans=virtio,version=9p2000.L,msize=262144,"
	const root = "/root"
	s.mount(proto.RootTag, "/lower", "9p", unix.MS_RDONLY, p9+"ro,cache=loose")
	s.mount("tmpfs", "/rw", "tmpfs", 0, "mode=755")
	for _, d := range []string{"/rw/upper", "/rw/work"} {
		s.check("overlay", os.Mkdir(d, 0o755))
	}
	if !s.mount("overlay", root, "overlay", 0, "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work") {
		return fmt.Errorf("no root file system")
	}
	for _, d := range []string{"/proc", "/sys", "/dev"} {
		s.check("move "+d, unix.Mount(d, root+d, "", unix.MS_MOVE, ""))
	}
	if err := unix.Chroot(root); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	s.check("host name", unix.Sethostname([]byte("nested")))
	s.mount("devpts", "/dev/pts", "devpts", 0, "mode=620,ptmxmode=666")
	s.mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777")
	s.mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
	s.check("tmp", os.MkdirAll("/run/tmp", 0o777))
	s.mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "")
	s.mount("debugfs", "/sys/kernel/debug", "debugfs", 0, "")
	s.mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, "")
	// No cache here: L0 reads the files while L1 writes them.
	s.mount(proto.OutTag, proto.OutDir, "9p", 0, p9+"cache=none")
	return nil
}

// holdVM makes a VM that nobody runs. With the first VM, and after the last one, the kernel
// rewrites the code of its scheduler (preempt_notifier_inc), and an emulated CPU may run an
// instruction that is half written: the kernel then ends with "Oops: int3".
func (s *setup) holdVM() *kvm.VM {
	sys, err := kvm.Open()
	if !s.check("hold a VM", err) {
		return nil
	}
	defer sys.Close()
	vm, err := sys.CreateVM()
	s.check("hold a VM", err)
	return vm
}

// linkUp sets a network interface up; lo is down in a fresh kernel.
func (s *setup) linkUp(name string) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if !s.check("link "+name, err) {
		return
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if !s.check("link "+name, err) {
		return
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	s.check("link "+name, unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
}
