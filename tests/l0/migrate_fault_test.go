package l0

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"baton/migrate/wire"
	"baton/tests/harness"
	"baton/tests/tiny"
)

// frameFault is what happens when a frame comes to pass, or has passed.
type frameFault struct {
	name string
	at   wire.Type
	past bool // the frame has been forwarded
	harm func(*relay)
}

// relay is between a source and a target that listen and connect by unix sockets. It knows frames.
type relay struct {
	fault  frameFault
	mover  *mover
	once   sync.Once
	struck chan struct{}
	hold   chan struct{} // closed: what was held may go on

	mu    sync.Mutex
	conns []net.Conn
	dead  *harness.Guest
}

// stampedEcho is tiny.Echo with RAM that is looked at: 1024 pages have their address in them, and if
// one has not, what is echoed is "!".
func stampedEcho() tiny.Code {
	le := binary.LittleEndian
	pages := func(body ...byte) tiny.Code {
		c := le.AppendUint32(tiny.Code{0xbf}, 16<<20)           // mov $16 MiB, %edi
		c = le.AppendUint32(append(c, 0xb9), 1024)              // mov $1024, %ecx
		c = append(c, body...)                                  // 1:
		c = append(c, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x49) // add $4096, %edi; dec %ecx
		return append(c, 0x75, byte(-len(body)-9))              // jnz 1b
	}
	fill := append(pages(0x89, 0x3f), tiny.Say("up\n")...) // mov %edi, (%edi)
	loop := tiny.Code{
		0x66, 0xba, 0xfd, 0x03, // wait: mov $0x3fd, %dx
		0xec, 0xa8, 0x01, //            in (%dx), %al; test $1, %al
		0x74, 0xf7, //                  jz wait
		0xb2, 0xf8, 0xec, 0x88, 0xc3, // mov $0xf8, %dl; in (%dx), %al; mov %al, %bl
	}
	loop = append(loop, pages(0x39, 0x3f, 0x74, 0x02, 0xb3, '!')...) // cmp %edi, (%edi); je +2; mov $'!', %bl
	loop = append(loop, 0x88, 0xd8, 0xee)                            // mov %bl, %al; out %al, (%dx)
	return append(append(fill, loop...), 0xeb, byte(-len(loop)-2))   // jmp wait
}

// TestMigrateFaults has two processes, and what can happen to them, at each frame of the
// protocol: the list is the protocol's own. At the end the guest is there once, with its RAM,
// and can move again.
func TestMigrateFaults(t *testing.T) {
	kernel := tiny.Kernel(t, stampedEcho())
	n := 0
	for _, at := range wire.Types() {
		switch at {
		case wire.TypeAlive, wire.TypeAbort, wire.TypeRefuse, wire.TypeAsk, wire.TypeAnswer:
			continue // they are not there, or need not be, unless something has happened
		}
		for _, past := range []bool{false, true} {
			for _, f := range []frameFault{
				{"source killed", at, past, func(r *relay) { r.kill(r.mover.source) }},
				{"target killed", at, past, func(r *relay) { r.kill(r.mover.target) }},
				{"cut", at, past, func(r *relay) { r.cut() }},
				{"stall", at, past, func(*relay) {}},
				{"corrupt", at, past, nil},
			} {
				if f.harm == nil && past {
					continue
				}
				if n++; n%4 != 0 && os.Getenv("BATON_LONG") == "" {
					continue // the others are for make test-long
				}
				when := "before"
				if past {
					when = "after"
				}
				t.Run(fmt.Sprintf("%s %s %s", f.name, when, at), func(t *testing.T) {
					t.Parallel()
					testMigrateFault(t, kernel, f)
				})
			}
		}
	}
}

