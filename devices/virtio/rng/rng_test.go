package rng_test

import (
	"bytes"
	"testing"

	"baton/devices/virtio"
	"baton/devices/virtio/rng"
	"baton/tests/virtiotest"
)

func TestContract(t *testing.T) {
	virtiotest.Run(t, func(testing.TB) virtio.Device { return rng.New() })
}

func TestEntropy(t *testing.T) {
	d := virtiotest.NewDriver(t, rng.New(), virtio.CoreFeatures)
	for _, tt := range []struct {
		in   []int
		want int
	}{
		{[]int{16}, 16},
		{[]int{1, 100, 4096}, 4197},
		{[]int{60 << 10, 60 << 10}, 64 << 10},
		{[]int{200 << 10}, 64 << 10},
		{[]int{64 << 10, 64}, 64 << 10},
	} {
		got := d.Rings[0].Do(nil, tt.in...)
		if len(got) != tt.want {
			t.Errorf("%v: %d bytes, want %d", tt.in, len(got), tt.want)
		}
		if tail := got[max(0, len(got)-16):]; bytes.Equal(tail, make([]byte, len(tail))) {
			t.Errorf("%v: ends in zeroes", tt.in)
		}
	}
	// A request without a writable buffer is the driver's mistake, not the device's end.
	if got := d.Rings[0].Do([][]byte{{1}}); len(got) != 0 {
		t.Errorf("%d bytes without a buffer", len(got))
	}
}
