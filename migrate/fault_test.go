package migrate

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"baton/migrate/wire"
)

// faults are what can happen at any state. The name says what; harm does it.
var faults = []struct {
	name string
	harm func(*trip)
}{
	{"kill the source", func(tr *trip) { tr.killSource() }},
	{"kill the target", func(tr *trip) { tr.killTarget() }},
	{"cut", func(tr *trip) { tr.net.cut(false) }},
	{"cut for long", func(tr *trip) { tr.net.cut(true) }},
	{"stall to the target", func(tr *trip) { tr.net.stall(toTarget) }},
	{"stall to the source", func(tr *trip) { tr.net.stall(toSource) }},
	{"stall both", func(tr *trip) { tr.net.stall(toTarget); tr.net.stall(toSource) }},
	{"corrupt to the target", func(tr *trip) { tr.net.corruptNext(toTarget) }},
	{"corrupt to the source", func(tr *trip) { tr.net.corruptNext(toSource) }},
	{"cancel", func(tr *trip) { tr.cancelled = tr.source.Cancel() == nil }},
	{"cancel the target", func(tr *trip) { _ = tr.target.Cancel() }},
}

// killSource is kill -9: nothing that this process does has an effect any more, and the system
// closes its connections.
func (tr *trip) killSource() {
	tr.from.kill()
	tr.dead = tr.from
	_ = tr.net.l.Close()
	tr.net.cut(false)
	tr.source.cancel(errDead)
}

func (tr *trip) killTarget() {
	tr.to.kill()
	tr.dead = tr.to
	tr.net.mu.Lock()
	tr.net.to = "127.0.0.1:1"
	tr.net.mu.Unlock()
	tr.net.cut(false)
	tr.target.cancel(errDead)
}

// detours are how states are reached that a migration without faults does not come to: what is
// done at which other state first.
var detours = map[State]struct {
	at State
	do func(*trip)
}{
	SourceAsking:    {SourceCommitting, func(tr *trip) { tr.net.cut(false) }},
	SourceUndoing:   {SourceSending, func(tr *trip) { _ = tr.source.Cancel() }},
	SourceCancelled: {SourceSending, func(tr *trip) { _ = tr.source.Cancel() }},
	SourceFailed:    {TargetReceiving, func(tr *trip) { tr.net.cut(false) }},
	TargetDoubting:  {TargetWaiting, func(tr *trip) { tr.net.cut(false) }},
	TargetUndoing:   {TargetReceiving, func(tr *trip) { tr.net.cut(false) }},
	TargetFailed:    {TargetReceiving, func(tr *trip) { tr.net.cut(false) }},
}

// TestFaults lets each thing happen at each state of both sides: at the end, the guest runs once.
func TestFaults(t *testing.T) {
	// Most of them wait, for a connection to be silent for long enough.
	room := make(chan struct{}, 16)
	var all sync.WaitGroup
	defer all.Wait()
	n := 0
	for s := range States() {
		n++
		if s == SourceIdle || s == TargetIdle {
			continue // nobody enters them: there is nothing yet that could fail
		}
		for i, f := range faults {
			for _, channels := range []uint64{0, 2} {
				if (n+i)%2 == int(channels/2) && os.Getenv("BATON_LONG") == "" {
					continue // the other half is for make test-long
				}
				room <- struct{}{}
				all.Go(func() {
					defer func() { <-room }()
					t.Run(fmt.Sprintf("%s/%s/%d", s, f.name, channels), func(t *testing.T) { testFault(t, s, f.name, f.harm, channels) })
				})
			}
		}
	}
}

func testFault(t *testing.T, s State, name string, harm func(*trip), channels uint64) {
	tr := pair(t)
	tr.opt.Capabilities = Capabilities{CapPauseBeforeSwitch: true, CapMultifd: channels > 0}
	if strings.HasPrefix(name, "stall") || strings.HasPrefix(name, "corrupt") {
		tr.opt.Params.StallTimeout = 1500
	}
	tr.opt.Params.MultifdChannels = max(channels, 1)
	tr.at[SourceHolding] = func() { _ = tr.source.Continue() }
	if d, ok := detours[s]; ok {
		tr.at[d.at] = func() { d.do(tr) }
	}
	var once sync.Once
	before := tr.at[s]
	tr.at[s] = func() {
		once.Do(func() { harm(tr) })
		if before != nil {
			before()
		}
	}
	tr.start()
	wait(tr, tr.reached[s], "the state is not reached") // as all must be that will ever be added
	tr.settle()
}