func testMigrateFault(t *testing.T, kernel string, f frameFault) {
	m := new(mover)
	m.source, m.from = startQMP(t, kernel)
	m.source.WaitSerial(harness.Context(t, limit), "up")
	m.uri = "unix:" + filepath.Join(shortDir(t), "m")
	m.target, m.to = startIncoming(t, "defer")
	for _, q := range []*harness.QMP{m.from, m.to} {
		capability(t, q, "events", "")
		capability(t, q, "multifd", "")
		q.Do("migrate-set-parameters", map[string]any{"stall-timeout": 1500, "multifd-channels": 2})
	}
	m.to.Do("migrate-incoming", uri(m.uri))
	r := &relay{fault: f, mover: m, struck: make(chan struct{}), hold: make(chan struct{})}
	through := filepath.Join(shortDir(t), "r")
	l, err := net.Listen("unix", through)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); close(r.hold); r.cut() })
	go r.accept(l, strings.TrimPrefix(m.uri, "unix:"))
	m.from.Do("migrate", uri("unix:"+through))
	ctx := harness.Context(t, limit)
	select {
	case <-r.struck:
	case <-ctx.Done():
		t.Fatalf("no %s frame has come by", f.at)
	}
	r.mu.Lock()
	dead := r.dead
	r.mu.Unlock()
	on, q := m.source, m.from
	switch dead {
	case m.source:
		switch first(ctx, m.target, `migration: (refused|a connection was turned away)`, `the source may be gone`, "RESUME") {
		case 0: // it waits for another one
			return
		case 1:
			m.to.Do("x-migrate-decide", map[string]any{"run-here": true})
			m.target.WaitEvent(ctx, "RESUME")
		case 3: // nothing of the guest has survived
			return
		}
		on, q = m.target, m.to
	case m.target:
		if first(ctx, m.source, "", `the target may have the guest`, "MIGRATION") == 1 {
			if got, err := m.from.Execute("migrate_cancel", nil); err == nil {
				t.Errorf("what has been committed is cancelled: %s", got)
			}
			m.from.Do("x-migrate-decide", map[string]any{"run-here": true})
		}
		if ended(t, m.from) == "completed" {
			return // it had the guest, and has died with it
		}
	default:
		if ended(t, m.from) == "completed" {
			on, q = m.target, m.to
			m.target.WaitEvent(ctx, "RESUME")
			status(t, m.from, "postmigrate")
		} else if names := names(t, m.target); strings.Contains(names, "RESUME") {
			t.Errorf("the guest runs on the source, and the target has: %s", names)
		}
	}
	runsOn(t, on, q)
	// Once more.
	m.newTarget(t)
	q.Do("migrate", uri(m.uri))
	m.target.WaitEvent(ctx, "RESUME")
	runsOn(t, m.target, m.to)
}

// ended waits for the end of a source's migration.
func ended(t *testing.T, q *harness.QMP) string {
	t.Helper()
	for {
		var data struct{ Status string }
		decode(t, q.WaitEvent("MIGRATION").Data, &data)
		switch data.Status {
		case "completed", "failed", "cancelled":
			return data.Status
		}
	}
}

// first says what happens first: one of two lines on stderr, an event (of MIGRATION, a final one),
// or, 3, the end.
func first(ctx context.Context, g *harness.Guest, line0, line1, event string) int {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	what := make(chan int, 4)
	for i, line := range []string{line0, line1} {
		if line == "" {
			continue
		}
		go func() {
			if _, err := g.Stderr.Wait(ctx, 0, line); err == nil {
				what <- i
			}
		}()
	}
	go func() {
		final := func(e harness.Event) bool {
			return event != "MIGRATION" || strings.Contains(string(e.Data), "completed") || strings.Contains(string(e.Data), "failed")
		}
		if _, err := g.Events.WaitEvent(ctx, 0, event, final); err == nil {
			what <- 2
		}
	}()
	select {
	case i := <-what:
		return i
	case <-g.Ended():
		return 3
	case <-ctx.Done():
		return -1
	}
}

func (r *relay) kill(g *harness.Guest) {
	g.Kill()
	r.mu.Lock()
	r.dead = g
	r.mu.Unlock()
	r.cut()
}

func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		_ = c.Close()
	}
	r.conns = nil
}

func (r *relay) accept(l net.Listener, to string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		d, err := net.Dial("unix", to)
		if err != nil {
			_ = c.Close()
			continue
		}
		r.mu.Lock()
		r.conns = append(r.conns, c, d)
		r.mu.Unlock()
		go r.pass(c, d)
		go r.pass(d, c)
	}
}

// pass forwards the preamble and then frames, one at a time.
func (r *relay) pass(from, to net.Conn) {
	defer to.Close()
	if _, err := io.CopyN(to, from, 12); err != nil {
		return
	}
	for {
		head := make([]byte, 16)
		if _, err := io.ReadFull(from, head); err != nil {
			return
		}
		frame := append(head, make([]byte, binary.LittleEndian.Uint32(head[4:]))...)
		if _, err := io.ReadFull(from, frame[16:]); err != nil {
			return
		}
		struck := false
		strike := func() {
			r.once.Do(func() {
				struck = true
				if r.fault.harm != nil {
					r.fault.harm(r)
				} else {
					frame[len(frame)-1] ^= 1
				}
				close(r.struck)
			})
		}
		hit := wire.Type(frame[0]) == r.fault.at
		if hit && !r.fault.past {
			strike()
		}
		r.stall(struck)
		if _, err := to.Write(frame); err != nil {
			return
		}
		if hit && r.fault.past {
			strike()
			r.stall(struck)
		}
	}
}

// stall holds what comes after a fault that is a stall.
func (r *relay) stall(struck bool) {
	if r.fault.name == "stall" && struck {
		<-r.hold
	}
}
