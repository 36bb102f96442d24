package migrate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"baton/kvm/guestmem"
	"baton/migrate/wire"
)

// world is what all machines of a test have in common: the disk's lock, and the knowledge of
// who runs the guest.
type world struct {
	t testing.TB

	mu   sync.Mutex
	runs *machine // who runs the guest
	lock *machine // who has the disk
	next *machine // for whom it is reserved
}

// machine is a guest that counts: step i writes i into page i%pages, so that the counter, which
// is in the state, says what RAM has to be.
type machine struct {
	w    *world
	name string
	mem  *guestmem.Memory

	mu       sync.Mutex
	dead     bool // the process was killed
	count    uint64
	disk     []byte // state of another device
	hot      uint64 // pages that the guest writes to, 0: all
	stop     chan struct{}
	stopped  chan struct{}
	throttle []int
	loaded   []string
	flushes  int
	logs     int              // dirty logs that are on
	log      *guestmem.Bitmap // what it has, as KVM's in its manual mode
	open     *guestmem.Bitmap // what of that has been reported, and is not watched again
	facts    []Fact
	version  uint16 // of the section cpu
	failAt   string // the method that fails
	burst    int    // steps in a tenth of a millisecond
	late     []Late // what came after it had left its source
	stood    time.Duration
}

const testPages = 1200 // more than a block, and no multiple of it

func newMachine(t testing.TB, w *world, name string) *machine {
	t.Helper()
	mem, err := guestmem.New([]guestmem.Range{{Base: 0, Size: (testPages - 8) * guestmem.PageSize}, {Base: 1 << 32, Size: 8 * guestmem.PageSize}}, guestmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{w: w, name: name, mem: mem, facts: facts("machine", "fake", "ram", "4800 KiB"), version: 1, disk: []byte("disk"), burst: 1}
	t.Cleanup(func() {
		m.kill()
		_ = mem.Close()
	})
	return m
}

// boot starts a guest with half of its RAM written.
func (m *machine) boot() *machine {
	for range testPages / 2 {
		m.step()
	}
	m.w.lock = m
	m.run()
	return m
}

func (m *machine) gpa(page uint64) int64 {
	if page < testPages-8 {
		return int64(page * guestmem.PageSize)
	}
	return int64(1<<32 + (page-(testPages-8))*guestmem.PageSize)
}

func (m *machine) step() {
	pages := uint64(testPages)
	if m.hot != 0 && m.count > testPages {
		pages = m.hot
	}
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], m.count)
	binary.LittleEndian.PutUint64(b[8:], ^m.count)
	if _, err := m.mem.WriteAt(b[:], m.gpa(m.count%pages)); err != nil {
		m.w.t.Error(err)
	}
	m.count++
}

// check looks at every page; the guest is paused.
func (m *machine) check() {
	for p := range uint64(testPages) {
		want := uint64(0) // the last step that wrote the page
		pages := uint64(testPages)
		if m.hot != 0 && m.count > testPages+1 && p < m.hot {
			pages = m.hot
		}
		limit := m.count
		if m.hot != 0 && pages != m.hot {
			limit = min(limit, testPages+1)
		}
		if p < limit {
			want = p + (limit-1-p)/pages*pages
		}
		var b [16]byte
		_, _ = m.mem.ReadAt(b[:], m.gpa(p))
		v, n := binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:])
		if p >= limit && v == 0 && n == 0 {
			continue
		}
		if v != want || n != ^want {
			m.w.t.Errorf("%s: page %d has stamp %d, want %d, at count %d", m.name, p, v, want, m.count)
			return
		}
	}
}

func (m *machine) run() {
	m.w.mu.Lock()
	if m.w.runs != nil {
		m.w.t.Errorf("the guest runs on %s, and now on %s too", m.w.runs.name, m.name)
	}
	if m.w.lock != m {
		m.w.t.Errorf("the guest runs on %s, which has not locked its disk", m.name)
	}
	m.w.runs = m
	m.w.mu.Unlock()
	m.stop, m.stopped = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(m.stopped)
		tick := time.NewTicker(100 * time.Microsecond)
		defer tick.Stop()
		for {
			select {
			case <-m.stop:
				return
			case <-tick.C:
				for range m.burst {
					m.step()
				}
			}
		}
	}()
}

