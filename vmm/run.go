package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"baton/devices/char"
)

// State is what the machine is doing; the names are QMP's RunState.
type State string

// The states of a machine.
const (
	StatePrelaunch     State = "prelaunch" // no vCPU has run yet
	StateRunning       State = "running"
	StatePaused        State = "paused"
	StateInternalError State = "internal-error" // KVM or the guest failed; the vCPUs stand still
	StateShutdown      State = "shutdown"
	StateInMigrate     State = "inmigrate"      // a guest is to come, or is coming
	StateFinishMigrate State = "finish-migrate" // the guest leaves: the vCPUs stand still
	StatePostMigrate   State = "postmigrate"    // the guest has left
)

// Values is qmp.Enum.
func (State) Values() []string {
	return []string{string(StatePrelaunch), string(StateRunning), string(StatePaused), string(StateInternalError), string(StateShutdown),
		string(StateInMigrate), string(StateFinishMigrate), string(StatePostMigrate)}
}

// ErrCrashed is what Run returns after a guest that cannot go on; the report is in the log.
var ErrCrashed = errors.New("guest crashed")

// request is what somebody wants of the machine's main loop. A vCPU's thread only asks:
// the loop needs every vCPU parked to do it.
type request struct {
	kind   requestKind
	reason string // QMP's ShutdownCause
}

type requestKind int

const (
	requestReset requestKind = iota
	requestPowerOff
	requestCrash
	requestQuit // a person or a client ends baton, whatever the options say
)

// control is how others reach the main loop, where all changes of the machine's state happen.
type control struct {
	calls chan func()
	ended chan struct{} // closed when the loop has ended
	quit  string        // reason to end, if there is one; the loop's own
	fault error         // the same, for what Run is to return

	monitors  []monitor
	shared    *char.Monitor // on the serial port's terminal, may be nil
	devices   []*device
	runs      context.Context // Run's
	nics      nics
	migration migration
	files     map[string]*os.File // of getfd, by name
	pairs     []*failoverPair
	closing   sync.WaitGroup // devices that are being closed
	boots     atomic.Uint64  // how often the guest was started
	posts
}

// posts are what somebody who cannot wait wants of the main loop.
type posts struct {
	postMu sync.Mutex
	posted []func()
	wake   chan struct{} // holds one when there are some
}

