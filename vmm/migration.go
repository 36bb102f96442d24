package vmm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"baton/devices"
	"baton/devices/pci"
	"baton/devices/virtio/console"
	"baton/migrate"
	"baton/migrate/wire"
	"baton/vmm/qmp"

	"golang.org/x/sys/unix"
)

// migration is what the machine knows of migrations: those of its guest to elsewhere, one after
// the other, and the one by which its guest came. The main loop owns it.
//
//	QMP ──> main loop ── makes ──> migrate.Source, Target      goroutines of their own
//	          ^    └── closes done when Run has returned             │
//	          └─ call ── mover: pause, state, locks, start <─────────┘
//	EventBus <── MIGRATION, MIGRATION_PASS ── Events <───────────────┘
type migration struct {
	params       migrate.Params
	capabilities migrate.Capabilities

	source *migrate.Source // the last one, nil before the first
	target *migrate.Target // nil before one is listened for
	last   engine          // the last of these
	done   <-chan struct{} // closed when that one has ended; nil before the first

	cpu  []migrate.Fact // see cpuFacts
	tell atomic.Bool    // the capability events is on; the engines look at it

	exitOnError bool                  // a guest that does not come ends the machine
	abandoned   bool                  // the machine is ending
	away        bool                  // the guest has left: the disks are somebody else's
	watched     []migrate.DirtySource // of the last attempt; those of a guest that has left still watch
	was         State                 // before the pause
	quiesced    []devices.Quiescer    // by the pause, or by the wait for a guest
}

// engine is what sources and targets have in common.
type engine interface {
	Run() error
	Cancel() error
	Decide(run bool) error
	Stats() migrate.Stats
}

// migrating says whether a guest is on its way, from here or to here. Its devices must not
// change meanwhile.
func (m *Machine) migrating() bool {
	if m.migration.last == nil {
		return false
	}
	s := m.migration.last.Stats().State
	return !s.Final() && s != migrate.TargetIdle && s != migrate.TargetListening && s != migrate.TargetConfirming
}

// blockers are the reasons why the guest cannot move, in words for people.
func (m *Machine) blockers() (list []string) {
	for _, d := range m.devices {
		if d.Driver == "vfio-pci" && !m.isPrimary(d.fn) {
			list = append(list, fmt.Sprintf("%s: VFIO migration is not supported: give it failover_pair_id= and a standby", d.Device))
		}
	}
	return list
}

// startMigration sends the guest to a.
func (m *Machine) startMigration(a wire.Address) error {
	switch {
	case m.State() == StateInMigrate:
		return qmp.Errorf("Guest is waiting for an incoming migration")
	case m.migrating():
		return errMigrating
	case m.State() == StatePostMigrate:
		return qmp.Errorf("Can't migrate the vm that was paused due to previous migration")
	}
	for _, b := range m.blockers() {
		return qmp.Errorf("%s", b)
	}
	o, err := m.migrationOptions(a, false)
	if err != nil {
		return err
	}
	o.Preparers = m.preparers()
	s, err := migrate.NewSource(mover{m}, o)
	if err != nil {
		return err
	}
	m.migration.source = s
	m.runMigration(s)
	return nil
}

var errMigrating = qmp.Errorf("There's a migration process in progress")

// awaitMigration listens for a guest at a.
func (m *Machine) awaitMigration(a wire.Address) error {
	o, err := m.migrationOptions(a, true)
	if err != nil {
		return err
	}
	o.Hooks = m.hooks()
	t, err := migrate.NewTarget(mover{m}, o)
	if err != nil {
		return err
	}
	if err := m.rehearse(); err != nil {
		return err
	}
	if err := t.Listen(); err != nil {
		return err
	}
	m.migration.target = t
	m.runMigration(t)
	return nil
}

// rehearse saves and loads the state of a machine that waits for a guest. Nothing changes by it,
// but what is done for the first time takes long, and would again in the stop.
func (m *Machine) rehearse() error {
	for _, s := range m.staters() {
		data, err := s.SaveState()
		if err == nil && !m.takesInput(s) { // which would come twice
			err = s.LoadState(s.StateInfo().Version, data)
		}
		if err != nil {
			return fmt.Errorf("the machine's own state before a migration: %w", err)
		}
	}
	return nil
}

// takesInput says whether what the host has sent is put after what comes with the state.
func (m *Machine) takesInput(s devices.Stater) bool {
	if s == devices.Stater(m.serial) {
		return true
	}
	return slices.ContainsFunc(m.devices, func(d *device) bool {
		_, is := d.model.(*console.Device)
		return is && any(d.fn) == any(s)
	})
}

// rehearseLeaving saves the state of a machine whose guest has not begun, for the same reason.
func (m *Machine) rehearseLeaving() error {
	if err := m.quiesce(); err != nil {
		return err
	}
	for _, s := range m.staters() {
		if _, err := s.SaveState(); err != nil {
			return errors.Join(err, m.unquiesce())
		}
	}
	return m.unquiesce()
}

// migrationGC lets a heap of 16 MiB grow before it is collected while there is a migration: more than one needs.
const migrationGC = 400

