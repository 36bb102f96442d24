// Command demo shows baton at work, on the terminal: `make demo`.
//
//	demo          this machine: build, look at the host, choose where the guest runs
//	└─ demo -here the host of the guest: this machine, or the nested host (tests/nested)
//	   └─ baton   the guest: a stock Debian kernel and the demo image, driven over its
//	              serial port as a person would drive it
//
// It needs root, and Debian 12 or 13 to install what is missing. Its exit code is 0 if
// all that it shows was as it should be.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

const intro = `demo: boots the Debian kernel that is installed here on baton, shows its PCIe tree, disk and
      network; then has a guest whose NIC is a VF move from one host's NIC to another's, on
      baton and on QEMU, and writes what happened to demo.html. Ctrl-C ends it and cleans up.
`

func init() {
	// Pdeathsig is sent when the thread that started a process ends: let that be the main one.
	runtime.LockOSThread()
}

func main() {
	here := flag.Bool("here", false, "run the guest on this machine (used by the demo itself)")
	pair := flag.Bool("pair", false, "with -here: the machine has two SR-IOV NICs, as the nested host")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	run := prepare
	if *here {
		run = func(ctx context.Context) error {
			if err := show(ctx); err != nil || !*pair {
				return err
			}
			return journeys(ctx)
		}
	}
	err := run(ctx)
	var ended *exec.ExitError
	switch {
	case err == nil:
	case ctx.Err() != nil:
		if !*here {
			fmt.Fprintln(os.Stderr, "\ndemo: interrupted; nothing is left running")
		}
		os.Exit(130)
	case errors.As(err, &ended) && !*here:
		fmt.Fprintln(os.Stderr, "demo: FAILED, for the reason above")
		os.Exit(1)
	default:
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

// prepare builds what the demo needs and runs its other half where a guest can run.
func prepare(ctx context.Context) error {
	start := time.Now()
	fmt.Print(intro)
	if os.Geteuid() != 0 {
		return errors.New("needs root, for the guest's TAP and for what may have to be installed")
	}
	build := command(ctx, "make", "-s", "--no-print-directory", "build", "install")
	if err := step("building baton and the nested host", build); err != nil {
		return err
	}
	image := command(ctx, "go", "run", ".", "demo", "test")
	image.Dir = "guest-images"
	if err := step("building the guest's image", image); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	obstacle, emulated, err := lookAtHost(ctx)
	if err != nil {
		return err
	}
	var cmd *exec.Cmd
	if obstacle == "" {
		fmt.Println("demo: this host can run the guest itself")
		cmd = command(ctx, self, "-here")
		// A network namespace of its own: no name or address of the host's is in the way,
		// and nothing is left when it ends.
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	} else {
		fmt.Printf("demo: %s\n      so the guest runs in the nested host, a machine in QEMU that can\n", obstacle)
		cmd = command(ctx, ".cache/bin/nested", "exec", "--", self, "-here", "-pair")
	}
	filter := &pageFilter{out: os.Stdout}
	cmd.Stdout = filter
	if err := cmd.Run(); err != nil {
		return err
	}
	if filter.page != nil {
		if err := os.WriteFile("demo.html", filter.page, 0o644); err != nil {
			return err
		}
		fmt.Println("\ndemo: demo.html has the timelines and plots")
	}
	if emulated {
		fmt.Println("\nThe nested host's CPU is emulated here: on a real one all this is many times faster.")
	}
	fmt.Printf("demo: all is well, after %.0f s\n", time.Since(start).Seconds())
	return nil
}

// command is a program that ends when ctx does, by its own clean end if it has one, and
// in any case when this process does.
func command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// step runs a command and says that it does once it has taken 2 s, then ever more seldom.
func step(what string, cmd *exec.Cmd) error {
	begin := time.Now()
	ended := make(chan struct{})
	said := make(chan struct{})
	go func() {
		defer close(said)
		for next := 2 * time.Second; ; next *= 2 {
			select {
			case <-ended:
				return
			case <-time.After(time.Until(begin.Add(next))):
				fmt.Printf("demo: %s … %d s\n", what, int(next.Seconds()))
			}
		}
	}()
	err := cmd.Run()
	close(ended)
	<-said
	return err
}

// A finding is one line of `baton check -json`.
type finding struct{ Status, Name, Value string }

// lookAtHost returns why this host cannot run the demo's guest, "" if it can, and whether
// that is because of its KVM.
func lookAtHost(ctx context.Context) (obstacle string, kvm bool, err error) {
	cmd := command(ctx, "./baton", "check", "-json")
	cmd.Stdout, cmd.Stderr = nil, nil
	out, err := cmd.Output()
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) { // exit code 1 only says that something is missing
		return "", false, err
	}
	var list []finding
	if err := json.Unmarshal(out, &list); err != nil {
		return "", false, fmt.Errorf("baton check: %w", err)
	}
	obstacle, kvm = obstacleOf(list)
	return obstacle, kvm, nil
}

func obstacleOf(list []finding) (obstacle string, kvm bool) {
	var why []string
	for _, f := range list {
		needed := slices.Contains([]string{"vhost-net", "tun"}, f.Name)
		if f.Status == "!!" || needed && f.Status != "ok" {
			why = append(why, f.Name+": "+f.Value)
			kvm = kvm || !needed
		}
	}
	return strings.Join(why, "; "), kvm
}
