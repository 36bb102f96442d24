package virtio_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"sync"
	"testing"

	"baton/devices/virtio"
	"baton/kvm/guestmem"
	"baton/tests/virtiotest"
)

const (
	flagNext     = 1
	flagWrite    = 2
	flagIndirect = 4
)

var featureSets = []uint64{
	virtio.FeatureVersion1,
	virtio.FeatureVersion1 | virtio.FeatureEventIdx,
	virtio.CoreFeatures,
}

func TestChain(t *testing.T) {
	for _, f := range featureSets {
		t.Run(fmt.Sprintf("%#x", f), func(t *testing.T) {
			d := virtiotest.NewDriver(t, nil, f)
			r := d.NewRing(0, 8)
			for range 40 { // several times around the ring
				r.Add([][]byte{[]byte("he"), []byte("llo")}, 3, 5)
				c, err := r.Pop()
				if err != nil || c == nil {
					t.Fatalf("pop: %v, %v", c, err)
				}
				if c.OutLen() != 5 || c.InLen() != 8 {
					t.Fatalf("out %d, in %d bytes", c.OutLen(), c.InLen())
				}
				var p [8]byte
				if n := c.Read(p[:4]); n != 4 || string(p[:4]) != "hell" {
					t.Fatalf("read %d: %q", n, p[:n])
				}
				if n := c.Read(p[:]); n != 1 || p[0] != 'o' || c.OutLen() != 0 {
					t.Fatalf("read %d: %q", n, p[:n])
				}
				if n := c.Write([]byte("abcd")); n != 4 || c.InLen() != 4 {
					t.Fatalf("wrote %d, %d left", n, c.InLen())
				}
				if n := c.Write([]byte("efghij")); n != 4 || len(c.In) != 0 {
					t.Fatalf("wrote %d", n)
				}
				r.Push(c, 8)
				r.Notify()
				req, n := r.Wait()
				if n != 8 || string(req.Written(n)) != "abcdefgh" {
					t.Fatalf("driver got %q", req.Written(n))
				}
				if c, err := r.Pop(); c != nil || err != nil {
					t.Fatalf("pop of an empty queue: %v, %v", c, err)
				}
			}
		})
	}
}

func TestIndirect(t *testing.T) {
	d := virtiotest.NewDriver(t, nil, virtio.CoreFeatures)
	r := d.NewRing(0, 4)
	const n = 9 // more than the queue has
	table := d.Alloc(16 * n)
	for i := range n {
		gpa, flags := d.Alloc(16), uint16(flagNext)
		if i >= 4 {
			flags |= flagWrite
		}
		if i == n-1 {
			flags &^= flagNext
		}
		copy(d.Bytes(gpa, 16), bytes.Repeat([]byte{byte(i)}, 16))
		virtiotest.PutDesc(d.Bytes(table+16*uint64(i), 16), gpa, 16, flags, uint16(i+1))
	}
	first := d.Alloc(16)
	r.Desc(2, first, 16, flagNext, 3)
	// VIRTQ_DESC_F_WRITE means nothing here: 2.7.5.3.2.
	r.Desc(3, table, 16*n, flagIndirect|flagWrite, 0)
	r.Offer(2)
	c, err := r.Pop()
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Out) != 5 || len(c.In) != 5 || c.Head != 2 {
		t.Fatalf("head %d, %d readable, %d writable", c.Head, len(c.Out), len(c.In))
	}
	if c.Out[1][0] != 0 || c.Out[4][15] != 3 || c.In[4][0] != 8 {
		t.Error("buffers in the wrong order")
	}
}

