package l0

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// A machine that waits for a guest needs no kernel, and starts nothing.
func TestIncomingDefer(t *testing.T) {
	g, q := startIncoming(t, "defer")
	status(t, q, "inmigrate")
	fails(t, q, "migrate", uri("tcp:127.0.0.1:1"), "GenericError: Guest is waiting for an incoming migration")
	q.Do("migrate_cancel", nil)
	q.Do("cont", nil)
	q.Do("stop", nil)
	status(t, q, "inmigrate")
	heard(t, q, "")
	q.Do("system_reset", nil)
	heard(t, q, `RESET {"guest":false,"reason":"host-qmp-system-reset"}`)
	status(t, q, "inmigrate")
	fails(t, q, "migrate-incoming", uri("bogus:1"), "GenericError: unknown migration protocol: bogus:1")
	fails(t, q, "migrate-incoming", nil, "GenericError: need either 'uri' or 'channels' argument")
	path := filepath.Join(shortDir(t), "m")
	q.Do("migrate-incoming", uri("unix:"+path))
	if got, want := string(q.Do("query-migrate", nil)), fmt.Sprintf(`{"status":"setup","socket-address":[{"type":"unix","path":%q}]}`, path); got != want {
		t.Errorf("query-migrate: %s, want %s", got, want)
	}
	fails(t, q, "migrate-incoming", uri("unix:"+path), "GenericError: The incoming migration has already been started")
	capability(t, q, "multifd", "GenericError: Multifd must be set before incoming starts")
	q.Do("quit", nil)
	ends(t, g, "host-qmp-quit")
	if got := g.Serial.String(); got != "" {
		t.Errorf("it ran: %q", got)
	}
	missing(t, path)
}

func uri(u string) map[string]any { return map[string]any{"uri": u} }

// capability turns one on, or wants the error.
func capability(t *testing.T, q *harness.QMP, name, fail string) {
	t.Helper()
	args := map[string]any{"capabilities": []any{map[string]any{"capability": name, "state": true}}}
	if fail == "" {
		q.Do("migrate-set-capabilities", args)
	} else {
		fails(t, q, "migrate-set-capabilities", args, fail)
	}
}

// sendFile gives a machine a file by getfd.
func sendFile(t *testing.T, socket, name string, fd int) {
	t.Helper()
	conn := connect(t, socket).(*net.UnixConn)
	in := json.NewDecoder(conn)
	for _, request := range []string{"", `{"execute":"qmp_capabilities"}`, fmt.Sprintf(`{"execute":"getfd","arguments":{"fdname":%q}}`, name)} {
		var rights []byte
		if strings.Contains(request, "getfd") {
			rights = syscall.UnixRights(fd)
		}
		if request != "" {
			if _, _, err := conn.WriteMsgUnix([]byte(request), rights, nil); err != nil {
				t.Fatal(err)
			}
		}
		var reply map[string]json.RawMessage
		if err := in.Decode(&reply); err != nil || reply["error"] != nil {
			t.Fatalf("%s: %s, %v", request, reply["error"], err)
		}
	}
}

// A guest moves through a socket that both machines were given by a client.
func TestMigrateFD(t *testing.T) {
	dir := shortDir(t)
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	source, from := startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo), "-qmp", "unix:"+a+",server=on,wait=off")
	source.WaitSerial(harness.Context(t, limit), "up")
	target, to := startIncoming(t, "defer", "-qmp", "unix:"+b+",server=on,wait=off")
	fails(t, from, "getfd", map[string]any{"fdname": "x"}, "GenericError: No file descriptor supplied via SCM_RIGHTS")
	fails(t, from, "closefd", map[string]any{"fdname": "x"}, "GenericError: File descriptor named 'x' not found")
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, socket := range []string{a, b} {
		sendFile(t, socket, "way", pair[i])
		sendFile(t, socket, "other", pair[i])
		if err := syscall.Close(pair[i]); err != nil {
			t.Fatal(err)
		}
	}
	from.Do("closefd", map[string]any{"fdname": "other"})
	to.Do("closefd", map[string]any{"fdname": "other"})
	capability(t, from, "events", "")
	capability(t, to, "events", "")
	to.Do("migrate-incoming", uri("fd:way"))
	from.Do("migrate", uri("fd:way"))
	wait(t, from, "completed")
	wait(t, to, "completed")
	runsOn(t, target, to)
	from.Do("cont", nil)
	from.Do("migrate", uri("fd:way")) // it is used up
	wait(t, from, "failed")
	runsOn(t, source, from)
}

