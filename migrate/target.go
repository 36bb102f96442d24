package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"baton/migrate/wire"
)

// Target takes a guest in. An attempt that is refused at the hello, or ends before RAM comes, leaves it
// waiting for the next one, where the transport lets there be one.
type Target struct {
	engine
	m TargetMachine
	l *wire.Listener

	sink     *wire.Sink
	prefault *prefault
	hellos   chan *incoming // what wants to be the main connection
	greets   sync.WaitGroup // connections whose first frame is read

	normal, zero atomic.Uint64

	// Guarded by mu.
	current *incoming
	outcome outcome

	settled chan struct{} // closed when outcome is final
	known   chan struct{} // closed when the source knows it
	decide  chan bool     // Decide
}

// outcome is what becomes of the guest here. It changes once to committing, from there or from
// the beginning once to a final one.
type outcome int

const (
	undecided outcome = iota
	committing
	runs
	never
)

// incoming is an attempt of a source.
type incoming struct {
	hello  wire.Hello
	stream *wire.Stream
	main   *wire.Conn
	ctx    context.Context
	cancel context.CancelCauseFunc

	joins         chan *wire.Conn // channels, in any order
	mu            sync.Mutex
	channels      []*wire.Conn // guarded by mu
	rounds        barrier
	reading       sync.WaitGroup // reads main, if answers go back
	frames        chan any       // what is not RAM, from the reader of main
	end           *wire.End      // when it has come
	stopped       time.Time      // when the guest was stopped, as end says
	began, loaded bool           // RAM may have been written; the source may commit, and has to know what becomes of that
}

// NewTarget prepares it. It fails on parameters that cannot be.
func NewTarget(m TargetMachine, o Options) (*Target, error) {
	if err := o.Params.Validate(); err != nil {
		return nil, err
	}
	t := &Target{m: m, hellos: make(chan *incoming), settled: make(chan struct{}), known: make(chan struct{}), decide: make(chan bool)}
	t.sink = wire.NewSink(m.Memory())
	t.init(o, TargetIdle)
	return t, nil
}

// Listen takes the address, so that a source can connect before Run is called.
func (t *Target) Listen() (err error) {
	wire.Prepare()
	t.l, err = wire.Listen(t.o.Address, wire.Options{TLS: t.o.TLS, Files: t.o.Files})
	if err != nil {
		return fmt.Errorf("listen at %s: %w", t.o.Address, err)
	}
	return nil
}

// Addr is where it listens: with the port that the system chose, if it was 0.
func (t *Target) Addr() wire.Address { return t.l.Addr() }

// SetParams changes parameters; on the target only those of the announcement matter, which are
// the machine's.
func (t *Target) SetParams(p Params) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.params = p
}

// Cancel ends it. It fails when the guest has been committed to this side, and while the source
// may have to be told that it has not (TargetDoubting: see Decide).
func (t *Target) Cancel() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.state.Final():
		return fmt.Errorf("cancel migration: it is over, %s", t.status)
	case t.state == TargetDoubting:
		return errors.New("cancel migration: the source may ask whether the guest runs here; this waits for it, or for a decision")
	case !t.settle(never):
		return errors.New("cancel migration: too late, the guest is this side's")
	case t.state != TargetWaiting: // there the source may be past the commit, and has to be told
		t.cancel(ErrCancelled)
	}
	return nil
}

// Decide ends the wait for a source that is gone (TargetDoubting, TargetConfirming). True starts
// the guest here, unless it runs already: that is for a source of which it is certain that it does
// not run the guest, for otherwise it runs twice and its disks break. False gives it up.
func (t *Target) Decide(run bool) error {
	switch st := t.now(); {
	case st == TargetConfirming && !run:
		return errors.New("the guest runs here")
	case st != TargetDoubting && st != TargetConfirming:
		return fmt.Errorf("the migration's fate is not in doubt: it is %s", st)
	case run && t.settledAs(never):
		return errors.New("the source keeps the guest: it has been told that this side does not run it")
	}
	select {
	case t.decide <- run:
		return nil
	case <-t.known:
		return errors.New("the source knows")
	case <-t.ctx.Done():
		return context.Cause(t.ctx)
	}
}

