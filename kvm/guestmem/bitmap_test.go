package guestmem

import (
	"math"
	"slices"
	"sync"
	"testing"
)

// bitmapMemory has regions whose pages do not fill whole words: 130 pages, 3 pages.
func bitmapMemory(t testing.TB) *Memory {
	t.Helper()
	m, err := New([]Range{{0, 130 * PageSize}, {4 * gib, 3 * PageSize}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func runs(b *Bitmap) (r []Range) {
	for gpa, n := range b.Runs() {
		r = append(r, Range{gpa, n})
	}
	return r
}

func TestBitmap(t *testing.T) {
	const p = PageSize
	for _, tt := range []struct {
		name string
		set  []Range
		want []Range
	}{
		{"nothing", nil, nil},
		{"no bytes", []Range{{5, 0}}, nil},
		{"a byte", []Range{{5, 1}}, []Range{{0, p}}},
		{"two bytes, two pages", []Range{{p - 1, 2}}, []Range{{0, 2 * p}}},
		{"end of a page", []Range{{p, p}}, []Range{{p, p}}},
		{"end of a word", []Range{{63 * p, p}}, []Range{{63 * p, p}}},
		{"across words", []Range{{63 * p, 2 * p}}, []Range{{63 * p, 2 * p}}},
		{"a whole word", []Range{{64 * p, 64 * p}}, []Range{{64 * p, 64 * p}}},
		{"all", []Range{{0, 130 * p}, {4 * gib, 3 * p}}, []Range{{0, 130 * p}, {4 * gib, 3 * p}}},
		{"last page", []Range{{130*p - 1, 1}}, []Range{{129 * p, p}}},
		{"beyond the region", []Range{{129 * p, math.MaxUint64}}, []Range{{129 * p, p}}},
		{"not RAM", []Range{{130 * p, p}, {4*gib - 1, 2}, {math.MaxUint64, 1}, {4*gib + 3*p, 1}}, nil},
		{"neighbours", []Range{{p, p}, {2 * p, p}, {4 * p, 1}}, []Range{{p, 2 * p}, {4 * p, p}}},
	} {
		b := NewBitmap(bitmapMemory(t))
		for _, r := range tt.set {
			b.Set(r.Base, r.Size)
		}
		if got := runs(b); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
		pages := uint64(0)
		for _, r := range tt.want {
			pages += r.Size / p
			if !b.Test(r.Base) || !b.Test(r.Base+r.Size-1) {
				t.Errorf("%s: ends of %v are not in the set", tt.name, r)
			}
		}
		if got := b.Count(); got != pages {
			t.Errorf("%s: Count = %d, want %d", tt.name, got, pages)
		}
		for range b.Runs() {
			break // the iterator takes no for an answer
		}
		b.Clear()
		if b.Count() != 0 || runs(b) != nil {
			t.Errorf("%s: not empty after Clear", tt.name)
		}
	}
	if NewBitmap(bitmapMemory(t)).Test(math.MaxUint64) {
		t.Error("an address outside of RAM is in an empty set")
	}
}

func TestBitmapRunsIn(t *testing.T) {
	const p = PageSize
	b := NewBitmap(bitmapMemory(t))
	for _, r := range []Range{{0, 70 * p}, {100 * p, p}, {4 * gib, 3 * p}} {
		b.Set(r.Base, r.Size)
	}
	for _, tt := range []struct {
		base, size uint64
		want       []Range
	}{
		{0, math.MaxUint64, []Range{{0, 70 * p}, {100 * p, p}, {4 * gib, 3 * p}}},
		{0, 0, nil},
		{0, p, []Range{{0, p}}},
		{63 * p, 2 * p, []Range{{63 * p, 2 * p}}},
		{65 * p, 64 * p, []Range{{65 * p, 5 * p}, {100 * p, p}}},
		{101 * p, gib, nil},
		{4*gib + p, p, []Range{{4*gib + p, p}}},
		{4*gib + p, math.MaxUint64, []Range{{4*gib + p, 2 * p}}},
		{8 * gib, math.MaxUint64, nil},
	} {
		var got []Range
		for gpa, n := range b.RunsIn(tt.base, tt.size) {
			got = append(got, Range{gpa, n})
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("RunsIn(%#x, %#x): %v, want %v", tt.base, tt.size, got, tt.want)
		}
	}
}

func TestBitmapOr(t *testing.T) {
	m := bitmapMemory(t)
	a, b := NewBitmap(m), NewBitmap(m)
	a.Set(0, 1)
	b.Set(PageSize, 1)
	b.Set(4*gib, 1)
	a.Or(b)
	a.OrWords(0, []uint64{1 << 5, 0, 1 << 1, 99 /* more than the region has */})
	a.OrWords(1, nil)
	want := []Range{{0, 2 * PageSize}, {5 * PageSize, PageSize}, {129 * PageSize, PageSize}, {4 * gib, PageSize}}
	if got := runs(a); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestDirtyLog(t *testing.T) {
	m := bitmapMemory(t)
	b := NewBitmap(m)
	write := func(gpa int64) {
		t.Helper()
		if _, err := m.WriteAt([]byte{1}, gpa); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(what string, want ...Range) {
		t.Helper()
		m.SyncDirtyLog(b)
		if got := runs(b); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
		b.Clear()
	}
	write(0)
	expect("before the start")
	m.StartDirtyLog()
	expect("at the start")
	write(2 * PageSize)
	if err := m.Store16(4*gib+2, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Bytes(7*PageSize, PageSize); err != nil {
		t.Fatal(err)
	}
	m.MarkDirty(7*PageSize, 1)
	expect("writes", Range{2 * PageSize, PageSize}, Range{7 * PageSize, PageSize}, Range{4 * gib, PageSize})
	expect("after they were taken")
	write(3 * PageSize)
	m.StopDirtyLog()
	expect("after the stop")
	m.StartDirtyLog()
	expect("after the next start")
	m.StopDirtyLog()
}

func TestTouched(t *testing.T) {
	m := bitmapMemory(t)
	b := NewBitmap(m)
	for _, page := range []int64{0, 1, 65, 129} {
		if _, err := m.WriteAt([]byte{1}, page*PageSize); err != nil {
			t.Fatal(err)
		}
	}
	p, err := OpenPagemap(m)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, r := range m.Regions() {
		if err := p.Touched(b, r.GPA, r.Size); err != nil {
			t.Fatal(err)
		}
	}
	// Others may be there, too, with huge pages.
	for _, page := range []uint64{0, 1, 65, 129} {
		if !b.Test(page * PageSize) {
			t.Errorf("page %d is not in the set", page)
		}
	}
	if b.Test(4*gib) || b.Test(4*gib+2*PageSize) {
		t.Error("the region that nobody has touched is in the set")
	}
}

// TestDirtyLogLosesNothing marks pages while another goroutine takes the log.
func TestDirtyLogLosesNothing(t *testing.T) {
	m := bitmapMemory(t)
	m.StartDirtyLog()
	got := NewBitmap(m)
	marked := make(chan struct{})
	var wg sync.WaitGroup
	for first := range uint64(2) {
		wg.Go(func() {
			for page := first; page < 130; page += 2 {
				m.MarkDirty(page*PageSize, 1)
			}
		})
	}
	go func() { wg.Wait(); close(marked) }()
	for done := false; !done; {
		select {
		case <-marked:
			done = true
		default:
		}
		m.SyncDirtyLog(got)
	}
	if n := got.Count(); n != 130 {
		t.Errorf("%d of 130 pages arrived", n)
	}
}

// FuzzBitmap compares with a set of page addresses.
func FuzzBitmap(f *testing.F) {
	f.Add(uint64(0), uint64(1), uint64(4*gib), uint64(5000))
	f.Add(uint64(63*PageSize), uint64(65*PageSize), uint64(0), uint64(0))
	m := bitmapMemory(f)
	f.Fuzz(func(t *testing.T, gpa1, n1, gpa2, n2 uint64) {
		b, model := NewBitmap(m), map[uint64]bool{}
		for _, w := range []Range{{gpa1, n1}, {gpa2, n2}} {
			b.Set(w.Base, w.Size)
			for _, r := range m.Regions() {
				if w.Base < r.GPA || w.Base >= r.GPA+r.Size {
					continue
				}
				for page := w.Base &^ (PageSize - 1); page < r.GPA+r.Size && w.Size > 0; page += PageSize {
					if page < w.Base || page-w.Base < w.Size {
						model[page] = true
					}
				}
			}
		}
		if got := b.Count(); got != uint64(len(model)) {
			t.Errorf("Count = %d, want %d", got, len(model))
		}
		for gpa, n := range b.Runs() {
			for page := gpa; page < gpa+n; page += PageSize {
				if !model[page] {
					t.Errorf("page %#x is in the set", page)
				}
				delete(model, page)
			}
		}
		if len(model) > 0 {
			t.Errorf("missing in Runs: %v", model)
		}
	})
}
