package l0

import (
	"os"
	"testing"

	"baton/tests/harness"
)

// A guest moves on and on, 100 times in the long form, and the machine that has it last holds no more
// than the first that it came to.
func TestMigrateAgain(t *testing.T) {
	moves := 10
	if os.Getenv("BATON_LONG") != "" {
		moves = 100
	}
	disk := t.TempDir() + "/disk"
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-drive", "file=" + disk + ",format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0"}
	m := newMover(t, args...)
	var first harness.Held
	for i := range moves {
		m.from.Do("migrate", uri(m.uri))
		wait(t, m.from, "completed")
		wait(t, m.to, "completed")
		runsOn(t, m.target, m.to)
		m.from.Do("quit", nil)
		ends(t, m.source, "host-qmp-quit")
		held := m.target.Holds(m.to, 128)
		if i == 0 {
			first = held
		}
		if leaked := held.Leaked(first); leaked != "" {
			t.Errorf("move %d: %s", i+1, leaked)
		}
		m.newTargetOf(t, args...)
	}
}
