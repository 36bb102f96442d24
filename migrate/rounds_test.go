package migrate

import (
	"testing"

	"baton/kvm/guestmem"
	"baton/migrate/wire"
)

// portions are what a Protector is asked for.
type portions []guestmem.Range

func (p *portions) Protect(gpa, size uint64) error {
	*p = append(*p, guestmem.Range{Base: gpa, Size: size})
	return nil
}

// Portions of RAM that are looked after follow each other without gap or overlap, in whole blocks but for a region's end,
// and each has about lookAhead of the round's pages at most.
func TestAhead(t *testing.T) {
	const pageSize = guestmem.PageSize
	ranges := []guestmem.Range{{Base: 0, Size: 40*block + 5*pageSize}, {Base: 1 << 32, Size: 7 * pageSize}, {Base: 1 << 33, Size: (maxAhead + 3) * block}}
	mem, err := guestmem.New(ranges, guestmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	fill := map[string]func(*guestmem.Bitmap){
		"all":  func(b *guestmem.Bitmap) { set(b, ranges, 1) },
		"some": func(b *guestmem.Bitmap) { set(b, ranges, 3*block/pageSize+1) },
		"none": func(*guestmem.Bitmap) {},
	}
	want := map[string]int{"all": 6 + 1 + 129, "some": 1 + 1 + 2, "none": 1 + 1 + 2}
	for name, f := range fill {
		pages := guestmem.NewBitmap(mem)
		f(pages)
		s, err := newSenders(mem, DefaultParams(), make([]*wire.Conn, 1), false)
		if err != nil {
			t.Fatal(err)
		}
		var got portions
		s.protectors = []Protector{&got}
		for i := range s.blocks {
			if err := s.read(i, pages); err != nil {
				t.Fatal(err)
			}
		}
		if len(got) != want[name] {
			t.Errorf("%s: %d portions, want %d", name, len(got), want[name])
		}
		left := ranges
		for _, p := range got {
			sum := uint64(0)
			for _, n := range pages.RunsIn(p.Base, p.Size) {
				sum += n
			}
			r := left[0]
			if p.Base != r.Base || p.Size == 0 || p.Size > r.Size || p.Size%block != 0 && p.Size != r.Size || sum >= lookAhead+block {
				t.Fatalf("%s: %+v, with %d bytes to send; %+v is left", name, p, sum, r)
			}
			if left = append([]guestmem.Range{{Base: r.Base + p.Size, Size: r.Size - p.Size}}, left[1:]...); p.Size == r.Size {
				left = left[1:]
			}
		}
		if len(left) > 0 {
			t.Errorf("%s: %+v are left", name, left)
		}
	}
}

// set puts each nth page into b.
func set(b *guestmem.Bitmap, ranges []guestmem.Range, nth uint64) {
	for _, r := range ranges {
		for off := uint64(0); off < r.Size; off += nth * guestmem.PageSize {
			b.Set(r.Base+off, guestmem.PageSize)
		}
	}
}
