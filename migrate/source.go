package migrate

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"baton/kvm/guestmem"
	"baton/migrate/wire"
)

// Source moves a guest away. It is made for one attempt.
type Source struct {
	engine
	m       SourceMachine
	session wire.Session

	stream *wire.Stream
	main   *wire.Conn
	ram    []*wire.Conn // connections that carry RAM: the channels, or main
	direct bool         // see wire.Batch.Direct
	conns  []*wire.Conn // all; guarded by mu

	answers chan answer
	deaf    chan struct{} // closed when nobody reads the target's answers any more

	senders *senders
	sending *guestmem.Bitmap // pages of this round
	dirty   *guestmem.Bitmap // those of the next one
	watched []DirtySource    // started
	undos   []func()

	paused, running   bool
	offered, released bool          // the disks' locks
	committed         bool          // guarded by mu: past the last moment to cancel
	answered          time.Duration // after which the target has accepted the hello; 0: it does not answer
	preparing         time.Time     // since when; zero: it is not
	stopped           time.Time

	goOn    chan struct{}     // Continue
	decide  chan bool         // Decide
	asked   chan wire.Address // Recover
	settled chan struct{}     // closed when SourceAsking is over
	unsure  atomic.Bool       // the target has answered, and may not know that the answer has come
}

// answer is a frame from the target.
type answer struct {
	t     wire.Type
	stall int64
	round int
	again []wire.Region
}

// refusal is the target's reason.
type refusal struct{ reason error }

func (e *refusal) Error() string { return "the target: " + e.reason.Error() }
func (e *refusal) Unwrap() error { return e.reason }

// Prepare does once what any attempt needs and takes its time. To call it when a migration is likely is enough; NewSource's
// attempt does not wait for it before it has to.
func Prepare() { wire.Prepare() }

// NewSource prepares an attempt. It fails on parameters that cannot be.
func NewSource(m SourceMachine, o Options) (*Source, error) {
	if o.Policy == nil {
		o.Policy = DefaultPolicy
	}
	if err := o.Params.Validate(); err != nil {
		return nil, err
	}
	if o.Capabilities.Has(CapMultifd) && !o.Address.Again() {
		return nil, fmt.Errorf("%s: multifd needs tcp: or unix:, where there can be more connections than one", o.Address)
	}
	s := &Source{m: m, answers: make(chan answer, 8), deaf: make(chan struct{}),
		goOn: make(chan struct{}, 1), decide: make(chan bool), asked: make(chan wire.Address), settled: make(chan struct{})}
	s.init(o, SourceIdle)
	if _, err := rand.Read(s.session[:]); err != nil {
		return nil, err
	}
	return s, nil
}

// Cancel ends the attempt; the guest goes on here. It returns at once: while something has to
// be undone the status is cancelling, then it is cancelled. It fails when it is too late, for
// the commit has been sent, and when all is over.
func (s *Source) Cancel() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.state.Final():
		return fmt.Errorf("cancel migration: it is over, %s", s.status)
	case s.committed:
		return errors.New("cancel migration: too late, the guest may run on the target")
	}
	s.cancel(ErrCancelled)
	return nil
}

// Continue ends the wait of pause-before-switchover (migrate-continue).
func (s *Source) Continue() error {
	if st := s.now(); st != SourceHolding {
		return qemuErrorf("Migration not in expected state: %s", st.Status())
	}
	select {
	case s.goOn <- struct{}{}:
	default:
	}
	return nil
}

// SetParams changes what takes effect on the way, such as max-bandwidth, downtime-limit and throttling.
func (s *Source) SetParams(p Params) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.params = p
}

// inAsking sends to a channel of ask.
func inAsking[T any](s *Source, c chan<- T, v T) error {
	if st := s.now(); st != SourceAsking {
		return fmt.Errorf("the migration's fate is not in doubt: it is %s", st)
	}
	select {
	case c <- v:
		return nil
	case <-s.settled:
		return errors.New("the target has just answered")
	}
}

// Decide ends the state in which the target does not answer (SourceAsking). True lets the guest
// go on here: that is for a target of which it is certain that it does not run, for otherwise
// the guest runs twice and its disks break. False gives the guest up.
func (s *Source) Decide(run bool) error { return inAsking(s, s.decide, run) }