// usualGC is what it is otherwise, also when one migration begins before the last has ended.
var usualGC = sync.OnceValue(func() int { return debug.SetGCPercent(migrationGC) })

func (m *Machine) runMigration(e engine) {
	done := make(chan struct{})
	m.migration.last, m.migration.done = e, done
	go func() {
		defer close(done)
		// A collection would take CPUs from the guest, and time from its stop.
		defer debug.SetGCPercent(usualGC())
		debug.SetGCPercent(migrationGC)
		if err := e.Run(); err != nil {
			m.log.Warn("migration: " + err.Error())
		}
	}()
}

// migrationEnded does what the end of a migration means for the machine.
func (m *Machine) migrationEnded(e migrate.Event) {
	switch {
	case e.State == migrate.SourceCompleted:
		m.migration.away = true
		m.setState(StatePostMigrate)
		m.guestLeft()
	case e.State == migrate.TargetFailed && m.migration.exitOnError && !m.migration.abandoned:
		m.fault = fmt.Errorf("incoming migration: %w", e.Err)
	}
}

func (m *Machine) migrationOptions(a wire.Address, incoming bool) (o migrate.Options, err error) {
	p := m.migration.params
	o = migrate.Options{
		Address: a, Params: p, Capabilities: m.migration.capabilities,
		Files: func(name string) (f *os.File, err error) {
			if e := m.call(func() { f, err = m.migrationFile(name) }); e != nil {
				err = e
			}
			return f, err
		},
		Events: m.migrationEvents(),
	}
	if socket := a.Network == wire.TCP || a.Network == wire.Unix || a.Network == wire.FD; socket && p.TLSCreds != "" {
		o.TLS, err = wire.LoadTLS(p.TLSCreds, incoming, cmp.Or(p.TLSHostname, a.Host))
	}
	return o, err
}

// migrationFile is what fd: names: a file of getfd, or one that baton was started with.
func (m *Machine) migrationFile(name string) (*os.File, error) {
	if fd, err := strconv.ParseUint(name, 10, 31); err == nil {
		return os.NewFile(uintptr(fd), "fd:"+name), nil
	}
	if f := m.takeFile(name); f != nil {
		return f, nil
	}
	return nil, qmp.Errorf("File descriptor named '%s' has not been found", name)
}

// migrationEvents returns what publishes, if clients want it, what the engine tells, in QEMU's
// order: the guest is stopped before the status is device. It is called from the engine's
// goroutine.
func (m *Machine) migrationEvents() func(migrate.Event) {
	last := migrate.StatusNone
	return func(e migrate.Event) {
		publish := m.migration.tell.Load()
		switch {
		case e.Log != "":
			m.log.Info("migration: " + e.Log)
			return
		case e.Pass != 0:
			if publish {
				m.events.Publish("MIGRATION_PASS", passData{int64(e.Pass)})
			}
			return
		case e.State.Final():
			_ = m.call(func() { m.migrationEnded(e) }) // unless the machine has ended
		case e.State == migrate.SourcePreparing:
			_ = m.call(m.unplugPrimaries)
		case e.State == migrate.SourceStopping:
			return
		}
		if publish && e.Status != last {
			m.events.Publish("MIGRATION", migrationData{migrationStatus(e.Status)})
		}
		last = e.Status
	}
}

type (
	passData struct {
		Pass int64 `json:"pass"`
	}
	migrationData struct {
		Status migrationStatus `json:"status"`
	}
)

// cancelMigration calls off the one under way, if it can be.
func (m *Machine) cancelMigration() error {
	if !m.migrating() || m.State() == StateInMigrate { // as QEMU, of which only the source cancels
		return nil
	}
	return m.migration.last.Cancel()
}

// cancelTime is how long the end of the machine waits for its migration's.
const cancelTime = 10 * time.Second

// abandonMigration ends the one under way because the machine ends. It is called by the main
// loop, at its end, and serves calls meanwhile. What is not decided by then is decided by the
// other side.
func (m *Machine) abandonMigration() {
	mg := &m.migration
	mg.abandoned = true
	if mg.last == nil {
		return
	}
	late := time.NewTimer(cancelTime)
	defer late.Stop()
	cancelled := make(chan error, 1)
	go func() { cancelled <- mg.last.Cancel() }()
	for {
		select {
		case f := <-m.calls:
			f()
		case err := <-cancelled:
			if err != nil && !mg.last.Stats().State.Final() {
				m.log.Warn("migration: the machine ends, and it cannot be cancelled: " + err.Error())
				return
			}
		case <-mg.done:
			return
		case <-late.C:
			m.log.Warn("migration: the machine ends, and it does not")
			return
		}
	}
}

// beginIncoming has everything ready for a guest: devices as after their reset, at rest,
// vCPUs that have not run, and in RAM nothing.
func (m *Machine) beginIncoming(context.Context) error {
	if err := m.resetDevices(); err != nil {
		return err
	}
	if err := m.quiesce(); err != nil {
		return err
	}
	m.migration.exitOnError = true
	if m.cfg.Incoming == IncomingDefer {
		return nil
	}
	a, err := parseIncoming(m.cfg.Incoming)
	if err != nil {
		return err
	}
	return m.awaitMigration(a)
}

