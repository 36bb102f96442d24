package l0

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// monitorClient is a person at the human monitor.
type monitorClient struct {
	*harness.Log
	t *testing.T
	w io.Writer
}

func (m *monitorClient) ask(line, pattern string) {
	m.t.Helper()
	from := m.Len()
	if _, err := io.WriteString(m.w, line); err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.Wait(harness.Context(m.t, limit), from, pattern); err != nil {
		m.t.Fatalf("after %q: %v: %q", line, err, m.String())
	}
}

// monitorOn connects to a monitor's socket.
func monitorOn(t *testing.T, conn net.Conn) *monitorClient {
	m := &monitorClient{harness.NewLog(), t, conn}
	go func() {
		_, err := io.Copy(m, conn)
		if err == nil {
			err = io.EOF
		}
		m.Close(err)
	}()
	if _, err := m.Wait(harness.Context(t, limit), 0, `\(qemu\) $`); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestHMP(t *testing.T) {
	path := filepath.Join(shortDir(t), "hmp")
	g, q := startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo), "-S", "-smp", "2", "-monitor", "unix:"+path+",server,nowait",
		"-device", "pcie-root-port,id=root1,chassis=7", "-device", "virtio-rng-pci,id=rng1,bus=root1", "-chardev", "null,id=c",
		"-device", "virtio-serial-pci,id=vs", "-device", "virtconsole,chardev=c")
	m := monitorOn(t, connect(t, path))
	m.ask("info status\n", `VM status: paused \(prelaunch\)\n`)
	m.ask("cont\n", `\(qemu\) $`)
	q.WaitEvent("RESUME")
	g.WaitSerial(harness.Context(t, limit), "up")
	m.ask("info st\t\r", `VM status: running\n`)
	m.ask("info cpus\n", `\* CPU #0: thread_id=[1-9]\d*\n  CPU #1: thread_id=[1-9]\d*\n`)
	m.ask("info version\n", `baton .*10\.0\.2`)
	m.ask("info pci\n", `1b36:000c\n(.*\n)*      id "root1"\n`)
	m.ask("info qtree\n", `dev: pcie-root-port, id "root1"\n    addr = 0\d.0\n    chassis = 7\n    bus: root1\n      type PCIe\n      dev: virtio-rng-pci, id "rng1"`)
	m.ask("info mtree\n", `  0000000000000000-[0-9a-f]{16}: ram\n(.*\n)*.*: ioapic\n(.*\n)*memory slots of KVM\n  0000000000000000-[0-9a-f]{16}: slot 0\n(.*\n)*address-space: I/O\n(.*\n)*  03f8-03ff: serial\n`)
	m.ask("info irq\n", `gsi 24: (no route|address 0x[0-9a-f]+, data 0x[0-9a-f]+)\n`)
	m.ask("info registers\n", `  cpu 1: registers\n(.*\n)*  mp state 1  tpr 0x0  requested \[\]  in service \[\]  timer 0x10000, 0 of 0 left\n`)
	m.ask("set_link nosuch off\n", `Error: Device 'nosuch' not found\n`)
	m.ask("stop\n", `\(qemu\) $`)
	q.WaitEvent("STOP")
	m.ask("system_reset\n", `\(qemu\) $`)
	q.WaitEvent("RESET")
	m.ask("system_powerdown\n", `\(qemu\) $`)
	q.WaitEvent("POWERDOWN")
	if got := string(q.Do("human-monitor-command", map[string]any{"command-line": "info status"})); got != `"VM status: paused (prelaunch)\r\n"` {
		t.Errorf("by QMP: %s", got)
	}
	m.ask("q\n", `^`)
	ends(t, g, "host-qmp-quit")
	missing(t, path)
}

func TestHMPQuitByQMP(t *testing.T) {
	g, q := startQMP(t, tiny.Kernel(t, tiny.Halt))
	if got := string(q.Do("human-monitor-command", map[string]any{"command-line": "quit"})); got != `""` {
		t.Errorf("%s", got)
	}
	q.WaitEnd()
	ends(t, g, "host-qmp-quit")
}

func TestHMPNetwork(t *testing.T) {
	_, q, tap := startNIC(t)
	ask := func(line string) string {
		return string(q.Do("human-monitor-command", map[string]any{"command-line": line}))
	}
	nic := `net1: type=nic,model=virtio-net-pci,macaddr=52:54:00:6f:55:cc\r\n \\ hostnet1: type=tap,ifname=` + tap + `,script=no,downscript=no,vhost=off,queues=1\r\n`
	for _, s := range [][2]string{
		{"info network", nic},
		{"netdev_add tap,id=n2,ifname=" + tap + "b,script=no,downscript=no,queues=1", ""},
		{"info network", nic + `n2: type=tap,ifname=` + tap + `b,script=no,downscript=no,vhost=off,queues=1\r\n`},
		{"netdev_add tap,id=n2", `Error: Duplicate ID 'n2'\r\n`},
		{"netdev_del n2", ""},
		{"netdev_del n2", `Error: Device 'n2' not found\r\n`},
		{"set_link net1 off", ""},
		{"info network", nic},
	} {
		if got := ask(s[0]); got != `"`+s[1]+`"` {
			t.Errorf("%s: %s, want %s", s[0], got, s[1])
		}
	}
	if got := ask("info block"); !strings.HasPrefix(got, `"d`) || !strings.Contains(got, `(raw)\r\n`) {
		t.Errorf("info block: %s", got)
	}
}

