package migrate

import "time"

// Stats is what query-migrate shows, in Go's units. A copy is taken at any time.
type Stats struct {
	State  State
	Status Status
	Owner  Owner
	Err    error // why it failed, or, in SourceAsking, why there is no answer

	SetupTime        time.Duration // until the first byte of RAM, without the Preparers
	PrepareTime      time.Duration // what the Preparers took, up to now
	TotalTime        time.Duration // since the beginning, without what follows the end
	ExpectedDowntime time.Duration // while it is active
	Downtime         Downtime      // when it is over

	RAM RAMStats

	Channels    int    // connections that carry RAM
	Compression string // "none", "zstd", "s2"
	Throttle    int    // percent, now
	TLS         bool
}

// RAMStats are the counters of "ram" in query-migrate. The source counts what it sends, the
// target what it receives.
type RAMStats struct {
	Total         uint64 // bytes of RAM
	Remaining     uint64 // bytes that are to be sent as far as is known
	Transferred   uint64 // bytes on the wire, all connections
	ChannelBytes  uint64 // those of the channels only (multifd-bytes)
	PrecopyBytes  uint64 // those before the stop
	DowntimeBytes uint64 // those after the stop
	Zero          uint64 // pages that were zero ("duplicate")
	Normal        uint64 // pages that were sent
	DirtySync     uint64 // rounds ("dirty-sync-count")
	DirtyRate     uint64 // pages per second ("dirty-pages-rate")
	PagesPerSec   uint64
	Mbps          float64 // 10^6 bits per second on the wire
	PageSize      uint64
}

// Downtime is the time for which nobody ran the guest, and what it consists of.
type Downtime struct {
	Total   time.Duration // from before Pause until the target has said that the guest runs
	Pause   time.Duration // vCPUs and devices stopped
	Sync    time.Duration // flush of disks, last look for dirty pages
	RAM     time.Duration // last pages sent
	Save    time.Duration // sections saved and sent
	Load    time.Duration // the target received and loaded the rest
	Release time.Duration // locks given up
	Commit  time.Duration // the target took the locks and started
}
