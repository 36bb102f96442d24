package migrate

import (
	"fmt"
	"time"
)

// worthIt is a stop that no further round is to make shorter; nor is one of which RAM is the lesser
// part, for a round takes as long as the rest of it.
const worthIt = 5 * time.Millisecond

// DefaultPolicy stops the guest when the rest fits into the downtime limit, and goes on for
// as long as that makes the stop shorter: each round at least halves what is left. With
// auto-converge, the vCPUs are slowed down when two rounds have got too dirty. What the user
// has set as the limit ends it.
func DefaultPolicy(s Sample) Decision {
	p := s.Params
	rate := s.Bandwidth
	if p.AvailSwitchoverBandwidth != 0 {
		rate = float64(p.AvailSwitchoverBandwidth)
	}
	limit := time.Duration(p.DowntimeLimit) * time.Millisecond
	d := Decision{Throttle: s.Throttle, ExpectedDowntime: time.Hour}
	if s.Remaining == 0 {
		d.ExpectedDowntime = s.Overhead
	} else if rate > 0 {
		seconds := min(float64(s.Remaining)/rate, 3600)
		d.ExpectedDowntime = time.Duration(seconds*float64(time.Second)) + s.Overhead
	}
	shrinks := s.Remaining <= s.Sent/2
	over := ""
	switch {
	case p.LimitRounds != 0 && uint64(s.Round) >= p.LimitRounds:
		over = fmt.Sprintf("limit-rounds: %d rounds are over", s.Round)
	case p.LimitTime != 0 && s.Elapsed >= time.Duration(p.LimitTime)*time.Millisecond:
		over = fmt.Sprintf("limit-time: %s are over", s.Elapsed.Round(time.Millisecond))
	}
	switch fits := s.Remaining == 0 || d.ExpectedDowntime <= limit; {
	case fits && (over != "" || !shrinks || d.ExpectedDowntime-s.Overhead <= max(worthIt, s.Overhead)):
		d.Action, d.Reason = Switch, "the rest fits into downtime-limit"
	case over != "" && p.LimitAction == "switch":
		d.Action, d.Reason = Switch, over
	case over != "":
		d.Action = GiveUp
		d.Reason = fmt.Sprintf("the guest writes faster than it can be sent: %s, stop would take %s, downtime-limit is %s\nraise downtime-limit or max-bandwidth, or switch auto-converge on",
			over, d.ExpectedDowntime.Round(time.Millisecond), limit)
	case fits:
		d.Reason = "the next round makes the stop shorter"
	case s.AutoConverge && s.HighDirty >= 2:
		d.Throttle = throttle(s)
		d.Reason = fmt.Sprintf("vCPUs throttled to %d%%", 100-d.Throttle)
	}
	return d
}

// throttle is the next step of auto-converge, as in QEMU's mig_throttle_guest_down.
func throttle(s Sample) int {
	p := s.Params
	if s.Throttle == 0 {
		return int(min(p.CPUThrottleInitial, p.MaxCPUThrottle))
	}
	inc := int(p.CPUThrottleIncrement)
	if p.CPUThrottleTailslow && s.DirtyRate > 0 {
		// What the CPU may have so that the threshold is met, and no step beyond it.
		now := 100 - s.Throttle
		ideal := int(float64(now) * s.Bandwidth * float64(p.ThrottleTriggerThreshold) / 100 / s.DirtyRate)
		inc = min(max(now-ideal, 1), inc)
	}
	return min(s.Throttle+inc, int(p.MaxCPUThrottle))
}
