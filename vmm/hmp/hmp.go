// Package hmp is the human monitor: lines of text that a person types, with QEMU's names and
// answers (QEMU's hmp-commands.hx), on top of the commands of QMP.
//
//	telnet, unix, tcp, stdio ──> Converse: line editor ──Do──> Run ──> QMP's commands
//	QMP's human-monitor-command ─────────────────────────────┘
//
// A command here parses its words, has a command of QMP do the work and prints the result.
package hmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Config is what a monitor needs of the machine.
type Config struct {
	// Commands are the names of the commands of QMP that there are. What needs another one
	// is not there.
	Commands []string
	// Execute runs a command of QMP.
	Execute func(command string, args map[string]any) (any, error)
	// Views are subcommands of info besides those that print a result of QMP's.
	Views []View
	// Do runs a function where Execute and the views have to run, and waits for its end. It
	// fails if nothing runs there any more.
	Do func(func()) error
}

// View is a subcommand of info: a text about the machine.
type View struct {
	Name, Help string
	Text       func() string // ends with a newline, unless there is nothing to say
}

// Monitor runs lines of text.
type Monitor struct {
	cfg      Config
	commands []command // sorted, as the next
	infos    []command
}

// command is a row of the table.
type command struct {
	name, alias, params, help string
	qmp                       string // the command of QMP that it is made of, if any
	run                       func(m *Monitor, args []string) (string, error)
}

// New makes a monitor of the commands that the machine can carry out.
func New(c Config) *Monitor {
	m := &Monitor{cfg: c}
	add := func(to *[]command, list []command) {
		for _, cmd := range list {
			if cmd.qmp == "" || slices.Contains(c.Commands, cmd.qmp) {
				*to = append(*to, cmd)
			}
		}
		slices.SortFunc(*to, func(a, b command) int { return strings.Compare(a.name, b.name) })
	}
	for _, v := range c.Views {
		m.infos = append(m.infos, command{name: v.Name, help: v.Help, run: func(*Monitor, []string) (string, error) { return v.Text(), nil }})
	}
	add(&m.infos, slices.Concat(infos, migrationInfos))
	add(&m.commands, slices.Concat(commands(), migration()))
	return m
}

// Run carries out a line, where Config.Do runs functions, and returns its answer. An error is
// part of that, as nobody but a person reads it.
func (m *Monitor) Run(line string) string {
	text, err := m.run(line)
	if err != nil {
		text = err.Error()
	}
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	return text
}

func (m *Monitor) run(line string) (string, error) {
	words, err := Split(line)
	if err != nil || len(words) == 0 {
		return "", err
	}
	c := find(m.commands, words[0])
	if c == nil {
		return "", fmt.Errorf("unknown command: '%s'", words[0])
	}
	args := words[1:]
	if c.name == "info" && len(args) > 0 {
		if c = find(m.infos, args[0]); c == nil {
			return "", fmt.Errorf("unknown command: 'info %s'", args[0])
		}
		args = args[1:]
	}
	var wants, least int
	for _, p := range strings.Fields(c.params) {
		if wants++; p[0] != '[' {
			least++
		}
	}
	if len(args) < least || len(args) > wants {
		return "", fmt.Errorf("usage: %s\nTry \"help %s\" for more information", c.usage(), words[0])
	}
	text, err := c.run(m, args)
	if err != nil {
		return "Error: " + err.Error(), nil
	}
	return text, nil
}

func (c *command) usage() string { return strings.TrimSpace(c.name + " " + c.params) }

func find(list []command, name string) *command {
	i := slices.IndexFunc(list, func(c command) bool { return c.name == name || c.alias != "" && c.alias == name })
	if i < 0 {
		return nil
	}
	return &list[i]
}

// Split splits a line into words. In double quotes a word may have spaces, and a backslash
// stands before a quote, a backslash, or the n of a newline.
func Split(line string) (words []string, err error) {
	var word strings.Builder
	var inWord, quoted bool
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '"' && (quoted || !inWord):
			quoted, inWord = !quoted, true
		case quoted && c == '\\' && i+1 < len(line):
			i++
			at := strings.IndexByte(`"\n`, line[i])
			if at < 0 {
				return nil, fmt.Errorf("unsupported escape code: '\\%c'", line[i])
			}
			word.WriteByte("\"\\\n"[at])
		case !quoted && (c == ' ' || c == '\t' || c == '\r' || c == '\n'):
			if inWord {
				words = append(words, word.String())
			}
			word.Reset()
			inWord = false
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if quoted {
		return nil, errors.New("unterminated string")
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, nil
}

// Complete extends the last word of a line as far as there is one way to. Where there are
// several, it returns them.
func (m *Monitor) Complete(line string) (longer string, choices []string) {
	last := line[strings.LastIndexAny(line, " \t")+1:]
	words := append(strings.Fields(strings.TrimSuffix(line, last)), last)
	list := m.commands
	switch {
	case len(words) == 2 && words[0] == "info":
		list = m.infos
	case len(words) == 1 || len(words) == 2 && (words[0] == "help" || words[0] == "?"):
	default:
		return line, nil
	}
	for _, c := range list {
		if strings.HasPrefix(c.name, last) {
			choices = append(choices, c.name)
		}
	}
	if len(choices) == 0 {
		return line, nil
	}
	common := choices[0]
	for _, c := range choices {
		for !strings.HasPrefix(c, common) {
			common = common[:len(common)-1]
		}
	}
	line = strings.TrimSuffix(line, last) + common
	if len(choices) == 1 {
		return line + " ", nil
	}
	return line, choices
}

// do runs a command of QMP that has nothing to show.
func (m *Monitor) do(command string, args map[string]any) (string, error) {
	_, err := m.cfg.Execute(command, args)
	return "", err
}

// onOff reads a word that says on or off.
func onOff(word string) (bool, error) {
	if word != "on" && word != "off" {
		return false, errors.New("want 'on' or 'off'")
	}
	return word == "on", nil
}

// ask runs a query of QMP and reads the part of its result that T has.
func ask[T any](m *Monitor, query string) (v T, err error) {
	result, err := m.cfg.Execute(query, nil)
	if err != nil {
		return v, err
	}
	text, err := json.Marshal(result)
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(text, &v)
}
