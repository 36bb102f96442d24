package devices

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
)

// memory is a device that remembers what is written to it.
type memory struct {
	data   []byte
	widths []int
}

func (m *memory) Read(off uint64, p []byte) {
	m.widths = append(m.widths, len(p))
	copy(p, m.data[off:])
}

func (m *memory) Write(off uint64, p []byte) {
	m.widths = append(m.widths, len(p))
	copy(m.data[off:], p)
}

// constant reads as one value everywhere.
type constant byte

func (c constant) Read(_ uint64, p []byte) {
	for i := range p {
		p[i] = byte(c)
	}
}
func (constant) Write(uint64, []byte) {}

func names(b *Bus) (list []string) {
	b.Walk(func(r Range, name string) { list = append(list, fmt.Sprintf("%s %s", r, name)) })
	return list
}

func TestBusRoutes(t *testing.T) {
	b := NewBus()
	dev := &memory{data: []byte{0x10, 0x11, 0x12, 0x13}}
	if err := b.Insert(Range{Base: 0x100, Size: 4}, "dev", dev); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		addr uint64
		want []byte
	}{
		{0x0ff, []byte{0xff}},
		{0x0ff, []byte{0xff, 0xff}}, // starts before the claim: nobody's
		{0x100, []byte{0x10, 0x11, 0x12, 0x13}},
		{0x101, []byte{0x11}},
		{0x102, []byte{0x12, 0x13, 0xff, 0xff}},
		{0x103, []byte{0x13, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}},
		{0x104, []byte{0xff, 0xff, 0xff}},
		{math.MaxUint64, []byte{0xff, 0xff}},
		{0x100, nil},
	} {
		got := make([]byte, len(c.want))
		if b.Read(c.addr, got); !bytes.Equal(got, c.want) {
			t.Errorf("read %#x: got % x, want % x", c.addr, got, c.want)
		}
	}
	b.Write(0x103, []byte{0x23, 0x24})
	b.Write(0x0ff, []byte{0x33, 0x34})
	b.Write(0x104, []byte{0x44})
	if want := []byte{0x10, 0x11, 0x12, 0x23}; !bytes.Equal(dev.data, want) {
		t.Errorf("after the writes: % x, want % x", dev.data, want)
	}
	for _, w := range dev.widths {
		if w > 4 {
			t.Errorf("the device saw an access of %d bytes, its range is 4", w)
		}
	}
}

func TestBusInsert(t *testing.T) {
	for _, c := range []struct {
		name string
		r    Range
		err  string // part of the error, empty if there is none
	}{
		{"below", Range{Base: 0x0ff, Size: 1}, ""},
		{"above", Range{Base: 0x110, Size: 1}, ""},
		{"top of the space", Range{Base: math.MaxUint64, Size: 1}, ""},
		{"last page", Range{Base: math.MaxUint64 - 0xfff, Size: 0x1000}, ""},
		{"same", Range{Base: 0x100, Size: 0x10}, "claim new: 0x100-0x10f overlaps old at 0x100-0x10f"},
		{"inside", Range{Base: 0x104, Size: 1}, "overlaps old"},
		{"around", Range{Base: 0, Size: 0x1000}, "overlaps old"},
		{"first byte", Range{Base: 0x0ff, Size: 2}, "overlaps old"},
		{"last byte", Range{Base: 0x10f, Size: 2}, "overlaps old"},
		{"empty", Range{Base: 0x200, Size: 0}, "empty or wraps around"},
		{"wraps", Range{Base: math.MaxUint64, Size: 2}, "empty or wraps around"},
		{"whole space but one", Range{Base: 0, Size: math.MaxUint64}, "overlaps old"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := NewBus()
			if err := b.Insert(Range{Base: 0x100, Size: 0x10}, "old", constant(1)); err != nil {
				t.Fatal(err)
			}
			before := names(b)
			err := b.Insert(c.r, "new", constant(2))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("error %v, want %q", err, c.err)
				}
				if after := names(b); !slices.Equal(before, after) {
					t.Errorf("a failed insert changed the bus: %v", after)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, addr := range []uint64{c.r.Base, c.r.End() - 1} {
				p := []byte{0}
				if b.Read(addr, p); p[0] != 2 {
					t.Errorf("read %#x: %#x, want the new device", addr, p[0])
				}
			}
		})
	}
}

// The top claim's end is 2^64, which must not look like zero.
func TestBusTopOfSpace(t *testing.T) {
	b := NewBus()
	top := Range{Base: math.MaxUint64 - 0xf, Size: 0x10}
	if err := b.Insert(top, "top", constant(1)); err != nil {
		t.Fatal(err)
	}
	for _, r := range []Range{{Base: math.MaxUint64, Size: 1}, {Base: math.MaxUint64 - 0x1f, Size: 0x20}} {
		if err := b.Insert(r, "second", constant(2)); err == nil {
			t.Errorf("%s was given away twice", r)
		}
	}
	p := []byte{0, 0, 0}
	if b.Read(math.MaxUint64-1, p); !bytes.Equal(p, []byte{1, 1, 0xff}) {
		t.Errorf("read over the top: % x", p)
	}
}

