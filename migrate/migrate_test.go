package migrate

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"baton/migrate/wire"
)

// pair makes a guest that runs, and a machine that waits for it.
func pair(t testing.TB) *trip {
	w := &world{t: t}
	return newTrip(t, newMachine(t, w, "the source").boot(), newMachine(t, w, "the target"))
}

// succeeds waits for the end of a migration that does.
func (tr *trip) succeeds() {
	tr.t.Helper()
	if err := wait(tr, tr.sourceEnd, "source"); err != nil {
		tr.t.Fatalf("source: %v", err)
	}
	if err := wait(tr, tr.targetEnd, "target"); err != nil {
		tr.t.Fatalf("target: %v", err)
	}
	tr.check(tr.to)
	wait(tr, tr.hook.resumed, "AfterResume")
	if tr.from.logs != 1 {
		tr.t.Errorf("%d dirty logs are on, 1 was begun, and who has gone is not waited for to end it", tr.from.logs)
	}
	if tr.prep[0].undos+tr.prep[1].undos+tr.hook.undos != 0 || !tr.prep[0].taken || !tr.hook.taken {
		tr.t.Error("what was prepared was undone")
	}
}

func TestMigrate(t *testing.T) {
	for _, compression := range []string{"none", "zstd", "s2"} {
		for _, channels := range []uint64{0, 1, 2, 4} {
			t.Run(fmt.Sprint(compression, channels), func(t *testing.T) {
				t.Parallel()
				tr := pair(t)
				tr.opt.Params.MultifdCompression = compression
				if channels > 0 {
					tr.opt.Capabilities = Capabilities{CapMultifd: true}
					tr.opt.Params.MultifdChannels = channels
				}
				tr.start()
				tr.succeeds()
				if l := tr.to.late; len(l) != 1 || len(l[0].Frames) != 1 || string(l[0].Frames[0]) != "late for "+tr.from.name || l[0].Dropped != 3 {
					t.Errorf("what came late: %+v", l)
				}
				if tr.to.stood <= 0 || tr.to.stood > tr.source.Stats().Downtime.Total {
					t.Errorf("the target takes the guest to have stood still for %v of %v", tr.to.stood, tr.source.Stats().Downtime.Total)
				}
				s, d := tr.source.Stats(), tr.target.Stats()
				ram := s.RAM
				if ram.Normal < testPages/2 || ram.Zero < testPages/4 || ram.Normal != d.RAM.Normal || ram.Zero != d.RAM.Zero || ram.Transferred == 0 ||
					(ram.ChannelBytes > 0) != (channels > 0) || ram.Remaining != 0 || ram.DirtySync < 2 || ram.PageSize != 4096 || ram.Total != testPages*4096 ||
					ram.PrecopyBytes+ram.DowntimeBytes != ram.Transferred {
					t.Errorf("source %+v\ntarget %+v", ram, d.RAM)
				}
				if s.Channels != max(int(channels), 1) || d.Channels != s.Channels || s.Compression != compression || d.Compression != compression {
					t.Errorf("source %+v\ntarget %+v", s, d)
				}
				down := s.Downtime
				if parts := down.Pause + down.Sync + down.RAM + down.Save + down.Load + down.Release + down.Commit; down.Total <= 0 || parts > down.Total || parts < down.Total/2 {
					t.Errorf("parts of the downtime %+v", down)
				}
			})
		}
	}
}

