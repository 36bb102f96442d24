// Package l0 shows what baton does around a guest, with guests of a few instructions: they
// run on any KVM, on the machine itself and in the nested host alike.
package l0

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"baton/kvm"
	"baton/tests/harness"
	"baton/tests/tiny"
)

// TestMain builds the program under test where nobody has: outside the nested host.
func TestMain(m *testing.M) {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		fmt.Printf("not run: %v\nin the nested host: go run ./tests/nested run ./tests/l0\n", err)
		os.Exit(0)
	} else {
		f.Close()
	}
	if os.Getenv(harness.EnvBaton) != "" {
		os.Exit(m.Run())
	}
	dir, err := os.MkdirTemp("", "l0")
	if err != nil {
		panic(err)
	}
	bin := filepath.Join(dir, "baton")
	if out, err := exec.Command("go", "build", "-o", bin, "baton").CombinedOutput(); err != nil {
		fmt.Printf("go build: %v\n%s", err, out)
		os.Exit(1)
	}
	os.Setenv(harness.EnvBaton, bin)
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// limit is for what takes milliseconds on a machine that has nothing else to do.
const limit = 30 * time.Second

// start starts a tiny guest.
func start(t *testing.T, kernel string, args ...string) *harness.Guest {
	t.Helper()
	return harness.Start(t, harness.GuestConfig{NoAgent: true, Args: append([]string{"-kernel", kernel}, args...)})
}

// ends waits for the end and checks exit code and reason, the SHUTDOWN event's.
func ends(t *testing.T, g *harness.Guest, reason string) {
	t.Helper()
	if code := g.Wait(harness.Context(t, limit)); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	var data struct {
		Guest  bool
		Reason string
	}
	e := g.WaitEvent(harness.Context(t, limit), "SHUTDOWN")
	if err := json.Unmarshal(e.Data, &data); err != nil {
		t.Fatal(err)
	}
	if data.Reason != reason || data.Guest != strings.HasPrefix(reason, "guest-") {
		t.Errorf("SHUTDOWN %s, want reason %s", e.Data, reason)
	}
}

// names returns the names of all events.
func names(t *testing.T, g *harness.Guest) string {
	t.Helper()
	events, err := g.Events.Events()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range events {
		all = append(all, e.Name)
	}
	return strings.Join(all, " ")
}

func missing(t *testing.T, file string) {
	t.Helper()
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s was left behind (%v)", file, err)
	}
}

func TestPowerOff(t *testing.T) {
	g := start(t, tiny.Kernel(t, tiny.Say("hello\n"), tiny.PowerOff, tiny.Halt))
	ends(t, g, "guest-shutdown")
	if g.Serial.String() != "hello\n" || g.Stderr.String() != "" {
		t.Errorf("serial %q, stderr %q", g.Serial, g.Stderr)
	}
	if got := names(t, g); got != "RESUME SHUTDOWN" {
		t.Errorf("events %s", got)
	}
}

func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		for name, rest := range map[string]tiny.Code{"halted": tiny.Halt, "spinning": tiny.Spin} {
			t.Run(fmt.Sprint(sig, " ", name), func(t *testing.T) {
				pidfile := filepath.Join(t.TempDir(), "pid")
				g := start(t, tiny.Kernel(t, tiny.Say("up\n"), rest), "-pidfile", pidfile, "-smp", "2")
				g.WaitSerial(harness.Context(t, limit), "^up$")
				if text, err := os.ReadFile(pidfile); err != nil || string(text) != fmt.Sprintln(g.PID()) {
					t.Errorf("pidfile has %q, want %d (%v)", text, g.PID(), err)
				}
				g.Signal(sig)
				ends(t, g, "host-signal")
				missing(t, pidfile)
			})
		}
	}
}

// startsAgain checks that the guest, which says up whenever it starts, starts twice.
func startsAgain(t *testing.T, g *harness.Guest) {
	t.Helper()
	g.WaitSerial(harness.Context(t, limit), "up\nup\n")
	g.WaitEvent(harness.Context(t, limit), "RESET")
	if got := names(t, g); got != "RESUME RESET" {
		t.Errorf("events %s", got)
	}
}

func TestReset(t *testing.T) {
	kernel := tiny.Kernel(t, tiny.Say("up\n"), tiny.Twice(tiny.Reset, tiny.Halt))
	t.Run("again", func(t *testing.T) {
		startsAgain(t, start(t, kernel))
	})
	t.Run("no-reboot", func(t *testing.T) {
		g := start(t, kernel, "-no-reboot")
		ends(t, g, "guest-reset")
		if g.Serial.String() != "up\n" {
			t.Errorf("serial %q", g.Serial)
		}
	})
}

