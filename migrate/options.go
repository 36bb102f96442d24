package migrate

import (
	"crypto/tls"
	"os"
	"time"

	"baton/migrate/wire"
)

// Options are what a Source or a Target is made with. What is here is either for both sides or
// named as one side's.
//
//	s, err := NewSource(machine, Options)   t, err := NewTarget(machine, Options)
//	go s.Run() (error)                      t.Listen() (error)    the address is taken, connections wait
//	s.Stats() Stats                         go t.Run() (error)
//	s.Cancel() error                        t.Addr() wire.Address the port that was chosen
//	s.Continue() error                      t.Stats() Stats
//	s.SetParams(Params)                     t.Cancel() error
//	s.Decide(run bool) error                t.Decide(run bool) error
//	s.Recover(wire.Address) error
//
// Run returns when the state is final, with nil for Completed alone.
type Options struct {
	Address      wire.Address
	Params       Params
	Capabilities Capabilities
	TLS          *tls.Config // nil: none; see wire.LoadTLS
	// Files hands over, for good, the file that fd:NAME names.
	Files func(name string) (*os.File, error)
	// Events may be nil.
	Events func(Event)
	// Preparers are the source's.
	Preparers []Preparer
	// Hooks are the target's.
	Hooks []Hook
	// Policy is the source's; nil is DefaultPolicy.
	Policy Policy
}

// Policy decides, after each round over RAM, what comes next. It is a pure function: all it
// knows is in the sample.
type Policy func(Sample) Decision

// Sample is what a Policy decides on.
type Sample struct {
	Params       Params
	AutoConverge bool

	Round     int           // rounds that are over, 1 after the first
	Elapsed   time.Duration // since the first began
	Remaining uint64        // bytes that are dirty now
	Sent      uint64        // bytes of guest memory that the round sent, without zero pages
	Bandwidth float64       // bytes of guest memory per second, estimated; 0: not known
	DirtyRate float64       // bytes per second in the round
	Throttle  int           // percent now
	// Overhead is what the stop takes without RAM, estimated.
	Overhead time.Duration
	// HighDirty counts the rounds, up to now, in which more got dirty than
	// throttle-trigger-threshold allows, since the last change of Throttle.
	HighDirty int
}

// Action is what comes after a round.
type Action int

// Actions.
const (
	NextRound Action = iota
	Switch           // stop the guest, send the rest
	GiveUp           // end the migration; the guest stays
)

// Decision is a Policy's.
type Decision struct {
	Action           Action
	Throttle         int           // percent from now on, with NextRound
	ExpectedDowntime time.Duration // if the guest were stopped now
	Reason           string        // for people: with GiveUp it is the error, else part of the round's log line
}
