// Package devicetest is the contract that every device with saved state has to meet.
package devicetest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"baton/devices"
)

// State checks a kind of device. Make returns one as after its reset, each time the same;
// mutate has it differ from that in all that its state tells, as a guest would do it. What has
// been saved once is loaded for ever: testdata/TYPE-vN.cbor is the section as format N had it,
// written by the environment variable BATON_UPDATE=1 when there is a new one.
func State(t *testing.T, make func(testing.TB) devices.Stater, mutate func(testing.TB, devices.Stater)) {
	t.Helper()
	info := make(t).StateInfo()
	quiesce := func(t *testing.T, d devices.Stater, on bool) {
		t.Helper()
		q, ok := d.(devices.Quiescer)
		if !ok {
			return
		}
		f := q.Unquiesce
		if on {
			f = q.Quiesce
		}
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	save := func(t *testing.T, d devices.Stater) []byte {
		t.Helper()
		data, err := d.SaveState()
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	made := func(t *testing.T) devices.Stater {
		d := make(t)
		quiesce(t, d, true)
		return d
	}
	mutated := func(t *testing.T) []byte {
		d := make(t)
		mutate(t, d)
		quiesce(t, d, true)
		return save(t, d)
	}
	t.Run("state/info", func(t *testing.T) {
		if info.ID == "" || info.Type == "" || strings.Contains(info.ID, "nowhere") {
			t.Errorf("the section is %q of type %q", info.ID, info.Type)
		}
		if info.Version < 1 || info.MinVersion < 1 || info.MinVersion > info.Version {
			t.Errorf("format %d, from %d on", info.Version, info.MinVersion)
		}
	})
	t.Run("state/round trip", func(t *testing.T) {
		d := make(t)
		quiesce(t, d, true)
		fresh := save(t, d)
		quiesce(t, d, false)
		mutate(t, d)
		quiesce(t, d, true)
		data := save(t, d)
		if bytes.Equal(fresh, data) {
			t.Error("what the guest did is not in the state")
		}
		if again := save(t, d); !bytes.Equal(data, again) {
			t.Errorf("saving changes the state\n% x\n% x", data, again)
		}
		other := made(t)
		if err := other.LoadState(info.Version, data); err != nil {
			t.Fatal(err)
		}
		if again := save(t, other); !bytes.Equal(data, again) {
			t.Errorf("loaded, the state is another one\n% x\n% x", data, again)
		}
		quiesce(t, other, false)
		quiesce(t, other, true)
		quiesce(t, other, true) // twice is once
		quiesce(t, other, false)
		quiesce(t, other, false)
		quiesce(t, d, false) // the source goes on as well
	})
	t.Run("state/fresh", func(t *testing.T) {
		d := made(t)
		data := save(t, d)
		other := made(t)
		if err := other.LoadState(info.Version, data); err != nil {
			t.Fatal(err)
		}
		if again := save(t, other); !bytes.Equal(data, again) {
			t.Errorf("loaded, the state is another one\n% x\n% x", data, again)
		}
	})
	t.Run("state/golden", func(t *testing.T) {
		data := mutated(t)
		for v := info.MinVersion; v <= info.Version; v++ {
			file := filepath.Join("testdata", fmt.Sprintf("%s-v%d.cbor", info.Type, v))
			if v == info.Version && os.Getenv("BATON_UPDATE") != "" {
				if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(file, data, 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			golden, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			d := made(t)
			if err := d.LoadState(v, golden); err != nil {
				t.Errorf("%s: %v", file, err)
			}
			if v == info.Version && !bytes.Equal(save(t, d), golden) {
				t.Errorf("%s: saved again it is\n% x, not\n% x", file, save(t, d), golden)
			}
		}
	})
	t.Run("state/versions", func(t *testing.T) {
		data := mutated(t)
		for _, v := range []uint16{info.Version + 1, info.MinVersion - 1, 0xffff} {
			refused(t, info, made(t).LoadState(v, data))
		}
	})
	t.Run("state/truncated", func(t *testing.T) {
		data := mutated(t)
		for n := 0; n < len(data); n += 1 + n/64 {
			refused(t, info, made(t).LoadState(info.Version, data[:n]))
		}
		refused(t, info, made(t).LoadState(info.Version, append(bytes.Clone(data), 0)))
	})
	// Whatever comes, there is an error or a device that works; neither a panic nor a hang.
	t.Run("state/hostile", func(t *testing.T) {
		data := mutated(t)
		for i := 0; i < len(data); i += 1 + i/64 {
			for _, flip := range []byte{0x01, 0x80, 0xff} {
				bad := bytes.Clone(data)
				bad[i] ^= flip
				d := made(t)
				if err := d.LoadState(info.Version, bad); err != nil {
					refused(t, info, err)
					continue
				}
				if q, ok := d.(devices.Quiescer); ok && q.Unquiesce() == nil {
					quiesce(t, d, true)
				}
				save(t, d)
			}
		}
	})
}

// refused checks that a section was refused with an error that says which one.
func refused(t *testing.T, info devices.StateInfo, err error) {
	t.Helper()
	var e *devices.StateError
	switch {
	case err == nil:
		t.Error("a bad section was loaded")
	case !errors.As(err, &e) || e.Info.ID != info.ID:
		t.Errorf("the error does not name %s: %v", info, err)
	}
}

// FuzzState loads foreign sections: there is an error or a device that works.
func FuzzState(f *testing.F, make func(testing.TB) devices.Stater) {
	files, err := filepath.Glob("testdata/*.cbor")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d := make(t)
		q, ok := d.(devices.Quiescer)
		if ok {
			_ = q.Quiesce()
		}
		if d.LoadState(d.StateInfo().Version, data) != nil {
			return
		}
		if ok && q.Unquiesce() == nil {
			_ = q.Quiesce()
		}
		if _, err := d.SaveState(); err != nil {
			t.Error(err)
		}
	})
}