func TestMalformed(t *testing.T) {
	const size = 8
	d := virtiotest.NewDriver(t, nil, virtio.CoreFeatures)
	buf, table := uint64(0x100000), uint64(0x200000)
	indirect := func(i int, addr uint64, n uint32, flags, next uint16) {
		virtiotest.PutDesc(d.Bytes(table+16*uint64(i), 16), addr, n, flags, next)
	}
	tests := []struct {
		name, want string
		features   uint64
		make       func(r *virtiotest.Ring)
	}{
		{"index jump", "jumps by 9", virtio.CoreFeatures, func(r *virtiotest.Ring) { _ = d.Mem.Store16(r.Avail+2, size+1) }},
		{"index back", "jumps by 65535", virtio.CoreFeatures, func(r *virtiotest.Ring) { _ = d.Mem.Store16(r.Avail+2, 0xffff) }},
		{"head", "descriptor 8 is not in the table", virtio.CoreFeatures, func(r *virtiotest.Ring) { r.Offer(size) }},
		{"next", "descriptor 65535 is not", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, buf, 1, flagNext, 0xffff)
			r.Offer(0)
		}},
		{"loop to itself", "loop", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, buf, 1, flagNext, 0)
			r.Offer(0)
		}},
		{"long loop", "loop", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			for i := range size {
				r.Desc(i, buf, 1, flagNext, uint16(i+1)%size)
			}
			r.Offer(3)
		}},
		{"no length", "no length", virtio.CoreFeatures, func(r *virtiotest.Ring) { r.Desc(0, buf, 0, 0, 0); r.Offer(0) }},
		{"outside of RAM", "outside of RAM", virtio.CoreFeatures, func(r *virtiotest.Ring) { r.Desc(0, 0xc0000000, 1, 0, 0); r.Offer(0) }},
		{"over the end", "outside of RAM", virtio.CoreFeatures, func(r *virtiotest.Ring) { r.Desc(0, buf, 0xffffffff, 0, 0); r.Offer(0) }},
		{"wraps", "outside of RAM", virtio.CoreFeatures, func(r *virtiotest.Ring) { r.Desc(0, ^uint64(0), 2, 0, 0); r.Offer(0) }},
		{"order", "readable after a writable", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, buf, 1, flagNext|flagWrite, 1)
			r.Desc(1, buf, 1, 0, 0)
			r.Offer(0)
		}},
		{"indirect not negotiated", "where none may be", virtio.FeatureVersion1, func(r *virtiotest.Ring) {
			r.Desc(0, table, 16, flagIndirect, 0)
			indirect(0, buf, 1, 0, 0)
			r.Offer(0)
		}},
		{"indirect with next", "has a next", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, table, 16, flagIndirect|flagNext, 1)
			r.Offer(0)
		}},
		{"nested", "where none may be", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, table, 16, flagIndirect, 0)
			indirect(0, table, 16, flagIndirect, 0)
			r.Offer(0)
		}},
		{"odd table", "indirect table of 17 bytes", virtio.CoreFeatures, func(r *virtiotest.Ring) { r.Desc(0, table, 17, flagIndirect, 0); r.Offer(0) }},
		{"great table", "indirect table of", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, table, 16*(virtio.MaxChain+1), flagIndirect, 0)
			r.Offer(0)
		}},
		{"table outside of RAM", "outside of RAM", virtio.CoreFeatures, func(r *virtiotest.Ring) { r.Desc(0, 1<<40, 16, flagIndirect, 0); r.Offer(0) }},
		{"index in table", "descriptor 2 is not", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, table, 32, flagIndirect, 0)
			indirect(0, buf, 1, flagNext, 2)
			r.Offer(0)
		}},
		{"loop in table", "loop", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, table, 32, flagIndirect, 0)
			indirect(0, buf, 1, flagNext, 1)
			indirect(1, buf, 1, flagNext, 0)
			r.Offer(0)
		}},
		{"too many buffers", "more than 1024", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, buf, 1, flagNext, 1)
			r.Desc(1, table, 16*virtio.MaxChain, flagIndirect, 0)
			for i := range virtio.MaxChain {
				indirect(i, buf, 1, flagNext, uint16(i+1))
			}
			r.Offer(0)
		}},
		{"more than 4 GiB", "longer than 4 GiB", virtio.CoreFeatures, func(r *virtiotest.Ring) {
			r.Desc(0, table, 16*200, flagIndirect, 0)
			for i := range 200 {
				indirect(i, virtiotest.HighBase, 32<<20, flagNext|flagWrite, uint16(i+1))
			}
			r.Offer(0)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := d.NewRing(3, size)
			if err := r.Start(d.Mem, tt.features); err != nil {
				t.Fatal(err)
			}
			tt.make(r)
			c, err := r.Pop()
			if err == nil {
				t.Fatalf("no error, chain %+v", c)
			}
			if !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "queue 3: ") {
				t.Errorf("error %q, want %q", err, tt.want)
			}
			if _, again := r.Pop(); again != err {
				t.Errorf("second pop: %v; the queue has to stay stopped", again)
			}
			if err := r.Start(d.Mem, tt.features); err != nil {
				t.Fatal(err)
			}
			_ = d.Mem.Store16(r.Avail+2, 0)
			if c, err := r.Pop(); c != nil || err != nil {
				t.Errorf("after a new start: %v, %v", c, err)
			}
		})
	}
}