// settle waits for the end of what a fault has begun and checks that one guest is there.
func (tr *trip) settle() {
	tr.t.Helper()
	// Both sides come to an end, or wait for the other one.
	rest := func(end chan error, doubt State) (error, bool) {
		select {
		case err := <-end:
			return err, true
		case <-tr.reached[doubt]:
		case <-time.After(30 * time.Second):
			tr.t.Errorf("nothing happens; source %s (%v), target %s (%v)", tr.source.now(), tr.source.Stats().Err, tr.target.now(), tr.target.Stats().Err)
		}
		return nil, false
	}
	sourceErr, sourceOver := rest(tr.sourceEnd, SourceAsking)
	if !sourceOver {
		// It asks, and does not go on by itself however long that takes.
		if tr.from.stop != nil && tr.dead != tr.from && tr.source.now() == SourceAsking { // it may just have been answered
			tr.t.Error("the guest runs on the source, which does not know whose it is")
		}
		if err := tr.source.Cancel(); err == nil {
			tr.t.Error("what has been committed is cancelled")
		}
	}
	tr.net.heal()
	if !sourceOver && tr.dead == tr.from {
		_ = tr.source.Decide(false) // ends what a dead process does not do
	}
	if !sourceOver && tr.dead == tr.to {
		// There will be no answer: a person decides, who knows that the target is gone.
		if err := tr.source.Decide(true); err != nil {
			tr.t.Error(err)
		}
	}
	if !sourceOver {
		sourceErr = wait(tr, tr.sourceEnd, "the source asks")
	}
	if tr.dead == tr.from {
		// Nobody asks a target that has loaded all.
		select {
		case <-tr.reached[TargetDoubting]:
			err := tr.target.Decide(true)
			if tr.target.settledAs(never) { // the source had asked before it died, but has not said that it got the answer
				err = tr.target.Decide(false)
			}
			if err != nil && tr.target.now() == TargetDoubting {
				tr.t.Error(err)
			}
		case <-tr.reached[TargetFailed]:
		case <-tr.reached[TargetCompleted]:
		case <-tr.targetRests:
			tr.targetRests <- struct{}{}
		}
	}
	var targetErr error
	select {
	case targetErr = <-tr.targetEnd:
	case <-tr.targetRests:
		// Nothing has come from a source, or it was refused; or the source knows already, but
		// its last frame was lost.
		if tr.target.Cancel() != nil {
			_ = tr.target.Decide(true)
		}
		targetErr = wait(tr, tr.targetEnd, "the target ends")
	case <-time.After(30 * time.Second):
		tr.t.Fatalf("the target is %s (%v)", tr.target.now(), tr.target.Stats().Err)
	}
	on := tr.from
	if sourceErr == nil && tr.dead != tr.from || targetErr == nil && tr.dead != tr.to {
		on = tr.to
	}
	if tr.dead != nil && tr.dead != on || tr.dead == nil {
		// The one that is left says what has happened.
		if on == tr.from && (sourceErr == nil || targetErr == nil && tr.dead != tr.to) {
			tr.t.Errorf("source %v, target %v", sourceErr, targetErr)
		}
		tr.check(on)
		tr.again(on)
		return
	}
	// The guest was where the fault hit: it is gone, and runs nowhere.
	if tr.from.w.runs != nil {
		tr.t.Errorf("the guest runs on %s", tr.from.w.runs.name)
	}
}

// TestDecisions are those of a person while a side is in doubt.
func TestDecisions(t *testing.T) {
	t.Run("early", func(t *testing.T) {
		tr := pair(t)
		tr.start()
		tr.succeeds()
		for _, err := range []error{tr.source.Decide(true), tr.source.Recover(tr.net.address()), tr.target.Decide(false)} {
			if err == nil || !strings.Contains(err.Error(), "is not in doubt") {
				t.Error(err)
			}
		}
	})
	t.Run("the source gives the guest up", func(t *testing.T) {
		tr := pair(t)
		tr.at[SourceCommitting] = tr.killTarget
		tr.start()
		wait(tr, tr.reached[SourceAsking], "asking")
		if st := tr.source.Stats(); st.Owner != OwnerAsked || st.Err == nil || !strings.Contains(st.Err.Error(), "migrate-recover") {
			t.Errorf("%+v", st)
		}
		if err := tr.source.Decide(false); err != nil {
			t.Fatal(err)
		}
		if err := wait(tr, tr.sourceEnd, "source"); err != nil || tr.from.stop != nil {
			t.Errorf("%v", err)
		}
	})
	t.Run("the target gives the guest up", func(t *testing.T) {
		tr := pair(t)
		tr.at[TargetWaiting] = tr.killSource
		tr.start()
		wait(tr, tr.reached[TargetDoubting], "doubting")
		if err := tr.target.Decide(false); err != nil {
			t.Fatal(err)
		}
		if err := wait(tr, tr.targetEnd, "target"); err == nil || tr.to.stop != nil {
			t.Errorf("%v", err)
		}
	})
	t.Run("migrate-recover", func(t *testing.T) {
		tr := pair(t)
		tr.at[SourceCommitting] = func() { tr.net.cut(true) }
		tr.start()
		wait(tr, tr.reached[SourceAsking], "asking")
		if err := tr.source.Recover(wire.Address{Network: wire.File, Path: "x"}); err == nil {
			t.Error("a file is asked")
		}
		if err := tr.source.Recover(tr.target.Addr()); err != nil {
			t.Fatal(err)
		}
		err := wait(tr, tr.sourceEnd, "source")
		on := tr.to
		if err != nil {
			on = tr.from
		}
		_ = wait(tr, tr.targetEnd, "target")
		tr.check(on)
	})
}

