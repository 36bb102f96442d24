//go:build !race

package blk_test

import (
	"encoding/binary"
	"testing"

	"baton/devices/virtio/blk"
	"baton/tests/virtiotest"
)

// TestHotPathDoesNotAllocate: one read, from kick to interrupt, in the whole process. (The race
// detector makes x/sys keep its vectors on the heap.)
func TestHotPathDoesNotAllocate(t *testing.T) {
	d, _ := disk(t, folders(t)["tmpfs"], blk.Options{ReadOnly: true}, blk.Config{})
	do := prepared(t, d)
	if n := testing.AllocsPerRun(200, do); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

// prepared returns a function that reads 4 KiB from somewhere, without allocating itself.
func prepared(t testing.TB, d *virtiotest.Driver) func() {
	r := d.Rings[0]
	head, data, st := d.Alloc(16), d.Alloc(4096), d.Alloc(1)
	h := d.Bytes(head, 16)
	r.Desc(0, head, 16, 1, 1)
	r.Desc(1, data, 4096, 1|2, 2)
	r.Desc(2, st, 1, 2, 0)
	sector := uint64(0)
	return func() {
		sector = (sector*5 + 8) % (diskSize/512 - 8)
		binary.LittleEndian.PutUint64(h[8:], sector)
		r.Offer(0)
		r.Kick()
		if _, n := r.Wait(); n != 4097 {
			t.Fatalf("%d bytes", n)
		}
	}
}
