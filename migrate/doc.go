// Package migrate moves a running guest to another process: the two state machines, the rounds over
// RAM, the policy that ends them, and the hand-over after which exactly one side runs the guest.
// What it moves is behind the interfaces of machine.go; how it is written is package wire.
//
//	source                        wire                         target
//	connecting                                                 listening
//	greeting      ── hello (facts, RAM, sections) ──────────>  greeting: differences by name
//	              <───────────────── accept, or refuse + why ──
//	reserving     ── N channels join ───────────────────────>  reserving: hooks
//	              <────────────────────────────────── ready ──
//	preparing       Preparers (wait-unplug)                    receiving
//	sending       ── pages ─────────────────────────────────>  into guest memory
//	              ── end of round ──────────────────────────>
//	              <────────────────────── end of round, all ──
//	                policy: next round, throttle, switch, give up
//	stopping        Pause
//	holding         pause-before-switchover
//	finishing     ── last pages, sections, end ─────────────>  loading
//	loading       <───────────────────────────────── loaded ──  waiting
//	releasing       locks given up: last moment to cancel
//	committing    ── commit ────────────────────────────────>  committing: locks taken, Start
//	              <────────────────────────────── committed ──  confirming, AfterResume
//	completed     ── done, and what came too late ──────────>  completed
//	              <──────────────────────────────────── done ──
//
// # Who owns the guest
//
// Until the source sends the commit, it does: whatever fails, or is cancelled, it resumes the
// guest, undoes what the Preparers did, and says why. It may forget the target, for a target that
// has no commit does not start the guest.
//
// When the commit has been sent, only the target knows: it takes the commit, and from then on owns the
// guest, or ends without. A source whose connection breaks now keeps the guest paused and asks, on a
// new connection, again and again. To be asked makes a target that has no commit give the guest
// up for good, so that each answer is final: "runs", or "does not, and never will".
//
//	source                                     target
//	committing ─ connection lost ─> asking     waiting ─ connection lost ─> doubting
//	asking     ─ "runs" ──────────> completed  doubting ─ asked: "never" ─> failed
//	asking     ─ "never" ─────────> undoing    committing ─ asked: waits for Start, then answers
//	asking     ─ Decide(bool)                  doubting ─ Decide(bool)
//	asking     ─ Recover(address): ask there   confirming ─ asked: "runs" ─> completed
//
// What each side does when the other one dies, or seems to for stall-timeout:
//
//	source is in        target is gone              target is in      source is gone
//	connecting ..       fails, the guest goes on    listening ..      waits for the next source
//	 .. releasing       here                         .. reserving
//	committing,         asks for as long as it      receiving,        fails; the guest was the source's
//	asking              takes; Decide               loading
//	completed           nothing                     waiting,          doubting: Decide(true) starts the
//	                                                doubting          guest here
//	                                                committing,       the guest runs here
//	                                                confirming
//
// Decide is for people who know more than the network tells: that the other host is gone for
// good. Where they are wrong the guest runs twice, and its disks break.
//
// A stream that goes one way, to a file or a pipe, has no answers: the source ends with the guest
// paused when all is written, the target starts the guest when all is loaded.
package migrate
