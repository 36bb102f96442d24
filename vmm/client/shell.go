package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// Monitor runs the command, if there is one, else lines of in: with an editor if that is a
// terminal. Events are shown between them. ErrFailed is for a command that has failed, or
// any of a script's.
func Monitor(ctx context.Context, socket, command string, in *os.File, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	interactive := command == "" && term.IsTerminal(int(in.Fd()))
	var screen io.Writer = out
	var t *term.Terminal
	if interactive {
		t = term.NewTerminal(struct {
			io.Reader
			io.Writer
		}{in, out}, "(baton) ")
		if columns, rows, err := term.GetSize(int(in.Fd())); err == nil && columns > 0 {
			_ = t.SetSize(columns, rows)
		}
		screen = t
	}
	c, err := Dial(ctx, socket, func(event json.RawMessage) {
		if interactive {
			fmt.Fprintln(screen, line(event))
		}
	})
	if err != nil {
		return err
	}
	next := bufio.NewScanner(in)
	readLine := func() (string, error) {
		if next.Scan() {
			return next.Text(), nil
		}
		return "", errors.Join(next.Err(), io.EOF)
	}
	if command != "" {
		readLine = func() (text string, err error) {
			if text, command = command, ""; text == "" {
				err = io.EOF
			}
			return text, err
		}
	} else if interactive {
		saved, err := term.MakeRaw(int(in.Fd()))
		if err != nil {
			return err
		}
		defer func() { _ = term.Restore(int(in.Fd()), saved) }()
		t.AutoCompleteCallback = c.completer()
		readLine = t.ReadLine
		fmt.Fprintln(screen, "a line of HMP, such as help, or of QMP, such as {\"execute\":\"query-commands\"}; Ctrl-D ends this")
	}
	var failed error
	for {
		request, err := readLine()
		if errors.Is(err, io.EOF) {
			return failed
		} else if err != nil && !errors.Is(err, term.ErrPasteIndicator) {
			return err
		}
		text, err := c.Run(request)
		if _, werr := io.WriteString(screen, text); werr != nil {
			return werr
		}
		switch {
		case err == nil:
		case errors.Is(err, ErrFailed) && !interactive:
			failed = err
		case !errors.Is(err, ErrFailed):
			return fmt.Errorf("%s: the machine has ended, or has closed the connection (%w)", socket, err)
		}
	}
}

// completer completes the names that the monitor's help has.
func (c *Conn) completer() func(string, int, rune) (string, int, bool) {
	var names []string
	for _, list := range []string{"help", "info"} {
		text, _ := c.human(list)
		for row := range strings.Lines(text) {
			words := strings.Fields(strings.SplitN(row, " -- ", 2)[0])
			name, _, _ := strings.Cut(strings.Join(words[:min(len(words), 1)], ""), "|")
			if list == "info" && len(words) > 1 {
				name += " " + words[1]
			}
			names = append(names, name)
		}
	}
	return func(line string, pos int, key rune) (string, int, bool) {
		if key != '\t' || pos == 0 {
			return "", 0, false
		}
		longer := ""
		for _, n := range names {
			switch {
			case !strings.HasPrefix(n, line[:pos]):
			case longer == "":
				longer = n
			default:
				for !strings.HasPrefix(n, longer) {
					longer = longer[:len(longer)-1]
				}
			}
		}
		if longer == "" {
			return "", 0, false
		}
		return longer + line[pos:], len(longer), true
	}
}

// line is an event for people.
func line(event json.RawMessage) string {
	var e struct {
		Event     string
		Data      json.RawMessage
		Timestamp struct{ Seconds, Microseconds int64 }
	}
	if err := json.Unmarshal(event, &e); err != nil {
		return string(event)
	}
	at := time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*1000)
	return strings.TrimSpace(fmt.Sprintf("%s %s %s", at.Format("15:04:05.000000"), e.Event, e.Data))
}

// poll is how often a file is looked at for what was added.
const poll = 100 * time.Millisecond

// Events writes the events of a QMP socket until the machine ends, or those of a file that
// -event-log writes until ctx ends: a line each, for people or of JSON.
func Events(ctx context.Context, source string, asJSON bool, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var failed error
	show := func(event json.RawMessage) {
		text := line(event)
		if asJSON {
			var b bytes.Buffer
			failed = errors.Join(failed, json.Compact(&b, event))
			text = b.String()
		}
		if _, err := fmt.Fprintln(out, text); err != nil {
			failed = err
			cancel()
		}
	}
	if info, err := os.Stat(source); err == nil && info.Mode().Type() != os.ModeSocket {
		f, err := os.Open(source)
		if err != nil {
			return err
		}
		defer f.Close()
		in := bufio.NewReader(f)
		var text []byte
		for ctx.Err() == nil {
			part, err := in.ReadBytes('\n')
			text = append(text, part...)
			switch {
			case err == nil && json.Valid(text):
				show(text)
				text = nil
			case err == nil:
				return fmt.Errorf("%s: not an event: %q", source, text)
			case err != io.EOF:
				return err
			case !info.Mode().IsRegular(): // the end of a pipe is one
				return failed
			default:
				select {
				case <-time.After(poll):
				case <-ctx.Done():
				}
			}
		}
		return failed
	}
	c, err := Dial(ctx, source, show)
	if err != nil {
		return err
	}
	<-c.replies // there are none: until it is closed
	return failed
}
