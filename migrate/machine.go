package migrate

import (
	"context"
	"time"

	"baton/kvm/guestmem"
	"baton/migrate/wire"
)

// Machine is what both sides need of a virtual machine. Its methods are called from the
// engine's goroutines, one at a time unless said otherwise; they may wait for the machine's
// main loop, which therefore must never wait for the engine.
type Machine interface {
	// Memory is the guest's RAM. The target's is fresh: it reads as zeros, and nobody else
	// writes to it before Start.
	Memory() *guestmem.Memory
	// Facts are what has to be the same on both sides, such as the machine's type, the size of
	// its RAM, CPUID leaves, MSRs and the device tree, in an order that people can read.
	Facts() []Fact
	// Sections are all state but RAM, in the order in which it is loaded. The source's list is
	// taken twice, for the hello and when the guest has been paused, and is to be the same: the
	// target needs all of its own, and no other. What can leave on the way, a passed-through
	// device, has none.
	Sections() []Section
	// TakeLocks locks the disks for this process. On the target it comes after the commit and
	// before Start; on the source it undoes OfferLocks and ReleaseLocks.
	TakeLocks() error
	// ReleaseLocks gives the disks' locks up. On the source the guest is paused, the target has
	// loaded all of it, and only the commit is left; on the target it undoes ReserveLocks and TakeLocks.
	ReleaseLocks() error
}

// SourceMachine is the machine that the guest leaves.
type SourceMachine interface {
	Machine
	// OfferLocks lets the target, if it can answer, and one machine only, reserve the disks, which
	// stay the source's. It is called before the hello.
	OfferLocks() error
	// DirtySources are all that writes guest memory, or lets others write it. Taken once, after
	// the Preparers.
	DirtySources() []DirtySource
	// Pause stops the vCPUs and quiesces the devices. When it returns, nothing writes guest
	// memory, and what was written is seen by the next DirtySource.Sync. Running says whether
	// the vCPUs ran before; the target starts them only then. An error leaves the guest as it was.
	Pause() (running bool, err error)
	// Resume undoes Pause: the migration has failed or was cancelled, the guest goes on here.
	// Running is what Pause returned.
	Resume(running bool) error
	// Throttle makes the vCPUs idle for so many percent of the time, 0 to 99; 0 ends it. It
	// returns at once.
	Throttle(percent int)
	// Flush writes what the host caches for the disks. It is called once before Pause, while
	// the guest runs, and again after it.
	Flush() error
	// TakeLate is what has come for the guest since Pause, at most wire.MaxLate bytes. It is called
	// when the guest runs on the target, which gets it.
	TakeLate() []Late
}

// TargetMachine is the machine that the guest arrives in: built with the same configuration,
// its vCPUs never run.
type TargetMachine interface {
	Machine
	// Check compares the source's facts with its own and names each difference that matters, such
	// as `cpu: leaf 7 ebx: avx512f is missing here`.
	Check(source []Fact) (differences []string)
	// Map prepares the vCPUs for n bytes at gpa, of one region, that have come or are about to: what they would
	// have to do about them for the first time. It is called from a goroutine of its own, beside everything
	// else, but is over when Start is called; it may do nothing.
	Map(gpa, n uint64)
	// ReserveLocks makes sure that TakeLocks will succeed once the source has released the locks,
	// which it has offered before. Its error refuses the migration.
	ReserveLocks() error
	// Start lets the guest go: it unquiesces the devices and, if the guest ran on the source,
	// starts the vCPUs. It is called once, when the locks are taken. An error says that nothing
	// of the guest has run.
	// Stopped is for how long nobody has run it, 0 if that is not known.
	Start(running bool, stopped time.Duration) error
	// GiveLate gets what SourceMachine.TakeLate returned, soon after Start.
	GiveLate(list []Late)
}

// Fact is one thing that both sides must agree on: a name, such as "machine", "ram",
// "cpu/0x7.0/ebx", "device/pci/0000:00:02.0", and a value, for people to read as well.
type Fact = wire.Fact

// Late is what came for a network card of the guest when that had left.
type Late = wire.Late