func TestStartRefuses(t *testing.T) {
	mem := virtiotest.Memory(t)
	for _, tt := range []struct {
		name              string
		size              uint16
		desc, avail, used uint64
		want              string
	}{
		{"fine", 8, 0x1000, 0x2000, 0x3000, ""},
		{"fine at the least alignment", 8, 0x1010, 0x2002, 0x3004, ""},
		{"no size", 0, 0x1000, 0x2000, 0x3000, "size 0"},
		{"odd size", 12, 0x1000, 0x2000, 0x3000, "size 12"},
		{"great size", 2048, 0x1000, 0x2000, 0x3000, "size 2048"},
		{"descriptors misaligned", 8, 0x1008, 0x2000, 0x3000, "descriptor area 0x1008 is not aligned to 16"},
		{"avail misaligned", 8, 0x1000, 0x2001, 0x3000, "driver area 0x2001 is not aligned to 2"},
		{"used misaligned", 8, 0x1000, 0x2000, 0x3002, "device area 0x3002 is not aligned to 4"},
		{"descriptors in a hole", 8, 0xd0000000, 0x2000, 0x3000, "descriptor area: "},
		{"avail over the end", 8, 0x1000, 32<<20 - 8, 0x3000, "driver area: "},
		{"used wraps", 8, 0x1000, 0x2000, ^uint64(3), "device area: "},
	} {
		q, err := virtio.NewQueue(1, tt.size)
		if err != nil {
			t.Fatal(err)
		}
		q.Desc, q.Avail, q.Used = tt.desc, tt.avail, tt.used
		err = q.Start(mem, virtio.CoreFeatures)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.want)
		}
		_ = q.Close()
	}
}

// TestNotify follows the used index past the driver's event index: 2.7.7.2.
func TestNotify(t *testing.T) {
	for _, tt := range []struct {
		name     string
		features uint64
		wish     func(mem *guestmem.Memory, r *virtiotest.Ring)
		want     []int // chains after which an interrupt comes
	}{
		{"always", virtio.FeatureVersion1, func(*guestmem.Memory, *virtiotest.Ring) {}, []int{1, 2, 3, 4, 5}},
		{"never", virtio.FeatureVersion1, func(m *guestmem.Memory, r *virtiotest.Ring) { _ = m.Store16(r.Avail, 1) }, nil},
		{"flags mean nothing with event indexes", virtio.CoreFeatures,
			func(m *guestmem.Memory, r *virtiotest.Ring) { _ = m.Store16(r.Avail, 1) }, []int{1}},
		{"at the third", virtio.CoreFeatures,
			func(m *guestmem.Memory, r *virtiotest.Ring) { _ = m.Store16(r.Avail+4+2*8, 2) }, []int{3}},
		{"far ahead", virtio.CoreFeatures,
			func(m *guestmem.Memory, r *virtiotest.Ring) { _ = m.Store16(r.Avail+4+2*8, 1000) }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := virtiotest.NewDriver(t, nil, tt.features)
			r := d.NewRing(0, 8)
			n, got := 0, []int(nil)
			r.Interrupt = func() { got = append(got, n) }
			tt.wish(d.Mem, r)
			r.Notify() // nothing was pushed
			for n = 1; n <= 5; n++ {
				r.Add(nil, 1)
				c, err := r.Pop()
				if err != nil {
					t.Fatal(err)
				}
				r.Push(c, 0)
				r.Notify()
				r.Notify() // not a second time
			}
			if fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("interrupts after %v, want %v", got, tt.want)
			}
		})
	}
}