func (m *machine) halt() {
	if m.stop != nil {
		close(m.stop)
		<-m.stopped
		m.stop = nil
		m.w.mu.Lock()
		m.w.runs = nil
		m.w.mu.Unlock()
	}
}

// kill is kill -9: the guest is gone, locks are free, nothing has an effect any more.
func (m *machine) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.halt()
	m.dead = true
	m.w.mu.Lock()
	if m.w.lock == m {
		m.w.lock = nil
	}
	if m.w.next == m {
		m.w.next = nil
	}
	m.w.mu.Unlock()
}

var errDead = errors.New("this process is dead")

// alive begins every method that has an effect.
func (m *machine) alive(method string) (unlock func(), err error) {
	m.mu.Lock()
	if m.dead {
		err = errDead
	} else if m.failAt == method {
		err = fmt.Errorf("%s fails, as the test wants it", method)
	}
	return m.mu.Unlock, err
}

func (m *machine) Memory() *guestmem.Memory     { return m.mem }
func (m *machine) Facts() []Fact                { return m.facts }
func (m *machine) Check(source []Fact) []string { return differences(source, m.facts) }

// differences names the facts that differ, for a machine that needs all of them to be equal.
func differences(source, target []Fact) []string {
	var diff []string
	have := make(map[string]string)
	for _, f := range target {
		have[f.Name] = f.Value
	}
	for _, f := range source {
		v, ok := have[f.Name]
		switch {
		case !ok:
			diff = append(diff, fmt.Sprintf("%s: %s on the source, missing on the target", f.Name, f.Value))
		case v != f.Value:
			diff = append(diff, fmt.Sprintf("%s: %s on the source, %s on the target", f.Name, f.Value, v))
		}
		delete(have, f.Name)
	}
	for _, f := range target {
		if _, ok := have[f.Name]; ok {
			diff = append(diff, fmt.Sprintf("%s: missing on the source, %s on the target", f.Name, f.Value))
		}
	}
	return diff
}

func (m *machine) TakeLocks() error {
	unlock, err := m.alive("TakeLocks")
	defer unlock()
	if err != nil {
		return err
	}
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	if m.w.lock != nil && m.w.lock != m {
		return fmt.Errorf("disk is locked by %s", m.w.lock.name)
	}
	m.w.lock = m
	return nil
}

func (m *machine) OfferLocks() error {
	unlock, err := m.alive("OfferLocks")
	defer unlock()
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	if err == nil && m.w.next == m {
		m.w.next = nil
	}
	return err
}

func (m *machine) ReserveLocks() error {
	unlock, err := m.alive("ReserveLocks")
	defer unlock()
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	if err == nil && m.w.next != nil && m.w.next != m {
		err = fmt.Errorf("disk is reserved by %s", m.w.next.name)
	}
	if err == nil {
		m.w.next = m
	}
	return err
}

func (m *machine) ReleaseLocks() error {
	unlock, err := m.alive("ReleaseLocks")
	defer unlock()
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	if err == nil && m.w.lock == m {
		m.w.lock = nil
	}
	if err == nil && m.w.next == m {
		m.w.next = nil
	}
	return err
}

func (m *machine) Flush() error {
	unlock, err := m.alive("Flush")
	defer unlock()
	m.flushes++
	return err
}

func (m *machine) Throttle(percent int) {
	unlock, err := m.alive("Throttle")
	defer unlock()
	if err == nil {
		m.throttle = append(m.throttle, percent)
	}
}

func (m *machine) Pause() (bool, error) {
	unlock, err := m.alive("Pause")
	defer unlock()
	running := m.stop != nil
	if err == nil {
		m.halt()
	}
	return running, err
}

func (m *machine) Resume(running bool) error {
	unlock, err := m.alive("Resume")
	defer unlock()
	if err == nil && running {
		m.run()
	}
	return err
}

func (m *machine) TakeLate() []Late {
	return []Late{{Name: "net", Frames: [][]byte{[]byte("late for " + m.name)}, Dropped: 3}}
}