// Stats may be called at any time.
func (t *Target) Stats() Stats {
	s := t.snapshot(t.m.Memory())
	t.mu.Lock()
	defer t.mu.Unlock()
	s.RAM.Normal, s.RAM.Zero = t.normal.Load(), t.zero.Load()
	if in := t.current; in != nil {
		s.RAM.Transferred = in.main.Received()
		for _, c := range in.conns()[1:] {
			s.RAM.ChannelBytes += c.Received()
		}
		s.RAM.Transferred += s.RAM.ChannelBytes
		s.Channels, s.Compression = max(in.hello.Channels, 1), in.hello.Compression
	}
	return s
}

// settle makes the outcome committing, or never, if it is still undecided, and says whether it
// is that; mu is held.
func (t *Target) settle(o outcome) bool {
	if t.outcome == undecided {
		t.become(o)
	}
	return t.outcome == o
}

// become is for settle, and for who has made the outcome committing and knows what came of it.
func (t *Target) become(o outcome) {
	if t.outcome = o; o > committing {
		close(t.settled)
	}
}

// trySettle is settle for those who do not hold mu.
func (t *Target) trySettle(o outcome) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.settle(o)
}

func (t *Target) settledAs(o outcome) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.outcome == o
}

// sourceKnows notes that the source has learned the outcome.
func (t *Target) sourceKnows() {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-t.known:
	default:
		close(t.known)
	}
}

// Run waits for a source and takes its guest in. It returns nil when the guest runs here and the
// source knows.
func (t *Target) Run() error {
	defer t.greets.Wait()
	defer t.cancel(nil)
	t.prefault = newPrefault(t.m.Memory(), t.m.Map)
	t.sink.Coming = t.prefault.coming
	t.greets.Go(func() { t.prefault.run(t.ctx.Done()) })
	context.AfterFunc(t.ctx, func() { _ = t.l.Close() })
	t.greets.Add(1)
	go t.accept()
	for {
		t.enter(TargetListening)
		var in *incoming
		select {
		case in = <-t.hellos:
		case <-t.ctx.Done():
			return t.end(context.Cause(t.ctx))
		}
		err := t.take(in)
		if err == nil || in.began || !t.o.Address.Again() || t.ctx.Err() != nil {
			return t.end(err)
		}
		t.note(func(*Stats) { t.err = err })
		t.log("refused: %v", err)
	}
}

// end says how it was.
func (t *Target) end(err error) error {
	if err == nil {
		t.enter(TargetCompleted)
		return nil
	}
	t.trySettle(never)
	t.enterAs(TargetFailed, StatusFailed, err)
	return err
}

// maxGreets is the number of connections that may be at their first frame at the same time.
const maxGreets = 300

// accept takes connections until the listener is closed.
func (t *Target) accept() {
	defer t.greets.Done()
	room := make(chan struct{}, maxGreets)
	for {
		open, err := t.l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			t.cancel(fmt.Errorf("accept: %w", err))
			return
		}
		room <- struct{}{}
		t.greets.Go(func() {
			defer func() { <-room }()
			if err := t.greet(open); err != nil {
				t.log("a connection was turned away: %v", err)
				if !t.o.Address.Again() {
					t.cancel(err)
				}
			}
		})
	}
}

// greet reads the first frame of a connection and hands it on.
func (t *Target) greet(open func(context.Context) (*wire.Stream, error)) (err error) {
	ctx, cancel := context.WithTimeout(t.ctx, t.stall())
	defer cancel()
	st, err := open(ctx)
	if err != nil {
		return err
	}
	c := wire.NewConn(st.ReadWriteCloser)
	defer context.AfterFunc(t.ctx, c.Interrupt)()
	kept := false
	defer func() {
		if !kept {
			_ = c.Close()
		}
	}()
	if !st.OneWay {
		c.SetStall(t.stall(), t.stall())
		if err := c.WritePreamble(); err != nil {
			return err
		}
	}
	if err := c.ReadPreamble(); err != nil {
		if errors.Is(err, wire.ErrVersion) && !st.OneWay {
			_ = refuse(c, err)
		}
		return err
	}
	h, err := c.ReadHeader()
	if err != nil {
		return err
	}
	switch h.Type {
	case wire.TypeHello:
		in := &incoming{stream: st, main: c}
		if err := c.ReadMessage(h, &in.hello); err != nil {
			return err
		}
		select {
		case t.hellos <- in:
			kept = true
		case <-t.ctx.Done():
		case <-ctx.Done():
			err = errors.New("another source is here already")
			_ = refuse(c, err)
		}
		return err
	case wire.TypeJoin:
		var j wire.Join
		if err := c.ReadMessage(h, &j); err != nil {
			return err
		}
		t.mu.Lock()
		in := t.current
		t.mu.Unlock()
		if in == nil || in.hello.Session != j.Session || j.Index < 0 || j.Index >= in.hello.Channels {
			return errors.New("a channel of nobody's")
		}
		kept = in.join(c)
		return nil
	case wire.TypeAsk:
		var a wire.Ask
		if err := c.ReadMessage(h, &a); err != nil {
			return err
		}
		return t.answer(c, a)
	}
	return fmt.Errorf("%w: %s as the first frame", wire.ErrCorrupt, h.Type)
}