// TestEvents is the order in which QEMU tells, as failover-semantics.md 1.3 has it.
func TestEvents(t *testing.T) {
	tr := pair(t)
	tr.opt.Capabilities = Capabilities{CapPauseBeforeSwitch: true}
	tr.at[SourceHolding] = func() {
		if err := tr.source.Continue(); err != nil {
			t.Error(err)
		}
	}
	tr.start()
	tr.succeeds()
	var source, target []string
	for _, e := range tr.seen {
		list := &target
		if e.State.Source() {
			list = &source
		}
		word := string(e.Status)
		if e.Pass > 0 {
			word = "pass"
		}
		if e.Log == "" && (len(*list) == 0 || (*list)[len(*list)-1] != word) {
			*list = append(*list, word)
		}
	}
	if got := strings.Join(source, " "); got != "setup wait-unplug active pass active pre-switchover device pass device completed" {
		t.Error("source:", got)
	}
	if got := strings.Join(target, " "); got != "setup active completed" {
		t.Error("target:", got)
	}
	if want := []string{"vcpu/0", "pci/0000:00:01.0"}; !slices.Equal(tr.to.loaded, want) {
		t.Errorf("loaded %v", tr.to.loaded)
	}
	if tr.from.flushes != 2 {
		t.Errorf("%d flushes, want one before the stop and one after", tr.from.flushes)
	}
	if err := tr.source.Continue(); err == nil || err.Error() != "Migration not in expected state: completed" {
		t.Error(err)
	}
	if err := tr.source.Cancel(); err == nil {
		t.Error("a migration that is over is cancelled")
	}
	tr.again(tr.to)
}

// TestPaused moves a guest that does not run: it does not run after, either.
func TestPaused(t *testing.T) {
	tr := pair(t)
	if _, err := tr.from.Pause(); err != nil {
		t.Fatal(err)
	}
	tr.start()
	if err := wait(tr, tr.sourceEnd, "source"); err != nil {
		t.Fatal(err)
	}
	if err := wait(tr, tr.targetEnd, "target"); err != nil {
		t.Fatal(err)
	}
	if tr.to.stop != nil || tr.from.stop != nil {
		t.Error("the guest runs")
	}
	tr.to.check()
}

// TestRefusals are targets that cannot take this guest; they wait for another one.
func TestRefusals(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(tr *trip)
		want   string
	}{
		"facts":         {func(tr *trip) { tr.to.facts = facts("machine", "fake", "ram", "5 MiB") }, "the target: ram: 4800 KiB on the source, 5 MiB on the target"},
		"format":        {func(tr *trip) { tr.from.version = 2 }, "the target: state of vcpu/0 (vcpu): format 2, the target knows 1 to 1"},
		"hook":          {func(tr *trip) { tr.hook.err = fmt.Errorf("no VF is free") }, "the target: no VF is free"},
		"source's prep": {func(tr *trip) { tr.prep[1].err = fmt.Errorf("the guest keeps its VF") }, "the guest keeps its VF"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := pair(t)
			tt.change(tr)
			tr.start()
			if err := wait(tr, tr.sourceEnd, "source"); err == nil || err.Error() != tt.want {
				t.Errorf("source: %v", err)
			}
			tr.check(tr.from)
			if st := tr.source.Stats(); st.Status != StatusFailed || st.Err == nil || st.Downtime.Total != 0 {
				t.Errorf("%+v", st)
			}
			if tr.prep[0].taken || tr.prep[1].taken {
				t.Error("what was prepared was not undone")
			}
			if name == "source's prep" {
				err := wait(tr, tr.targetEnd, "target") // it was ready
				if err == nil || err.Error() != "the source: the guest keeps its VF" {
					t.Errorf("target: %v", err)
				}
			} else {
				// The target has undone what it had begun, says why, and takes another guest.
				tr.to.facts, tr.hook.err = tr.from.facts, nil
				tr.from.version = 1
				next := newTrip(t, tr.from, tr.to)
				next.net, next.hook, next.target, next.targetEnd = tr.net, tr.hook, tr.target, tr.targetEnd
				source, err := NewSource(tr.from, Options{Params: tr.opt.Params, Address: tr.net.address()})
				if err != nil {
					t.Fatal(err)
				}
				next.source = source
				go func() { next.sourceEnd <- source.Run() }()
				if err := wait(next, next.sourceEnd, "source"); err != nil {
					t.Fatal(err)
				}
				if err := wait(next, next.targetEnd, "target"); err != nil {
					t.Fatal(err)
				}
				next.check(tr.to)
				return
			}
			tr.again(tr.from)
		})
	}
}