func (m *machine) Map(uint64, uint64) {}

func (m *machine) GiveLate(list []Late) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.late = list
}

func (m *machine) Start(running bool, stopped time.Duration) error {
	unlock, err := m.alive("Start")
	defer unlock()
	m.stood = stopped
	if err == nil && running {
		m.run()
	}
	return err
}

// section is one that a test may look into.
type section struct {
	m    *machine
	info SectionInfo
	save func() []byte
	load func([]byte) error
}

func (s *section) Info() SectionInfo { return s.info }
func (s *section) Save() ([]byte, error) {
	unlock, err := s.m.alive("Save")
	defer unlock()
	return s.save(), err
}

func (s *section) Load(version uint16, data []byte) error {
	unlock, err := s.m.alive("Load")
	defer unlock()
	s.m.loaded = append(s.m.loaded, s.info.ID)
	return errors.Join(err, s.load(data))
}

func (m *machine) Sections() []Section {
	return []Section{
		&section{m, SectionInfo{"vcpu/0", "vcpu", m.version, 1},
			func() []byte { return binary.LittleEndian.AppendUint64(nil, m.count) },
			func(b []byte) error {
				if len(b) != 8 {
					return errors.New("a count has 8 bytes")
				}
				m.count = binary.LittleEndian.Uint64(b)
				return nil
			}},
		&section{m, SectionInfo{"pci/0000:00:01.0", "virtio-blk-pci", 3, 2},
			func() []byte { return m.disk },
			func(b []byte) error { m.disk = b; return nil }},
	}
}

// dirtyLog is what guestmem logs, as a [Protector].
type dirtyLog struct{ m *machine }

func (d dirtyLog) Start() error {
	unlock, err := d.m.alive("StartLog")
	defer unlock()
	if err == nil {
		d.m.logs++
		d.m.mem.StartDirtyLog()
		d.m.log = guestmem.NewBitmap(d.m.mem)
		for _, r := range d.m.mem.Regions() {
			d.m.log.Set(r.GPA, r.Size)
		}
		d.m.open = d.m.log
	}
	return err
}

func (d dirtyLog) Sync(b *guestmem.Bitmap) error {
	unlock, err := d.m.alive("Sync")
	defer unlock()
	d.m.mem.SyncDirtyLog(d.m.log)
	b.Or(d.m.log)
	d.m.open = guestmem.NewBitmap(d.m.mem)
	d.m.open.Or(d.m.log)
	return err
}

func (d dirtyLog) Protect(gpa, size uint64) error {
	unlock, err := d.m.alive("Protect")
	defer unlock()
	d.m.mem.SyncDirtyLog(d.m.log)
	log, open := guestmem.NewBitmap(d.m.mem), guestmem.NewBitmap(d.m.mem)
	for at, n := range d.m.log.Runs() {
		for page := at; page < at+n; page += guestmem.PageSize {
			switch {
			case !d.m.open.Test(page):
				log.Set(page, 1)
			case page-gpa >= size:
				log.Set(page, 1)
				open.Set(page, 1)
			}
		}
	}
	d.m.log, d.m.open = log, open
	return err
}

func (d dirtyLog) Stop() error {
	unlock, err := d.m.alive("StopLog")
	defer unlock()
	d.m.logs--
	d.m.mem.StopDirtyLog()
	return err
}

func (m *machine) DirtySources() []DirtySource { return []DirtySource{dirtyLog{m}} }

// preparer takes something away and gives it back.
type preparer struct {
	mu    sync.Mutex
	taken bool
	undos int
	err   error
}

func (p *preparer) Prepare(ctx context.Context) (func(), error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken = true
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.taken = false
		p.undos++
	}, errors.Join(p.err, ctx.Err())
}

// waiter is a preparer whose guest does nothing.
type waiter struct{ waits chan struct{} }

func (w waiter) Prepare(ctx context.Context) (func(), error) {
	close(w.waits)
	<-ctx.Done()
	return nil, ctx.Err()
}

// hook reserves something.
type hook struct {
	preparer
	resumed chan struct{}
}

