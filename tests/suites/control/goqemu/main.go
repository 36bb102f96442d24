// Command goqemu is a small shell on DigitalOcean's go-qemu, a client of QMP that knows nothing
// of baton:
//
//	goqemu SOCKET
//
// Each line of its input is a command with its arguments, KEY=VALUE with a JSON value or a
// text, and gets its reply as one line; what the library has a method for is called by that:
// commands, version, status, pci, blocks, powerdown, reset. Events are lines that start with
// "event".
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/digitalocean/go-qemu/qemu"
	"github.com/digitalocean/go-qemu/qmp"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Println("goqemu:", err)
		os.Exit(1)
	}
}

func run(socket string) error {
	monitor, err := qmp.NewSocketMonitor("unix", socket, 10*time.Second)
	if err != nil {
		return err
	}
	if err := monitor.Connect(); err != nil {
		return err
	}
	domain, err := qemu.NewDomain(monitor, "vm")
	if err != nil {
		return err
	}
	events, done, err := domain.Events()
	if err != nil {
		return err
	}
	defer close(done)
	go func() {
		for e := range events {
			data, _ := json.Marshal(e.Data) // came as JSON
			fmt.Printf("event %s %s\n", e.Event, data)
		}
	}()
	fmt.Println("connected to", monitor.Version)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		result, err := execute(domain, strings.Fields(lines.Text()))
		if err != nil {
			fmt.Println("error", err)
			continue
		}
		text, err := json.Marshal(result)
		if err != nil {
			return err
		}
		fmt.Println("done", string(text))
	}
	return nil
}

func execute(d *qemu.Domain, words []string) (any, error) {
	switch name := strings.Join(words, " "); name {
	case "commands":
		return d.Commands()
	case "version":
		return d.Version()
	case "status":
		s, err := d.Status()
		return s.String(), err
	case "pci":
		return d.PCIDevices()
	case "blocks":
		return d.BlockDevices()
	case "powerdown":
		return nil, d.SystemPowerdown()
	case "reset":
		return nil, d.SystemReset()
	}
	args := map[string]any{}
	for _, word := range words[1:] {
		key, value, _ := strings.Cut(word, "=")
		if args[key] = json.RawMessage(value); !json.Valid([]byte(value)) {
			args[key] = value
		}
	}
	reply, err := d.Run(qmp.Command{Execute: words[0], Args: args})
	return json.RawMessage(reply), err
}
