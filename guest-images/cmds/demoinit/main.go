// Command demoinit is the demo image's /init: it shows the machine it runs on and leaves
// the user at a shell; leaving that powers the machine off. As /bin/lspci it prints the
// PCI tree.
//
// The kernel's command line may hold baton.ip=10.0.0.2/24, an address for the first
// network interface, and baton.ping=10.0.0.1, a host to ping before the shell.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"baton/guest-images/guest"
)

func main() {
	if filepath.Base(os.Args[0]) == "lspci" {
		lspci()
		return
	}
	report(guest.Mount())
	guest.Ready()
	report(guest.LoadBoot())
	os.Setenv("PATH", "/bin")
	os.Setenv("HOME", "/")
	os.Setenv("TERM", "vt100")
	_, err := guest.SetAddr("lo", "127.0.0.1/8")
	report(err)
	welcome()
	network(cmdline())
	fmt.Println("\nCommands are in /bin; exit or poweroff ends the demo.")
	report(shell())
	unix.Sync()
	report(unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
}

func report(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
	}
}

func lspci() {
	tree, err := guest.PCITree("")
	report(err)
	fmt.Print(tree)
}

func welcome() {
	var u unix.Utsname
	report(unix.Uname(&u))
	var si unix.Sysinfo_t
	report(unix.Sysinfo(&si))
	fmt.Printf("\nLinux %s on baton: %d CPUs, %d MiB\n\nPCI:\n", unix.ByteSliceToString(u.Release[:]), runtime.NumCPU(), si.Totalram>>20)
	lspci()
	disks, _ := filepath.Glob("/sys/block/vd*")
	for _, d := range disks {
		b, _ := os.ReadFile(filepath.Join(d, "size"))
		sectors, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		fmt.Printf("disk %s: %d MiB\n", filepath.Base(d), sectors>>11)
	}
	nics, _ := filepath.Glob("/sys/class/net/eth*")
	for _, n := range nics {
		mac, _ := os.ReadFile(filepath.Join(n, "address"))
		fmt.Printf("network %s: %s\n", filepath.Base(n), strings.TrimSpace(string(mac)))
	}
}

// cmdline returns the kernel parameters that have a value.
func cmdline() map[string]string {
	b, _ := os.ReadFile("/proc/cmdline")
	p := map[string]string{}
	for _, f := range strings.Fields(string(b)) {
		if k, v, ok := strings.Cut(f, "="); ok {
			p[k] = v
		}
	}
	return p
}

func network(p map[string]string) {
	if ip := p["baton.ip"]; ip != "" {
		_, err := guest.SetAddr("eth0", ip)
		report(err)
	}
	if host := p["baton.ping"]; host != "" {
		cmd := exec.Command("ping", "-c", "3", host)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		report(cmd.Run())
	}
}

// shell runs on the terminal behind /dev/console, which itself cannot be the controlling
// terminal that Ctrl-C needs.
func shell() error {
	active, err := os.ReadFile("/sys/class/tty/console/active")
	if err != nil {
		return err
	}
	names := strings.Fields(string(active))
	if len(names) == 0 {
		return fmt.Errorf("start a shell: the kernel has no console")
	}
	tty, err := os.OpenFile("/dev/"+names[len(names)-1], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer tty.Close()
	cmd := exec.Command("gosh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	return cmd.Run()
}
