// Package harness is what the scenario suites share: guests, the network around them, the
// peer at the other end of the wire, and SR-IOV.
//
//	netns peer          the host under test (L1, or this host with BATON_TEST=host)
//	┌──────────┐  wire  ┌─────┐   ┌────────┐   ┌─────┐   ┌────────────────────┐
//	│ Peer     ├────────┤ PF  ├───┤ Bridge ├───┤ Tap ├───┤ Guest: VMM process │
//	└──────────┘        │  VF ├───────────vfio-pci───────┤  events, serial,   │
//	                    └─────┘                          │  agent             │
//	                                                     └────────────────────┘
//
// Everything that a function here sets up is undone when its test ends, in reverse order,
// whether the test passed or not. Nothing sleeps: each wait is for an event, up to a deadline.
package harness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Environment variables by which the runner (tests/nested) speaks to a suite.
const (
	EnvTest      = "BATON_TEST"      // where the suite runs: nested or host
	EnvBaton     = "BATON_BIN"       // the program under test
	EnvRepo      = "BATON_REPO"      // root of the repository, whose .cache holds the images
	EnvArtifacts = "BATON_ARTIFACTS" // a folder for logs, kept if the suite fails
	EnvHost      = "BATON_HOST"      // of two nested hosts, which run the same suite: 0 or 1
	EnvPFs       = "BATON_PFS"       // on a host: names of the SR-IOV NICs to use, by comma
)

// Main is the TestMain of every suite, m its *testing.M. It runs nothing on a machine that has not been set
// up as a host under test.
func Main(m interface{ Run() int }) {
	switch where := os.Getenv(EnvTest); where {
	case "nested", "host":
		os.Exit(m.Run())
	case "":
		fmt.Printf("not run: needs a host with KVM, vhost-net and SR-IOV\nrun it in the nested host by `go run ./tests/nested run PKG`, or here with %s=host\n", EnvTest)
	default:
		fmt.Printf("%s=%s: must be nested or host\n", EnvTest, where)
		os.Exit(2)
	}
}

// Nested says whether the host under test is the nested host.
func Nested() bool { return os.Getenv(EnvTest) == "nested" }

// Context returns a context that ends after d, or with the test.
func Context(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("nothing for %v", d))
	t.Cleanup(cancel)
	return ctx
}

// Baton returns the program under test.
func Baton(t testing.TB) string {
	t.Helper()
	bin := os.Getenv(EnvBaton)
	if bin == "" {
		t.Fatalf("%s is not set", EnvBaton)
	}
	return bin
}

// Image returns the path of a guest image that `make images` built.
func Image(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(os.Getenv(EnvRepo), ".cache", "images", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("image: %v\n`make images` builds it", err)
	}
	return path
}

// Artifacts returns a folder for what a test wants to be kept if it fails.
func Artifacts(t testing.TB) string {
	t.Helper()
	base := os.Getenv(EnvArtifacts)
	if base == "" {
		return t.TempDir()
	}
	dir := filepath.Join(base, strings.ReplaceAll(t.Name(), "/", "_"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// undo runs f when the test ends and reports its error as the test's: what cannot be taken
// back would be found by the next test.
func undo(t testing.TB, what string, f func() error) {
	t.Cleanup(func() {
		if err := f(); err != nil {
			t.Errorf("undo %s: %v", what, err)
		}
	})
}

// must ends the test if what it was about to do failed.
func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
