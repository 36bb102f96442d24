package guestmem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

const gib = 1 << 30

// newMemory makes two regions as a machine has them, small: [0, 64 KiB), [4 GiB, 4 GiB + 12 KiB).
func newMemory(t testing.TB) *Memory {
	t.Helper()
	m, err := New([]Range{{4 * gib, 3 * PageSize}, {0, 16 * PageSize}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

var (
	_ io.ReaderAt = (*Memory)(nil)
	_ io.WriterAt = (*Memory)(nil)
)

func TestRegions(t *testing.T) {
	m := newMemory(t)
	r := m.Regions()
	if len(r) != 2 || r[0].GPA != 0 || r[1].GPA != 4*gib || m.Size() != 19*PageSize {
		t.Fatalf("regions %+v of %d bytes", r, m.Size())
	}
	for _, r := range r {
		if uint64(len(r.Host)) != r.Size || uint64(cap(r.Host)) != r.Size {
			t.Errorf("region at %#x: %d bytes mapped, %d wanted", r.GPA, len(r.Host), r.Size)
		}
		r.Host[r.Size-1] = 0xa5
		if at := address(r.Host); at%hugePage != 0 {
			t.Errorf("region at %#x: mapped at %#x, where it cannot have huge pages", r.GPA, at)
		}
	}
}

func TestNewErrors(t *testing.T) {
	for _, tt := range []struct {
		name   string
		ranges []Range
		o      Options
		want   string
	}{
		{"empty", []Range{{0, 0}}, Options{}, "empty"},
		{"odd size", []Range{{0, 100}}, Options{}, "whole pages"},
		{"odd base", []Range{{1, PageSize}}, Options{}, "whole pages"},
		{"wrap", []Range{{math.MaxUint64 &^ (PageSize - 1), 2 * PageSize}}, Options{}, "beyond"},
		{"huge", []Range{{0, 1 << 60}}, Options{}, "beyond"},
		{"overlap", []Range{{PageSize, PageSize}, {0, 2 * PageSize}}, Options{}, "overlaps"},
		{"twice", []Range{{0, PageSize}, {0, PageSize}}, Options{}, "overlaps"},
		{"page size", []Range{{0, PageSize}}, Options{PageSize: 64 << 10}, "page size 65536"},
		{"too large to map", []Range{{0, PageSize}, {gib, 1 << 51}}, Options{}, "0x40000000+0x8000000000000: "},
	} {
		before := openFiles(t)
		m, err := New(tt.ranges, tt.o)
		if m != nil || err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%s: %d descriptors, %d before", tt.name, after, before)
		}
	}
}

// openFiles is the lowest free descriptor, which rises when one leaks.
func openFiles(t *testing.T) int {
	t.Helper()
	fd, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(fd)
	return fd
}

// TestHugePages gets huge pages, or an error that says how to reserve them.
func TestHugePages(t *testing.T) {
	for size, dir := range map[uint64]string{2 << 20: "hugepages-2048kB", gib: "hugepages-1048576kB"} {
		m, err := New([]Range{{0, 3 * PageSize}}, Options{PageSize: size, Prealloc: true})
		if err != nil {
			if want := "\nreserve 1 huge pages for it in /sys/kernel/mm/hugepages/" + dir + "/nr_hugepages"; !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want the hint %q", err, want)
			}
			continue
		}
		if n := len(m.Regions()[0].Host); n != 3*PageSize {
			t.Errorf("%d bytes mapped, want what was asked for", n)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestPrealloc(t *testing.T) {
	for _, prealloc := range []bool{false, true} {
		m, err := New([]Range{{0, 1 << 20}}, Options{Prealloc: prealloc})
		if err != nil {
			t.Fatal(err)
		}
		const pages = 1 << 20 / PageSize
		if got := resident(t, m.Regions()[0].Host); prealloc && got != pages || !prealloc && got != 0 {
			t.Errorf("Prealloc %v: %d of %d pages are there", prealloc, got, pages)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// resident counts the pages of a mapping that are in memory.
func resident(t *testing.T, host []byte) (n int) {
	t.Helper()
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	entries := make([]byte, len(host)/PageSize*8)
	if _, err := f.ReadAt(entries, int64(address(host)/PageSize*8)); err != nil {
		t.Fatal(err)
	}
	for ; len(entries) > 0; entries = entries[8:] {
		n += int(binary.LittleEndian.Uint64(entries) >> 63)
	}
	return n
}

func TestCloseTwice(t *testing.T) {
	m, err := New([]Range{{0, PageSize}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Close(), m.Close()); err != nil {
		t.Error(err)
	}
	if _, err := m.Bytes(0, 1); err == nil {
		t.Error("memory is there after Close")
	}
}

func TestBytes(t *testing.T) {
	m := newMemory(t)
	const low, high, highEnd = 16 * PageSize, 4 * gib, 4*gib + 3*PageSize
	for _, tt := range []struct {
		gpa, n uint64
		ok     bool
	}{
		{0, 0, true}, {0, 1, true}, {0, low, true}, {low - 1, 1, true}, {low - 8, 8, true},
		{0, low + 1, false}, {low - 1, 2, false}, {low, 0, false}, {low, 1, false},
		{low, high - low, false}, {low - 1, high, false},
		{high - 1, 1, false}, {high - 1, 2, false}, {high, 3 * PageSize, true}, {highEnd - 1, 1, true},
		{highEnd - 1, 2, false}, {highEnd, 1, false},
		{0, math.MaxUint64, false}, {1, math.MaxUint64, false}, {high, math.MaxUint64, false},
		{math.MaxUint64, 1, false}, {math.MaxUint64, math.MaxUint64, false}, {math.MaxUint64 - 1, 2, false},
	} {
		b, err := m.Bytes(tt.gpa, tt.n)
		if (err == nil) != tt.ok {
			t.Errorf("Bytes(%#x, %#x): %v", tt.gpa, tt.n, err)
			continue
		}
		if !tt.ok {
			var re *RangeError
			if !errors.As(err, &re) || re.GPA != tt.gpa || re.Size != tt.n || b != nil {
				t.Errorf("Bytes(%#x, %#x): %d bytes, %#v", tt.gpa, tt.n, len(b), err)
			}
		} else if uint64(len(b)) != tt.n || uint64(cap(b)) != tt.n {
			t.Errorf("Bytes(%#x, %#x): length %d, capacity %d", tt.gpa, tt.n, len(b), cap(b))
		}
	}
}

func TestRangeError(t *testing.T) {
	for _, tt := range []struct {
		err  RangeError
		want string
	}{
		{RangeError{GPA: 0x1000, Size: 2}, "guest memory 0x1000+0x2: outside of RAM"},
		{RangeError{GPA: 0x1001, Size: 4, Misaligned: true}, "guest memory 0x1001: not aligned to 4 bytes"},
	} {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

// TestBytesIsCheap wants no allocation where virtqueues live.
func TestBytesIsCheap(t *testing.T) {
	m := newMemory(t)
	if n := testing.AllocsPerRun(100, func() {
		b, _ := m.Bytes(4*gib, 64)
		b[0]++
		m.MarkDirty(4*gib, 64)
		v, _ := m.Load16(0x102)
		_ = m.Store16(0x102, v+1)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestReadWriteAt(t *testing.T) {
	m := newMemory(t)
	text := []byte("written by the VMM")
	for _, gpa := range []int64{0, 5 * PageSize, 4*gib + 100} {
		if n, err := m.WriteAt(text, gpa); n != len(text) || err != nil {
			t.Errorf("WriteAt(%#x) = %d, %v", gpa, n, err)
		}
		got := make([]byte, len(text))
		if n, err := m.ReadAt(got, gpa); n != len(text) || err != nil || !bytes.Equal(got, text) {
			t.Errorf("ReadAt(%#x) = %d, %v, %q", gpa, n, err, got)
		}
	}
	for _, gpa := range []int64{-1, math.MinInt64, 16*PageSize - 1, 2 * gib} {
		if n, err := m.WriteAt(text, gpa); n != 0 || err == nil {
			t.Errorf("WriteAt(%#x) = %d, %v", gpa, n, err)
		}
		if n, err := m.ReadAt(make([]byte, 2), gpa); n != 0 || err == nil {
			t.Errorf("ReadAt(%#x) = %d, %v", gpa, n, err)
		}
	}
}

func TestWords(t *testing.T) {
	m := newMemory(t)
	b, _ := m.Bytes(0x100, 16)
	copy(b, "\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10")
	if v, err := m.Load16(0x100); v != 0x0201 || err != nil {
		t.Errorf("Load16 = %#x, %v", v, err)
	}
	if v, err := m.Load16(0x102); v != 0x0403 || err != nil {
		t.Errorf("Load16 = %#x, %v", v, err)
	}
	if v, err := m.Load32(0x104); v != 0x08070605 || err != nil {
		t.Errorf("Load32 = %#x, %v", v, err)
	}
	if err := errors.Join(m.Store16(0x100, 0xaabb), m.Store16(0x106, 0xccdd)); err != nil {
		t.Error(err)
	}
	want := "\xbb\xaa\x03\x04\x05\x06\xdd\xcc\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10"
	if string(b) != want {
		t.Errorf("memory is % x, want % x", b, want)
	}

	const end = 16 * PageSize
	for _, gpa := range []uint64{0x101, 0x103, end - 1, end, math.MaxUint64, math.MaxUint64 - 1} {
		_, err16 := m.Load16(gpa)
		_, err32 := m.Load32(gpa)
		for i, err := range []error{err16, err32, m.Store16(gpa, 0)} {
			if re := new(RangeError); !errors.As(err, &re) {
				t.Errorf("access %d at %#x: %v", i, gpa, err)
			}
		}
	}
	if string(b) != want {
		t.Error("a refused store wrote")
	}
}

// TestStore16Neighbours writes both halves of a word at once; neither may lose anything.
func TestStore16Neighbours(t *testing.T) {
	m := newMemory(t)
	const rounds = 20000
	var wg sync.WaitGroup
	for half := uint64(0); half < 4; half += 2 {
		wg.Go(func() {
			for i := range uint16(rounds) {
				if v, _ := m.Load16(half); v != i {
					t.Errorf("half %d is %d, want %d", half, v, i)
					return
				}
				_ = m.Store16(half, i+1)
			}
		})
	}
	wg.Wait()
}

func TestHostAddr(t *testing.T) {
	m := newMemory(t)
	base, err := m.HostAddr(4*gib, 1)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := m.HostAddr(4*gib+0x123, 0x10); a != base+0x123 || err != nil {
		t.Errorf("HostAddr = %#x, %v, base %#x", a, err, base)
	}
	if _, err := m.HostAddr(4*gib-1, 2); err == nil {
		t.Error("HostAddr outside of RAM")
	}
}

// FuzzAccess compares every access with a model: two arrays and arithmetic without overflow.
func FuzzAccess(f *testing.F) {
	f.Add(uint64(0), uint64(1))
	f.Add(uint64(16*PageSize-1), uint64(2))
	f.Add(uint64(4*gib), uint64(3*PageSize))
	f.Add(uint64(math.MaxUint64), uint64(math.MaxUint64))
	f.Add(uint64(4*gib-2), uint64(4))
	m := newMemory(f)
	f.Fuzz(func(t *testing.T, gpa, n uint64) {
		inRAM := func(n uint64) bool {
			end := gpa + n
			return end >= gpa && (gpa < 16*PageSize && end <= 16*PageSize ||
				gpa >= 4*gib && gpa < 4*gib+3*PageSize && end <= 4*gib+3*PageSize)
		}
		b, err := m.Bytes(gpa, n)
		if (err == nil) != inRAM(n) || err == nil && uint64(len(b)) != n {
			t.Errorf("Bytes(%#x, %#x) = %d bytes, %v", gpa, n, len(b), err)
		}
		for i := range b { // faults if the window is not mapped
			b[i] = 1
		}
		m.MarkDirty(gpa, n)
		_, err16 := m.Load16(gpa)
		_, err32 := m.Load32(gpa)
		for i, err := range []error{err16, m.Store16(gpa, 1), err32} {
			size := uint64(2) << (i / 2)
			if (err == nil) != (gpa%size == 0 && inRAM(size)) {
				t.Errorf("%d byte access at %#x: %v", size, gpa, err)
			}
		}
	})
}

func BenchmarkBytes(b *testing.B) {
	m := newMemory(b)
	for b.Loop() {
		if _, err := m.Bytes(4*gib+64, 16); err != nil {
			b.Fatal(err)
		}
	}
}
