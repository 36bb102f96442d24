package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"baton/migrate/wire"
)

// maxSections is the most bytes that all sections may have.
const maxSections = 256 << 20

// abortion is the source's reason.
type abortion struct{ reason error }

func (e *abortion) Error() string { return "the source: " + e.reason.Error() }
func (e *abortion) Unwrap() error { return e.reason }

// aborted says that the source has ended the attempt, and knows.
func (in *incoming) aborted() bool {
	var a *abortion
	return errors.As(context.Cause(in.ctx), &a)
}

// fail is the cause of an attempt's end, or else err.
func (in *incoming) fail(err error) error {
	if cause := context.Cause(in.ctx); cause != nil {
		return cause
	}
	return err
}

func (in *incoming) conns() []*wire.Conn {
	in.mu.Lock()
	defer in.mu.Unlock()
	return append([]*wire.Conn{in.main}, in.channels...)
}

// stood is for how long the guest has stood still; 0 for one that may have lain somewhere.
func (in *incoming) stood() time.Duration {
	if in.stream.OneWay {
		return 0
	}
	return time.Since(in.stopped)
}

func (in *incoming) interrupt() {
	for _, c := range in.conns() {
		c.Interrupt()
	}
}

func (in *incoming) close() {
	for _, c := range in.conns() {
		_ = c.Close()
	}
}

// check looks at the hello and lists all that is wrong.
func (t *Target) check(in *incoming) error {
	h := &in.hello
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, d := range t.m.Check(h.Facts) {
		bad("%s", d)
	}
	regions := t.m.Memory().Regions()
	same := len(regions) == len(h.Regions)
	for i := 0; same && i < len(regions); i++ {
		same = h.Regions[i] == wire.Region{GPA: regions[i].GPA, Size: regions[i].Size}
	}
	if !same {
		bad("RAM: the source's is laid out in another way")
	}
	if _, err := wire.ParseCompression(h.Compression); err != nil {
		bad("%v", err)
	}
	if h.Channels < 0 || h.Channels > 255 || h.Channels > 0 && !t.o.Address.Again() {
		bad("%d channels: more than are possible here", h.Channels)
	}
	for _, f := range h.Features {
		if f != wire.FeatureSums {
			bad("feature %s is not known to the target", f)
		}
	}
	if h.OneWay != in.stream.OneWay {
		bad("the stream has one way on one side, and two on the other")
	}
	mine := make(map[string]SectionInfo)
	for _, s := range t.m.Sections() {
		mine[s.Info().ID] = s.Info()
	}
	for _, s := range h.Sections {
		i, ok := mine[s.ID]
		delete(mine, s.ID)
		switch {
		case !ok:
			bad("state of %s (%s): the target has none", s.ID, s.Type)
		case s.Type != i.Type:
			bad("state of %s: %s on the source, %s on the target", s.ID, s.Type, i.Type)
		case s.Version < i.MinVersion || s.Version > i.Version:
			bad("state of %s (%s): format %d, the target knows %d to %d", s.ID, s.Type, s.Version, i.MinVersion, i.Version)
		}
	}
	for _, s := range t.m.Sections() {
		if i := s.Info(); mine[i.ID].ID != "" {
			bad("state of %s (%s): the source has none", i.ID, i.Type)
		}
	}
	return errors.Join(errs...)
}

// join hands a channel over, unless the attempt is over.
func (in *incoming) join(c *wire.Conn) bool {
	select {
	case <-in.ctx.Done():
		return false
	default:
	}
	select {
	case in.joins <- c:
		return true
	default:
		return false
	}
}

// barrier lets nobody go on to the next round before all have ended this one.
type barrier struct {
	mu      sync.Mutex
	parties int
	round   int // that all are in
	arrived int
	next    chan struct{}
}

func (b *barrier) init(parties int) { b.parties, b.round, b.next = parties, 1, make(chan struct{}) }

