// Package proto is how a test speaks with the agent in its guest: one JSON object per line
// each way, over a byte stream such as a virtio-serial port.
//
//	-> {"id":1,"argv":["uname","-r"],"timeout_ms":1000}
//	<- {"id":1,"exit":0,"stdout":"6.12.0\n","stderr":"","error":""}
//
// Requests run at the same time, so answers come in any order; id tells them apart.
package proto

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"sync"
	"time"
)

// MaxLine is the longest request in bytes; a longer one is answered by an error.
const MaxLine = 16 << 20

// Request asks the agent to run a program, or a verb of its own when Argv[0] begins with @.
type Request struct {
	ID        int64    `json:"id"`
	Argv      []string `json:"argv"`
	Stdin     string   `json:"stdin,omitempty"`
	TimeoutMS int64    `json:"timeout_ms,omitempty"` // 0: no limit
}

// Response is the outcome. Error is set when the program could not be run, or was ended at
// its time limit; a program's own failure is Exit alone.
type Response struct {
	ID     int64  `json:"id"`
	Exit   int    `json:"exit"`
	Stdout string `json:"stdout"`
	Stderr string `json:"stderr"`
	Error  string `json:"error"`

	// After runs once the response has been written: for what leaves nobody to answer.
	After func() `json:"-"`
}

// Serve answers the requests that arrive on rw, until reading fails (io.EOF: nil), and
// waits for those under way.
func Serve(rw io.ReadWriter, run func(context.Context, Request) Response) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	var mu sync.Mutex
	reply := func(r Response) {
		b, err := json.Marshal(r)
		if err != nil { // cannot happen: plain fields only
			panic(err)
		}
		mu.Lock()
		defer mu.Unlock()
		_, _ = rw.Write(append(b, '\n')) // a lost peer shows on the next read
		if r.After != nil {
			r.After()
		}
	}
	in := bufio.NewReaderSize(rw, 64<<10)
	for {
		line, tooLong, err := readLine(in)
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		var req Request
		switch {
		case len(bytes.TrimSpace(line)) == 0 && !tooLong:
		case tooLong:
			reply(Response{Exit: -1, Error: "request: longer than 16 MiB"})
		default:
			if err := json.Unmarshal(line, &req); err != nil {
				reply(Response{ID: req.ID, Exit: -1, Error: "request: " + err.Error()})
			} else if len(req.Argv) == 0 {
				reply(Response{ID: req.ID, Exit: -1, Error: "request: argv is empty"})
			} else {
				wg.Go(func() {
					ctx, cancel := context.Background(), context.CancelFunc(func() {})
					if req.TimeoutMS > 0 {
						ctx, cancel = context.WithTimeout(ctx, time.Duration(req.TimeoutMS)*time.Millisecond)
					}
					defer cancel()
					r := run(ctx, req)
					r.ID = req.ID
					reply(r)
				})
			}
		}
	}
}

// readLine returns the next line; of one longer than MaxLine it keeps nothing.
func readLine(in *bufio.Reader) (line []byte, tooLong bool, err error) {
	for {
		part, err := in.ReadSlice('\n')
		if err != nil && err != bufio.ErrBufferFull {
			return nil, false, err
		}
		if tooLong = tooLong || len(line)+len(part) > MaxLine; tooLong {
			line = nil
		} else {
			line = append(line, part...)
		}
		if err == nil {
			return line, tooLong, nil
		}
	}
}