func TestConnectErrors(t *testing.T) {
	w := &world{t: t}
	m := newMachine(t, w, "the source").boot()
	for uri, want := range map[string]string{
		"tcp:127.0.0.1:1":     "connect to tcp:127.0.0.1:1: dial tcp 127.0.0.1:1: connect: connection refused",
		"unix:/nowhere":       "connect to unix:/nowhere: dial unix /nowhere: connect: no such file or directory",
		"file:/nowhere/x":     "connect to file:/nowhere/x: open /nowhere/x: no such file or directory",
		"fd:x":                "connect to fd:x: fd:x: no file has been handed over",
		"exec:exit 3":         "",
		"file:/dev/full":      "write /dev/full: no space left on device",
		"exec:head -c 100000": "",
	} {
		a, err := wire.ParseURI(uri)
		if err != nil {
			t.Fatal(err)
		}
		s, err := NewSource(m, Options{Params: DefaultParams(), Address: a})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Run(); err == nil || want != "" && err.Error() != want {
			t.Errorf("%s: %v", uri, err)
		}
		if m.stop == nil || m.logs != 0 {
			t.Fatalf("%s: the guest does not run any more", uri)
		}
	}
}

// TestConvergence is a guest that writes faster than max-bandwidth.
func TestConvergence(t *testing.T) {
	busy := func(t *testing.T) *trip {
		w := &world{t: t}
		from := newMachine(t, w, "the source")
		from.burst = 20
		tr := newTrip(t, from.boot(), newMachine(t, w, "the target"))
		tr.opt.Params.MaxBandwidth = 20 << 20
		tr.opt.Params.DowntimeLimit = 0
		return tr
	}
	t.Run("limit-rounds, cancel", func(t *testing.T) {
		t.Parallel()
		tr := busy(t)
		tr.opt.Params.LimitRounds = 3
		tr.start()
		err := wait(tr, tr.sourceEnd, "source")
		if err == nil || !strings.HasPrefix(err.Error(), "the guest writes faster than it can be sent: limit-rounds: 3 rounds are over") {
			t.Fatalf("source: %v", err)
		}
		tr.check(tr.from)
		if err := wait(tr, tr.targetEnd, "target"); err == nil || !strings.HasPrefix(err.Error(), "the source: the guest writes faster") {
			t.Errorf("target: %v", err)
		}
	})
	t.Run("limit-time, switch", func(t *testing.T) {
		t.Parallel()
		tr := busy(t)
		tr.opt.Params.LimitTime, tr.opt.Params.LimitAction = 100, "switch" // within the first round
		tr.start()
		tr.succeeds()
	})
	t.Run("auto-converge", func(t *testing.T) {
		t.Parallel()
		tr := busy(t)
		tr.opt.Capabilities = Capabilities{CapAutoConverge: true}
		tr.opt.Params.ThrottleTriggerThreshold = 1
		tr.opt.Params.LimitRounds, tr.opt.Params.LimitAction = 7, "switch"
		tr.start()
		tr.succeeds()
		if got := tr.from.throttle; len(got) < 2 || got[0] != 20 || got[len(got)-1] != 0 {
			t.Errorf("throttled to %v", got)
		}
	})
	t.Run("max-bandwidth", func(t *testing.T) {
		t.Parallel()
		tr := pair(t)
		tr.opt.Params.MaxBandwidth = 10 << 20
		tr.start()
		begin := time.Now()
		tr.succeeds()
		sent := tr.source.Stats().RAM.PrecopyBytes
		if took, least := time.Since(begin), time.Duration(float64(sent)/(10<<20)*float64(time.Second))-2*slack; took < least {
			t.Errorf("%d bytes in %s, at least %s", sent, took, least)
		}
	})
}
