package blk_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"baton/devices"
	"baton/devices/virtio"
	"baton/devices/virtio/blk"
	"baton/tests/virtiotest"
)

func device(t testing.TB, path string, o blk.Options, cfg blk.Config) *blk.Device {
	t.Helper()
	cfg.Disk = open(t, path, o)
	dev, err := blk.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

func TestState(t *testing.T) {
	path := image(t, t.TempDir())
	make := func(t testing.TB) virtio.Device {
		return device(t, path, blk.Options{Unlocked: true}, blk.Config{Queues: 2})
	}
	virtiotest.State(t, make, func(_ testing.TB, f *virtiotest.Function) {
		f.Rings[1].Do([][]byte{header(reqIn, 0)}, 512, 1)
	})
}

// A guest writes and reads while its machine is moved to and fro, each time with requests
// under way, the lock handed over, and memory of its own on the other side.
func TestMigrate(t *testing.T) {
	path := image(t, t.TempDir())
	dev := device(t, path, blk.Options{}, blk.Config{Queues: 2})
	f := virtiotest.NewFunction(t, dev, virtiotest.Memory(t))
	f.Start(dev.Features())
	want := bytes.Clone(content())
	for round := range 6 {
		for i := range 20 {
			sector := uint64(round*100 + i)
			data := bytes.Repeat([]byte{byte(round), byte(i)}, 256)
			copy(want[sector*512:], data)
			f.Rings[i%2].Add([][]byte{header(reqOut, sector), data}, 1)
		}
		for _, r := range f.Rings {
			r.Kick()
		}
		other := device(t, path, blk.Options{Unlocked: true}, blk.Config{Queues: 2})
		if err := other.Disk().Reserve(); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("reserved before it is offered: %v", err)
		}
		if err := dev.Disk().Offer(); err != nil {
			t.Fatal(err)
		}
		if err := other.Disk().Reserve(); err != nil {
			t.Fatal(err)
		}
		if third, err := blk.Open(path, blk.Options{}); err == nil {
			third.Close()
			t.Error("the disk goes to a third machine while it is offered")
		}
		if err := dev.Disk().Lock(); err != nil {
			t.Errorf("its owner takes it back while it is reserved: %v", err)
		}
		if err := f.Quiesce(); err != nil {
			t.Fatal(err)
		}
		if err := dev.Disk().Flush(); err != nil {
			t.Fatal(err)
		}
		if err := other.Disk().Lock(); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("locked twice: %v", err)
		}
		if err := dev.Disk().Unlock(); err != nil {
			t.Fatal(err)
		}
		if third, err := blk.Open(path, blk.Options{}); err == nil {
			third.Close()
			t.Error("a third machine takes the disk on its way")
		}
		if err := other.Disk().Lock(); err != nil {
			t.Fatal(err)
		}
		if err := dev.Disk().Lock(); err == nil {
			t.Error("the source takes the lock while the target has it")
		}
		f = f.Migrate(other)
		dev = other
		for i := range 20 {
			if req, n := f.Rings[i%2].Wait(); n != 1 || req.Written(1)[0] != ok {
				t.Fatalf("round %d, request %d: % x", round, i, req.Written(n))
			}
		}
		got, st := status(t, f.Rings[0].Do([][]byte{header(reqIn, 0)}, 64<<10, 1))
		if st != ok || !bytes.Equal(got, want[:64<<10]) {
			t.Errorf("round %d: status %d, the disk reads otherwise", round, st)
		}
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file is not as written: %v", err)
	}
}

func TestStateOfAnotherDisk(t *testing.T) {
	data, err := device(t, image(t, t.TempDir()), blk.Options{}, blk.Config{}).SaveState()
	if err != nil {
		t.Fatal(err)
	}
	info := devices.StateInfo{ID: "pci/0000:00:02.0", Type: "virtio-blk-pci", Version: 1, MinVersion: 1}
	small := t.TempDir() + "/small"
	if err := os.WriteFile(small, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, dev := range map[string]*blk.Device{
		"Sectors: the guest's disk has 8192, " + small + " has 8": device(t, small, blk.Options{}, blk.Config{}),
		"BlockSize: 512 bytes, here 4096":                         device(t, image(t, t.TempDir()), blk.Options{}, blk.Config{BlockSize: 4096}),
	} {
		if err := dev.LoadState(info, 1, data); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
