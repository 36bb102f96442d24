package migrate

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Params are the parameters of migrate-set-parameters with QEMU's names, units and defaults.
// To set some of them, decode JSON over a copy and Validate that.
type Params struct {
	MaxBandwidth             uint64 `json:"max-bandwidth"`              // bytes per second, 0: no limit
	AvailSwitchoverBandwidth uint64 `json:"avail-switchover-bandwidth"` // bytes per second assumed for the last round, 0: as measured
	DowntimeLimit            uint64 `json:"downtime-limit"`             // ms
	MultifdChannels          uint64 `json:"multifd-channels"`           // connections for RAM, with the capability multifd
	MultifdCompression       string `json:"multifd-compression"`        // none, zstd, s2 (QEMU has no s2)
	MultifdZstdLevel         uint64 `json:"multifd-zstd-level"`         // 0 to 20
	ZeroPageDetection        string `json:"zero-page-detection"`        // none, legacy, multifd (the two are one here)
	ThrottleTriggerThreshold uint64 `json:"throttle-trigger-threshold"` // percent of what was sent in a round that may get dirty before the vCPUs are throttled
	CPUThrottleInitial       uint64 `json:"cpu-throttle-initial"`       // percent
	CPUThrottleIncrement     uint64 `json:"cpu-throttle-increment"`     // percent
	CPUThrottleTailslow      bool   `json:"cpu-throttle-tailslow"`      // smaller increments near the end
	MaxCPUThrottle           uint64 `json:"max-cpu-throttle"`           // percent
	AnnounceInitial          uint64 `json:"announce-initial"`           // ms before the second announcement
	AnnounceMax              uint64 `json:"announce-max"`               // ms, the longest pause between two
	AnnounceRounds           uint64 `json:"announce-rounds"`            // how many
	AnnounceStep             uint64 `json:"announce-step"`              // ms by which the pause grows
	TLSCreds                 string `json:"tls-creds"`                  // the credentials' name; what counts is Options.TLS
	TLSHostname              string `json:"tls-hostname"`               // the name in the target's certificate: see wire.LoadTLS
	TLSAuthz                 string `json:"tls-authz"`                  // not supported but empty
	XBZRLECacheSize          uint64 `json:"xbzrle-cache-size"`          // kept, has no effect
	MaxPostcopyBandwidth     uint64 `json:"max-postcopy-bandwidth"`     // kept, has no effect
	VCPUDirtyLimit           uint64 `json:"vcpu-dirty-limit"`           // kept, has no effect
	XVCPUDirtyLimitPeriod    uint64 `json:"x-vcpu-dirty-limit-period"`  // kept, has no effect
	XCheckpointDelay         uint64 `json:"x-checkpoint-delay"`         // kept, has no effect
	Mode                     string `json:"mode"`                       // normal
	DirectIO                 bool   `json:"direct-io"`                  // not supported

	// What QEMU does not have.

	LimitTime    uint64 `json:"limit-time"`    // ms from the first round until LimitAction, 0: never
	LimitRounds  uint64 `json:"limit-rounds"`  // rounds until LimitAction, 0: never
	LimitAction  string `json:"limit-action"`  // cancel, or switch: at any downtime
	StallTimeout uint64 `json:"stall-timeout"` // ms without a byte from the other side after which it is given up
}

// DefaultParams are the parameters before any was set.
func DefaultParams() Params {
	return Params{
		MaxBandwidth: 128 << 20, DowntimeLimit: 300,
		MultifdChannels: 2, MultifdCompression: "none", MultifdZstdLevel: 1, ZeroPageDetection: "multifd",
		ThrottleTriggerThreshold: 50, CPUThrottleInitial: 20, CPUThrottleIncrement: 10, MaxCPUThrottle: 99,
		AnnounceInitial: 50, AnnounceMax: 550, AnnounceRounds: 5, AnnounceStep: 100,
		XBZRLECacheSize: 64 << 20, VCPUDirtyLimit: 1, XVCPUDirtyLimitPeriod: 1000, XCheckpointDelay: 20000,
		Mode: "normal", LimitTime: 3600 * 1000, LimitAction: "cancel", StallTimeout: 10000,
	}
}

// qemuErrorf is an error in QEMU's words, which begin with a capital.
func qemuErrorf(format string, args ...any) error { return qemuError(fmt.Sprintf(format, args...)) }

type qemuError string

func (e qemuError) Error() string { return string(e) }