func TestBusRemoveAndMove(t *testing.T) {
	b := NewBus()
	a, z := Range{Base: 0x100, Size: 0x10}, Range{Base: 0x200, Size: 0x10}
	if err := errors.Join(b.Insert(a, "a", constant(1)), b.Insert(z, "z", constant(2))); err != nil {
		t.Fatal(err)
	}
	before := names(b)
	for _, f := range []func() error{
		func() error { return b.Remove(Range{Base: 0x100, Size: 8}) },
		func() error { return b.Remove(Range{Base: 0x300, Size: 1}) },
		func() error { return b.Move(Range{Base: 0x101, Size: 0xf}, Range{Base: 0x300, Size: 0xf}) },
		func() error { return b.Move(a, Range{Base: 0x208, Size: 0x10}) },
		func() error { return b.Move(a, Range{Base: 0x300, Size: 0}) },
		func() error { return b.Move(a, Range{Base: math.MaxUint64, Size: 0x10}) },
	} {
		if f() == nil {
			t.Error("no error")
		}
		if after := names(b); !slices.Equal(before, after) {
			t.Fatalf("a failure changed the bus: %v", after)
		}
	}
	// A move may overlap the place it leaves, and pass another claim.
	for _, to := range []Range{{Base: 0x108, Size: 0x10}, {Base: 0x300, Size: 0x20}} {
		if err := b.Move(a, to); err != nil {
			t.Fatal(err)
		}
		a = to
	}
	if got, want := names(b), []string{"0x200-0x20f z", "0x300-0x31f a"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if err := errors.Join(b.Remove(z), b.Remove(a)); err != nil || len(names(b)) != 0 {
		t.Errorf("%v, left: %v", err, names(b))
	}
}

// Whoever looks while a claim moves finds it at one place or the other.
func TestBusMoveIsAtomic(t *testing.T) {
	b := NewBus()
	at := [2]Range{{Base: 0x1000, Size: 0x1000}, {Base: 0x1800, Size: 0x1000}} // they share 0x1800 to 0x1fff
	if err := b.Insert(at[0], "bar", constant(7)); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(stop)
		for i := range 2000 {
			if err := b.Move(at[i%2], at[(i+1)%2]); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Go(func() {
		for p := []byte{0}; ; {
			select {
			case <-stop:
				return
			default:
			}
			if b.Read(0x1800, p); p[0] != 7 {
				t.Errorf("read %#x in the middle of a move", p[0])
				return
			}
		}
	})
	wg.Wait()
}

func TestBusDoesNotAllocate(t *testing.T) {
	b := NewBus()
	for i := range uint64(32) {
		if err := b.Insert(Range{Base: i * 0x100, Size: 0x80}, "dev", constant(1)); err != nil {
			t.Fatal(err)
		}
	}
	p := make([]byte, 4)
	if n := testing.AllocsPerRun(100, func() { b.Read(0x1010, p); b.Write(0x1f90, p) }); n != 0 {
		t.Errorf("%v allocations per access", n)
	}
}

// FuzzBus compares the bus with a plain list: each three bytes are an operation, a base
// and a size in a small address space, at its bottom or its top.
func FuzzBus(f *testing.F) {
	f.Add([]byte{0, 0x10, 8, 0, 0x14, 8, 1, 0x10, 8, 2, 0x20, 4})
	f.Add([]byte{4, 0xf0, 0x10, 4, 0xff, 1, 0, 0, 0, 6, 0xf0, 0x10})
	f.Fuzz(func(t *testing.T, ops []byte) {
		b := NewBus()
		owner := map[uint64]byte{} // address to device
		var claims []Range
		free := func(r Range, but byte) bool {
			if r.Size == 0 || r.Base > math.MaxUint64-(r.Size-1) {
				return false
			}
			for i := range r.Size {
				if o := owner[r.Base+i]; o != 0 && o != but {
					return false
				}
			}
			return true
		}
		set := func(r Range, dev byte) {
			for i := range r.Size {
				owner[r.Base+i] = dev
			}
		}
		for n := byte(1); len(ops) >= 3 && n < 200; ops, n = ops[3:], n+1 {
			r := Range{Base: uint64(ops[1]), Size: uint64(ops[2] % 32)}
			if ops[0]&4 != 0 {
				r.Base |= math.MaxUint64 &^ 0xff
			}
			var err error
			var want bool
			i := slices.Index(claims, r)
			switch ops[0] & 3 {
			case 0, 3:
				want = free(r, 0)
				if err = b.Insert(r, "dev", constant(n)); want {
					claims = append(claims, r)
					set(r, n)
				}
			case 1:
				if err, want = b.Remove(r), i >= 0; want {
					claims = slices.Delete(claims, i, i+1)
					set(r, 0)
				}
			case 2:
				if len(claims) == 0 {
					continue
				}
				from := claims[0]
				dev := owner[from.Base]
				want = free(r, dev)
				if err = b.Move(from, r); want {
					set(from, 0)
					set(r, dev)
					claims[0] = r
				}
			}
			if (err == nil) != want {
				t.Fatalf("operation %d on %#x+%#x: %v, want success: %v", ops[0]&3, r.Base, r.Size, err, want)
			}
		}
		for _, addr := range []uint64{0, math.MaxUint64 &^ 0xff} {
			for range 0x100 {
				want, p := owner[addr], []byte{0}
				if want == 0 {
					want = 0xff
				}
				if b.Read(addr, p); p[0] != want {
					t.Fatalf("%#x: %#x, want %#x", addr, p[0], want)
				}
				addr++
			}
		}
		last, first := uint64(0), true
		b.Walk(func(r Range, _ string) {
			if !first && r.Base <= last {
				t.Fatalf("claims are not sorted at %s", r)
			}
			last, first = r.End()-1, false
		})
	})
}