func (h *hook) Reserve(ctx context.Context) (func(), error) { return h.Prepare(ctx) }
func (h *hook) AfterResume()                                { close(h.resumed) }

// network is between a source and a target: a relay that does what networks do.
type network struct {
	t  testing.TB
	l  net.Listener
	to string

	mu      sync.Mutex
	conns   []net.Conn
	stalled [2]bool // bytes to the target, bytes to the source, go nowhere
	down    bool    // no connection can be made
	corrupt [2]bool // the next byte is broken

	corruptPage bool // one of the next page is
	moved       *sync.Cond
}

const toTarget, toSource = 0, 1

func newNetwork(t testing.TB) *network {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &network{t: t, l: l}
	n.moved = sync.NewCond(&n.mu)
	t.Cleanup(func() {
		_ = l.Close()
		n.heal()
		n.cut(false)
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.mu.Lock()
			to, down := n.to, n.down
			n.mu.Unlock()
			d, err := net.Dial("tcp", to)
			if err != nil || down {
				_ = c.Close()
				if err == nil {
					_ = d.Close()
				}
				continue
			}
			n.mu.Lock()
			n.conns = append(n.conns, c, d)
			n.mu.Unlock()
			go n.relay(c, d, toTarget)
			go n.relay(d, c, toSource)
		}
	}()
	return n
}

func (n *network) address() wire.Address {
	a, err := wire.ParseURI("tcp:" + n.l.Addr().String())
	if err != nil {
		n.t.Fatal(err)
	}
	return a
}

func (n *network) relay(from, to net.Conn, direction int) {
	b := make([]byte, 64<<10)
	for {
		k, err := from.Read(b)
		n.mu.Lock()
		for n.stalled[direction] {
			n.moved.Wait()
		}
		if n.corrupt[direction] && k > 0 {
			b[k/2] ^= 1
			n.corrupt[direction] = false
		}
		if zeros := make([]byte, 1000); n.corruptPage && direction == toTarget {
			if i := bytes.Index(b[:k], zeros); i >= 0 { // no head, run or sum is among them
				b[i+len(zeros)/2] ^= 1
				n.corruptPage = false
			}
		}
		n.mu.Unlock()
		if k > 0 {
			if _, err := to.Write(b[:k]); err != nil {
				_ = from.Close()
			}
		}
		if err == io.EOF {
			_ = to.(*net.TCPConn).CloseWrite()
			return
		}
		if err != nil {
			_ = to.Close()
			return
		}
	}
}

// cut ends all connections; down says that there will be none until heal.
func (n *network) cut(down bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = down
	for _, c := range n.conns {
		_ = c.Close()
	}
	n.conns = nil
}

func (n *network) stall(direction int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stalled[direction] = true
}

func (n *network) heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down, n.stalled = false, [2]bool{}
	n.moved.Broadcast()
}

func (n *network) corruptNext(direction int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.corrupt[direction] = true
}

// trip is one migration between two machines, and what happens on the way.
type trip struct {
	t        testing.TB
	from, to *machine
	net      *network
	source   *Source
	target   *Target
	prep     [2]preparer
	hook     *hook
	opt      Options // of both
	tweak    func(source, target *Options)

	dead      *machine // killed
	cancelled bool

	mu      sync.Mutex
	seen    []Event
	at      map[State]func() // what is done when a state is entered
	reached map[State]chan struct{}

	sourceEnd, targetEnd chan error
	targetRests          chan struct{} // the target waits for a source, or knows that it has the guest
}

func newTrip(t testing.TB, from, to *machine) *trip {
	tr := &trip{t: t, from: from, to: to, net: newNetwork(t), hook: &hook{resumed: make(chan struct{})}, at: map[State]func(){}, reached: map[State]chan struct{}{},
		sourceEnd: make(chan error, 1), targetEnd: make(chan error, 1), targetRests: make(chan struct{}, 1)}
	for s := range States() {
		tr.reached[s] = make(chan struct{})
	}
	tr.opt.Params = DefaultParams()
	tr.opt.Params.MaxBandwidth = 0
	tr.opt.Params.StallTimeout = 20000
	return tr
}

