package migrate

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestParams(t *testing.T) {
	p := DefaultParams()
	if err := p.Validate(); err != nil {
		t.Errorf("defaults: %v", err)
	}
	if err := json.Unmarshal([]byte(`{"max-bandwidth":1073741824,"downtime-limit":20,"multifd-channels":4}`), &p); err != nil {
		t.Fatal(err)
	}
	if err := p.Validate(); err != nil || p.MaxBandwidth != 1<<30 || p.DowntimeLimit != 20 || p.MultifdChannels != 4 || p.CPUThrottleInitial != 20 {
		t.Errorf("%+v, %v", p, err)
	}
	err := json.Unmarshal([]byte(`{"downtime-limit":2000001,"multifd-channels":0,"multifd-compression":"zlib","cpu-throttle-initial":30,
		"max-cpu-throttle":29,"announce-step":10001,"limit-action":"wait","direct-io":true,"mode":"cpr-reboot","tls-authz":"x"}`), &p)
	if err != nil {
		t.Fatal(err)
	}
	want := `Parameter 'downtime-limit' expects an integer in the range of 0 to 2000000 ms
Parameter 'multifd-channels' expects an integer in the range of 1 to 255
Parameter 'multifd-compression' does not accept value 'zlib'
it is one of none, zstd, s2
Parameter 'max-cpu-throttle' expects an integer in the range of 30 to 99
Parameter 'announce-step' expects an integer in the range of 0 to 10000 ms
Parameter 'tls-authz' does not accept value 'x'
it is one of 
Parameter 'mode' does not accept value 'cpr-reboot'
it is one of normal
Parameter 'direct-io' does not accept value 'true'
it is one of false
Parameter 'limit-action' does not accept value 'wait'
it is one of cancel, switch`
	if err := p.Validate(); err == nil || err.Error() != want {
		t.Errorf("%v\nwant\n%s", err, want)
	}
}

func TestCapabilities(t *testing.T) {
	var c Capabilities
	n, err := c.With([]Capability{{CapEvents, true}, {CapMultifd, true}, {"xbzrle", false}})
	if err != nil || !n.Has(CapEvents) || n.Has(CapAutoConverge) || c.Has(CapEvents) || len(n.List()) != 21 {
		t.Errorf("%v, %v", n, err)
	}
	if n, err = n.With([]Capability{{CapEvents, false}}); err != nil || n.Has(CapEvents) || !n.Has(CapMultifd) {
		t.Errorf("%v, %v", n, err)
	}
	_, err = n.With([]Capability{{"nosuch", true}, {CapPostcopyRAM, true}})
	if err == nil || !strings.Contains(err.Error(), "'nosuch'") || !strings.Contains(err.Error(), "'postcopy-ram' is not supported\n") {
		t.Errorf("%v", err)
	}
}

func TestStates(t *testing.T) {
	n, names := 0, map[string]bool{}
	for s := range States() {
		n++
		if names[s.String()] {
			t.Errorf("%s twice", s)
		}
		names[s.String()] = true
		if side := strings.HasPrefix(s.String(), "source/"); side != s.Source() {
			t.Errorf("%s: Source is %v", s, s.Source())
		}
		if s.Status() == "" {
			t.Errorf("%s has no status", s)
		}
	}
	if n != len(states) || n != int(SourceCancelled)+1+int(TargetFailed-TargetIdle)+1 {
		t.Errorf("%d of %d states", n, len(states))
	}
	if got := State(200).String(); got != "state 200" {
		t.Error(got)
	}
}