// refuse tells the other side why not, and reads until it has gone, so that it gets to know.
func refuse(c *wire.Conn, why error) error {
	err := c.WriteLast(wire.TypeRefuse, wire.NewReason(why), time.Second)
	if err == nil {
		c.SetStall(time.Second, time.Second)
		_, err = io.Copy(io.Discard, c)
	}
	return err
}

// answer tells a source that asks whether the guest runs here. If it does not, it never will.
func (t *Target) answer(c *wire.Conn, a wire.Ask) error {
	t.mu.Lock()
	in := t.current
	ours := in != nil && in.hello.Session == a.Session
	if ours {
		t.settle(never) // has no effect after the commit
	}
	t.mu.Unlock()
	if !ours {
		err := errors.New("this session is not known here")
		_ = refuse(c, err)
		return err
	}
	in.cancel(errors.New("the source has lost the connection"))
	<-t.settled // takes as long as the start of the guest
	t.mu.Lock()
	r := t.outcome == runs
	t.mu.Unlock()
	if err := c.Write(wire.TypeAnswer, wire.Answer{Runs: r}); err != nil {
		return err
	}
	if h, err := c.ReadHeader(); err != nil || h.Type != wire.TypeDone {
		return fmt.Errorf("answer to the source: not confirmed (%w)", err)
	}
	err := c.Write(wire.TypeDone, nil)
	t.sourceKnows()
	return err
}

// take goes through an attempt. An error says that the guest does not run here, and the
// source knows, or has no reason to ask.
func (t *Target) take(in *incoming) error {
	in.ctx, in.cancel = context.WithCancelCause(t.ctx)
	defer in.cancel(nil)
	defer in.close()
	interrupted := make(chan struct{})
	defer context.AfterFunc(in.ctx, func() { in.interrupt(); close(interrupted) })()
	in.joins, in.frames = make(chan *wire.Conn, 256), make(chan any)
	t.mu.Lock()
	t.current, t.err = in, nil
	t.mu.Unlock()

	t.enter(TargetGreeting)
	undos, err := []func(){}, t.check(in)
	if err == nil {
		undos, err = t.reserve(in)
	}
	if err == nil {
		err = t.receive(in)
	}
	if err == nil {
		if err = t.wait(in); err == nil {
			return nil
		}
	}
	if cause := context.Cause(in.ctx); cause != nil && !in.loaded {
		err = cause
	}
	t.enter(TargetUndoing)
	for _, undo := range slices.Backward(undos) {
		undo()
	}
	if !in.stream.OneWay { // what is to say is said when nobody else reads
		in.cancel(err)
		<-interrupted
		in.reading.Wait()
	}
	switch {
	case in.stream.OneWay:
	case in.aborted():
		_ = in.main.WriteLast(wire.TypeDone, nil, time.Second)
	case !in.loaded:
		_ = refuse(in.main, err)
	}
	return err
}

// reserve runs the hooks while the channels connect.
func (t *Target) reserve(in *incoming) (undos []func(), err error) {
	t.enter(TargetReserving)
	if !in.stream.OneWay {
		if err := in.main.Write(wire.TypeAccept, wire.Accept{Stall: int64(t.settings().StallTimeout)}); err != nil {
			return nil, err
		}
		go stayAlive(in.ctx, time.Duration(in.hello.Stall)*time.Millisecond, in.main)
	}
	in.rounds.init(in.hello.Channels + 1)
	if !in.stream.OneWay {
		in.reading.Go(func() { t.readMain(in) })
		undos = append(undos, func() {
			if err := t.m.ReleaseLocks(); err != nil {
				t.log("give the disks up: %v", err)
			}
		})
		if err := t.m.ReserveLocks(); err != nil {
			return undos, fmt.Errorf("reserve the disks: %w", err)
		}
	}
	for _, h := range t.o.Hooks {
		undo, err := h.Reserve(in.ctx)
		if undo != nil {
			undos = append(undos, undo)
		}
		if err != nil {
			return undos, err
		}
	}
	timeout := time.NewTimer(t.stall())
	defer timeout.Stop()
	for n := range in.hello.Channels {
		select {
		case c := <-in.joins:
			in.mu.Lock()
			in.channels = append(in.channels, c)
			in.mu.Unlock()
			if in.ctx.Err() != nil {
				c.Interrupt()
			}
			go t.readChannel(in, c)
		case <-timeout.C:
			return undos, fmt.Errorf("%d of %d channels have come", n, in.hello.Channels)
		case <-in.ctx.Done():
			return undos, context.Cause(in.ctx)
		}
	}
	return undos, in.fail(nil)
}