// People who talk without listening, who say nothing, and who go away hold up nobody.
func TestHMPBadClients(t *testing.T) {
	path := filepath.Join(shortDir(t), "hmp")
	g := start(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo), "-monitor", "unix:"+path+",server,nowait")
	m := monitorOn(t, connect(t, path))
	connect(t, path) // says nothing
	flood := connect(t, path)
	go func() {
		for {
			if _, err := io.WriteString(flood, strings.Repeat("help\n", 1000)); err != nil {
				return
			}
		}
	}()
	for range 20 {
		gone := connect(t, path)
		fmt.Fprint(gone, "info mtree\ninfo mtree\n")
		gone.Close()
		m.ask("stop\n", `\(qemu\) $`)
		m.ask("cont\n", `\(qemu\) $`)
	}
	g.Type("alive\n")
	g.WaitSerial(harness.Context(t, limit), "alive")
	// Another machine does not take the socket of this one, but that of a dead one.
	kernel := tiny.Kernel(t, tiny.Halt)
	other := start(t, kernel, "-monitor", "unix:"+path+",server,nowait")
	if code := other.Wait(harness.Context(t, limit)); code != 1 || !strings.Contains(other.Stderr.String(), "another process listens on "+path) {
		t.Errorf("exit code %d: %s", code, other.Stderr)
	}
	g.Kill()
	g = start(t, kernel, "-monitor", "unix:"+path+",server,nowait")
	g.WaitEvent(harness.Context(t, limit), "RESUME")
	monitorOn(t, connect(t, path)).ask("quit\n", "^")
	ends(t, g, "host-qmp-quit")
}

// freePort returns a TCP port that nobody listens on.
func freePort(t *testing.T) (port string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err = net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// The program of that name, on a terminal, with all that it negotiates.
func TestTelnet(t *testing.T) {
	telnet, err := exec.LookPath("telnet")
	if err != nil {
		t.Skip("no telnet: apt-get install inetutils-telnet")
	}
	port := freePort(t)
	g := start(t, tiny.Kernel(t, tiny.Halt), "-monitor", "telnet:127.0.0.1:"+port+",server,nowait")
	g.WaitEvent(harness.Context(t, limit), "RESUME")
	c := openTerminalOf(t, telnet, "127.0.0.1", port)
	if _, err := c.Wait(harness.Context(t, limit), 0, `\(qemu\) $`); err != nil {
		t.Fatal(err)
	}
	c.typeAndSee(t, "info status\r", `^info status\nVM status: running\n\(qemu\) $`) // nothing twice
	c.typeAndSee(t, "inf\t \tst\t\r", `VM status: running\n\(qemu\) $`)
	c.typeAndSee(t, "stop\r", `\(qemu\) $`)
	g.WaitEvent(harness.Context(t, limit), "STOP")
	c.typeAndSee(t, "\x1b[A\x1b[A\r", `VM status: paused\n\(qemu\) $`)
	c.typeAndSee(t, "rubbish\x03cont\r", `\(qemu\) $`)
	g.WaitEvent(harness.Context(t, limit), "RESUME")
	c.typeAndSee(t, "quit\r", "Connection closed")
	ends(t, g, "host-qmp-quit")
}

// The monitor and the serial port on one terminal: QEMU's -serial mon:stdio.
func TestMonitorOnSerial(t *testing.T) {
	c := openTerminal(t, "-kernel", tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo), "-serial", "mon:stdio")
	if _, err := c.Wait(harness.Context(t, limit), 0, "up"); err != nil {
		t.Fatal(err)
	}
	c.typeAndSee(t, "guest", "^guest$")
	c.typeAndSee(t, "\x01c", `\(qemu\) $`)
	c.typeAndSee(t, "stop\r", `\(qemu\) $`)
	c.typeAndSee(t, "info status\r", `VM status: paused`)
	c.typeAndSee(t, "\x01c", "^")
	c.master.WriteString(strings.Repeat("typed while it stands still", 20))
	c.typeAndSee(t, "\x01c", `\(qemu\) $`)
	c.typeAndSee(t, "cont\r", `(typed while it stands still){20}`)
	c.typeAndSee(t, "\x01h", "C-a c")
	c.typeAndSee(t, "\x01cback", "back$")
	if strings.Contains(c.String(), "baton's monitor") {
		t.Error("the monitor speaks unasked")
	}
	c.master.WriteString("\x01x")
	waitFor(t, c.cmd)
}

// A monitor on standard input and output, for scripts.
func TestMonitorOnStdio(t *testing.T) {
	cmd := exec.Command(harness.Baton(t), "-kernel", tiny.Kernel(t, tiny.Halt), "-monitor", "stdio")
	cmd.Stdin = strings.NewReader("info status\nquit\n")
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil || !strings.Contains(out.String(), "VM status: running") {
		t.Errorf("%v: %s", err, &out)
	}
}

func waitFor(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	timer := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	defer timer.Stop()
	if err := cmd.Wait(); err != nil {
		t.Errorf("%s: %v", cmd, err)
	}
}
