package l0

import (
	"testing"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// A machine that waits for a guest needs no kernel, and starts nothing.
func TestIncomingDefer(t *testing.T) {
	g, q := startIncoming(t, "defer")
	status(t, q, "inmigrate")
	q.Do("cont", nil)
	q.Do("stop", nil)
	status(t, q, "inmigrate")
	heard(t, q, "")
	q.Do("system_reset", nil)
	heard(t, q, `RESET {"guest":false,"reason":"host-qmp-system-reset"}`)
	status(t, q, "inmigrate")
	q.Do("quit", nil)
	ends(t, g, "host-qmp-quit")
	if got := g.Serial.String(); got != "" {
		t.Errorf("it ran: %q", got)
	}
}

func TestGetFD(t *testing.T) {
	g, q := startQMP(t, tiny.Kernel(t, tiny.Halt))
	fails(t, q, "getfd", map[string]any{"fdname": "x"}, "GenericError: No file descriptor supplied via SCM_RIGHTS")
	fails(t, q, "closefd", map[string]any{"fdname": "x"}, "GenericError: File descriptor named 'x' not found")
	q.Do("quit", nil)
	ends(t, g, "host-qmp-quit")
}

// startIncoming starts a machine that a guest is to come to.
func startIncoming(t *testing.T, uri string, args ...string) (*harness.Guest, *harness.QMP) {
	t.Helper()
	path := shortDir(t) + "/qmp"
	g := harness.Start(t, harness.GuestConfig{Name: "target", NoAgent: true, Args: append(args, "-incoming", uri, "-qmp", "unix:"+path+",server=on,wait=off")})
	return g, harness.DialQMP(t, harness.Context(t, limit), path)
}