func (tr *trip) event(e Event) {
	tr.mu.Lock()
	tr.seen = append(tr.seen, e)
	var f func()
	if e.Pass == 0 && e.Log == "" {
		f = tr.at[e.State]
		if !e.State.Source() {
			select {
			case <-tr.targetRests:
			default:
			}
			if e.State == TargetListening || e.State == TargetConfirming {
				tr.targetRests <- struct{}{}
			}
		}
	}
	tr.mu.Unlock()
	if f != nil {
		f()
	}
	if e.Pass == 0 && e.Log == "" {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		select {
		case <-tr.reached[e.State]:
		default:
			close(tr.reached[e.State])
		}
	}
}

// start sets both sides going.
func (tr *trip) start() {
	tr.t.Helper()
	s, d := tr.opt, tr.opt
	s.Events, d.Events = tr.event, tr.event
	s.Preparers = []Preparer{&tr.prep[0], &tr.prep[1]}
	d.Hooks = []Hook{tr.hook}
	d.Address = wire.Address{Network: wire.TCP, Host: "127.0.0.1", Port: "0"}
	if tr.tweak != nil {
		tr.tweak(&s, &d)
	}
	var err error
	if tr.target, err = NewTarget(tr.to, d); err != nil {
		tr.t.Fatal(err)
	}
	if err := tr.target.Listen(); err != nil {
		tr.t.Fatal(err)
	}
	if s.Address.Network == "" {
		a := tr.target.Addr()
		tr.net.mu.Lock()
		tr.net.to = net.JoinHostPort(a.Host, a.Port)
		tr.net.mu.Unlock()
		s.Address = tr.net.address()
	}
	if tr.source, err = NewSource(tr.from, s); err != nil {
		tr.t.Fatal(err)
	}
	// Both have ended before the machines' memory goes, whatever the test waits for.
	var running sync.WaitGroup
	running.Go(func() { tr.targetEnd <- tr.target.Run() })
	running.Go(func() { tr.sourceEnd <- tr.source.Run() })
	tr.t.Cleanup(func() {
		tr.killSource()
		tr.killTarget()
		running.Wait()
	})
}

// wait waits for something that happens.
func wait[T any](tr *trip, c <-chan T, what string) (v T) {
	tr.t.Helper()
	select {
	case v = <-c:
	case <-time.After(30 * time.Second):
		tr.t.Fatalf("%s: nothing happens; source %s (%v), target %s (%v)", what, tr.source.now(), tr.source.Stats().Err, tr.target.now(), tr.target.Stats().Err)
	}
	return v
}

// check looks at the machine that is to run the guest: it does, nobody else does, RAM is right,
// and it gets on.
func (tr *trip) check(m *machine) {
	tr.t.Helper()
	m.w.mu.Lock()
	runs, lock := m.w.runs, m.w.lock
	m.w.mu.Unlock()
	if runs != m || lock != m {
		name := func(m *machine) string {
			if m == nil {
				return "nobody"
			}
			return m.name
		}
		tr.t.Fatalf("the guest runs on %s, the disk is %s's, both should be %s's; source %v, target %v", name(runs), name(lock), m.name, tr.source.Stats().Err, tr.target.Stats().Err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.halt()
	before := m.count
	m.check()
	m.step()
	m.check()
	if m.count != before+1 || string(m.disk) != "disk" {
		tr.t.Errorf("%s: state is %d, %q", m.name, m.count, m.disk)
	}
	m.run()
}

// again shows that nothing is left behind: another migration succeeds.
func (tr *trip) again(from *machine) {
	tr.t.Helper()
	from.failAt = ""
	next := newTrip(tr.t, from, newMachine(tr.t, from.w, "the next target"))
	next.opt.Capabilities = tr.opt.Capabilities
	next.at[SourceHolding] = func() { _ = next.source.Continue() }
	next.start()
	if err := wait(next, next.sourceEnd, "second migration"); err != nil {
		tr.t.Fatalf("second migration: %v", err)
	}
	if err := wait(next, next.targetEnd, "second migration"); err != nil {
		tr.t.Fatalf("second migration: %v", err)
	}
	next.check(next.to)
}
