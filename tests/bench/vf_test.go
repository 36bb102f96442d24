package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
)

const (
	vfMAC   = "52:54:00:88:00:0%d"
	vfWorld = "10.88.0.2" // the peer, over the wire
	vfGuest = "10.88.0.1%d"
)

// TestVF measures a VF: what it carries, for two guests with one each, and how long it takes to
// come and go.
func TestVF(t *testing.T) {
	if !harness.Nested() {
		t.Skip("needs the nested host's NICs")
	}
	peer := harness.NewPeer(t, vfWorld+"/24")
	vfs := harness.PFs(t)[0].CreateVFs(t, 2)
	for n, vf := range vfs {
		vf.SetMAC(t, fmt.Sprintf(vfMAC, n))
		vf.BindVFIO(t)
	}
	server := exec.Command(nettool(t), "serve", vfWorld+":5001")
	out, err := server.StdoutPipe()
	if err == nil {
		err = peer.Start(server)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Process.Kill(); server.Wait() })
	if _, err := out.Read(make([]byte, 64)); err != nil { // its address: it listens
		t.Fatalf("nettool: %v", err)
	}
	results.notef("VF: an 82576's, in a root port, hot-plugged but for the traffic; QEMU's ways are ACPI, its default, and native hot-plug; all times from the QMP command on")
	takeTurns(t, "traffic", 4*runs,
		func(t testing.TB, c contender, n int) *linux { return startVF(t, c, vfs[n], n) },
		func(ctx context.Context, l *linux, record recorder) error {
			return measureVFTraffic(ctx, peer, l, record)
		})
	for i := range runs {
		list := contenders(t, "host")
		native := list[1]
		native.name = "QEMU-native"
		native.args = append(slices.Clone(native.args), "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
		for _, c := range append(list, native) {
			live(t, fmt.Sprintf("%s/%d", c.name, i+1), func(t testing.TB) { measureVF(t, c, vfs[0]) })
		}
	}
}

// startVF starts the guest of the contender that has that number, with a VF.
func startVF(t testing.TB, c contender, vf harness.VF, n int) *linux {
	mac, addr := fmt.Sprintf(vfMAC, n), fmt.Sprintf(vfGuest, n)
	g := harness.Start(t, harness.GuestConfig{VMM: c.vmm, Args: append(slices.Clone(c.args),
		"-m", fmt.Sprint(guestMiB), "-smp", "1",
		"-kernel", harness.Image(t, "vmlinuz"), "-initrd", harness.Image(t, "test.cpio"), "-append", cmdline,
		"-device", "pcie-root-port,id=r,chassis=1,slot=1", "-device", "vfio-pci,bus=r,host="+vf.PCI,
	)})
	ctx := harness.Context(t, 3*time.Minute)
	g.Output(ctx, "@carrier", mac)
	g.Output(ctx, "@addr", mac, addr+"/24")
	g.Output(ctx, "@tcp-serve", addr+":5001")
	g.Sh(ctx, "until ping -c 1 -W 1 "+vfWorld+" >/dev/null; do :; done")
	return &linux{contender: c, guest: g, host: vfWorld, addr: addr, nettool: nettool(t)}
}

