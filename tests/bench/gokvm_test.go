package bench

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
)

// TestGokvm boots the kernel with gokvm. That it cannot is a result too.
func TestGokvm(t *testing.T) {
	const limit = time.Minute
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, fmt.Errorf("not in %v", limit))
	defer cancel()
	console := harness.NewLog()
	cmd := exec.CommandContext(ctx, tool(t, "gokvm"), "boot", "-m", fmt.Sprintf("%dM", guestMiB), "-c", "1",
		"-k", harness.Image(t, "vmlinuz"), "-i", harness.Image(t, "test.cpio"), "-p", cmdline)
	cmd.Stdout, cmd.Stderr = console, console
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		console.Close(fmt.Errorf("it ended: %v", cmd.Wait()))
	}()
	_, err := console.Wait(ctx, 0, "^BATON-READY")
	took := time.Since(start).Seconds()
	cancel()
	<-ended
	switch last := strings.TrimSpace(console.Tail(5)); {
	case err == nil:
		results.notef("gokvm boots the same kernel and initrd, without disk and network, in %.1f s", took)
	default:
		results.notef("gokvm does not boot this kernel: %v; its last words:\n%s", err, last)
	}
}