// startIncoming starts a machine that a guest is to come to.
func startIncoming(t *testing.T, uri string, args ...string) (*harness.Guest, *harness.QMP) {
	t.Helper()
	path := shortDir(t) + "/qmp"
	g := harness.Start(t, harness.GuestConfig{Name: "target", NoAgent: true, Args: append(args, "-incoming", uri, "-qmp", "unix:"+path+",server=on,wait=off")})
	return g, harness.DialQMP(t, harness.Context(t, limit), path)
}

// The errors and results are those that QEMU 10 gave, word for word.
func TestMigrateWords(t *testing.T) {
	g, q := startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo))
	capability(t, q, "events", "")
	if got := string(q.Do("query-migrate", nil)); got != "{}" {
		t.Errorf("before the first one: %s", got)
	}
	for _, c := range []struct {
		command string
		args    any
		want    string
	}{
		{"migrate", uri("bogus:1"), "unknown migration protocol: bogus:1"},
		{"migrate", map[string]any{}, "need either 'uri' or 'channels' argument"},
		{"migrate", map[string]any{"uri": 3}, "Invalid parameter type for 'uri', expected: string"},
		{"migrate", map[string]any{"uri": "unix:x", "resume": true}, "Cannot resume if there is no paused migration"},
		{"migrate-incoming", uri("tcp:127.0.0.1:2"), "'-incoming' was not specified on the command line"},
		{"migrate-continue", map[string]any{"state": "pre-switchover"}, "Migration not in expected state: none"},
		{"migrate-continue", map[string]any{"state": "bogus"}, "Parameter 'state' does not accept value 'bogus'"},
		{"migrate-pause", nil, "migrate-pause is currently only supported during postcopy-active or postcopy-recover state"},
		{"migrate-recover", uri("tcp:127.0.0.1:2"), "Migrate recover can only be run when postcopy is paused."},
		{"migrate-set-parameters", map[string]any{"nope": -1}, "Parameter 'nope' is unexpected"},
		{"migrate-set-parameters", map[string]any{"multifd-compression": "bad"}, "Parameter 'multifd-compression' does not accept value 'bad'"},
		{"migrate-set-parameters", map[string]any{"cpu-throttle-tailslow": "bad"}, "Invalid parameter type for 'cpu-throttle-tailslow', expected: boolean"},
		{"migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "bogus", "state": true}}}, "Parameter 'capability' does not accept value 'bogus'"},
	} {
		fails(t, q, c.command, c.args, "GenericError: "+c.want)
	}
	q.Do("migrate_cancel", nil) // nothing is there to cancel
	heard(t, q, "")
	for range 2 { // after a failure there is another one
		q.Do("migrate", uri("tcp:127.0.0.1:1"))
		wait(t, q, "failed")
		var info struct {
			Status string
			Error  string `json:"error-desc"`
		}
		decode(t, q.Do("query-migrate", nil), &info)
		if info.Status != "failed" || !strings.Contains(info.Error, "connection refused") {
			t.Errorf("query-migrate %+v", info)
		}
		status(t, q, "running")
	}
	q.Do("migrate", map[string]any{"channels": []any{map[string]any{"channel-type": "main", "addr": map[string]any{"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"}}}})
	wait(t, q, "failed")
	q.Do("quit", nil)
	ends(t, g, "host-qmp-quit")
}