// wait waits for the commit and starts the guest.
func (t *Target) wait(in *incoming) error {
	if !in.stream.OneWay {
		t.enter(TargetWaiting)
		in.loaded = true
		if err := in.main.Write(wire.TypeLoaded, nil); err != nil {
			in.cancel(err)
		}
		if err := t.awaitCommit(in); err != nil {
			return err
		}
	} else if !t.trySettle(committing) {
		return context.Cause(t.ctx)
	}
	t.prefault.guestStarts()
	t.enter(TargetCommitting)
	err := t.start(in)
	t.mu.Lock()
	if err == nil {
		t.become(runs)
	} else {
		t.become(never)
	}
	t.mu.Unlock()
	if err != nil {
		if in.stream.OneWay {
			return err
		}
		// The source has to know, by this or by asking; until then the answer must be here.
		err = fmt.Errorf("%w: %w", errNoStart, err)
		_ = in.main.WriteLast(wire.TypeRefuse, wire.NewReason(err), t.stall())
		t.enterAs(TargetDoubting, TargetDoubting.Status(), err)
		t.awaitSource(in)
		return err
	}
	for _, h := range t.o.Hooks {
		go h.AfterResume()
	}
	if in.stream.OneWay {
		return nil
	}
	_ = in.main.WriteLast(wire.TypeCommitted, nil, t.stall()) // else it asks
	t.enter(TargetConfirming)
	t.awaitSource(in)
	return nil
}

var errNoStart = errors.New("the guest was not started on the target")

func (t *Target) start(in *incoming) error {
	err := t.m.TakeLocks()
	if err != nil {
		err = fmt.Errorf("lock the disks: %w", err)
	} else {
		err = t.m.Start(in.end.Running, in.stood())
	}
	if err != nil { // the source needs them before it hears of it
		return errors.Join(err, t.m.ReleaseLocks())
	}
	return nil
}

// awaitCommit returns nil when the guest is this side's.
func (t *Target) awaitCommit(in *incoming) error {
	select {
	case f := <-in.frames:
		if f != wire.TypeCommit {
			return in.fail(fmt.Errorf("%w: %v before the commit", wire.ErrCorrupt, f))
		}
		if t.trySettle(committing) {
			return nil
		}
	case <-t.settled: // asked, or cancelled
	case <-in.ctx.Done():
	}
	if in.aborted() {
		return in.fail(nil)
	}
	// The source may have sent the commit, or not. It is over when the source knows that the guest
	// will not run here; until it asks, a person may decide that it does.
	err := in.fail(ErrCancelled)
	t.enterAs(TargetDoubting, TargetDoubting.Status(), fmt.Errorf("the source may be gone: %w\nthe guest stays where it was; a decision by hand starts it here", err))
	t.log("%v", t.Stats().Err)
	if t.settledAs(never) {
		_ = in.main.WriteLast(wire.TypeRefuse, wire.NewReason(err), time.Second)
	}
	if run := t.awaitSource(in); run && t.trySettle(committing) {
		return nil
	}
	return err
}

// awaitSource waits until the source knows what has become of the guest, or until a person says
// that it need not, and what is to become of it.
func (t *Target) awaitSource(in *incoming) (run bool) {
	lost := in.ctx.Done()
	for {
		select {
		case f := <-in.frames:
			if done, ok := f.(*wire.Done); ok {
				if t.settledAs(runs) {
					t.m.GiveLate(done.Late)
				}
				_ = in.main.WriteLast(wire.TypeDone, nil, time.Second)
				t.sourceKnows()
			}
		case <-lost:
			if lost = nil; in.aborted() {
				return false
			}
		case <-t.known:
			return false
		case run := <-t.decide:
			t.log("decided by hand: the guest runs here: %v", run)
			return run
		case <-t.ctx.Done():
			return false
		}
	}
}
