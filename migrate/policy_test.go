package migrate

import (
	"strings"
	"testing"
	"time"
)

func TestDefaultPolicy(t *testing.T) {
	const mib, ms = 1 << 20, time.Millisecond
	p := DefaultParams()
	limited := func(rounds, ms uint64, action string) Params {
		p := DefaultParams()
		p.LimitRounds, p.LimitTime, p.LimitAction = rounds, ms, action
		return p
	}
	slow := p
	slow.AvailSwitchoverBandwidth = mib
	tail := p
	tail.CPUThrottleTailslow = true
	tail.ThrottleTriggerThreshold = 100
	for _, tt := range []struct {
		name     string
		s        Sample
		action   Action
		throttle int
		expected time.Duration
		reason   string
	}{
		{"nothing is left", Sample{Params: p, Overhead: 3 * ms}, Switch, 0, 3 * ms, "fits"},
		{"no rate yet", Sample{Params: p, Remaining: mib}, NextRound, 0, time.Hour, ""},
		{"too much", Sample{Params: p, Remaining: 1000 * mib, Sent: 1000 * mib, Bandwidth: 1000 * mib}, NextRound, 0, 1000 * ms, ""},
		{"fits, and shrinks no more", Sample{Params: p, Remaining: 100 * mib, Sent: 150 * mib, Bandwidth: 1000 * mib}, Switch, 0, 100 * ms, "fits"},
		{"fits, but shrinks", Sample{Params: p, Remaining: 100 * mib, Sent: 200 * mib, Bandwidth: 1000 * mib}, NextRound, 0, 100 * ms, "shorter"},
		{"fits, shrinks, but is little", Sample{Params: p, Remaining: 5 * mib, Sent: 200 * mib, Bandwidth: 1000 * mib, Overhead: 20 * ms}, Switch, 0, 25 * ms, "fits"},
		{"fits, shrinks, but is the lesser part", Sample{Params: p, Remaining: 20 * mib, Sent: 200 * mib, Bandwidth: 1000 * mib, Overhead: 20 * ms}, Switch, 0, 40 * ms, "fits"},
		{"the user knows the rate", Sample{Params: slow, Remaining: mib, Sent: mib, Bandwidth: 1000 * mib}, NextRound, 0, time.Second, ""},
		{"rounds are over", Sample{Params: limited(3, 0, "cancel"), Round: 3, Remaining: 1000 * mib, Bandwidth: mib}, GiveUp, 0, 1000 * time.Second, "limit-rounds: 3 rounds"},
		{"rounds are not over", Sample{Params: limited(3, 0, "cancel"), Round: 2, Remaining: 1000 * mib, Bandwidth: mib}, NextRound, 0, 1000 * time.Second, ""},
		{"rounds are over, but it fits", Sample{Params: limited(3, 0, "cancel"), Round: 3, Remaining: 100 * mib, Sent: 1000 * mib, Bandwidth: 1000 * mib}, Switch, 0, 100 * ms, "fits"},
		{"time is over, switch", Sample{Params: limited(0, 5000, "switch"), Elapsed: 5 * time.Second, Remaining: 1000 * mib, Bandwidth: mib}, Switch, 0, 1000 * time.Second, "limit-time: 5s"},
		{"time is over, cancel", Sample{Params: limited(0, 5000, "cancel"), Elapsed: 6 * time.Second, Remaining: 1000 * mib, Bandwidth: mib}, GiveUp, 0, 1000 * time.Second, "limit-time: 6s"},
		{"by default, an hour", Sample{Params: p, Elapsed: time.Hour, Remaining: 1000 * mib, Bandwidth: mib}, GiveUp, 0, 1000 * time.Second, "limit-time"},
		{"first throttle", Sample{Params: p, AutoConverge: true, HighDirty: 2, Remaining: 1000 * mib, Bandwidth: mib}, NextRound, 20, 1000 * time.Second, "to 80%"},
		{"one dirty round is no reason", Sample{Params: p, AutoConverge: true, HighDirty: 1, Remaining: 1000 * mib, Bandwidth: mib}, NextRound, 0, 1000 * time.Second, ""},
		{"not without auto-converge", Sample{Params: p, HighDirty: 9, Remaining: 1000 * mib, Bandwidth: mib}, NextRound, 0, 1000 * time.Second, ""},
		{"more throttle", Sample{Params: p, AutoConverge: true, HighDirty: 2, Throttle: 20, Remaining: 1000 * mib, Bandwidth: mib}, NextRound, 30, 1000 * time.Second, ""},
		{"most throttle", Sample{Params: p, AutoConverge: true, HighDirty: 2, Throttle: 95, Remaining: 1000 * mib, Bandwidth: mib}, NextRound, 99, 1000 * time.Second, ""},
		{"tail: just enough", Sample{Params: tail, AutoConverge: true, HighDirty: 2, Throttle: 20, DirtyRate: 1.05 * mib, Remaining: 1000 * mib, Bandwidth: mib}, NextRound, 24, 1000 * time.Second, ""},
	} {
		d := DefaultPolicy(tt.s)
		if d.Action != tt.action || d.Throttle != tt.throttle || d.ExpectedDowntime != tt.expected || !strings.Contains(d.Reason, tt.reason) || tt.reason == "" && d.Action != NextRound {
			t.Errorf("%s: %+v", tt.name, d)
		}
	}
}

// facts makes them of names and values.
func facts(s ...string) (f []Fact) {
	for ; len(s) > 0; s = s[2:] {
		f = append(f, Fact{Name: s[0], Value: s[1]})
	}
	return f
}
