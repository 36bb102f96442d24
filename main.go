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
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"baton/vmm"
	"baton/vmm/client"
	"baton/vmm/timeline"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run is the command; its result is the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	command := "run"
	if len(args) > 0 && slices.Contains(vmm.Commands, args[0]) {
		command, args = args[0], args[1:]
	}
	var err error
	switch command {
	case "check":
		err = check(args, stdout)
	case "completion":
		if !slices.Equal(args, []string{"bash"}) {
			err = errors.New("completion: which shell?\nusage: baton completion bash")
			break
		}
		_, err = io.WriteString(stdout, vmm.BashCompletion())
	case "device":
		err = device(args, stdout)
	case "events":
		err = events(args, stdout)
	case "migrate":
		err = migrate(args, stdout)
	case "monitor":
		err = monitor(args, stdout)
	case "version", "help":
		err = start([]string{"-" + command}, stdout, stderr)
	default:
		err = start(args, stdout, stderr)
	}
	if errors.Is(err, vmm.ErrDaemon) || errors.Is(err, client.ErrFailed) { // it has said why
		return 1
	}
	for _, e := range vmm.Errors(err) {
		fmt.Fprintf(stderr, "baton: %s\n", strings.ReplaceAll(e.Error(), "\n", "\n       "))
	}
	switch {
	case errors.Is(err, client.ErrCancelled):
		return 130 // 128 and SIGINT, as shells have it
	case err != nil:
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
	ctx, stop := untilSignal()
	defer stop()
	if inv.Config.Daemonize && !daemon {
		return vmm.Daemonize(ctx, append([]string{"run"}, args...))
	}
	// The thread of a vCPU is in the kernel for most of the time, and has one of Go's processors there until somebody
	// takes it away: who works finds as many as without.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + min(max(inv.Config.SMP, 0), vmm.MaxCPUs))
	return vmm.Serve(ctx, inv.Config)
}

// untilSignal returns a context that ends with the first signal that asks for the end; a
// second one does not wait for that to be a clean one.
func untilSignal() (ctx context.Context, stop func()) {
	ctx, stop = signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// migrate is `baton migrate`.
func migrate(args []string, stdout io.Writer) error {
	if len(args) < 2 || strings.HasPrefix(args[0], "-") {
		return errors.New("migrate: what, and where to?\nusage: baton migrate SOCKET URI [NAME=VALUE...]; SOCKET is that of -qmp, " +
			"URI what -incoming says there, such as tcp:HOST:PORT\nNAME=VALUE are parameters and capabilities, such as max-bandwidth=1G or multifd=on")
	}
	ctx, stop := untilSignal()
	defer stop()
	out, ok := stdout.(*os.File)
	return client.Migrate(ctx, args[0], args[1], args[2:], stdout, ok && term.IsTerminal(int(out.Fd())))
}

// monitor is `baton monitor`.
func monitor(args []string, stdout io.Writer) error {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		return errors.New("monitor: which socket?\nusage: baton monitor SOCKET [COMMAND...]; SOCKET is that of -qmp")
	}
	ctx, stop := untilSignal()
	defer stop()
	return client.Monitor(ctx, args[0], strings.Join(args[1:], " "), os.Stdin, stdout)
}

// device is `baton device`.
func device(args []string, stdout io.Writer) error {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		return errors.New("device: which socket?\nusage: baton device SOCKET [add DRIVER,KEY=VALUE... | del ID [surprise]]; SOCKET is that of -qmp")
	}
	ctx, stop := untilSignal()
	defer stop()
	return client.Device(ctx, args[0], args[1:], stdout)
}

// events is `baton events`.
func events(args []string, stdout io.Writer) error {
	if len(args) > 0 && strings.TrimLeft(args[0], "-") == "timeline" {
		return drawTimeline(args[1:], stdout)
	}
	asJSON := slices.Contains(args, "-json")
	args = slices.DeleteFunc(slices.Clone(args), func(a string) bool { return a == "-json" })
	if len(args) != 1 || strings.HasPrefix(args[0], "-") {
		return errors.New("events: of which machine?\nusage: baton events [-json] SOCKET|FILE; SOCKET is that of -qmp, FILE that of -event-log\n" +
			"       baton events -timeline FILE FILE [NAME=SERIES...] > OUT.html; the logs of source and target, SERIES has lines of TIME,VALUE")
	}
	ctx, stop := untilSignal()
	defer stop()
	return client.Events(ctx, args[0], asJSON, stdout)
}

// drawTimeline is `baton events -timeline`.
func drawTimeline(args []string, stdout io.Writer) error {
	var act timeline.Act
	for _, arg := range args {
		name, file, isSeries := strings.Cut(arg, "=")
		if !isSeries {
			file = arg
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		if isSeries {
			points, err := timeline.ReadPoints(f)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			act.Series = append(act.Series, timeline.Series{Name: name, Points: points})
			continue
		}
		events, err := timeline.ReadEvents(f)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		act.Sides = append(act.Sides, timeline.Side{Name: filepath.Base(file), Events: events})
	}
	if len(act.Sides) != 2 {
		return fmt.Errorf("events -timeline: %d event logs, want two: that of the source, then that of the target", len(act.Sides))
	}
	return timeline.Write(stdout, timeline.Page{Title: "A guest's way", Acts: []timeline.Act{act}})
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