func decode(t *testing.T, text json.RawMessage, v any) {
	t.Helper()
	if err := json.Unmarshal(text, v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
}

// wait waits for a status of the migration; another final one ends the test.
func wait(t *testing.T, q *harness.QMP, status string) {
	t.Helper()
	for {
		e := q.WaitEvent("MIGRATION")
		var data struct{ Status string }
		decode(t, e.Data, &data)
		switch data.Status {
		case status:
			return
		case "completed", "failed", "cancelled":
			t.Fatalf("migration %s, want %s: %s", data.Status, status, q.Do("query-migrate", nil))
		}
	}
}

// story is what happened to a machine: the events, with what they say of a migration.
func story(t *testing.T, g *harness.Guest) string {
	t.Helper()
	events, err := g.Events.Events()
	if err != nil {
		t.Fatal(err)
	}
	var words []string
	for _, e := range events {
		var data struct {
			Status string
			Pass   int
		}
		_ = json.Unmarshal(e.Data, &data)
		switch e.Name {
		case "MIGRATION":
			words = append(words, data.Status)
		case "MIGRATION_PASS":
			words = append(words, fmt.Sprint("pass", data.Pass))
		default:
			words = append(words, e.Name)
		}
	}
	return strings.Join(words, " ")
}

// mover is a source whose guest says up and echoes what is typed, and a target for it.
type mover struct {
	source, target *harness.Guest
	from, to       *harness.QMP
	uri            string
}

func newMover(t *testing.T, args ...string) *mover {
	t.Helper()
	m := new(mover)
	args = append(args, "-smp", "2")
	m.source, m.from = startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo), args...)
	m.source.WaitSerial(harness.Context(t, limit), "up")
	capability(t, m.from, "events", "")
	m.newTarget(t, args...)
	return m
}

func (m *mover) newTarget(t *testing.T, args ...string) {
	t.Helper()
	m.uri = "unix:" + filepath.Join(shortDir(t), "m")
	m.target, m.to = startIncoming(t, "defer", args...)
	capability(t, m.to, "events", "")
	m.to.Do("migrate-incoming", uri(m.uri))
}

// newTargetOf makes the target the source of another one.
func (m *mover) newTargetOf(t *testing.T, args ...string) {
	t.Helper()
	m.source, m.from = m.target, m.to
	m.newTarget(t, append(args, "-smp", "2")...)
}

// runsOn checks that the guest runs there.
func runsOn(t *testing.T, g *harness.Guest, q *harness.QMP) {
	t.Helper()
	status(t, q, "running")
	from := g.Serial.Len()
	g.Type("hello\n")
	if _, err := g.Serial.Wait(harness.Context(t, limit), from, "hello\n"); err != nil {
		t.Error(err)
	}
}

func TestMigrate(t *testing.T) {
	m := newMover(t)
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.from, "completed")
	wait(t, m.to, "completed")
	status(t, m.from, "postmigrate")
	runsOn(t, m.target, m.to)
	if got := story(t, m.source); !regexp.MustCompile(`^RESUME setup active pass1 (pass\d+ )*STOP device (pass\d+ )*completed$`).MatchString(got) {
		t.Errorf("source: %s", got)
	}
	if got := story(t, m.target); got != "setup active RESUME completed" {
		t.Errorf("target: %s", got)
	}
	info := map[string]any{}
	decode(t, m.from.Do("query-migrate", nil), &info)
	for _, name := range []string{"status", "total-time", "setup-time", "downtime", "ram"} {
		if info[name] == nil {
			t.Errorf("query-migrate has no %s: %v", name, info)
		}
	}
	ram, _ := info["ram"].(map[string]any)
	for _, name := range strings.Fields("total remaining transferred duplicate normal normal-bytes dirty-pages-rate mbps dirty-sync-count postcopy-requests page-size " +
		"multifd-bytes pages-per-second precopy-bytes downtime-bytes postcopy-bytes dirty-sync-missed-zero-copy") {
		if ram[name] == nil {
			t.Errorf("query-migrate's ram has no %s", name)
		}
	}
	if got := string(m.to.Do("query-migrate", nil)); got != `{"status":"completed"}` {
		t.Errorf("target's query-migrate: %s", got)
	}
	fails(t, m.from, "migrate", uri(m.uri), "GenericError: Can't migrate the vm that was paused due to previous migration")
	fails(t, m.to, "migrate-incoming", uri(m.uri), "GenericError: The incoming migration has already been started")
	m.to.Do("quit", nil)
	ends(t, m.target, "host-qmp-quit")
	m.from.Do("cont", nil) // as QEMU: it is the user's decision
	runsOn(t, m.source, m.from)
	m.from.Do("quit", nil)
	ends(t, m.source, "host-qmp-quit")
}

