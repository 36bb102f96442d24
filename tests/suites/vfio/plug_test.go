package vfio

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
)

// cycles is how often a VF comes and goes under traffic, on each machine: 12 times on all, or 210
// with BATON_LONG.
func cycles() int {
	if os.Getenv("BATON_LONG") != "" {
		return 70
	}
	return 4
}

// TestPlug takes a VF in and out of a running guest in each way, then many times; the last
// time it is left there, for the guest to find it again after a reboot.
func TestPlug(t *testing.T) {
	for _, c := range []struct {
		name, machine string
		linux         func(testing.TB, ...string) []string
	}{
		{"ACPI", "q35", harness.Linux},
		{"native", "q35,native-hotplug=on", harness.Linux},
		{"Linux 6.1", "q35", harness.Linux61},
	} {
		t.Run(c.name, func(t *testing.T) { testPlug(t, c.machine, c.linux(t)) })
	}
}

func testPlug(t *testing.T, machine string, linux []string) {
	harness.QuietKernel(t)
	peer := harness.NewPeer(t, world+"/24")
	vf := harness.PFs(t)[0].CreateVFs(t, 1)[0]
	vf.SetMAC(t, mac)
	was := vf.Driver()
	sock := socket(t)
	g := harness.Start(t, harness.GuestConfig{Args: append(linux, "-m", "256M", "-smp", "2", "-machine", machine,
		"-qmp", "unix:"+sock+",server=on,wait=off", "-device", "pcie-root-port,id=r")})
	g.Output(harness.Context(t, bootLimit), "true")
	p := &plugged{t: t, g: g, vf: vf, q: harness.DialQMP(t, harness.Context(t, 30*time.Minute), sock)}
	n := &nic{g: g, driver: "igbvf", interrupt: "MSI", mac: mac, world: peer.Do, ping: func(ctx context.Context) { peer.Ping(ctx, guest) }}

	p.plug(map[string]any{"pool": vf.PF.Name}) // of which it is the only one
	t.Run("traffic", n.traffic)
	if d := vf.Driver(); d != "vfio-pci" {
		t.Errorf("driver %q while the guest has it", d)
	}
	if got := p.locked(); got < 256<<10 {
		t.Errorf("%d KiB are locked for a guest of 256 MiB", got)
	}
	p.remove("")
	if d := vf.Driver(); d != was {
		t.Errorf("driver %q after DEVICE_DELETED, was %q", d, was)
	}
	if got := p.locked(); got != 0 {
		t.Errorf("%d KiB stay locked after DEVICE_DELETED", got)
	}
	before := g.Holds(p.q, 256)
	for i := range cycles() {
		mode := []string{"surprise", ""}[i%2]
		p.add()
		stop := burst(t, peer)
		p.remove(mode)
		stop()
		if t.Failed() {
			t.Fatalf("in cycle %d", i+1)
		}
	}
	after := g.Holds(p.q, 256)
	t.Logf("%d cycles; held before: %+v, after: %+v", cycles(), before, after)
	if leak := after.Leaked(before); leak != "" {
		t.Error(leak)
	}
	p.add()
	t.Run("reboot", func(t *testing.T) { reboot(t, g) })
	t.Run("traffic after the reboot", n.traffic)
	n.powerOff(t)
	if d := vf.Driver(); d != was {
		t.Errorf("driver %q after the end, was %q", d, was)
	}
}

// plugged is a VF that comes and goes.
type plugged struct {
	t  *testing.T
	g  *harness.Guest
	q  *harness.QMP
	vf harness.VF
}

func (p *plugged) add() {
	p.t.Helper()
	p.plug(map[string]any{"host": p.vf.PCI})
}

// plug waits until the guest's driver has the VF and its link is up.
func (p *plugged) plug(which map[string]any) {
	p.t.Helper()
	maps.Copy(which, map[string]any{"driver": "vfio-pci", "id": "vf0", "bus": "r", "bind": "auto"})
	ctx := harness.Context(p.t, limit)
	p.g.Sh(ctx, "while grep -qs "+mac+" /sys/class/net/*/address; do sleep 0.02; done") // the one that was pulled
	_, err := p.q.Execute("device_add", which)
	for err != nil && strings.Contains(err.Error(), "has not noticed") && ctx.Err() == nil {
		_, err = p.q.Execute("device_add", which)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	p.g.Output(ctx, "@carrier", mac)
	p.g.Output(ctx, "@addr", mac, guest+"/24")
}

// remove unplugs it, and returns when all has been released.
func (p *plugged) remove(mode string) {
	p.t.Helper()
	unplug(p.t, p.q, "vf0", mode)
}

// unplug takes a device out of its slot, and returns when it has been released.
func unplug(t *testing.T, q *harness.QMP, id, mode string) {
	t.Helper()
	args := map[string]any{"id": id}
	if mode != "" {
		args["mode"] = mode
	}
	q.Do("device_del", args)
	var data struct{ Device string }
	for data.Device != id { // the path alone comes, too
		if err := json.Unmarshal(q.WaitEvent("DEVICE_DELETED").Data, &data); err != nil {
			t.Fatal(err)
		}
	}
}

// socket is a path for a monitor, short enough for a socket.
func socket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vfio")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "qmp")
}

var lockedLine = regexp.MustCompile(`(?m)^VmLck:\s+(\d+) kB`)

// locked is how many KiB of the process the kernel counts as locked.
func (p *plugged) locked() (kib int) {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.g.PID()))
	if m := lockedLine.FindSubmatch(status); err == nil && m != nil {
		fmt.Sscan(string(m[1]), &kib)
		return kib
	}
	p.t.Fatalf("VmLck: %v in %s", err, status)
	return 0
}

// burst floods the guest, which answers, with pings until the function that it returns is called.
func burst(t *testing.T, peer *harness.Peer) (stop func()) {
	t.Helper()
	cmd := exec.Command("ping", "-f", "-n", "-s", "1400", guest)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = peer.Start(cmd)
	}
	if err != nil {
		t.Fatal(err)
	}
	stop = func() { cmd.Process.Kill(); cmd.Wait() }
	timer := time.AfterFunc(limit, stop)
	defer timer.Stop()
	answers := bufio.NewReader(out)
	for range 100 { // it goes back over a dot for each answer
		if _, err := answers.ReadString('\b'); err != nil {
			t.Errorf("no burst: %v", err)
			break
		}
	}
	go io.Copy(io.Discard, answers) // ends with the pipe
	return stop
}