// SectionInfo names a section: see devices.StateInfo, which it repeats.
type SectionInfo struct {
	ID      string // an address, never an index
	Type    string // the kind of thing; a section is loaded only into the same kind
	Version uint16 // the format that Save writes
	// MinVersion is the oldest format that Load takes. The other side does not learn it.
	MinVersion uint16
}

// Section is one piece of the machine's state.
type Section interface {
	Info() SectionInfo
	// Save is called while the guest is paused. It changes nothing.
	Save() ([]byte, error)
	// Load gets what Save wrote on the source; the data is not to be trusted. After an error
	// the machine is of no use.
	Load(version uint16, data []byte) error
}

// DirtySource knows of pages that were written: KVM, the VMM itself, vhost. The sources of
// one machine are called one after the other.
type DirtySource interface {
	// Start begins to watch: a write that begins after it has returned is in a later Sync; of a [Protector], one
	// that begins after Protect.
	Start() error
	// Sync adds to b the pages that were written since Start or the last Sync and forgets them, but for a Protector's.
	// A write that it does not report is in the next Sync. It may be called while the guest
	// runs, and is called once more after Pause.
	Sync(b *guestmem.Bitmap) error
	// Stop ends the watch. It is called for every source that was started, when the guest goes on
	// here, after Resume. For one that has gone it is not: nobody waits for what it takes.
	Stop() error
}

// Protector is a DirtySource that watches a page again only when it is told to: a guest that writes to one that is
// watched is stopped for a moment, and what it writes before the page has been read anew need not be sent again.
type Protector interface {
	// Protect watches again what Start, which reports all, or Sync has reported of the size bytes at gpa, of one
	// region. What has not been watched again by the next Sync is in there once more.
	Protect(gpa, size uint64) error
}

// Preparer is what has to be done to the source's guest before it can move, such as taking its
// passed-through devices away. Preparers run one after the other, after the target has said that
// it is ready and before the first byte of RAM; the status is wait-unplug meanwhile.
type Preparer interface {
	// Prepare returns when it is done, and soon when ctx is cancelled. Undo, which may be nil
	// and may come with an error, takes it back: it is called, in reverse order, when the guest
	// stays after all, after Resume, and may take its time. It is not called after the commit.
	Prepare(ctx context.Context) (undo func(), err error)
}

// Hook is what the target has to do besides loading, such as opening a device early and
// plugging it late. Hooks run one after the other.
type Hook interface {
	// Reserve runs when the hello has been accepted and before the source does anything to its
	// guest: its error refuses the migration, and both sides report it. Undo, which may be nil, is
	// called in reverse order when the migration fails, not after the commit.
	Reserve(ctx context.Context) (undo func(), err error)
	// AfterResume runs in a goroutine of its own right after the guest was started here. Nobody
	// waits for it.
	AfterResume()
}

// Event is what an engine tells while it works. The callback is called from the engine's
// goroutines, one event at a time and in order; it must not wait for the engine.
type Event struct {
	State  State  // where the protocol is now
	Status Status // the same in QEMU's words; it changes less often
	Pass   int    // if not 0: this round over RAM begins now (MIGRATION_PASS); nothing else has changed
	Log    string // if not "": a line for the log; nothing else has changed
	Err    error  // with StatusFailed: why
}

// Status is the state of a migration in QEMU's words (qapi/migration.json, MigrationStatus).
type Status string

// Those of QEMU's MigrationStatus that there are here.
const (
	StatusNone          Status = "none"
	StatusSetup         Status = "setup"
	StatusWaitUnplug    Status = "wait-unplug"
	StatusActive        Status = "active"
	StatusPreSwitchover Status = "pre-switchover"
	StatusDevice        Status = "device"
	StatusCancelling    Status = "cancelling"
	StatusCancelled     Status = "cancelled"
	StatusCompleted     Status = "completed"
	StatusFailing       Status = "failing"
	StatusFailed        Status = "failed"
)

// Owner says who may run the guest.
type Owner int

// Who may run the guest.
const (
	// OwnerSource: the target must not start it; the source may, whenever it likes.
	OwnerSource Owner = iota
	// OwnerAsked: the source has sent the commit and has no answer. It keeps the guest paused and
	// asks; the target's answer decides, or a person (Decide).
	OwnerAsked
	// OwnerTarget: the target runs it, or has run it; the source must not.
	OwnerTarget
)
