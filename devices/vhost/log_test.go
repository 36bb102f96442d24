package vhost

import (
	"encoding/binary"
	"slices"
	"testing"

	"baton/kvm/guestmem"
	"baton/tests/taptest"
	"baton/tests/virtiotest"
)

func TestLogSync(t *testing.T) {
	mem := virtiotest.Memory(t)
	log, err := NewLog(mem)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	end := uint64(virtiotest.HighBase)/4096 + 32<<20/4096
	if len(log.mapping) != int(end/8) {
		t.Errorf("%d bytes for %d pages", len(log.mapping), end)
	}
	want := []uint64{0, 63, 64, 8191, virtiotest.HighBase / 4096, end - 1}
	for _, page := range append(want, 8192, 1<<19) { // those two are no RAM
		log.mapping[page/8] |= 1 << (page % 8) // as the kernel does it
	}
	for _, pages := range [][]uint64{want, nil} {
		b := guestmem.NewBitmap(mem)
		log.Sync(b)
		if got := pagesOf(b); !slices.Equal(got, pages) {
			t.Errorf("pages %d, want %d", got, pages)
		}
	}
}

func pagesOf(b *guestmem.Bitmap) (pages []uint64) {
	for gpa, n := range b.Runs() {
		for ; n > 0; gpa, n = gpa+4096, n-4096 {
			pages = append(pages, gpa/4096)
		}
	}
	return pages
}

// Every page that vhost writes, frames and rings, is in the log: set before the start or
// while frames flow, and after a stop with nothing in between.
func TestLog(t *testing.T) {
	r := newRig(t)
	log, err := NewLog(r.Mem)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := log.Close(); err != nil {
			t.Error(err)
		}
	})
	receive := func() []uint64 {
		t.Helper()
		ring := r.Rings[0]
		req := ring.Add(nil, 2048)
		ring.Kick()
		buffer := binary.LittleEndian.Uint64(r.Bytes(ring.Queue.Desc+16*uint64(req.Head), 8))
		r.host.Send(taptest.Frame(1, 100))
		r.receive(t, taptest.Frame(1, 100))
		return []uint64{ring.Queue.Used / 4096, buffer / 4096}
	}
	check := func(what string, want ...uint64) {
		t.Helper()
		b := guestmem.NewBitmap(r.Mem)
		log.Sync(b)
		got := pagesOf(b)
		for _, page := range want {
			if !slices.Contains(got, page) {
				t.Errorf("%s: page %d was written and is not among %d", what, page, got)
			}
		}
		if len(want) == 0 && len(got) > 0 {
			t.Errorf("%s: pages %d are logged", what, got)
		}
	}
	set := func(l *Log) {
		t.Helper()
		if err := r.net.SetLog(l); err != nil {
			t.Fatal(err)
		}
	}
	set(log)
	r.start(t, [2]uint16{})
	check("set before the start", receive()...)
	check("quiet")
	receive()
	base, err := r.net.Stop()
	if err != nil {
		t.Fatal(err)
	}
	check("stopped", r.Rings[0].Queue.Used/4096)
	set(nil)
	r.start(t, base)
	receive()
	check("not set")
	set(log)
	check("set while running", receive()...)
	set(nil)
	receive()
	check("no longer set")
}
