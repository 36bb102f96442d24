package vmm

import (
	"encoding/json"
	"fmt"
	"time"

	"baton/migrate"
	"baton/migrate/wire"
	"baton/vmm/qmp"
)

// Arguments and results of migration's commands: QEMU's qapi/migration.json.
type (
	migrateArgs struct {
		URI      *string          `json:"uri"`
		Channels []migrateChannel `json:"channels,omitempty"`
		Detach   *bool            `json:"detach"`
		Resume   *bool            `json:"resume"`
	}
	incomingArgs struct {
		URI         *string          `json:"uri"`
		Channels    []migrateChannel `json:"channels,omitempty"`
		ExitOnError *bool            `json:"exit-on-error"`
	}
	migrateChannel struct {
		Type    channelType    `json:"channel-type"`
		Address migrateAddress `json:"addr"`
	}
	migrateAddress struct {
		Transport transport   `json:"transport"`
		Type      *socketType `json:"type"` // of a socket
		Host      *string     `json:"host"`
		Port      *string     `json:"port"`
		Path      *string     `json:"path"`
		Str       *string     `json:"str"`
		Filename  *string     `json:"filename"` // of a file
		Offset    *int64      `json:"offset"`
		Args      []string    `json:"args,omitempty"` // of exec
	}
	continueArgs struct {
		State migrationStatus `json:"state"`
	}
	recoverArgs struct {
		URI string `json:"uri"`
	}
	decideArgs struct {
		RunHere bool `json:"run-here"`
	}
	capabilitiesArgs struct {
		Capabilities []capabilityState `json:"capabilities"`
	}
	capabilityState struct {
		Capability migrationCapability `json:"capability"`
		State      bool                `json:"state"`
	}
	channelType         string
	transport           string
	socketType          string
	migrationStatus     string
	migrationCapability string
	compression         string
	zeroPages           string
	migrationMode       string
	limitAction         string
)

func (channelType) Values() []string   { return []string{"main"} }
func (transport) Values() []string     { return []string{"socket", "exec", "file"} }
func (socketType) Values() []string    { return []string{"inet", "unix", "fd"} }
func (compression) Values() []string   { return []string{"none", "zstd", "s2"} }
func (zeroPages) Values() []string     { return []string{"none", "legacy", "multifd"} }
func (migrationMode) Values() []string { return []string{"normal"} }
func (limitAction) Values() []string   { return []string{"cancel", "switch"} }

func (migrationStatus) Values() []string {
	return []string{"none", "setup", "cancelling", "cancelled", "active", "completed", "failed", "pre-switchover", "device", "wait-unplug", "failing"}
}

func (migrationCapability) Values() (names []string) {
	for _, c := range (migrate.Capabilities{}).List() {
		names = append(names, c.Name)
	}
	return names
}

// migrateParameters are migrate.Params with what is optional as QMP has it.
type migrateParameters struct {
	AnnounceInitial          *int64         `json:"announce-initial,omitempty"`
	AnnounceMax              *int64         `json:"announce-max,omitempty"`
	AnnounceRounds           *int64         `json:"announce-rounds,omitempty"`
	AnnounceStep             *int64         `json:"announce-step,omitempty"`
	ThrottleTriggerThreshold *int64         `json:"throttle-trigger-threshold,omitempty"`
	CPUThrottleInitial       *int64         `json:"cpu-throttle-initial,omitempty"`
	CPUThrottleIncrement     *int64         `json:"cpu-throttle-increment,omitempty"`
	CPUThrottleTailslow      *bool          `json:"cpu-throttle-tailslow,omitempty"`
	TLSCreds                 *string        `json:"tls-creds,omitempty"`
	TLSHostname              *string        `json:"tls-hostname,omitempty"`
	TLSAuthz                 *string        `json:"tls-authz,omitempty"`
	MaxBandwidth             *int64         `json:"max-bandwidth,omitempty"`
	AvailSwitchoverBandwidth *int64         `json:"avail-switchover-bandwidth,omitempty"`
	DowntimeLimit            *int64         `json:"downtime-limit,omitempty"`
	XCheckpointDelay         *int64         `json:"x-checkpoint-delay,omitempty"`
	MultifdChannels          *int64         `json:"multifd-channels,omitempty"`
	XBZRLECacheSize          *int64         `json:"xbzrle-cache-size,omitempty"`
	MaxPostcopyBandwidth     *int64         `json:"max-postcopy-bandwidth,omitempty"`
	MaxCPUThrottle           *int64         `json:"max-cpu-throttle,omitempty"`
	MultifdCompression       *compression   `json:"multifd-compression,omitempty"`
	MultifdZstdLevel         *int64         `json:"multifd-zstd-level,omitempty"`
	XVCPUDirtyLimitPeriod    *int64         `json:"x-vcpu-dirty-limit-period,omitempty"`
	VCPUDirtyLimit           *int64         `json:"vcpu-dirty-limit,omitempty"`
	Mode                     *migrationMode `json:"mode,omitempty"`
	ZeroPageDetection        *zeroPages     `json:"zero-page-detection,omitempty"`
	DirectIO                 *bool          `json:"direct-io,omitempty"`
	LimitTime                *int64         `json:"limit-time,omitempty"` // from here on there is no such thing in QEMU
	LimitRounds              *int64         `json:"limit-rounds,omitempty"`
	LimitAction              *limitAction   `json:"limit-action,omitempty"`
	StallTimeout             *int64         `json:"stall-timeout,omitempty"`
}