// Recover has the source ask at another address (migrate-recover), in SourceAsking.
func (s *Source) Recover(a wire.Address) error {
	if !a.Again() {
		return fmt.Errorf("%s: the target can be asked by tcp: or unix: only", a)
	}
	return inAsking(s, s.asked, a)
}

// Stats may be called at any time.
func (s *Source) Stats() Stats {
	st := s.snapshot(s.m.Memory())
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.preparing.IsZero() {
		st.PrepareTime = time.Since(s.preparing)
	}
	for i, c := range s.conns {
		n := c.Sent()
		st.RAM.Transferred += n
		if i > 0 {
			st.RAM.ChannelBytes += n
		}
	}
	if s.senders != nil {
		st.RAM.Normal, st.RAM.Zero = s.senders.normal.Load(), s.senders.zero.Load()
		st.RAM.Remaining = uint64(max(s.senders.remaining.Load(), 0))
		st.Channels = len(s.senders.conns)
		if t := (st.TotalTime - st.SetupTime - st.PrepareTime).Seconds(); t > 0 {
			st.RAM.Mbps = float64(st.RAM.Transferred) * 8 / 1e6 / t
			st.RAM.PagesPerSec = uint64(float64(st.RAM.Normal+st.RAM.Zero) / t)
		}
	}
	st.Compression = s.o.Params.MultifdCompression
	if st.RAM.PrecopyBytes == 0 || s.stopped.IsZero() {
		st.RAM.PrecopyBytes = st.RAM.Transferred
	} else {
		st.RAM.DowntimeBytes = st.RAM.Transferred - st.RAM.PrecopyBytes
	}
	return st
}

// Run goes through all of it. It returns nil when the guest is the target's, or, for a stream
// that goes one way, when all is written.
func (s *Source) Run() error {
	defer s.cancel(nil)
	stop := context.AfterFunc(s.ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, c := range s.conns {
			c.Interrupt()
		}
	})
	err := s.run()
	stop()
	if err != nil {
		if !s.committed {
			err = s.why(err)
		}
		return s.giveUp(err)
	}
	last := s.now()
	s.enter(SourceCompleted)
	s.m.Throttle(0)
	var done any
	if !s.stream.OneWay {
		if late := s.m.TakeLate(); len(late) > 0 {
			done = wire.Done{Late: late}
		}
	}
	s.leave(wire.TypeDone, done, last == SourceCommitting || s.unsure.Load())
	return nil
}

// run returns an error when the guest is to go on here.
func (s *Source) run() error {
	if err := s.connect(); err != nil {
		return err
	}
	s.note(func(st *Stats) { st.SetupTime = time.Since(s.begun) })
	if err := s.prepare(); err != nil {
		return err
	}
	if err := s.precopy(); err != nil {
		return err
	}
	if err := s.stopGuest(); err != nil {
		return err
	}
	if s.stream.OneWay {
		return s.finishOneWay()
	}
	return s.commit()
}

// attach makes a stream one of the attempt's connections.
func (s *Source) attach(st *wire.Stream) *wire.Conn {
	c := wire.NewConn(st.ReadWriteCloser)
	stall := s.stall()
	c.SetStall(stall, stall)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = append(s.conns, c)
	if s.ctx.Err() != nil {
		c.Interrupt()
	}
	return c
}

func (s *Source) transport() wire.Options { return wire.Options{TLS: s.o.TLS, Files: s.o.Files} }

// dial opens an address and says who speaks.
func (s *Source) dial(ctx context.Context, a wire.Address) (*wire.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, s.stall())
	defer cancel()
	st, err := wire.Dial(ctx, a, s.transport())
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", a, err)
	}
	return st, nil
}