// What does not run stays so.
func TestMigratePaused(t *testing.T) {
	m := newMover(t)
	m.from.Do("stop", nil)
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.to, "completed")
	status(t, m.to, "paused")
	m.to.Do("cont", nil)
	runsOn(t, m.target, m.to)
}

// With -S the guest waits where it has come to.
func TestMigrateToS(t *testing.T) {
	m := newMover(t)
	m.to.Do("stop", nil)
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.to, "completed")
	status(t, m.to, "paused")
	m.to.Do("cont", nil)
	runsOn(t, m.target, m.to)
}

func TestMigrateCancel(t *testing.T) {
	m := newMover(t)
	capability(t, m.from, "pause-before-switchover", "")
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.from, "pre-switchover")
	fails(t, m.from, "migrate", uri(m.uri), "GenericError: There's a migration process in progress")
	capability(t, m.from, "events", "GenericError: There's a migration process in progress")
	m.from.Do("migrate_cancel", nil)
	wait(t, m.from, "cancelled")
	runsOn(t, m.source, m.from)
	if code := m.target.Wait(harness.Context(t, limit)); code != 1 {
		t.Errorf("target: exit code %d", code)
	}
	m.newTarget(t, "-smp", "2") // and then it goes
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.from, "pre-switchover")
	m.from.Do("migrate-continue", map[string]any{"state": "pre-switchover"})
	wait(t, m.to, "completed")
	runsOn(t, m.target, m.to)
}

// A machine that ends takes its migration with it: the guest runs nowhere.
func TestMigrateEnds(t *testing.T) {
	for name, end := range map[string]func(m *mover){
		"quit":    func(m *mover) { m.from.Do("quit", nil) },
		"SIGTERM": func(m *mover) { m.source.Signal(syscall.SIGTERM) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMover(t)
			capability(t, m.from, "pause-before-switchover", "")
			m.from.Do("migrate", uri(m.uri))
			wait(t, m.from, "pre-switchover")
			end(m)
			if code := m.source.Wait(harness.Context(t, limit)); code != 0 {
				t.Errorf("source: exit code %d: %s", code, m.source.Stderr)
			}
			if code := m.target.Wait(harness.Context(t, limit)); code != 1 {
				t.Errorf("target: exit code %d", code)
			}
			if got := m.target.Serial.String(); got != "" {
				t.Errorf("it ran: %q", got)
			}
		})
	}
}

// What differs is named on both sides, and the guest stays.
func TestMigrateRefused(t *testing.T) {
	m := newMover(t)
	m.target.Kill()
	m.newTarget(t, "-smp", "1", "-m", "256", "-device", "virtio-rng-pci")
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.from, "failed")
	var info struct {
		Error string `json:"error-desc"`
	}
	decode(t, m.from.Do("query-migrate", nil), &info)
	status(t, m.to, "inmigrate") // and waits for another one
	for _, want := range []string{"cpus: 2 at the source, 1 at the target", "memory: 128 MiB at the source, 256 MiB at the target", "device/pci/0000:00:01.0: not at the source, virtio-rng-pci at the target"} {
		if _, err := m.target.Stderr.Wait(harness.Context(t, limit), 0, regexp.QuoteMeta(want)); err != nil {
			t.Error(err)
		}
		for side, text := range map[string]string{"source": info.Error, "target": m.target.Stderr.String()} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: no %q in: %s", side, want, text)
			}
		}
	}
	runsOn(t, m.source, m.from)
}