// Validate returns all that is wrong, in QEMU's words where QEMU has the parameter.
func (p *Params) Validate() error {
	var errs []error
	num := func(name string, v, low, high uint64, unit string) {
		if v < low || v > high {
			errs = append(errs, qemuErrorf("Parameter '%s' expects an integer in the range of %d to %d%s", name, low, high, unit))
		}
	}
	word := func(name, v string, values ...string) {
		if !slices.Contains(values, v) {
			errs = append(errs, qemuErrorf("Parameter '%s' does not accept value '%s'\nit is one of %s", name, v, strings.Join(values, ", ")))
		}
	}
	num("max-bandwidth", p.MaxBandwidth, 0, 1<<63-1, " bytes/second")
	num("avail-switchover-bandwidth", p.AvailSwitchoverBandwidth, 0, 1<<63-1, " bytes/second")
	num("downtime-limit", p.DowntimeLimit, 0, 2000*1000, " ms")
	num("multifd-channels", p.MultifdChannels, 1, 255, "")
	word("multifd-compression", p.MultifdCompression, "none", "zstd", "s2")
	num("multifd-zstd-level", p.MultifdZstdLevel, 0, 20, "")
	word("zero-page-detection", p.ZeroPageDetection, "none", "legacy", "multifd")
	num("throttle-trigger-threshold", p.ThrottleTriggerThreshold, 1, 100, "")
	num("cpu-throttle-initial", p.CPUThrottleInitial, 1, 99, "")
	num("cpu-throttle-increment", p.CPUThrottleIncrement, 1, 99, "")
	num("max-cpu-throttle", p.MaxCPUThrottle, min(p.CPUThrottleInitial, 99), 99, "")
	num("announce-initial", p.AnnounceInitial, 0, 100000, " ms")
	num("announce-max", p.AnnounceMax, 0, 100000, " ms")
	num("announce-rounds", p.AnnounceRounds, 0, 1000, "")
	num("announce-step", p.AnnounceStep, 0, 10000, " ms")
	word("tls-authz", p.TLSAuthz, "")
	word("mode", p.Mode, "normal")
	if p.DirectIO {
		word("direct-io", "true", "false")
	}
	num("limit-time", p.LimitTime, 0, 1<<40, " ms")
	word("limit-action", p.LimitAction, "cancel", "switch")
	num("stall-timeout", p.StallTimeout, 1, 3600*1000, " ms")
	return errors.Join(errs...)
}

// Capability is an entry of query-migrate-capabilities.
type Capability struct {
	Name  string `json:"capability"`
	State bool   `json:"state"`
}

// Capabilities that have an effect, or none that could be missed.
const (
	CapEvents              = "events"                  // MIGRATION and MIGRATION_PASS
	CapAutoConverge        = "auto-converge"           // throttle the vCPUs when RAM gets dirty faster than it is sent
	CapMultifd             = "multifd"                 // RAM goes over connections of its own
	CapReturnPath          = "return-path"             // there always is one where the transport has two ways
	CapPauseBeforeSwitch   = "pause-before-switchover" // wait for migrate-continue
	CapLateBlockActivate   = "late-block-activate"     // locks are always taken late
	CapReleaseRAM          = "release-ram"             // kept, has no effect
	CapPostcopyRAM         = "postcopy-ram"            // not supported
	capabilityNotSupported = "Capability '%s' is not supported\nbaton does %s"
)

var supported = []string{CapEvents, CapAutoConverge, CapMultifd, CapReturnPath, CapPauseBeforeSwitch, CapLateBlockActivate, CapReleaseRAM}

// capabilityNames is QEMU 10's list, in its order.
var capabilityNames = []string{
	"xbzrle", "rdma-pin-all", CapAutoConverge, CapEvents, CapPostcopyRAM, "x-colo", CapReleaseRAM, CapReturnPath,
	CapPauseBeforeSwitch, CapMultifd, "dirty-bitmaps", "postcopy-blocktime", CapLateBlockActivate, "x-ignore-shared",
	"validate-uuid", "background-snapshot", "zero-copy-send", "postcopy-preempt", "switchover-ack", "dirty-limit", "mapped-ram",
}

// Capabilities are those that are on. The zero value has none; it is not to be copied once set.
type Capabilities map[string]bool

// Has says whether the capability is on.
func (c Capabilities) Has(name string) bool { return c[name] }

// List returns all, as query-migrate-capabilities does.
func (c Capabilities) List() []Capability {
	var l []Capability
	for _, n := range capabilityNames {
		l = append(l, Capability{n, c[n]})
	}
	return l
}

// With returns a copy in which those of the list are set. It fails, with all that is wrong,
// for a name that is not known and for one that is switched on but not supported.
func (c Capabilities) With(set []Capability) (Capabilities, error) {
	n := Capabilities{}
	for k, v := range c {
		n[k] = v
	}
	var errs []error
	for _, s := range set {
		switch {
		case !slices.Contains(capabilityNames, s.Name):
			errs = append(errs, qemuErrorf("Parameter 'capability' does not accept value '%s'", s.Name))
		case s.State && !slices.Contains(supported, s.Name):
			errs = append(errs, qemuErrorf(capabilityNotSupported, s.Name, strings.Join(supported, ", ")))
		}
		n[s.Name] = s.State
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return n, nil
}