// migrationCommands are those of QEMU, and x-migrate-decide.
func (m *Machine) migrationCommands() []qmp.Command {
	return []qmp.Command{
		qmp.Act("migrate", func(a migrateArgs) error {
			if a.Resume != nil && *a.Resume {
				return qmp.Errorf("Cannot resume if there is no paused migration")
			}
			addr, err := migrationAddress(a.URI, a.Channels)
			if err == nil {
				err = m.startMigration(addr)
			}
			return err
		}),
		qmp.Act("migrate-incoming", m.incoming),
		qmp.Act("migrate_cancel", func(qmp.None) error { return m.cancelMigration() }),
		qmp.Act("migrate-continue", func(a continueArgs) error {
			s := m.migrationStats().Status
			if a.State != "pre-switchover" || s != migrate.StatusPreSwitchover || m.migration.source == nil {
				return qmp.Errorf("Migration not in expected state: %s", s)
			}
			return m.migration.source.Continue()
		}),
		qmp.Act("migrate-recover", func(a recoverArgs) error { return m.recoverMigration(a.URI) }),
		qmp.Act("migrate-pause", func(qmp.None) error {
			return qmp.Errorf("migrate-pause is currently only supported during postcopy-active or postcopy-recover state")
		}),
		qmp.Act("x-migrate-decide", func(a decideArgs) error { return m.decideMigration(a.RunHere) }),
		qmp.Act("migrate-set-capabilities", m.setCapabilities),
		qmp.Query("query-migrate-capabilities", func() (list []capabilityState) {
			for _, c := range m.migration.capabilities.List() {
				list = append(list, capabilityState{migrationCapability(c.Name), c.State})
			}
			return list
		}),
		qmp.Act("migrate-set-parameters", m.setParameters),
		qmp.New("query-migrate-parameters", func(qmp.None) (p migrateParameters, err error) { return p, convert(m.migration.params, &p) }),
		qmp.Query("query-migrate", m.queryMigrate),
	}
}

// convert copies the members of JSON objects that two structs have in common.
func convert(from, to any) error {
	text, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, to)
}

// migrationAddress is where uri or the main channel say.
func migrationAddress(uri *string, channels []migrateChannel) (a wire.Address, err error) {
	switch {
	case (uri == nil) == (channels == nil):
		return a, qmp.Errorf("need either 'uri' or 'channels' argument")
	case uri != nil:
		return wire.ParseURI(*uri)
	case len(channels) != 1:
		return a, qmp.Errorf("Channel list must have only one entry, for type 'main'")
	}
	return channels[0].Address.parse()
}

func (c *migrateAddress) parse() (a wire.Address, err error) {
	need := func(name string, v *string) string {
		if v == nil && err == nil {
			err = qmp.Errorf("Parameter 'channels[0].addr.%s' is missing", name)
		}
		if v == nil {
			return ""
		}
		return *v
	}
	switch c.Transport {
	case "exec":
		a = wire.Address{Network: wire.Exec, Args: c.Args}
		if len(c.Args) == 0 {
			need("args", nil)
		}
	case "file":
		a = wire.Address{Network: wire.File, Path: need("filename", c.Filename)}
		if c.Offset != nil {
			a.Offset = *c.Offset
		}
	default:
		switch kind := need("type", (*string)(c.Type)); socketType(kind) {
		case "inet":
			a = wire.Address{Network: wire.TCP, Host: need("host", c.Host), Port: need("port", c.Port)}
		case "unix":
			a = wire.Address{Network: wire.Unix, Path: need("path", c.Path)}
		case "fd":
			a = wire.Address{Network: wire.FD, Name: need("str", c.Str)}
		}
	}
	return a, err
}

