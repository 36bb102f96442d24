package harness

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Linux returns the options that boot a stock kernel with the tests' image; words are added
// to its command line.
func Linux(t testing.TB, words ...string) []string {
	t.Helper()
	return boot(t, "", words)
}

// Linux61 is Linux with Debian 12's own kernel. The test is skipped on another release, where
// there is none.
func Linux61(t testing.TB, words ...string) []string {
	t.Helper()
	release, err := os.ReadFile("/etc/os-release")
	must(t, "release", err)
	if !strings.Contains(string(release), "VERSION_CODENAME=bookworm") {
		t.Skip("Linux 6.1 is Debian 12's: this is another release")
	}
	return boot(t, "6.1", words)
}

func boot(t testing.TB, images string, words []string) []string {
	t.Helper()
	cmdline := strings.Join(append([]string{"console=ttyS0 quiet panic=-1"}, words...), " ")
	return []string{"-kernel", Image(t, filepath.Join(images, "vmlinuz")), "-initrd", Image(t, filepath.Join(images, "test.cpio")), "-append", cmdline}
}

// Sh runs a script in the guest and returns what it prints, without the last newline; if it
// fails, or any command of it, the test ends.
func (g *Guest) Sh(ctx context.Context, script string) string {
	g.t.Helper()
	return strings.TrimSuffix(g.Output(ctx, "sh", "-ec", script), "\n")
}
