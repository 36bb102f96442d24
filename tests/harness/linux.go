package harness

import (
	"context"
	"strings"
	"testing"
)

// Linux returns the options that boot a stock kernel with the tests' image; words are added
// to its command line.
func Linux(t testing.TB, words ...string) []string {
	t.Helper()
	cmdline := strings.Join(append([]string{"console=ttyS0 quiet panic=-1"}, words...), " ")
	return []string{"-kernel", Image(t, "vmlinuz"), "-initrd", Image(t, "test.cpio"), "-append", cmdline}
}

// Sh runs a script in the guest and returns what it prints, without the last newline; if it
// fails, or any command of it, the test ends.
func (g *Guest) Sh(ctx context.Context, script string) string {
	g.t.Helper()
	return strings.TrimSuffix(g.Output(ctx, "sh", "-ec", script), "\n")
}
