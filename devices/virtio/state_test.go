package virtio_test

import (
	"strings"
	"testing"

	"baton/devices"
	"baton/devices/virtio"
	"baton/tests/virtiotest"
)

func TestState(t *testing.T) {
	make := func(testing.TB) virtio.Device { return newModel() }
	virtiotest.State(t, make, func(_ testing.TB, f *virtiotest.Function) {
		copy(f.Dev.(*model).config[3:], []byte{1, 2, 3})
		f.Rings[1].Do(nil, 4)
	})
}

// load changes a saved state and loads it.
func load(t *testing.T, change func(*fields)) error {
	t.Helper()
	dev := newModel()
	f := virtiotest.NewFunction(t, dev, virtiotest.Memory(t))
	f.Start(virtio.CoreFeatures)
	if err := f.Quiesce(); err != nil {
		t.Fatal(err)
	}
	data, err := f.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	var s fields
	if err := devices.DecodeState(f.StateInfo(), 1, data, &s, nil); err != nil {
		t.Fatal(err)
	}
	change(&s)
	if data, err = devices.EncodeState(s); err != nil {
		t.Fatal(err)
	}
	to := virtiotest.NewFunction(t, newModel(), virtiotest.Memory(t))
	if err := to.Quiesce(); err != nil {
		t.Fatal(err)
	}
	return to.LoadState(1, data)
}

// fields is the format of a section, spelled out once more.
type fields struct {
	Config         map[int]any `cbor:"1,keyasint"`
	Status         int         `cbor:"2,keyasint"`
	ISR            int         `cbor:"3,keyasint"`
	Generation     int         `cbor:"4,keyasint"`
	ConfigVector   int         `cbor:"5,keyasint"`
	DeviceSelect   int         `cbor:"6,keyasint"`
	DriverSelect   int         `cbor:"7,keyasint"`
	DriverFeatures uint64      `cbor:"8,keyasint"`
	QueueSelect    int         `cbor:"9,keyasint"`
	Active         bool        `cbor:"10,keyasint"`
	Queues         []queue     `cbor:"11,keyasint"`
	Device         []byte      `cbor:"12,keyasint,omitempty"`
}

type queue struct {
	Size    int    `cbor:"1,keyasint"`
	Desc    uint64 `cbor:"2,keyasint"`
	Avail   uint64 `cbor:"3,keyasint"`
	Used    uint64 `cbor:"4,keyasint"`
	Enabled bool   `cbor:"5,keyasint"`
	Vector  int    `cbor:"6,keyasint"`
	Next    int    `cbor:"7,keyasint"`
}

func TestStateErrors(t *testing.T) {
	for want, change := range map[string]func(*fields){
		"Status: 0x10 is none":                               func(s *fields) { s.Status = 0x10 },
		"Active: without DRIVER_OK":                          func(s *fields) { s.Status = 3 },
		"DriverFeatures: the driver uses 0x8000000000000000": func(s *fields) { s.DriverFeatures |= 1 << 63 },
		"ConfigVector: there is no vector 9":                 func(s *fields) { s.ConfigVector = 9 },
		"Queues: 1; here there are 2":                        func(s *fields) { s.Queues = s.Queues[:1] },
		"queue 0: Size: 512":                                 func(s *fields) { s.Queues[0].Size = 512 },
		"queue 1: Size: 0":                                   func(s *fields) { s.Queues[1].Size = 0 },
		"queue 1: there is no vector 3":                      func(s *fields) { s.Queues[1].Vector = 3 },
		"queue 0: descriptor area":                           func(s *fields) { s.Queues[0].Desc = 1 << 40 },
		"driver area 0x1 is not aligned":                     func(s *fields) { s.Queues[0].Avail = 1 },
		"queue 1: Next: 500 requests":                        func(s *fields) { s.Queues[1].Next = 500 },
		"ISR: cbor":                                          func(s *fields) { s.ISR = 256 },
	} {
		if err := load(t, change); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "load pci/0000:00:02.0 (virtio-blk-pci): ") {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := load(t, func(*fields) {}); err != nil {
		t.Error(err)
	}
}

// An interrupt or a kick that was on its way when the machine stopped is made up for.
func TestNothingIsLost(t *testing.T) {
	dev := newModel()
	f := virtiotest.NewFunction(t, dev, virtiotest.Memory(t))
	f.Start(virtio.CoreFeatures)
	r := f.Rings[0]
	r.Do(nil, 4) // and the driver asks for no further interrupt
	if err := f.Quiesce(); err != nil {
		t.Fatal(err)
	}
	r.Add(nil, 4) // offered, and no kick
	f = f.Migrate(newModel())
	f.WaitConfig()
	f.Rings[0].Wait()
	for i := range 5 {
		f.Rings[1].Add(nil, 4)
		f.Rings[1].Kick()
		if i%2 == 0 {
			f = f.Migrate(newModel())
		}
		f.Rings[1].Wait()
	}
}

// A device of the source that needs a reset needs one on the target, and gets over it.
func TestBrokenDevice(t *testing.T) {
	f := virtiotest.NewFunction(t, newModel(), virtiotest.Memory(t))
	f.Start(virtio.CoreFeatures)
	f.Rings[0].Desc(0, 0x5000, 0, 0, 0)
	f.Rings[0].Offer(0)
	f.Rings[0].Kick()
	f.WaitConfig()
	if f.Status() != 15|0x40 {
		t.Fatalf("status %#x", f.Status())
	}
	f = f.Migrate(newModel())
	if f.Status() != 15|0x40 {
		t.Errorf("status %#x after migration", f.Status())
	}
	f.Rings[1].Do(nil, 4)
}

func TestPausedReset(t *testing.T) {
	dev := newModel()
	f := virtiotest.NewFunction(t, dev, virtiotest.Memory(t))
	f.Start(virtio.CoreFeatures)
	if err := f.Quiesce(); err != nil {
		t.Fatal(err)
	}
	f.PCI.Reset()
	if err := f.Unquiesce(); err != nil || dev.a != nil || f.Status() != 0 {
		t.Errorf("%v, status %#x", err, f.Status())
	}
	if err := f.LoadState(1, nil); err == nil {
		t.Error("loaded into a device in use")
	}
}