// post has f run in the main loop, soon, after what was posted before. Anybody may call it: a
// vCPU's thread, and the main loop itself. What the loop does not come to is dropped.
func (p *posts) post(f func()) {
	p.postMu.Lock()
	p.posted = append(p.posted, f)
	p.postMu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// runPosted runs what was posted until now.
func (p *posts) runPosted() {
	p.postMu.Lock()
	list := p.posted
	p.posted = nil
	p.postMu.Unlock()
	for _, f := range list {
		f()
	}
}

// call runs f in the main loop and waits for its end. The vCPUs may be running meanwhile.
// It must not be called by f itself.
func (m *Machine) call(f func()) error {
	done := make(chan struct{})
	select {
	case m.calls <- func() { defer close(done); f() }:
		<-done
		return nil
	case <-m.ended:
		return errors.New("the machine has ended")
	}
}

// wait runs f, which may take seconds, on another goroutine, and carries out calls meanwhile. It
// is for the main loop: what that has looked at before may be different afterwards.
func (m *Machine) wait(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	for {
		select {
		case <-done:
			return
		case call := <-m.calls:
			call()
		case <-m.wake:
			m.runPosted()
		}
	}
}

// request asks the main loop to act and stops the guest at once. It may be called from a
// vCPU's thread. A request that comes while another one waits is dropped: the first wins.
func (m *Machine) request(kind requestKind, reason string) {
	m.gate.hold()
	select {
	case m.requests <- request{kind, reason}:
	default:
	}
}

// PowerOff ends Run as if the guest had turned itself off.
func (m *Machine) PowerOff(reason string) { m.request(requestPowerOff, reason) }

// Reset restarts the guest from its kernel, or ends Run under -no-reboot.
func (m *Machine) Reset(reason string) { m.request(requestReset, reason) }

// PowerButton presses the power button; what follows is the guest's decision.
func (m *Machine) PowerButton() {
	m.events.Publish("POWERDOWN", nil)
	m.pm.PowerButton()
}

// State returns what the machine is doing.
func (m *Machine) State() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

// Run starts the vCPUs and serves the machine and its monitors until the guest turns itself
// off, crashes (ErrCrashed), a client says quit or ctx is done. All vCPUs have stopped when
// it returns.
func (m *Machine) Run(ctx context.Context) error {
	defer close(m.ended)
	m.runs = ctx
	done := make(chan struct{}, len(m.vcpus))
	for _, c := range m.vcpus {
		go func() { c.run(); done <- struct{}{} }()
	}
	defer func() {
		m.stopVCPUs()
		m.gate.end()
		for range m.vcpus {
			<-done
		}
	}()
	defer m.abandonMigration()
	m.stopVCPUs() // which waits for all of them to be there
	if err := m.begin(ctx); err != nil {
		return err
	}
	m.serveMonitors(ctx)
	if m.cfg.Daemonize {
		if err := letGo(); err != nil {
			return err
		}
	}
	for {
		r := m.next(ctx)
		m.stopVCPUs()
		switch {
		case m.fault != nil:
			return m.fault
		case r.kind == requestReset && !m.cfg.NoReboot:
			m.reset(r.reason)
			continue
		case r.kind == requestCrash && m.cfg.NoShutdown:
			m.stop(StateInternalError)
			continue
		case r.kind == requestCrash:
			m.setState(StateInternalError)
			return ErrCrashed
		}
		if r.kind == requestQuit || !m.cfg.NoShutdown {
			m.end(r.reason)
			m.setState(StateShutdown)
			return nil
		}
		m.events.Publish("SHUTDOWN", shutdownData{guestAsked(r.reason), r.reason})
		m.stop(StateShutdown)
	}
}

// begin starts the guest, or gets ready for one that comes.
func (m *Machine) begin(ctx context.Context) error {
	if m.State() == StateInMigrate {
		return m.beginIncoming(ctx)
	}
	if err := m.restart(); err != nil {
		return err
	}
	if len(m.monitors) > 0 || m.shared != nil { // by which the guest may be told to go
		if err := m.rehearseLeaving(); err != nil {
			m.log.Warn("the guest will not be able to migrate: " + err.Error())
		}
	}
	if !m.cfg.Paused {
		m.resume()
	}
	return nil
}

// next waits for a request, and carries out calls meanwhile. Requests come first: what a
// vCPU has asked for happens before a call could let it run on.
func (m *Machine) next(ctx context.Context) request {
	for m.quit == "" && m.fault == nil {
		requests := m.requests
		if m.State() == StateFinishMigrate {
			requests = nil // until it is known where the guest is
		}
		select {
		case r := <-requests:
			return r
		default:
		}
		select {
		case r := <-requests:
			return r
		case f := <-m.calls:
			f()
		case <-m.wake:
			m.runPosted()
		case <-ctx.Done():
			return request{requestQuit, "host-signal"}
		}
	}
	return request{requestQuit, m.quit}
}

// end has Run return, if it was not about to.
func (m *Machine) end(reason string) {
	if m.quit == "" {
		m.quit = reason
		m.events.Publish("SHUTDOWN", shutdownData{guestAsked(reason), reason})
	}
}

// shutdownData is the data of QMP's SHUTDOWN and RESET events.
type shutdownData struct {
	Guest  bool   `json:"guest"`
	Reason string `json:"reason"`
}

func guestAsked(reason string) bool { return len(reason) > 6 && reason[:6] == "guest-" }

// restart puts everything into the state of a machine that was just turned on: devices,
// vCPUs, and the kernel in RAM. No vCPU may be running.
func (m *Machine) restart() error {
	start := time.Now()
	m.boots.Add(1)
	m.resetPairs()
	if err := m.resetDevices(); err != nil {
		return err
	}
	entry, err := m.loadKernel()
	if err != nil {
		return err
	}
	for _, c := range m.vcpus {
		if _, err := c.LoadState(c.power); err != nil {
			return fmt.Errorf("vcpu %d: %w", c.ID(), err)
		}
	}
	if err := m.vcpus[0].enter(entry); err != nil {
		return fmt.Errorf("vcpu 0: %w", err)
	}
	m.log.Debug("kernel loaded", "kernel", m.cfg.Kernel, "ms", time.Since(start).Milliseconds())
	return nil
}

// resume lets the vCPUs run.
func (m *Machine) resume() {
	m.setState(StateRunning)
	m.events.Publish("RESUME", nil)
	m.gate.open()
}

// stop stops the vCPUs if they run, and enters a state in which they do not.
func (m *Machine) stop(s State) {
	running := m.State() == StateRunning
	m.stopVCPUs()
	m.setState(s)
	if running {
		m.events.Publish("STOP", nil)
	}
}

// reset restarts the guest. One that did not run does not run afterwards either.
func (m *Machine) reset(reason string) {
	switch m.State() {
	case StateFinishMigrate:
		return // the guest is not ours to reset, for the moment
	case StateInMigrate: // there is nobody yet who could tell
		m.events.Publish("RESET", shutdownData{guestAsked(reason), reason})
		return
	}
	m.stopVCPUs()
	if err := m.restart(); err != nil {
		m.fault = fmt.Errorf("reset: %w", err)
		return
	}
	m.events.Publish("RESET", shutdownData{guestAsked(reason), reason})
	if m.State() == StateRunning {
		m.gate.open()
	} else {
		m.setState(StatePrelaunch)
	}
}

func (m *Machine) stopVCPUs() {
	m.gate.close(func() {
		for _, c := range m.vcpus {
			c.Kick()
		}
	})
}

func (m *Machine) setState(s State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = s
}