func (m *Machine) incoming(a incomingArgs) error {
	switch {
	case m.migration.target != nil:
		return qmp.Errorf("The incoming migration has already been started")
	case m.State() != StateInMigrate:
		return qmp.Errorf("'-incoming' was not specified on the command line")
	}
	addr, err := migrationAddress(a.URI, a.Channels)
	if err != nil {
		return err
	}
	m.migration.exitOnError = a.ExitOnError == nil || *a.ExitOnError
	return m.awaitMigration(addr)
}

// recoverMigration is for a source that has sent the commit and hears nothing: it asks at uri.
func (m *Machine) recoverMigration(uri string) error {
	if s := m.migration.source; s == nil || s.Stats().State != migrate.SourceAsking {
		return qmp.Errorf("Migrate recover can only be run when postcopy is paused.")
	}
	a, err := wire.ParseURI(uri)
	if err != nil {
		return err
	}
	return m.migration.source.Recover(a)
}

// decideMigration is for a side that cannot learn whether the other one runs the guest, because
// that is gone for good. The risk is the caller's: if it is not gone, two guests run, or none.
func (m *Machine) decideMigration(here bool) error {
	risk := "if the target is not gone for good, the guest now runs twice, with the same disks"
	if !here {
		risk = "if the target is gone, the guest is lost"
	}
	if !m.migrating() {
		return qmp.Errorf("Migration not in expected state: %s", m.migrationStats().Status)
	}
	err := m.migration.last.Decide(here)
	if err == nil {
		m.log.Warn(fmt.Sprintf("migration: decided by a client that the guest runs here: %v; %s", here, risk))
	}
	return err
}

func (m *Machine) setCapabilities(a capabilitiesArgs) error {
	if m.migrating() && m.State() != StateInMigrate { // as QEMU, who looks at the source's side
		return errMigrating
	}
	var set []migrate.Capability
	for _, c := range a.Capabilities {
		if c.Capability == migrate.CapMultifd && m.migration.target != nil && m.State() == StateInMigrate {
			return qmp.Errorf("Multifd must be set before incoming starts")
		}
		set = append(set, migrate.Capability{Name: string(c.Capability), State: c.State})
	}
	c, err := m.migration.capabilities.With(set)
	if err == nil {
		m.migration.capabilities = c
		m.migration.tell.Store(c.Has(migrate.CapEvents))
		go migrate.Prepare()
	}
	return err
}

func (m *Machine) setParameters(a migrateParameters) error {
	p := m.migration.params
	if err := convert(a, &p); err != nil {
		return err
	}
	if err := p.Validate(); err != nil {
		return Errors(err)[0]
	}
	m.migration.params = p
	go migrate.Prepare()
	if s := m.migration.source; s != nil && m.migrating() {
		s.SetParams(p)
	}
	return nil
}

// Results of query-migrate: MigrationInfo.
type (
	migrationInfo struct {
		Status           *migrationStatus `json:"status,omitempty"`
		RAM              *ramInfo         `json:"ram,omitempty"`
		TotalTime        *int64           `json:"total-time,omitempty"` // ms
		ExpectedDowntime *int64           `json:"expected-downtime,omitempty"`
		Downtime         *int64           `json:"downtime,omitempty"`
		SetupTime        *int64           `json:"setup-time,omitempty"`
		Throttle         *int64           `json:"cpu-throttle-percentage,omitempty"`
		Error            *string          `json:"error-desc,omitempty"`
		Blocked          []string         `json:"blocked-reasons,omitempty"`
		Sockets          []socketAddress  `json:"socket-address,omitempty"`
		Parts            *downtimeParts   `json:"x-downtime,omitempty"`
		PrepareTime      *int64           `json:"x-unplug-time,omitempty"` // ms
		Failover         []pairInfo       `json:"x-failover,omitempty"`    // how its primaries are, and what their changes have cost
		State            *string          `json:"x-state,omitempty"`
	}
	ramInfo struct {
		Transferred    int64   `json:"transferred"`
		Remaining      int64   `json:"remaining"`
		Total          int64   `json:"total"`
		Duplicate      int64   `json:"duplicate"`
		Normal         int64   `json:"normal"`
		NormalBytes    int64   `json:"normal-bytes"`
		DirtyPagesRate int64   `json:"dirty-pages-rate"`
		Mbps           float64 `json:"mbps"`
		DirtySyncCount int64   `json:"dirty-sync-count"`
		Postcopy       int64   `json:"postcopy-requests"`
		PageSize       int64   `json:"page-size"`
		MultifdBytes   int64   `json:"multifd-bytes"`
		PagesPerSecond int64   `json:"pages-per-second"`
		PrecopyBytes   int64   `json:"precopy-bytes"`
		DowntimeBytes  int64   `json:"downtime-bytes"`
		PostcopyBytes  int64   `json:"postcopy-bytes"`
		MissedZeroCopy int64   `json:"dirty-sync-missed-zero-copy"`
	}
	socketAddress struct {
		Type socketType `json:"type"`
		Host *string    `json:"host,omitempty"`
		Port *string    `json:"port,omitempty"`
		Path *string    `json:"path,omitempty"`
	}
	// downtimeParts are what the downtime consists of, in microseconds: see migrate.Downtime.
	downtimeParts struct {
		Pause   int64 `json:"pause"`
		Sync    int64 `json:"sync"`
		RAM     int64 `json:"ram"`
		Save    int64 `json:"save"`
		Load    int64 `json:"load"`
		Release int64 `json:"release"`
		Commit  int64 `json:"commit"`
	}
)