// TestMachineFails lets each method fail: before the commit the guest stays, and so it does if
// the target cannot lock the disks or start.
func TestMachineFails(t *testing.T) {
	for _, method := range []string{"Flush", "Pause", "Save", "StartLog", "Sync", "ReleaseLocks", "target Load", "target TakeLocks", "target Start"} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			tr := pair(t)
			m := tr.from
			name, onTarget := strings.CutPrefix(method, "target ")
			if onTarget {
				m = tr.to
			}
			m.failAt = name
			tr.start()
			if err := wait(tr, tr.sourceEnd, "source"); err == nil || !strings.Contains(err.Error(), name+" fails, as the test wants it") || strings.HasPrefix(err.Error(), "the target") != onTarget {
				t.Errorf("source: %v", err)
			}
			if err := wait(tr, tr.targetEnd, "target"); err == nil || !strings.Contains(err.Error(), name+" fails, as the test wants it") {
				t.Errorf("target: %v", err)
			}
			tr.check(tr.from)
			if tr.from.logs != 0 || tr.prep[0].undos != 1 || tr.prep[1].undos != 1 || tr.hook.undos != 1 {
				t.Errorf("%d logs are on; undone %d, %d, %d", tr.from.logs, tr.prep[0].undos, tr.prep[1].undos, tr.hook.undos)
			}
			tr.again(tr.from)
		})
	}
	t.Run("the disk is reserved", func(t *testing.T) {
		tr := pair(t)
		other := newMachine(t, tr.from.w, "another target")
		if err := other.ReserveLocks(); err != nil {
			t.Fatal(err)
		}
		tr.at[SourceStopping] = func() { t.Error("the guest is stopped") }
		tr.start()
		err := wait(tr, tr.sourceEnd, "source")
		if err == nil || err.Error() != "the target: reserve the disks: disk is reserved by another target" {
			t.Errorf("source: %v", err)
		}
		tr.check(tr.from)
		other.kill()
		tr.again(tr.from)
	})
	t.Run("the disk is somebody else's now", func(t *testing.T) {
		tr := pair(t)
		tr.to.failAt = "TakeLocks"
		thief := newMachine(t, tr.from.w, "a thief")
		tr.at[TargetCommitting] = func() {
			if err := thief.TakeLocks(); err != nil {
				t.Error(err)
			}
		}
		tr.start()
		err := wait(tr, tr.sourceEnd, "source")
		if err == nil || !strings.Contains(err.Error(), "\nthe guest stays paused: disk is locked by a thief") || tr.from.stop != nil {
			t.Errorf("source: %v", err)
		}
		_ = wait(tr, tr.targetEnd, "target")
	})
}

// TestCancelAtOnce cancels while a Preparer waits for its guest.
func TestCancelAtOnce(t *testing.T) {
	tr := pair(t)
	w := waiter{make(chan struct{})}
	tr.tweak = func(s, _ *Options) { s.Preparers = []Preparer{&tr.prep[0], w, &tr.prep[1]} }
	tr.start()
	wait(tr, w.waits, "the preparer")
	if err := tr.source.Cancel(); err != nil {
		t.Fatal(err)
	}
	if err := wait(tr, tr.sourceEnd, "source"); !errors.Is(err, ErrCancelled) {
		t.Errorf("%v", err)
	}
	if st := tr.source.Stats(); st.Status != StatusCancelled || tr.prep[0].undos != 1 || tr.prep[1].undos != 0 {
		t.Errorf("%+v; undone %d, %d", st, tr.prep[0].undos, tr.prep[1].undos)
	}
	tr.check(tr.from)
	if err := wait(tr, tr.targetEnd, "target"); err == nil || err.Error() != "the source: the migration was cancelled" {
		t.Errorf("target: %v", err)
	}
}

// TestAskedFor breaks a page that goes right from guest memory, as one is that somebody writes to meanwhile: the
// target asks for it again.
func TestAskedFor(t *testing.T) {
	for _, channels := range []uint64{0, 2} {
		tr := pair(t)
		tr.opt.Capabilities = Capabilities{CapMultifd: channels > 0}
		tr.opt.Params.MultifdChannels = max(channels, 1)
		tr.at[SourceSending] = func() {
			tr.net.mu.Lock()
			defer tr.net.mu.Unlock()
			tr.net.corruptPage = true
		}
		tr.start()
		tr.settle()
		tr.net.mu.Lock()
		if tr.net.corruptPage {
			t.Error("no page is broken")
		}
		tr.net.mu.Unlock()
		if s := tr.source.Stats(); s.Status != StatusCompleted {
			t.Errorf("%s: %v", s.Status, s.Err)
		}
	}
}