func measureVFTraffic(ctx context.Context, peer *harness.Peer, l *linux, record recorder) error {
	r, err := l.guest.Run(ctx, "@ping", vfWorld, "100", "10")
	var ping struct {
		Received int     `json:"received"`
		RTT      []int64 `json:"rtt_us"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(r.Stdout), &ping)
	}
	if err != nil || ping.Received < 80 {
		return fmt.Errorf("%d of 100 pings were answered: %v %s", ping.Received, err, r.Stderr)
	}
	slices.Sort(ping.RTT)
	record("VF, ping, median", "us", target{MaxRatio: 1.03}, float64(ping.RTT[len(ping.RTT)/2]))
	goal := target{MinRatio: 0.97}
	from, err := l.guest.Run(ctx, "@tcp-send", vfWorld+":5001", "1", "1")
	mbit, terr := throughput(from.Stdout)
	if err = errors.Join(err, terr); err != nil {
		return fmt.Errorf("send from the guest: %w: %s", err, from.Stderr)
	}
	record("VF, TCP from the guest", "Mbit/s", goal, mbit)
	to, err := peer.Run(ctx, l.nettool, "send", l.addr+":5001", "1", "1")
	if mbit, terr = throughput(to); errors.Join(err, terr) != nil {
		return fmt.Errorf("send to the guest: %w: %s", errors.Join(err, terr), to)
	}
	record("VF, TCP to the guest", "Mbit/s", goal, mbit)
	return nil
}

// measureVF measures one life of a guest.
func measureVF(t testing.TB, c contender, vf harness.VF) {
	scrub(t)
	dir, err := os.MkdirTemp("", "vf") // short enough for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sock := filepath.Join(dir, "qmp")
	g := harness.Start(t, harness.GuestConfig{VMM: c.vmm, Args: append(slices.Clone(c.args),
		"-m", fmt.Sprint(guestMiB), "-smp", "1",
		"-kernel", harness.Image(t, "vmlinuz"), "-initrd", harness.Image(t, "test.cpio"), "-append", cmdline,
		"-device", "pcie-root-port,id=r,chassis=1,slot=1", "-qmp", "unix:"+sock+",server=on,wait=off",
	)})
	ctx := harness.Context(t, 3*time.Minute)
	g.Output(ctx, "true")
	v := &vfLife{t: t, ctx: ctx, c: c, g: g, q: harness.DialQMP(t, ctx, sock), vf: vf, mac: fmt.Sprintf(vfMAC, 0)}

	native := c.name == "QEMU-native"
	plugged := v.plug()
	if !native {
		record(t, c, "VF, plug to carrier", "ms", target{MaxRatio: 1}, plugged)
	}
	v.comeAndGo(native)
}

// vfLife is a guest that the VF comes and goes in.
type vfLife struct {
	t   testing.TB
	ctx context.Context
	c   contender
	g   *harness.Guest
	q   *harness.QMP
	vf  harness.VF
	mac string
}

// comeAndGo measures how long each way out takes, and the way in.
func (v *vfLife) comeAndGo(native bool) {
	t, c := v.t, v.c
	for i := range 3 {
		if !native {
			record(t, c, "VF, the guest's own removal of it, by its own clock", "ms", target{}, v.removal())
		}
		took := v.unplug("")
		if c.name != "QEMU" {
			record(t, c, "VF, cooperative unplug, beside QEMU's native way", "ms", target{MaxRatio: 0.05}, took)
		}
		if native {
			return // 6 s each
		}
		record(t, c, "VF, cooperative unplug, beside QEMU's ACPI way", "ms", target{MaxRatio: 0.5}, took)
		plugged := v.plug()
		record(t, c, "VF, plug to carrier", "ms", target{MaxRatio: 1}, plugged)
		if c.name == "baton" {
			f := results.figure("VF, surprise unplug, beside baton's cooperative one", "ms", target{MaxRatio: 1})
			f.Peer = append(f.Peer, took)
			took = v.unplug("surprise")
			f.Baton = append(f.Baton, took)
			t.Attr(c.name, fmt.Sprintf("surprise unplug: %s ms (%d)", number(took), i+1))
			v.plug()
		}
	}
}

// removal has the guest remove the VF by itself, and find it again, and returns how many ms the first
// took: less is not to be had by whoever asks it to.
func (v *vfLife) removal() float64 {
	v.t.Helper()
	var from, to float64
	out := v.g.Sh(v.ctx, "for i in /sys/class/net/*; do ! grep -qs "+v.mac+" $i/address || d=$(readlink -f $i/device); done; "+
		"read a x </proc/uptime; echo 1 >$d/remove; read b x </proc/uptime; echo $a $b; echo 1 >/sys/bus/pci/rescan")
	if _, err := fmt.Sscan(out, &from, &to); err != nil {
		v.t.Fatalf("%q: %v", out, err)
	}
	v.g.Output(v.ctx, "@carrier", v.mac)
	return 1000 * (to - from)
}

// plug gives it the VF, and returns how many ms it took until the guest had a link.
func (v *vfLife) plug() float64 {
	v.t.Helper()
	v.g.Sh(v.ctx, "while grep -qs "+v.mac+" /sys/class/net/*/address; do sleep 0.02; done") // the one that was pulled
	carrier := make(chan error, 1)
	go func() {
		r, err := v.g.Run(v.ctx, "@carrier", v.mac)
		if err == nil && r.Exit != 0 {
			err = fmt.Errorf("exit code %d: %s", r.Exit, r.Stderr)
		}
		carrier <- err
	}()
	v.g.Output(v.ctx, "true") // the other command is being waited for by now
	which := map[string]any{"driver": "vfio-pci", "id": "vf0", "bus": "r", "host": v.vf.PCI}
	start := time.Now()
	_, err := v.q.Execute("device_add", which)
	for err != nil && strings.Contains(err.Error(), "has not noticed") && v.ctx.Err() == nil {
		start = time.Now()
		_, err = v.q.Execute("device_add", which)
	}
	if err == nil {
		err = <-carrier
	}
	if err != nil {
		v.t.Fatal(err)
	}
	return float64(time.Since(start).Microseconds()) / 1000
}

// unplug takes it away, and returns how many ms it took until all was released.
func (v *vfLife) unplug(mode string) float64 {
	v.t.Helper()
	args := map[string]any{"id": "vf0"}
	if mode != "" {
		args["mode"] = mode
	}
	start := time.Now()
	v.q.Do("device_del", args)
	var data struct{ Device string }
	for data.Device != "vf0" {
		if err := json.Unmarshal(v.q.WaitEvent("DEVICE_DELETED").Data, &data); err != nil {
			v.t.Fatal(err)
		}
	}
	return float64(time.Since(start).Microseconds()) / 1000
}