// isSVM says whether this host's KVM is AMD's, where the CPU leaves nothing of a guest's
// state after a triple fault: AMD APM vol. 2, 15.14.3.
func isSVM(t *testing.T) bool {
	t.Helper()
	return kind(t) == kvm.SVM
}

func kind(t *testing.T) kvm.Kind {
	t.Helper()
	s, err := kvm.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	return s.Kind()
}

func TestTripleFault(t *testing.T) {
	say := tiny.Say("up\n")
	kernel := tiny.Kernel(t, say, tiny.TripleFault)
	want := []string{"guest triple fault", "cpu 0: triple fault", fmt.Sprintf(`rip %#x\b`, 0x10_0000+len(say)), `at rip: 0f 0b  ud2$`}
	if isSVM(t) {
		want = []string{"guest triple fault", "cpu 0: triple fault", "KVM on AMD has reset this vCPU: its registers are lost"}
	}
	check := func(t *testing.T, text string) {
		t.Helper()
		for _, w := range want {
			if !regexp.MustCompile("(?m)" + w).MatchString(text) {
				t.Errorf("no %q in the report:\n%s", w, text)
			}
		}
	}
	t.Run("stderr", func(t *testing.T) {
		g := start(t, kernel, "-no-reboot")
		ends(t, g, "guest-reset")
		check(t, g.Stderr.String())
	})
	t.Run("log file", func(t *testing.T) {
		log := filepath.Join(t.TempDir(), "log")
		g := start(t, kernel, "-no-reboot", "-D", log)
		ends(t, g, "guest-reset")
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		check(t, string(text))
		if g.Stderr.String() != "" {
			t.Errorf("stderr: %s", g.Stderr)
		}
	})
	t.Run("is a reset", func(t *testing.T) {
		startsAgain(t, start(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Twice(tiny.TripleFault, tiny.Halt))))
	})
}

func TestPanic(t *testing.T) {
	g := start(t, tiny.Kernel(t, tiny.Panic, tiny.Say("on\n"), tiny.PowerOff, tiny.Halt))
	ends(t, g, "guest-shutdown")
	if got := names(t, g); got != "RESUME GUEST_PANICKED SHUTDOWN" {
		t.Errorf("events %s", got)
	}
	// KVM stops at the OUT, or after it where it has emulated it.
	if !regexp.MustCompile(`(?m)guest panicked\n  cpu 0: panic\n  rip 0x10000[67] [^#]*^  at rip: (ee  out +%al,\(%dx\)|66 ba f8 03  mov +\$0x3f8,%dx)$`).MatchString(g.Stderr.String()) {
		t.Errorf("report:\n%s", g.Stderr)
	}
	if g.Serial.String() != "on\n" {
		t.Errorf("the guest does not go on: serial %q", g.Serial)
	}
}

// A software KVM cannot run a stock kernel: that is said, with what to do, before anything
// is made.
func TestLinuxOnSoftwareKVM(t *testing.T) {
	kernels, _ := filepath.Glob("/boot/vmlinuz-*")
	if kind(t) != kvm.PVM {
		t.Skip("this host's KVM is not kvm_pvm")
	}
	if len(kernels) == 0 {
		t.Skip("no /boot/vmlinuz-*")
	}
	t.Run("refused", func(t *testing.T) {
		g := start(t, kernels[0])
		if code := g.Wait(harness.Context(t, limit)); code != 1 {
			t.Errorf("exit code %d", code)
		}
		for _, w := range []string{kernels[0], "kvm_pvm", "make nested", "force=on"} {
			if !strings.Contains(g.Stderr.String(), w) {
				t.Errorf("no %q in the error: %s", w, g.Stderr)
			}
		}
		if got := names(t, g); got != "" {
			t.Errorf("events %s", got)
		}
	})
	t.Run("forced", func(t *testing.T) {
		g := start(t, kernels[0], "-accel", "kvm,force=on", "-append", "console=ttyS0 earlyprintk=serial", "-no-reboot")
		g.WaitEvent(harness.Context(t, limit), "RESUME")
		g.Signal(syscall.SIGTERM)
		g.Wait(harness.Context(t, limit)) // however far it came
	})
}
