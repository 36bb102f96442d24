package migrate

import (
	"fmt"
	"iter"
)

// State is where one side's protocol is. The list is the only one there is: the diagrams of the
// package's comment draw it, faults are tested at each of its entries.
type State uint8

// States of the source, in the order in which they are gone through.
const (
	SourceIdle       State = iota // not begun
	SourceConnecting              // connects, shakes hands on TLS
	SourceGreeting                // has sent the hello, waits for the answer
	SourceReserving               // waits until the target is ready, connects the channels
	SourcePreparing               // the Preparers run
	SourceSending                 // rounds over RAM while the guest runs
	SourceStopping                // pauses the guest
	SourceHolding                 // pause-before-switchover: waits for Continue, the guest is paused as in QEMU
	SourceFinishing               // looks for dirty pages a last time, sends them and the sections
	SourceLoading                 // waits until the target has loaded all of it
	SourceReleasing               // gives the disks' locks up; the last moment to cancel
	SourceCommitting              // has sent the commit, waits for the answer
	SourceAsking                  // has lost the connection since: asks on new ones
	SourceUndoing                 // the guest goes on here; undoes what the Preparers did
	SourceCompleted
	SourceFailed
	SourceCancelled
)

// States of the target, in the order in which they are gone through.
const (
	TargetIdle       State = iota + 32 // not begun
	TargetListening                    // waits for the source
	TargetGreeting                     // reads the hello, checks it
	TargetReserving                    // runs the hooks, waits for the channels
	TargetReceiving                    // takes RAM
	TargetLoading                      // loads the sections
	TargetWaiting                      // all is loaded: waits for the commit
	TargetDoubting                     // has not got the commit, or refused it, and the source may not know: waits to be asked
	TargetCommitting                   // has the commit: takes the locks, starts the guest
	TargetConfirming                   // the guest runs; makes sure that the source knows
	TargetUndoing                      // undoes what the hooks did
	TargetCompleted
	TargetFailed
)

// stateInfo is what is known of a state.
type stateInfo struct {
	name   string
	status Status
	owner  Owner
	final  bool
}

var states = map[State]stateInfo{
	SourceIdle:       {"source/idle", StatusNone, OwnerSource, false},
	SourceConnecting: {"source/connecting", StatusSetup, OwnerSource, false},
	SourceGreeting:   {"source/greeting", StatusSetup, OwnerSource, false},
	SourceReserving:  {"source/reserving", StatusSetup, OwnerSource, false},
	SourcePreparing:  {"source/preparing", StatusWaitUnplug, OwnerSource, false},
	SourceSending:    {"source/sending", StatusActive, OwnerSource, false},
	SourceStopping:   {"source/stopping", StatusActive, OwnerSource, false},
	SourceHolding:    {"source/holding", StatusPreSwitchover, OwnerSource, false},
	SourceFinishing:  {"source/finishing", StatusDevice, OwnerSource, false},
	SourceLoading:    {"source/loading", StatusDevice, OwnerSource, false},
	SourceReleasing:  {"source/releasing", StatusDevice, OwnerSource, false},
	SourceCommitting: {"source/committing", StatusDevice, OwnerAsked, false},
	SourceAsking:     {"source/asking", StatusDevice, OwnerAsked, false},
	SourceUndoing:    {"source/undoing", StatusCancelling, OwnerSource, false},
	SourceCompleted:  {"source/completed", StatusCompleted, OwnerTarget, true},
	SourceFailed:     {"source/failed", StatusFailed, OwnerSource, true},
	SourceCancelled:  {"source/cancelled", StatusCancelled, OwnerSource, true},

	TargetIdle:       {"target/idle", StatusNone, OwnerSource, false},
	TargetListening:  {"target/listening", StatusSetup, OwnerSource, false},
	TargetGreeting:   {"target/greeting", StatusSetup, OwnerSource, false},
	TargetReserving:  {"target/reserving", StatusSetup, OwnerSource, false},
	TargetReceiving:  {"target/receiving", StatusActive, OwnerSource, false},
	TargetLoading:    {"target/loading", StatusActive, OwnerSource, false},
	TargetWaiting:    {"target/waiting", StatusActive, OwnerSource, false},
	TargetDoubting:   {"target/doubting", StatusActive, OwnerSource, false},
	TargetCommitting: {"target/committing", StatusActive, OwnerTarget, false},
	TargetConfirming: {"target/confirming", StatusCompleted, OwnerTarget, false},
	TargetUndoing:    {"target/undoing", StatusActive, OwnerSource, false},
	TargetCompleted:  {"target/completed", StatusCompleted, OwnerTarget, true},
	TargetFailed:     {"target/failed", StatusFailed, OwnerSource, true},
}

// States iterates over all states, the source's first, each side in order.
func States() iter.Seq[State] {
	return func(yield func(State) bool) {
		for s := range State(255) {
			if _, ok := states[s]; ok && !yield(s) {
				return
			}
		}
	}
}

// String is the side and the name: "source/sending".
func (s State) String() string {
	if i, ok := states[s]; ok {
		return i.name
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// Source says whether it is one of the source's states.
func (s State) Source() bool { return s < TargetIdle }

// Status is the state in QEMU's words. While a source that fails, rather than being
// cancelled, is SourceUndoing, Event and Stats say StatusFailing.
func (s State) Status() Status { return states[s].status }

// Owner says who may run the guest while one side is in this state, as far as it knows.
func (s State) Owner() Owner { return states[s].owner }

// Final says that nothing follows.
func (s State) Final() bool { return states[s].final }