// A disk that the target cannot have, for somebody else has it, is found out before the guest stops.
func TestMigrateDisk(t *testing.T) {
	dir := t.TempDir()
	disk := func(name string) []string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		return []string{"-drive", "file=" + path + ",format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0"}
	}
	right, wrong := disk("right"), disk("wrong")
	m := newMover(t, right...)
	m.target.Kill()
	m.newTarget(t, append(wrong, "-smp", "2")...)
	user, _ := startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo), wrong...)
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.from, "failed")
	want := fmt.Sprintf("reserve the disks: disk %s/wrong: locked by another process (pid %d)", dir, user.PID())
	for _, g := range []*harness.Guest{m.source, m.target} {
		if _, err := g.Stderr.Wait(harness.Context(t, limit), 0, regexp.QuoteMeta(want)); err != nil {
			t.Error(err)
		}
	}
	if got := story(t, m.source); got != "RESUME setup failing failed" {
		t.Errorf("source: %s", got)
	}
	runsOn(t, m.source, m.from)
	m.target.Kill()
	m.newTarget(t, append(right, "-smp", "2")...)
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.from, "completed")
	wait(t, m.to, "completed")
	runsOn(t, m.target, m.to)
}

// A snapshot is a migration to a file.
func TestSnapshot(t *testing.T) {
	for name, scheme := range map[string]string{"file": "file:%s", "exec": "exec:cat > %s"} {
		t.Run(name, func(t *testing.T) {
			g, q := startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo))
			g.WaitSerial(harness.Context(t, limit), "up")
			capability(t, q, "events", "")
			file := filepath.Join(t.TempDir(), "snapshot")
			for range 2 { // who goes on here can move again
				q.Do("migrate", uri(fmt.Sprintf(scheme, file)))
				wait(t, q, "completed")
				status(t, q, "postmigrate")
				q.Do("cont", nil)
				runsOn(t, g, q)
			}
			if info, err := os.Stat(file); err != nil || info.Size() > 16<<20 {
				t.Errorf("%v, %v: most of its RAM is zero", info, err)
			}
			for range 2 { // as often as one likes
				back := "file:" + file
				if name == "exec" {
					back = "exec:cat " + file
				}
				target, to := startIncoming(t, back)
				target.WaitEvent(harness.Context(t, limit), "RESUME")
				runsOn(t, target, to)
			}
		})
	}
}

