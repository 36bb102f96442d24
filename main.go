// Baton is a virtual machine monitor for Linux guests on KVM: see `baton help`.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"baton/vmm"

	"golang.org/x/sys/unix"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run is the command; its result is the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	command := "run"
	if len(args) > 0 {
		switch args[0] {
		case "run", "check", "version", "help":
			command, args = args[0], args[1:]
		}
	}
	var err error
	switch command {
	case "run":
		err = start(args, stdout, stderr)
	case "check":
		err = check(args, stdout)
	default:
		err = start(append([]string{"-" + command}, args...), stdout, stderr)
	}
	for _, e := range vmm.Errors(err) {
		text := strings.TrimRight(e.Error(), "\n")
		fmt.Fprintf(stderr, "baton: %s\n", strings.ReplaceAll(text, "\n", "\n       "))
	}
	if err != nil {
		return 1
	}
	return 0
}

func start(args []string, stdout, stderr io.Writer) error {
	inv, err := vmm.ParseArgs(args)
	for _, note := range inv.Notes {
		fmt.Fprintf(stderr, "baton: note: %s\n", note)
	}
	switch {
	case err != nil:
		return err
	case inv.Print != "":
		_, err = io.WriteString(stdout, inv.Print)
		return err
	case inv.PrintConfig:
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(inv.Config)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	_ = ctx
	return fmt.Errorf("not yet")
}

func check([]string, io.Writer) error { return nil }