func TestEnableKicks(t *testing.T) {
	for _, f := range featureSets {
		d := virtiotest.NewDriver(t, nil, f)
		r := d.NewRing(0, 8)
		kicked := func() bool {
			r.Kick()
			p := r.Queue.Kick.Pending()
			if p {
				_ = r.Queue.Kick.Wait()
			}
			return p
		}
		pop := func() {
			if c, err := r.Pop(); c == nil || err != nil {
				t.Fatalf("%#x: pop: %v, %v", f, c, err)
			}
		}
		if r.EnableKicks() {
			t.Errorf("%#x: more in an empty queue", f)
		}
		r.Add(nil, 1)
		if !kicked() {
			t.Errorf("%#x: no kick though enabled", f)
		}
		r.DisableKicks()
		pop()
		r.Add(nil, 1)
		if kicked() {
			t.Errorf("%#x: kick though disabled", f)
		}
		if !r.EnableKicks() {
			t.Errorf("%#x: the buffer offered while disabled would be lost", f)
		}
		pop()
		if r.EnableKicks() {
			t.Errorf("%#x: more than there is", f)
		}
		r.Add(nil, 1)
		if !kicked() {
			t.Errorf("%#x: no kick though enabled again", f)
		}
	}
}

// TestWorker sends requests through an echoing worker as fast as both sides can: one lost
// kick or interrupt and it hangs.
func TestWorker(t *testing.T) {
	for _, f := range featureSets {
		for _, depth := range []int{1, 2, 7, 8} {
			t.Run(fmt.Sprintf("%#x depth %d", f, depth), func(t *testing.T) {
				d := virtiotest.NewDriver(t, nil, f)
				r := d.NewRing(0, 16)
				fail := func(err error) { d.Failures <- err }
				w := r.Go(fail, func(w *virtio.Worker) {
					if depth%2 == 0 {
						w.Gather()
					}
					for c := w.Next(); c != nil; c = w.Next() {
						var p [8]byte
						c.Read(p[:])
						r.Push(c, uint32(c.Write(p[:])))
					}
				})
				defer w.Stop()
				const total = 3000
				sent := 0
				send := func() {
					r.Add([][]byte{binary.LittleEndian.AppendUint64(nil, uint64(sent))}, 8)
					r.Kick()
					sent++
				}
				for range depth {
					send()
				}
				for i := range total {
					req, n := r.Wait()
					if got := binary.LittleEndian.Uint64(req.Written(n)); got != uint64(i) {
						t.Fatalf("request %d came back as %d", i, got)
					}
					if sent < total {
						send()
					}
				}
			})
		}
	}
}

func TestWorkerStops(t *testing.T) {
	d := virtiotest.NewDriver(t, nil, virtio.CoreFeatures)
	r := d.NewRing(0, 16)
	running := make(chan struct{})
	w := r.Go(func(err error) { t.Error(err) }, func(w *virtio.Worker) {
		close(running)
		for c := w.Next(); c != nil; c = w.Next() {
			r.Push(c, 0)
		}
		<-w.Stopping()
	})
	<-running
	w.Stop()
	r.Offer(0)
	r.Queue.Kick.Signal()
	if _, _, ok := r.Poll(); ok {
		t.Error("served after Stop")
	}
}

// TestPushConcurrently completes chains from several goroutines out of order.
func TestPushConcurrently(t *testing.T) {
	d := virtiotest.NewDriver(t, nil, virtio.CoreFeatures)
	r := d.NewRing(0, 256)
	var wg sync.WaitGroup
	for range 50 {
		for range 100 {
			r.Add(nil, 4)
		}
		for range 100 {
			c, err := r.Pop()
			if err != nil || c == nil {
				t.Fatal(c, err)
			}
			wg.Go(func() {
				var p [4]byte
				binary.LittleEndian.PutUint32(p[:], uint32(c.Head))
				r.Push(c, uint32(c.Write(p[:])))
				r.Notify()
			})
		}
		for range 100 {
			req, n := r.Wait()
			if got := binary.LittleEndian.Uint32(req.Written(n)); got != uint32(req.Head) {
				t.Fatalf("chain %d has the data of %d", req.Head, got)
			}
		}
		wg.Wait()
	}
}