// A device that was plugged in later is one that the target has to have. While the guest moves,
// devices stay as they are.
func TestMigrateHotplugged(t *testing.T) {
	ports := []string{"-device", "pcie-root-port,id=rp1,chassis=1", "-device", "pcie-root-port,id=rp2,chassis=2"}
	m := newMover(t, ports...)
	rng := map[string]any{"driver": "virtio-rng-pci", "id": "rng1", "bus": "rp1"}
	m.from.Do("device_add", rng)
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.from, "failed")
	var info struct {
		Error string `json:"error-desc"`
	}
	decode(t, m.from.Do("query-migrate", nil), &info)
	if want := "device/pci/0000:00:01.0/00.0: virtio-rng-pci rng1 at the source, not at the target"; !strings.Contains(info.Error, want) {
		t.Errorf("no %q in: %s", want, info.Error)
	}
	runsOn(t, m.source, m.from)
	for ctx := harness.Context(t, limit); ; { // as good as on its command line
		_, err := m.to.Execute("device_add", rng)
		if err == nil {
			break
		}
		if ctx.Err() != nil || !strings.Contains(err.Error(), "not allowed while migrating") { // it is turning the source away
			t.Fatal(err)
		}
	}
	capability(t, m.from, "pause-before-switchover", "")
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.from, "pre-switchover")
	for _, q := range []*harness.QMP{m.from, m.to} {
		fails(t, q, "device_add", map[string]any{"driver": "virtio-rng-pci", "id": "rng2", "bus": "rp2"}, "GenericError: device_add not allowed while migrating")
		fails(t, q, "device_del", map[string]any{"id": "rng1"}, "GenericError: device_del not allowed while migrating")
	}
	fails(t, m.from, "cont", nil, "GenericError: Migration is not finalized yet")
	m.from.Do("migrate-continue", map[string]any{"state": "pre-switchover"})
	wait(t, m.to, "completed")
	runsOn(t, m.target, m.to)
	m.to.Do("device_add", map[string]any{"driver": "virtio-rng-pci", "id": "rng2", "bus": "rp2"})
	m.newTargetOf(t, append(ports, "-device", "virtio-rng-pci,id=rng1,bus=rp1", "-device", "virtio-rng-pci,id=rng2,bus=rp2")...)
	m.from.Do("migrate", uri(m.uri))
	wait(t, m.to, "completed")
	runsOn(t, m.target, m.to)
}

// A vCPU that never leaves the guest by itself, because it halts or spins, holds up nobody.
func TestMigrateBusyOrIdle(t *testing.T) {
	for name, code := range map[string]tiny.Code{"halted": tiny.Halt, "spinning": tiny.Spin} {
		t.Run(name, func(t *testing.T) {
			_, from := startQMP(t, tiny.Kernel(t, code), "-smp", "2")
			path := "unix:" + filepath.Join(shortDir(t), "m")
			_, to := startIncoming(t, path, "-smp", "2")
			capability(t, from, "events", "")
			from.Do("migrate", uri(path))
			wait(t, from, "completed")
			status(t, to, "running")
			to.Do("stop", nil)
			to.Do("cont", nil)
			status(t, to, "running")
		})
	}
}

// baton migrate is all that a person needs.
func TestMigrateCommand(t *testing.T) {
	socket := filepath.Join(shortDir(t), "person")
	m := new(mover)
	m.source, m.from = startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo), "-smp", "2", "-qmp", "unix:"+socket+",server=on,wait=off")
	m.source.WaitSerial(harness.Context(t, limit), "up")
	capability(t, m.from, "events", "")
	m.newTarget(t, "-smp", "2")
	command := func(args ...string) (*exec.Cmd, *strings.Builder) {
		out := new(strings.Builder)
		cmd := exec.Command(harness.Baton(t), append([]string{"migrate", socket}, args...)...)
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, out
	}
	cmd, out := command("unix:/nowhere")
	if cmd.Wait(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(out.String(), "baton: migration failed: ") {
		t.Errorf("exit code %d: %s", cmd.ProcessState.ExitCode(), out)
	}
	wait(t, m.from, "failed")
	cmd, _ = command(m.uri, "pause-before-switchover=on", "max-bandwidth=1G")
	wait(t, m.from, "pre-switchover")
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	wait(t, m.from, "cancelled")
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("cancelled: exit code %d", code)
	}
	runsOn(t, m.source, m.from)
	m.newTarget(t, "-smp", "2")
	cmd, out = command(m.uri, "pause-before-switchover=off")
	if cmd.Wait(); cmd.ProcessState.ExitCode() != 0 || !regexp.MustCompile(`(?m)^completed in \d.*, downtime \d+ ms \(pause `).MatchString(out.String()) {
		t.Errorf("exit code %d: %s", cmd.ProcessState.ExitCode(), out)
	}
	wait(t, m.to, "completed")
	runsOn(t, m.target, m.to)
}
