// Command nettool is the host's end of the agent's @tcp-serve and @tcp-send.
package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"baton/tests/nettool"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "nettool:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		l, err := net.Listen("tcp", args[1])
		if err != nil {
			return err
		}
		fmt.Println(l.Addr()) // for callers that asked for port 0
		return nettool.Serve(l)
	case len(args) == 4 && args[0] == "send":
		streams, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		d, err := time.ParseDuration(args[3] + "s")
		if err != nil {
			return err
		}
		r, err := nettool.Send(args[1], streams, d)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	return fmt.Errorf("usage: nettool serve ADDR | nettool send ADDR STREAMS SECONDS")
}