// connect goes from the beginning until the target is ready.
func (s *Source) connect() (err error) {
	s.enter(SourceConnecting)
	go wire.Prepare()
	if s.stream, err = s.dial(s.ctx, s.o.Address); err != nil {
		return err
	}
	s.main = s.attach(s.stream)
	s.enter(SourceGreeting)
	p := s.settings()
	hello := wire.Hello{Session: s.session, OneWay: s.stream.OneWay, Compression: p.MultifdCompression,
		Stall: int64(p.StallTimeout), Facts: s.m.Facts()}
	if s.direct = s.main.Direct() && p.MultifdCompression == "none"; s.direct || wire.SlowCRC() {
		hello.Features = append(hello.Features, wire.FeatureSums)
	}
	for _, r := range s.m.Memory().Regions() {
		hello.Regions = append(hello.Regions, wire.Region{GPA: r.GPA, Size: r.Size})
	}
	for _, sec := range s.m.Sections() {
		i := sec.Info()
		hello.Sections = append(hello.Sections, wire.SectionInfo{ID: i.ID, Type: i.Type, Version: i.Version})
	}
	if s.o.Capabilities.Has(CapMultifd) {
		hello.Channels = int(p.MultifdChannels)
	}
	if !s.stream.OneWay {
		go s.listen()
		s.offered = true
		if err := s.m.OfferLocks(); err != nil {
			return fmt.Errorf("offer the disks: %w", err)
		}
	} else {
		s.main.SetStall(0, 0) // whoever reads it may take its time
		close(s.deaf)
	}
	asked := time.Now()
	if err := s.main.Begin(wire.TypeHello, hello); err != nil {
		return s.lost(err)
	}
	s.ram = []*wire.Conn{s.main}
	if s.stream.OneWay {
		return nil
	}
	accept, err := s.expect(wire.TypeAccept)
	if err != nil {
		return err
	}
	s.answered = time.Since(asked)
	s.enter(SourceReserving)
	if hello.Channels > 0 {
		if err := s.openChannels(hello.Channels); err != nil {
			return s.lost(err)
		}
	}
	go stayAlive(s.ctx, min(s.stall(), time.Duration(accept.stall)*time.Millisecond), s.conns...)
	_, err = s.expect(wire.TypeReady)
	return err
}