func TestDirty(t *testing.T) {
	d := virtiotest.NewDriver(t, nil, virtio.CoreFeatures)
	r := d.NewRing(0, 8)
	const in = virtiotest.HighBase + 0x100000
	r.Desc(0, 0x300000, 4096, flagNext, 1)
	r.Desc(1, in, 4096, flagNext|flagWrite, 2)
	r.Desc(2, in+0x10000, 8192, flagNext|flagWrite, 3)
	r.Desc(3, in+0x20000, 4096, flagWrite, 0)
	r.Offer(0)
	d.Mem.StartDirtyLog()
	defer d.Mem.StopDirtyLog()
	c, err := r.Pop()
	if err != nil {
		t.Fatal(err)
	}
	var data [4097]byte
	r.Push(c, uint32(c.Write(data[:])))
	dirty := guestmem.NewBitmap(d.Mem)
	d.Mem.SyncDirtyLog(dirty)
	for gpa, want := range map[uint64]bool{
		0x300000:     false, // only read
		in:           true,
		in + 0x10000: true, // the one byte more
		in + 0x11000: false,
		in + 0x20000: false,
		r.Used:       true,
	} {
		if dirty.Test(gpa) != want {
			t.Errorf("page %#x: dirty %v, want %v", gpa, !want, want)
		}
	}
}

func TestHotPathDoesNotAllocate(t *testing.T) {
	d := virtiotest.NewDriver(t, nil, virtio.CoreFeatures)
	r := d.NewRing(0, 8)
	for i := range 3 {
		r.Desc(i, 0x300000, 512, uint16(flagNext|flagWrite)&^uint16(i/2*flagNext), uint16(i+1))
	}
	if n := testing.AllocsPerRun(100, func() {
		r.Offer(0)
		c, err := r.Pop()
		if err != nil || c == nil {
			t.Fatal(c, err)
		}
		r.Push(c, 1)
		r.Notify()
	}); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

func BenchmarkQueue(b *testing.B) {
	d := virtiotest.NewDriver(b, nil, virtio.CoreFeatures)
	r := d.NewRing(0, 256)
	for i := range 3 {
		r.Desc(i, 0x300000, 512, uint16(flagNext|flagWrite)&^uint16(i/2*flagNext), uint16(i+1))
	}
	for b.Loop() {
		r.Offer(0)
		c, _ := r.Pop()
		r.Push(c, 1)
		r.Notify()
	}
}

// FuzzQueue takes bytes as all that a driver can write: the three areas and an indirect
// table. Whatever they say, Pop ends, and what it returns lies in guest memory.
func FuzzQueue(f *testing.F) {
	f.Add([]byte{}, uint16(1), true)
	f.Add(bytes.Repeat([]byte{0x11, 0, 0, 0}, 64), uint16(8), true)
	f.Add(bytes.Repeat([]byte{1}, 300), uint16(9), false)
	f.Fuzz(func(t *testing.T, ring []byte, avail uint16, indirect bool) {
		mem, err := guestmem.New([]guestmem.Range{{Base: 0, Size: 0x4000}}, guestmem.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer mem.Close()
		features := uint64(virtio.CoreFeatures)
		if !indirect {
			features &^= virtio.FeatureIndirectDesc
		}
		q, err := virtio.NewQueue(0, 8)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		// Small addresses in the descriptors hit the rings themselves.
		q.Desc, q.Avail, q.Used = 0, 0x80, 0xa0
		copy(mem.Regions()[0].Host, ring)
		if err := q.Start(mem, features); err != nil {
			t.Fatal(err)
		}
		_ = mem.Store16(q.Avail+2, avail)
		for range 1000 { // buffers in the rings may keep it going for ever
			c, err := q.Pop()
			if c == nil || err != nil {
				break
			}
			if n := len(c.Out) + len(c.In); n == 0 || n > virtio.MaxChain {
				t.Fatalf("%d buffers", n)
			}
			want := c.InLen()
			for _, b := range c.In {
				want -= uint32(len(b))
			}
			if want != 0 {
				t.Fatal("InLen does not match In")
			}
			var p [64]byte
			c.Read(p[:])
			q.Push(c, uint32(c.Write(p[:])))
			q.Notify()
			q.EnableKicks()
		}
	})
}
