package main

import (
	"bytes"
	"os"
	"os/exec"
	"slices"
	"testing"
)

func TestFind(t *testing.T) {
	or := []byte{0x81, 0x8b, 1, 2, 3, 4, 0, 1, 0, 0}
	code := slices.Concat([]byte{0x90}, or, []byte{0x41}, or, []byte{0x81, 0xa3}, or)
	if got, want := find(code, setVIRQ), []int{1, len(code) - len(or)}; !slices.Equal(got, want) {
		t.Errorf("found at %v, want %v: one has a prefix", got, want)
	}
	if got := find(code, setIndex); got != nil {
		t.Errorf("found %v", got)
	}
}

// TestCorrectTCG corrects the QEMU that is installed: three instructions of it, once.
func TestCorrectTCG(t *testing.T) {
	path, err := exec.LookPath(qemu)
	if err != nil {
		t.Skip("no QEMU to look at")
	}
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	code := bytes.Clone(was)
	corrected, err := correctTCG(code)
	version, verr := exec.Command(path, "--version").Output()
	switch {
	case verr != nil:
		t.Fatal(verr)
	case err != nil && bytes.Contains(version, []byte("version 10.0.2 ")): // its code is known
		t.Fatalf("%s: %v", path, err)
	case err != nil:
		t.Logf("%s: corrected %v; %v", version, corrected, err)
		return
	}
	var runs, last int
	for i := range code {
		if code[i] == was[i] {
			continue
		}
		if runs == 0 || i-last > 10 {
			runs++
		}
		last = i
	}
	if runs != 3 || len(code) != len(was) {
		t.Errorf("%d places differ, want 3", runs)
	}
	if corrected, err := correctTCG(code); corrected || err == nil {
		t.Error("corrected twice")
	}
	if corrected, err := correctTCG(was[:1<<16]); corrected || err == nil {
		t.Error("half a file is accepted")
	}
}