func parseIncoming(uri string) (wire.Address, error) {
	a, err := wire.ParseURI(uri)
	if err != nil {
		return a, fmt.Errorf("incoming: %w", err)
	}
	return a, nil
}

// arrived lets the guest go that has come, as it was on the source unless -S says otherwise.
func (m *Machine) arrived(running bool, stopped time.Duration) error {
	if err := m.unquiesce(); err != nil {
		return err
	}
	m.migration.cpu = m.cpuFacts()
	if !running || m.cfg.Paused {
		m.setState(StatePaused)
	} else {
		time.AfterFunc(catchUpTime, m.goFirst())
		m.resume()
	}
	m.guestCame(stopped)
	p := m.migration.params
	if p.AnnounceRounds > 0 { // before the source hears that the guest is here: see takeLate
		m.announceOnce(nil)
	}
	go m.announce(context.Background(), announceArgs{Initial: int64(p.AnnounceInitial), Max: int64(p.AnnounceMax), Rounds: int64(p.AnnounceRounds), Step: int64(p.AnnounceStep)})
	return nil
}

// A guest that has come is behind: what it works with is in no cache, what came for it is waiting, and its peers are, too.
// For so long its vCPUs go before what else there is to do at the end of a migration, where they may; before what serves
// them as well, if that is on the same CPU.
const (
	catchUpTime = 200 * time.Millisecond
	catchUpNice = -10
)

// goFirst has the vCPUs go first, until undo.
func (m *Machine) goFirst() (undo func()) {
	var undos []func()
	for _, c := range m.vcpus {
		tid := int(c.tid.Load())
		usual, err := unix.SchedGetAttr(tid, 0)
		if err != nil || usual.Policy != unix.SCHED_NORMAL || usual.Nice <= catchUpNice {
			continue
		}
		nice := usual.Nice
		usual.Flags |= unix.SCHED_FLAG_RESET_ON_FORK // for what it starts meanwhile
		usual.Runtime, usual.Nice = 0, catchUpNice
		if unix.SchedSetAttr(tid, usual, 0) != nil {
			continue
		}
		undos = append(undos, func() {
			now, err := unix.SchedGetAttr(tid, 0)
			if err == nil && now.Nice == catchUpNice { // nobody else has changed it
				usual.Nice = nice
				_ = unix.SchedSetAttr(tid, usual, 0) // takes no privilege
			}
		})
	}
	return func() {
		for _, f := range undos {
			f()
		}
	}
}

// pauseGuest stops the guest for its move. Running says whether it ran.
func (m *Machine) pauseGuest() (running bool, err error) {
	was := m.State()
	m.stopVCPUs()
	select {
	case r := <-m.requests:
		select {
		case m.requests <- r: // for the loop, which is here
		default: // there is another one already
		}
		return false, errors.New("the guest is being reset or turned off")
	default:
	}
	if err := m.quiesce(); err != nil {
		if was == StateRunning {
			m.gate.open()
		}
		return false, err
	}
	m.migration.was = was
	m.stop(StateFinishMigrate)
	return was == StateRunning, nil
}

// resumeGuest undoes pauseGuest.
func (m *Machine) resumeGuest(running bool) error {
	err := m.unquiesce()
	if running && !m.migration.abandoned {
		m.resume()
	} else {
		m.setState(m.migration.was)
	}
	return err
}

// takeBack lets a guest go on that has been sent elsewhere, which QEMU allows, too: the disks
// have to be free again.
func (m *Machine) takeBack() error {
	if !m.migration.away {
		return nil
	}
	for _, d := range m.lockables() {
		if err := d.Lock(); err != nil {
			return err
		}
	}
	m.migration.away = false
	for _, d := range m.migration.watched {
		if err := d.Stop(); err != nil {
			m.log.Warn("dirty pages: " + err.Error())
		}
	}
	m.log.Warn("the guest goes on here, after it has migrated: see that it does not run elsewhere")
	m.guestStays()
	return m.unquiesce()
}

// quiesce has all devices come to rest.
func (m *Machine) quiesce() error {
	for _, q := range slices.Backward(m.quiescers()) {
		if err := q.Quiesce(); err != nil {
			return errors.Join(err, m.unquiesce())
		}
		m.migration.quiesced = append(m.migration.quiesced, q)
	}
	return nil
}

// join has a function come to rest that is added to a machine whose devices are at rest.
func (m *Machine) join(f pci.Function) error {
	q, ok := f.(devices.Quiescer)
	if !ok || m.State() != StateInMigrate {
		return nil
	}
	m.migration.quiesced = append(m.migration.quiesced, q)
	return q.Quiesce()
}

// unquiesce lets those go on that quiesce had come to rest.
func (m *Machine) unquiesce() (err error) {
	for _, q := range slices.Backward(m.migration.quiesced) {
		err = errors.Join(err, q.Unquiesce())
	}
	m.migration.quiesced = nil
	return err
}
