package migrate

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"baton/tests/harness"
)

// Whatever dies on the way, the guest runs in one place or in none: in this one, with all that
// it had, unless its own process was killed. And then it moves all the same.
func TestFaults(t *testing.T) {
	w := newWorld(t)
	m := w.boot()
	w.load(m, 16, "2", "0.5")
	for name, fault := range map[string]func(*world, *machine, *machine){
		"target killed":        func(w *world, m, to *machine) { to.Kill() },
		"target out of memory": (*world).starve,
		"network cut": func(w *world, m, to *machine) {
			w.hosts[1].IP("link", "set", "eth0", "down")
			w.t.Cleanup(func() { w.hosts[1].IP("link", "set", "eth0", "up") })
		},
		"cancelled": func(w *world, m, to *machine) { m.qmp.Do("migrate_cancel", nil) },
	} {
		for _, moment := range []string{"active", "pre-switchover"} {
			if name == "target out of memory" && moment != "active" {
				continue // it has all of the guest
			}
			t.Run(name+", "+moment, func(t *testing.T) { w.in(t).fault(m.in(t), moment, fault) })
		}
	}
	m = w.move(m, 1, w.uri(1))
	w.check(m)
	t.Run("source killed", func(t *testing.T) { w.in(t).sourceKilled(m.in(t)) })
	w.fsckKilled()
}

// in is the same world for a subtest.
func (w *world) in(t *testing.T) *world {
	v := *w
	v.t = t
	return &v
}

func (m *machine) in(t *testing.T) *machine {
	v := *m
	v.Guest = m.Guest.In(t)
	return &v
}

// begin begins a migration to a host and waits for the moment. One that is to be active is slow.
func (w *world) begin(m *machine, host int, moment string) (to *machine) {
	w.t.Helper()
	to = w.start(host, "-incoming", w.uri(host))
	for _, q := range []*harness.QMP{m.qmp, to.qmp} {
		q.Do("migrate-set-parameters", map[string]any{"stall-timeout": 5000, "max-bandwidth": map[string]int{"active": 4 * mib, "pre-switchover": 1 << 30}[moment]})
	}
	m.qmp.Do("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "pause-before-switchover", "state": true}}})
	m.qmp.Do("migrate", map[string]any{"uri": w.uri(host)})
	m.wait(w.t, moment)
	return to
}

func (w *world) fault(m *machine, moment string, fault func(*world, *machine, *machine)) {
	to := w.begin(m, 1, moment)
	fault(w, m, to)
	if moment == "pre-switchover" {
		_, _ = m.qmp.Execute("migrate-continue", map[string]any{"state": moment}) // it may be over
	}
	for status := ""; status != "failed" && status != "cancelled"; {
		status = m.next(w.t)
		if status == "completed" {
			w.t.Fatal("the migration completed")
		}
	}
	w.t.Logf("it says: %s", m.migration(w.t).Error)
	if got := string(m.qmp.Do("query-status", nil)); !strings.Contains(got, "running") {
		w.t.Errorf("source: %s", got)
	}
	if code := to.Wait(harness.Context(w.t, limit)); code == 0 {
		w.t.Error("the target ended as if all was well")
	}
	if strings.Contains(to.Events.String(), `"RESUME"`) {
		w.t.Error("the guest has run on the target")
	}
	w.check(m)
	m.qmp.Do("migrate-set-parameters", map[string]any{"stall-timeout": 60000, "max-bandwidth": 1 << 30})
	m.qmp.Do("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "pause-before-switchover", "state": false}}})
}

// starve has the target get no more memory than a few MiB, for which the kernel ends it.
func (w *world) starve(_, to *machine) {
	w.t.Helper()
	const root, group = "/sys/fs/cgroup", "/sys/fs/cgroup/starved"
	w.t.Cleanup(func() {
		to.Kill()
		if err := os.Remove(group); err != nil {
			w.t.Error(err)
		}
	})
	write := func(file, text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	write(root+"/cgroup.subtree_control", "+memory")
	if err := os.Mkdir(group, 0o700); err != nil {
		w.t.Fatal(err)
	}
	write(group+"/memory.max", "8M")
	write(group+"/cgroup.procs", fmt.Sprint(to.PID()))
}

// sourceKilled: the guest dies with its process; the target has not all of it, and does not start.
func (w *world) sourceKilled(m *machine) {
	to := w.begin(m, 0, "pre-switchover")
	m.Kill()
	if code := to.Wait(harness.Context(w.t, limit)); code != 1 {
		w.t.Errorf("target: exit code %d", code)
	}
	if strings.Contains(to.Events.String(), `"RESUME"`) {
		w.t.Error("the guest has run on the target")
	}
	w.t.Logf("the target says: %s", to.Stderr)
}
