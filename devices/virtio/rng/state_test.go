package rng_test

import (
	"testing"

	"baton/devices/virtio"
	"baton/devices/virtio/rng"
	"baton/tests/virtiotest"
)

func TestState(t *testing.T) {
	virtiotest.State(t, func(testing.TB) virtio.Device { return rng.New() }, nil)
}

func TestMigrate(t *testing.T) {
	dev := rng.New()
	f := virtiotest.NewFunction(t, dev, virtiotest.Memory(t))
	f.Start(dev.Features())
	for range 3 {
		f.Rings[0].Do(nil, 32)
		f = f.Migrate(rng.New())
	}
	if b := f.Rings[0].Do(nil, 32); len(b) != 32 {
		t.Errorf("%d bytes", len(b))
	}
}