// arrive says that one party has ended round n, and waits for the others.
func (b *barrier) arrive(ctx context.Context, n int) error {
	b.mu.Lock()
	if n != b.round {
		b.mu.Unlock()
		return fmt.Errorf("%w: end of round %d in round %d", wire.ErrCorrupt, n, b.round)
	}
	next := b.next
	if b.arrived++; b.arrived == b.parties {
		b.arrived = 0
		b.round++
		b.next = make(chan struct{})
		close(next)
	}
	b.mu.Unlock()
	select {
	case <-next:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ended is the number of rounds that all connections have ended.
func (b *barrier) ended() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.round - 1
}

// readMain reads the main connection to its end, which ends the attempt, or, if there is one
// way only, to the end of the guest.
func (t *Target) readMain(in *incoming) {
	for {
		last, err := t.readFrame(in, in.main, true)
		if err == nil {
			if last == wire.TypeEnd && in.stream.OneWay {
				return
			}
			continue
		}
		if err == io.EOF {
			err = errors.New("the source has closed the connection")
			if in.stream.OneWay {
				err = io.ErrUnexpectedEOF
			}
		}
		in.cancel(err)
		return
	}
}

// readChannel reads a channel, likewise.
func (t *Target) readChannel(in *incoming, c *wire.Conn) {
	c.SetStall(t.stall(), t.stall())
	for {
		if _, err := t.readFrame(in, c, false); err != nil {
			in.cancel(fmt.Errorf("channel: %w", err))
			return
		}
	}
}

// readFrame takes the next frame: RAM and rounds here, all else goes to in.frames.
func (t *Target) readFrame(in *incoming, c *wire.Conn, main bool) (wire.Type, error) {
	h, err := c.ReadHeader()
	if err != nil {
		return 0, err
	}
	return h.Type, t.readPayload(in, c, main, h)
}

func (t *Target) readPayload(in *incoming, c *wire.Conn, main bool, h wire.Header) (err error) {
	var f any
	switch h.Type {
	case wire.TypeAlive:
		return c.ReadMessage(h, nil)
	case wire.TypePages:
		if t.now() != TargetReceiving || main && in.hello.Channels > 0 {
			return fmt.Errorf("%w: pages out of turn", wire.ErrCorrupt)
		}
		n, z, err := c.ReadPages(h, t.sink)
		t.normal.Add(n)
		t.zero.Add(z)
		return err
	case wire.TypeRound:
		var m wire.Round
		if err := c.ReadMessage(h, &m); err != nil {
			return err
		}
		if err := in.rounds.arrive(in.ctx, m.Number); err != nil || !main {
			return err
		}
		t.prefault.roundEnded()
		if in.stream.OneWay {
			return nil
		}
		m.Changed = t.changed()
		return c.Write(wire.TypeRound, m)
	case wire.TypeSection:
		var m wire.Section
		err, f = c.ReadMessage(h, &m), &m
	case wire.TypeEnd:
		var m wire.End
		err, f = c.ReadMessage(h, &m), &m
	case wire.TypeAbort:
		var m wire.Reason
		if err := c.ReadMessage(h, &m); err != nil {
			return err
		}
		return &abortion{m.Err()}
	case wire.TypeDone:
		m := new(wire.Done)
		if f = m; h.Length == 0 {
			err = c.ReadMessage(h, nil)
		} else {
			err = c.ReadMessage(h, m)
		}
	case wire.TypeCommit:
		err, f = c.ReadMessage(h, nil), h.Type
	default:
		err = fmt.Errorf("%w: %s from the source", wire.ErrCorrupt, h.Type)
	}
	if err == nil && !main {
		err = fmt.Errorf("%w: %s on a channel", wire.ErrCorrupt, h.Type)
	}
	if err != nil {
		return err
	}
	select {
	case in.frames <- f:
		return nil
	case <-in.ctx.Done():
		return context.Cause(in.ctx)
	}
}

// changed are pages to ask for again.
func (t *Target) changed() (list []wire.Region) {
	for gpa, n := range t.sink.Changed.Runs() {
		if list = append(list, wire.Region{GPA: gpa, Size: n}); len(list) == wire.MaxChanged {
			break
		}
	}
	return list
}

// receive takes RAM and sections, and loads them.
func (t *Target) receive(in *incoming) error {
	in.began = true
	t.enter(TargetReceiving)
	if in.stream.OneWay {
		go t.readMain(in)
	} else if err := in.main.Write(wire.TypeReady, nil); err != nil {
		return in.fail(err)
	}
	come := make(map[string]*wire.Section)
	total := 0
	for {
		var f any
		select {
		case f = <-in.frames:
		case <-in.ctx.Done():
			return context.Cause(in.ctx)
		}
		switch f := f.(type) {
		case *wire.Section:
			announced := false
			for _, i := range in.hello.Sections {
				announced = announced || i == f.SectionInfo
			}
			if total += len(f.Data); !announced || come[f.ID] != nil || total > maxSections {
				return fmt.Errorf("%w: state of %s (%s) has not been announced, comes twice or is too long", wire.ErrCorrupt, f.ID, f.Type)
			}
			come[f.ID] = f
		case *wire.End:
			if f.Sections != len(come) || f.Rounds != in.rounds.ended() {
				return fmt.Errorf("%w: %d sections and %d rounds, the source has sent %d and %d", wire.ErrCorrupt,
					len(come), in.rounds.ended(), f.Sections, f.Rounds)
			}
			for _, r := range t.changed() {
				return fmt.Errorf("%w: RAM of %d pages, first at %#x, is not what has been sent", wire.ErrCorrupt,
					t.sink.Changed.Count(), r.GPA)
			}
			in.end, in.stopped = f, time.Now().Add(-time.Duration(f.Stopped)*time.Microsecond)
			return t.load(in, come)
		default:
			return fmt.Errorf("%w: %v while RAM is sent", wire.ErrCorrupt, f)
		}
	}
}

// load loads the sections in this machine's order.
func (t *Target) load(in *incoming, come map[string]*wire.Section) error {
	t.enter(TargetLoading)
	begin := time.Now()
	for _, s := range t.m.Sections() {
		i := s.Info()
		f := come[i.ID]
		if f == nil {
			return fmt.Errorf("state of %s (%s) has not come", i.ID, i.Type)
		}
		if err := s.Load(f.Version, f.Data); err != nil {
			return fmt.Errorf("state of %s (%s): %w", i.ID, i.Type, err)
		}
		if err := in.fail(nil); err != nil {
			return err
		}
	}
	t.note(func(st *Stats) { st.Downtime.Load = time.Since(begin) })
	return nil
}
