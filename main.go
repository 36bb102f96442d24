// Baton is a virtual machine monitor for Linux guests on KVM: see `baton help`.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"

	"baton/vmm"

	"golang.org/x/sys/unix"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run is the command; its result is the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	command := "run"
	if len(args) > 0 && slices.Contains([]string{"run", "check", "version", "help"}, args[0]) {
		command, args = args[0], args[1:]
	}
	var err error
	switch command {
	case "check":
		err = check(args, stdout)
	case "version", "help":
		err = start([]string{"-" + command}, stdout, stderr)
	default:
		err = start(args, stdout, stderr)
	}
	for _, e := range vmm.Errors(err) {
		fmt.Fprintf(stderr, "baton: %s\n", strings.ReplaceAll(e.Error(), "\n", "\n       "))
	}
	if err != nil {
		return 1
	}
	return 0
}

// start is `baton run`.
func start(args []string, stdout, stderr io.Writer) error {
	daemon := vmm.IsDaemon()
	inv, err := vmm.ParseArgs(args)
	for _, note := range inv.Notes {
		if !daemon { // who started it has said so
			fmt.Fprintf(stderr, "baton: note: %s\n", note)
		}
	}
	switch {
	case err != nil:
		return err
	case inv.Print != "":
		_, err = io.WriteString(stdout, inv.Print)
		return err
	case inv.PrintConfig:
		return printJSON(stdout, inv.Config)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal does not wait for the clean end
	if inv.Config.Daemonize && !daemon {
		return vmm.Daemonize(ctx, append([]string{"run"}, args...))
	}
	return vmm.Serve(ctx, inv.Config)
}

// check is `baton check`.
func check(args []string, stdout io.Writer) error {
	findings := vmm.CheckHost()
	write := vmm.WriteFindings
	if slices.Equal(args, []string{"-json"}) {
		write = func(w io.Writer, f []vmm.Finding) error { return printJSON(w, f) }
	} else if len(args) > 0 {
		return fmt.Errorf("check: unknown argument %q\nusage: baton check [-json]", args[0])
	}
	if err := write(stdout, findings); err != nil {
		return err
	}
	if slices.ContainsFunc(findings, func(f vmm.Finding) bool { return f.Status == vmm.StatusBad }) {
		return errors.New("this host cannot run a stock Linux guest\nsee the lines with !! above")
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
