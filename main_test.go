package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"baton": main})
}

// TestCommandLine runs the scripts: what baton prints, and its exit status, for command
// lines that need no KVM.
func TestCommandLine(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "tests/cli", RequireExplicitExec: true})
}

func TestPrefix(t *testing.T) {
	if _, err := os.Stat("tests/cli"); err != nil {
		t.Fatal(err) // testscript takes a missing folder for an empty one
	}
}
