package network

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// However baton ends, the down-script runs, once, while the TAP is there.
func TestDownScript(t *testing.T) {
	halt, off := tiny.Kernel(t, tiny.Halt), tiny.Kernel(t, tiny.PowerOff, tiny.Halt)
	for _, tc := range []struct {
		name, kernel string
		end          func(*harness.Guest)
	}{
		{"SIGINT", halt, func(g *harness.Guest) { g.Signal(syscall.SIGINT) }},
		{"SIGTERM", halt, func(g *harness.Guest) { g.Signal(syscall.SIGTERM) }},
		{"SIGHUP", halt, func(g *harness.Guest) { g.Signal(syscall.SIGHUP) }},
		{"Ctrl-A x", halt, func(g *harness.Guest) { g.Type("\x01x") }},
		{"power off", off, func(*harness.Guest) {}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			log := filepath.Join(dir, "log")
			down := script(t, filepath.Join(dir, "down"), "ip link show $1 >/dev/null; echo $1 >>"+log)
			g := harness.Start(t, harness.GuestConfig{NoAgent: true, Args: []string{"-kernel", tc.kernel,
				"-netdev", "tap,id=n,ifname=end0,vhost=on,script=no,downscript=" + down, "-device", "virtio-net-pci,netdev=n"}})
			g.WaitEvent(harness.Context(t, limit), "RESUME")
			tc.end(g)
			if code := g.Wait(harness.Context(t, limit)); code != 0 || g.Stderr.String() != "" {
				t.Errorf("exit code %d: %s", code, g.Stderr)
			}
			if text, err := os.ReadFile(log); err != nil || string(text) != "end0\n" {
				t.Errorf("the script wrote %q (%v)", text, err)
			}
			if _, err := netlink.LinkByName("end0"); err == nil {
				t.Error("the TAP was left behind")
			}
		})
	}
}
