package harness

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"time"
)

// AgentPort is the name of the virtio-serial port on which the agent in the guest listens.
const AgentPort = "org.baton.agent"

// A Result is what a program in the guest left.
type Result struct {
	Exit   int
	Stdout string
	Stderr string
}

// An agent runs programs in a guest: one JSON value a line each way, answers in any order.
type agent struct {
	conn net.Conn

	// write is apart from mu: a guest that writes an answer before it reads on must find a reader.
	write sync.Mutex

	mu      sync.Mutex
	id      int64
	waiting map[int64]chan agentResponse
	broken  error
}

type agentRequest struct {
	ID        int64    `json:"id"`
	Argv      []string `json:"argv"`
	Stdin     string   `json:"stdin,omitempty"`
	TimeoutMS int64    `json:"timeout_ms,omitempty"`
}

type agentResponse struct {
	ID     int64  `json:"id"`
	Exit   int    `json:"exit"`
	Stdout string `json:"stdout"`
	Stderr string `json:"stderr"`
	Error  string `json:"error"`
}

func newAgent(conn net.Conn) *agent {
	a := &agent{conn: conn, waiting: map[int64]chan agentResponse{}}
	go a.receive()
	return a
}

func (a *agent) receive() {
	dec := json.NewDecoder(bufio.NewReader(a.conn))
	for {
		var r agentResponse
		err := dec.Decode(&r)
		a.mu.Lock()
		if err != nil {
			if a.broken == nil {
				a.broken = fmt.Errorf("agent: %w", err)
			}
			for _, w := range a.waiting {
				close(w)
			}
			a.mu.Unlock()
			return
		}
		// A response that nobody waits for any more is late, after its context ended.
		if w := a.waiting[r.ID]; w != nil {
			w <- r
			delete(a.waiting, r.ID)
		}
		a.mu.Unlock()
	}
}

// run runs argv in the guest. The guest gets the deadline of ctx as its own time limit.
func (a *agent) run(ctx context.Context, stdin string, argv []string) (Result, error) {
	req := agentRequest{Argv: argv, Stdin: stdin}
	if d, ok := ctx.Deadline(); ok {
		req.TimeoutMS = max(1, time.Until(d).Milliseconds())
	}
	answer := make(chan agentResponse, 1)
	a.mu.Lock()
	if a.broken != nil {
		a.mu.Unlock()
		return Result{}, a.broken
	}
	a.id++
	req.ID = a.id
	a.waiting[req.ID] = answer
	a.mu.Unlock()
	if err := a.send(ctx, req); err != nil {
		return Result{}, err
	}
	select {
	case r, ok := <-answer:
		if !ok {
			return Result{}, a.broken
		}
		if r.Error != "" {
			return Result{r.Exit, r.Stdout, r.Stderr}, fmt.Errorf("agent: %v: %s", argv, r.Error)
		}
		return Result{r.Exit, r.Stdout, r.Stderr}, nil
	case <-ctx.Done():
		a.mu.Lock()
		delete(a.waiting, req.ID)
		a.mu.Unlock()
		return Result{}, fmt.Errorf("agent: %v: %w", argv, context.Cause(ctx))
	}
}

// send writes one request. If it fails half of a line may be under way, so that nothing
// can follow.
func (a *agent) send(ctx context.Context, req agentRequest) error {
	line, err := json.Marshal(req)
	if err != nil {
		return err
	}
	a.write.Lock()
	defer a.write.Unlock()
	// The guest may not read yet, or never: the write must not outlive ctx.
	d, _ := ctx.Deadline()
	a.conn.SetWriteDeadline(d)
	if _, err = a.conn.Write(append(line, '\n')); err != nil {
		err = fmt.Errorf("agent: %w", err)
		a.mu.Lock()
		a.broken = err
		a.mu.Unlock()
		a.conn.Close()
	}
	return err
}