// openChannels connects the channels, all at once.
func (s *Source) openChannels(n int) error {
	s.ram = make([]*wire.Conn, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			st, err := s.dial(s.ctx, s.o.Address)
			if errs[i] = err; err != nil {
				return
			}
			s.ram[i] = s.attach(st)
			errs[i] = s.ram[i].Begin(wire.TypeJoin, wire.Join{Session: s.session, Index: i})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// listen takes the target's answers until the connection ends, which ends the attempt.
func (s *Source) listen() {
	defer close(s.deaf)
	err := s.main.ReadPreamble()
	for err == nil {
		err = s.readAnswer()
	}
	var r *refusal
	switch {
	case errors.As(err, &r):
	case err == io.EOF:
		err = errors.New("the target has closed the connection")
	default:
		err = fmt.Errorf("connection to the target: %w", err)
	}
	s.cancel(err)
}

func (s *Source) readAnswer() error {
	h, err := s.main.ReadHeader()
	if err != nil {
		return err
	}
	a := answer{t: h.Type}
	switch h.Type {
	case wire.TypeAlive:
		return s.main.ReadMessage(h, nil)
	case wire.TypeRefuse:
		var r wire.Reason
		if err := s.main.ReadMessage(h, &r); err != nil {
			return err
		}
		return &refusal{r.Err()}
	case wire.TypeAccept:
		var m wire.Accept
		err = s.main.ReadMessage(h, &m)
		a.stall = m.Stall
	case wire.TypeRound:
		var m wire.Round
		err = s.main.ReadMessage(h, &m)
		a.round, a.again = m.Number, m.Changed
	default:
		err = s.main.ReadMessage(h, nil)
	}
	if err != nil {
		return err
	}
	select {
	case s.answers <- a:
		return nil
	default:
		return fmt.Errorf("%w: answers that nobody asked for", wire.ErrCorrupt)
	}
}

// expect waits for the answer of this type.
func (s *Source) expect(t wire.Type) (answer, error) {
	var a answer
	select {
	case a = <-s.answers:
	case <-s.ctx.Done():
		select { // the answer may have come before the end
		case a = <-s.answers:
		default:
			return a, context.Cause(s.ctx)
		}
	}
	if a.t != t {
		err := fmt.Errorf("%w: %s, not %s, from the target", wire.ErrCorrupt, a.t, t)
		s.cancel(err)
		return a, err
	}
	return a, nil
}

// lost is what a failed write means: the reader may still find the target's reason.
func (s *Source) lost(err error) error {
	if s.stream != nil && !s.stream.OneWay {
		t := time.NewTimer(min(s.stall(), time.Second))
		defer t.Stop()
		select {
		case <-s.deaf:
		case <-t.C:
		}
	}
	s.cancel(err) // has no effect if there is a better reason
	return context.Cause(s.ctx)
}

// prepare runs the Preparers.
func (s *Source) prepare() error {
	if len(s.o.Preparers) == 0 {
		return s.why(nil)
	}
	s.enter(SourcePreparing)
	s.mu.Lock()
	s.preparing = time.Now()
	s.mu.Unlock()
	defer s.note(func(st *Stats) { st.PrepareTime, s.preparing = time.Since(s.preparing), time.Time{} })
	for _, p := range s.o.Preparers {
		undo, err := p.Prepare(s.ctx)
		if undo != nil {
			s.undos = append(s.undos, undo)
		}
		if err = s.why(err); err != nil {
			return err
		}
	}
	return nil
}

// stopGuest pauses the guest and sends the rest.
func (s *Source) stopGuest() (err error) {
	if err := s.m.Flush(); err != nil { // most of it while the guest runs
		return fmt.Errorf("flush disks: %w", err)
	}
	s.enter(SourceStopping)
	if err := s.why(nil); err != nil {
		return err
	}
	begin := time.Now()
	if s.running, err = s.m.Pause(); err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	s.paused = true
	last := begin
	lap := func(part *time.Duration) {
		s.mu.Lock()
		defer s.mu.Unlock()
		now := time.Now()
		*part, last = now.Sub(last), now
	}
	d := &s.stats.Downtime
	lap(&d.Pause)
	sent := s.Stats().RAM.Transferred
	s.mu.Lock()
	s.stopped, s.stats.RAM.PrecopyBytes = begin, sent
	s.mu.Unlock()

	if s.o.Capabilities.Has(CapPauseBeforeSwitch) {
		s.enter(SourceHolding)
		select {
		case <-s.goOn:
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		}
		last = time.Now()
	}
	s.enter(SourceFinishing)
	if err := s.m.Flush(); err != nil {
		return fmt.Errorf("flush disks: %w", err)
	}
	round := int(s.stats.RAM.DirtySync)
	if err := s.sync(s.sending); err != nil {
		return err
	}
	lap(&d.Sync)
	s.senders.protectors = nil // nobody writes any more
	if _, _, err := s.round(round, time.Time{}, func() uint64 { return 0 }); err != nil {
		return err
	}
	lap(&d.RAM)
	sections := s.m.Sections()
	s.main.Hold()
	for _, sec := range sections {
		i := sec.Info()
		data, err := sec.Save()
		if err != nil {
			return fmt.Errorf("save %s: %w", i.ID, err)
		}
		err = s.main.Write(wire.TypeSection, wire.Section{SectionInfo: wire.SectionInfo{ID: i.ID, Type: i.Type, Version: i.Version}, Data: data})
		if err != nil {
			return s.lost(err)
		}
	}
	if s.stream.OneWay { // who reads the end may start the guest at once
		if err := s.release(); err != nil {
			return err
		}
	}
	end := wire.End{Running: s.running, Rounds: round, Sections: len(sections)}
	if !s.stream.OneWay { // which may lie somewhere before it is read
		end.Stopped = time.Since(begin).Microseconds()
	}
	if err := errors.Join(s.main.Write(wire.TypeEnd, end), s.main.Release()); err != nil {
		return s.lost(err)
	}
	lap(&d.Save)
	if s.stream.OneWay {
		return nil
	}
	s.enter(SourceLoading)
	if _, err := s.arrived(round); err != nil { // what it asks for is corrupt, and no answer follows
		return err
	}
	if _, err := s.expect(wire.TypeLoaded); err != nil {
		return err
	}
	lap(&d.Load)
	if err := s.release(); err != nil {
		return err
	}
	lap(&d.Release)
	return nil
}
