package control

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"baton/tests/harness"
)

// shell is a client of QMP that nobody here wrote: it takes "COMMAND KEY=VALUE..." and shows
// replies and events in its own way.
type shell struct {
	*client
	done  string // pattern of a reply with an empty result
	event func(name string)
}

// do carries out a command whose result is empty.
func (s shell) do(line string) {
	s.t.Helper()
	s.ask(line, s.done)
}

// TestGoQEMU drives a machine by DigitalOcean's go-qemu, by way of a shell on it
// (the module in goqemu).
func TestGoQEMU(t *testing.T) {
	life(t, func(socket string) shell {
		c := talk(t, cached(t, "bin/goqemu"), socket)
		c.see(0, `^connected to 10\.0\.2\n`)
		c.ask("commands", `^done \[.*"set_link"`)
		c.ask("version", `^done "10\.0\.2"\n`)
		c.ask("status", `^done "StatusPreLaunch"\n`)
		c.ask("pci", `^done \[.*"qdev_id":"root1"`)
		c.ask("blocks", `^done \[.*"device":"disk0"`)
		c.ask("query-qmp-schema", `^done `) // in one line
		heard := 0
		return shell{c, `^done {"return":{}}\n`, func(name string) {
			t.Helper()
			pattern := `^event ` + name + ` .*\n`
			m, err := c.Wait(harness.Context(t, limit), heard, pattern)
			if err != nil {
				t.Fatalf("want %s: %v; it shows %q", name, err, c.String()[heard:])
			}
			heard += strings.Index(c.String()[heard:], m[0]) + len(m[0])
		}}
	})
}

// TestQMPShell drives a machine by QEMU's own qmp-shell, of QEMU's source package.
func TestQMPShell(t *testing.T) {
	program := cached(t, "qmp-shell/scripts/qmp/qmp-shell")
	life(t, func(socket string) shell {
		human := talk(t, "python3", program, "-H", socket)
		human.see(0, `^Connected to QEMU 10\.0\.2\n`)
		human.ask("info status", `VM status: paused \(prelaunch\)`)
		human.ask("info pci", `id "root1"`)
		c := talk(t, "python3", program, socket)
		c.see(0, `^Connected to QEMU 10\.0\.2\n`)
		c.ask("query-status", `{"return": {"status": "prelaunch", "running": false}}`)
		heard := 0
		return shell{c, `{"return": {}}\n`, func(name string) {
			t.Helper()
			event := "'event': '" + name + "'"
			for ctx := harness.Context(t, limit); ; {
				c.ask("query-name", `{"return": {}}\n`) // it reads from its socket only for a reply
				c.ask("", `\(QEMU\) $`)                 // an empty line shows the events so far
				if i := strings.Index(c.String()[heard:], event); i >= 0 {
					heard += i + len(event)
					return
				}
				if ctx.Err() != nil {
					t.Fatalf("no %s; it shows %q", name, c.String()[heard:])
				}
			}
		}}
	})
}

// cached returns the path of something that the runner puts into the cache.
func cached(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(os.Getenv(harness.EnvRepo), ".cache", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v\n`go run ./tests/nested install` as root gets what it takes", err)
	}
	return path
}

// life is a machine's from its start to its power button, and what its guest sees of it.
func life(t *testing.T, dial func(socket string) shell) {
	harness.Tap(t, "control0", 1)
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket, disk := filepath.Join(dir, "qmp"), filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	g := harness.Start(t, harness.GuestConfig{Args: append(harness.Linux(t), "-m", "256", "-nodefaults", "-S",
		"-qmp", "unix:"+socket+",server,nowait", "-device", "pcie-root-port,id=root1,chassis=1",
		"-drive", "file="+disk+",format=raw,if=none,id=disk0", "-device", "virtio-blk-pci,drive=disk0",
		"-netdev", "tap,id=host0,ifname=control0,script=no,downscript=no,vhost=on",
		"-device", "virtio-net-pci,netdev=host0,id=net1,mac="+mac)})
	ctx := harness.Context(t, bootLimit)
	harness.WaitFile(t, ctx, socket)
	s := dial(socket)

	s.do("cont")
	s.event("RESUME")
	carrier := "cat /sys/class/net/" + strings.TrimSpace(g.Output(ctx, "@addr", mac, "10.88.0.3/24")) + "/carrier"
	until(ctx, t, g, carrier, "1")
	s.do("stop")
	s.event("STOP")
	s.ask("query-status", `"paused"`)
	s.do("cont")
	s.event("RESUME")
	s.do("set_link name=net1 up=false")
	until(ctx, t, g, carrier, "0")
	s.do("set_link name=net1 up=true")
	until(ctx, t, g, carrier, "1")
	s.ask("set_link name=nosuch up=true", `Device 'nosuch' not found`)

	const devices = "cat /sys/bus/pci/devices/*/device | grep -c 0x1044" // virtio-rng: VIRTIO 1.2, 4.1.2.1
	s.do("device_add driver=virtio-rng-pci id=rng1 bus=root1")
	until(ctx, t, g, devices, "1")
	s.do("device_del id=rng1")
	s.event("DEVICE_DELETED")
	until(ctx, t, g, devices, "0")

	before, err := strconv.Atoi(g.Sh(ctx, buttons))
	if err != nil {
		t.Fatal(err)
	}
	s.do("system_powerdown")
	s.event("POWERDOWN")
	until(ctx, t, g, buttons, strconv.Itoa(before+1))
	g.Output(ctx, "@poweroff")
	if code := g.Wait(ctx); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
