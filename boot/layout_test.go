package boot

import (
	"fmt"
	"strings"
	"testing"

	"baton/kvm/guestmem"
)

const mib = 1 << 20

func TestLayout(t *testing.T) {
	for _, tc := range []struct {
		ram       uint64
		bits      int
		low, high uint64
		mmio64    guestmem.Range
	}{
		{64 * mib, 36, 64 * mib, 0, guestmem.Range{Base: 4 * gib, Size: 60 * gib}},
		{128 * mib, 39, 128 * mib, 0, guestmem.Range{Base: 4 * gib, Size: 508 * gib}},
		{gib, 40, gib, 0, guestmem.Range{Base: 4 * gib, Size: 1008 * gib}},
		{0xb000_0000, 46, 0xb000_0000, 0, guestmem.Range{Base: 4 * gib, Size: 1008 * gib}},
		{0xb000_0000 + page, 46, 0xb000_0000, page, guestmem.Range{Base: 5 * gib, Size: 1007 * gib}},
		{3072 * mib, 48, 0xb000_0000, 256 * mib, guestmem.Range{Base: 5 * gib, Size: 1007 * gib}},
		{4 * gib, 40, 0xb000_0000, 4*gib - 0xb000_0000, guestmem.Range{Base: 6 * gib, Size: 1006 * gib}},
		{32 * gib, 36, 0xb000_0000, 32*gib - 0xb000_0000, guestmem.Range{Base: 34 * gib, Size: 30 * gib}},
		{64 * gib, 52, 0xb000_0000, 64*gib - 0xb000_0000, guestmem.Range{Base: 66 * gib, Size: 946 * gib}},
	} {
		t.Run(fmt.Sprintf("%dMiB-%d", tc.ram/mib, tc.bits), func(t *testing.T) {
			m, err := Layout(tc.ram, tc.bits)
			if err != nil {
				t.Fatal(err)
			}
			if m.Low != (guestmem.Range{Size: tc.low}) || m.High != (guestmem.Range{Base: 4 * gib, Size: tc.high}) {
				t.Errorf("RAM %+v and %+v", m.Low, m.High)
			}
			if m.MMIO64 != tc.mmio64 {
				t.Errorf("MMIO64 %+v, want %+v", m.MMIO64, tc.mmio64)
			}
			checkMap(t, m, tc.ram)
		})
	}
}

// checkMap checks what holds for any map.
func checkMap(t *testing.T, m Map, ram uint64) {
	t.Helper()
	var sum uint64
	for _, r := range m.RAM() {
		sum += r.Size
	}
	if sum != ram {
		t.Errorf("RAM adds up to %#x, want %#x", sum, ram)
	}
	all := append(m.RAM(), m.ECAM, m.MMIO32, m.MMIO64,
		guestmem.Range{Base: IOAPICAddr, Size: page}, guestmem.Range{Base: LAPICAddr, Size: page},
		guestmem.Range{Base: IdentityMap, Size: page}, guestmem.Range{Base: TSSAddr, Size: 3 * page})
	for i, a := range all {
		for _, b := range all[i+1:] {
			if a.Base < b.End() && b.Base < a.End() {
				t.Errorf("%+v overlaps %+v", a, b)
			}
		}
	}
	var last, usable uint64
	for _, e := range m.E820() {
		if e.Base < last || e.Size == 0 {
			t.Errorf("memory map: %+v is empty or not behind %#x", e, last)
		}
		last = e.Range.End()
		if e.Type == MemRAM {
			usable += e.Size
		}
	}
	if usable != ram-(legacyEnd-legacyBase) {
		t.Errorf("memory map: %#x bytes of RAM usable, want all but the legacy hole of %#x", usable, ram)
	}
}

func TestLayoutRefuses(t *testing.T) {
	for _, tc := range []struct {
		ram  uint64
		bits int
		want string
	}{
		{0, 40, "use 64 MiB to 64 GiB"},
		{64*mib - page, 40, "out of range"},
		{64*gib + page, 40, "out of range"},
		{1 << 63, 40, "out of range"},
		{64*mib + 512, 40, "not a multiple of 4 KiB"},
		{gib, 31, "31 physical address bits"},
		{gib, 53, "53 physical address bits"},
		{64 * gib, 36, "give the guest less memory"},
		{gib, 32, "give the guest less memory"},
	} {
		if _, err := Layout(tc.ram, tc.bits); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("Layout(%#x, %d): %v, want %q", tc.ram, tc.bits, err, tc.want)
		}
	}
}