// migrationStats are those of the last migration, of either kind.
func (m *Machine) migrationStats() migrate.Stats {
	if m.migration.last == nil {
		return migrate.Stats{Status: migrate.StatusNone}
	}
	return m.migration.last.Stats()
}

// queryMigrate shows each status with what QEMU shows with it: fill_source_migration_info and
// fill_destination_migration_info.
func (m *Machine) queryMigrate() (info migrationInfo) {
	info.Blocked = m.blockers()
	s := m.migrationStats()
	switch {
	case m.migration.last == nil:
		return info
	case s.Status == migrate.StatusNone: // it is about to begin
		s.Status = migrate.StatusSetup
	}
	status := migrationStatus(s.Status)
	info.Status = &status
	info.Failover = m.pairInfos()
	if s.Err != nil {
		info.Error = new(s.Err.Error())
	}
	if m.migration.source == nil { // the target's
		if s.Status == migrate.StatusSetup {
			info.Sockets = listening(m.migration.target.Addr())
		}
		return info
	}
	ms := func(d time.Duration) *int64 { return new(d.Milliseconds()) }
	switch s.Status {
	case migrate.StatusWaitUnplug:
		info.PrepareTime = ms(s.PrepareTime)
	case migrate.StatusActive, migrate.StatusPreSwitchover, migrate.StatusDevice, migrate.StatusCancelling, migrate.StatusFailing:
		info.ExpectedDowntime = ms(s.ExpectedDowntime)
	case migrate.StatusCompleted:
		info.Downtime = ms(s.Downtime.Total)
		d := s.Downtime
		info.Parts = &downtimeParts{d.Pause.Microseconds(), d.Sync.Microseconds(), d.RAM.Microseconds(), d.Save.Microseconds(), d.Load.Microseconds(), d.Release.Microseconds(), d.Commit.Microseconds()}
	default:
		return info
	}
	info.TotalTime = ms(s.TotalTime)
	if s.Status == migrate.StatusWaitUnplug {
		return info
	}
	info.SetupTime = ms(s.SetupTime)
	if s.Throttle > 0 {
		info.Throttle = new(int64(s.Throttle))
	}
	if s.Owner == migrate.OwnerAsked {
		info.State = new(s.State.String())
	}
	r := s.RAM
	info.RAM = &ramInfo{
		Transferred: int64(r.Transferred), Remaining: int64(r.Remaining), Total: int64(r.Total), Duplicate: int64(r.Zero), Normal: int64(r.Normal),
		NormalBytes: int64(r.Normal * r.PageSize), DirtyPagesRate: int64(r.DirtyRate), Mbps: r.Mbps, DirtySyncCount: int64(r.DirtySync), PageSize: int64(r.PageSize),
		MultifdBytes: int64(r.ChannelBytes), PagesPerSecond: int64(r.PagesPerSec), PrecopyBytes: int64(r.PrecopyBytes), DowntimeBytes: int64(r.DowntimeBytes),
	}
	return info
}

func listening(a wire.Address) []socketAddress {
	switch a.Network {
	case wire.TCP:
		return []socketAddress{{Type: "inet", Host: &a.Host, Port: &a.Port}}
	case wire.Unix:
		return []socketAddress{{Type: "unix", Path: &a.Path}}
	}
	return nil
}
