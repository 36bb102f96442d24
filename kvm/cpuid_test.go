package kvm

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A host with everything that must not reach the guest: APIC ID 0x55, 16 of everything.
func hostCPUID(vendor uint32) []CPUIDEntry {
	const idx = flagSignificantIndex
	return []CPUIDEntry{
		{Function: 0, Eax: 0x1f, Ebx: vendor},
		{Function: 1, Eax: 0xa0f11, Ebx: 0x55100800, Ecx: ecxVMX | 1, Edx: edxHTT | 1},
		{Function: 4, Index: 0, Flags: idx, Eax: 0xfc004121, Ebx: 1},     // L1
		{Function: 4, Index: 3, Flags: idx, Eax: 0xfc03c163, Ebx: 3},     // L3
		{Function: 4, Index: 4, Flags: idx},                              // end of the list
		{Function: 0xb, Index: 0, Flags: idx, Eax: 1, Ebx: 2, Edx: 0x55}, // two threads
		{Function: 0xb, Index: 1, Flags: idx, Eax: 5, Ebx: 32, Ecx: 0x201, Edx: 0x55},
		{Function: 0x15, Eax: 2, Ebx: 200, Ecx: 24e6},
		{Function: 0x16, Eax: 2300},
		{Function: 0x1f, Index: 0, Flags: idx, Eax: 1, Ebx: 2},
		{Function: 0x40000000, Eax: 0x40000001, Ebx: 0x4b4d564b, Ecx: 0x564b4d56, Edx: 0x4d},
		{Function: 0x40000001, Eax: 0x1007efb},
		{Function: 0x80000001, Ecx: ecxSVM | ecxCmpLegacy | 1},
		{Function: 0x80000008, Eax: 0x3030, Ecx: 0x0000500f},
		{Function: 0x8000001d, Index: 3, Flags: idx, Eax: 0x3c163},
		{Function: 0x8000001e, Eax: 0x55, Ebx: 0x102a, Ecx: 0x701},
		{Function: 0x80000026, Index: 0, Flags: idx, Ebx: 2},
	}
}

func find(entries []CPUIDEntry, function, index uint32) (CPUIDEntry, bool) {
	i := slices.IndexFunc(entries, func(e CPUIDEntry) bool { return e.Function == function && e.Index == index })
	if i < 0 {
		return CPUIDEntry{}, false
	}
	return entries[i], true
}

func TestGuestCPUID(t *testing.T) {
	const intel, amd = 0x756e6547, 0x68747541
	const idx = flagSignificantIndex
	for _, tt := range []struct {
		name      string
		vendor    uint32
		id, count int
		want      []CPUIDEntry
	}{
		{"one", intel, 0, 1, []CPUIDEntry{
			{Function: 1, Eax: 0xa0f11, Ebx: 0x00010800, Ecx: ecxX2APIC | ecxTSCDeadline | ecxHypervisor | 1, Edx: 1},
			{Function: 4, Index: 0, Flags: idx, Eax: 0x121, Ebx: 1},
			{Function: 4, Index: 3, Flags: idx, Eax: 0x163, Ebx: 3},
			{Function: 0xb, Index: 0, Flags: idx, Eax: 0, Ebx: 1, Ecx: 0x100},
			{Function: 0xb, Index: 1, Flags: idx, Eax: 0, Ebx: 1, Ecx: 0x201},
			{Function: 0x80000001, Ecx: 1},
			{Function: 0x80000008, Eax: 0x3030},
		}},
		{"sixth of six", intel, 5, 6, []CPUIDEntry{
			{Function: 1, Eax: 0xa0f11, Ebx: 0x05060800, Ecx: ecxX2APIC | ecxTSCDeadline | ecxHypervisor | 1, Edx: edxHTT | 1},
			{Function: 4, Index: 0, Flags: idx, Eax: 7<<26 | 0x121, Ebx: 1},
			{Function: 4, Index: 3, Flags: idx, Eax: 7<<26 | 7<<14 | 0x163, Ebx: 3},
			{Function: 4, Index: 4, Flags: idx},
			{Function: 0xb, Index: 0, Flags: idx, Eax: 0, Ebx: 1, Ecx: 0x100, Edx: 5},
			{Function: 0xb, Index: 1, Flags: idx, Eax: 3, Ebx: 6, Ecx: 0x201, Edx: 5},
			{Function: 0xb, Index: 2, Flags: idx, Ecx: 2, Edx: 5},
			{Function: 0x80000001, Ecx: 1},
		}},
		{"last of 64", amd, 63, 64, []CPUIDEntry{
			{Function: 0xb, Index: 1, Flags: idx, Eax: 6, Ebx: 64, Ecx: 0x201, Edx: 63},
			{Function: 0x80000001, Ecx: ecxCmpLegacy | 1},
			{Function: 0x80000008, Eax: 0x3030, Ecx: 6<<12 | 63},
			{Function: 0x8000001d, Index: 3, Flags: idx, Eax: 63<<14 | 0x163},
			{Function: 0x8000001e, Eax: 63, Ebx: 63},
			{Function: 0x15, Eax: 2, Ebx: 200, Ecx: 24e6},
			{Function: 0x16, Eax: 2300},
			{Function: 0x40000000, Eax: 0x40000001, Ebx: 0x4b4d564b, Ecx: 0x564b4d56, Edx: 0x4d},
			{Function: 0x40000001, Eax: 0x1007efb},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			host := hostCPUID(tt.vendor)
			got := guestCPUID(host, tt.id, tt.count, true)
			for _, want := range tt.want {
				e, _ := find(got, want.Function, want.Index)
				if d := cmp.Diff(want, e); d != "" {
					t.Errorf("leaf %#x.%d:\n%s", want.Function, want.Index, d)
				}
			}
			for _, leaf := range []uint32{0x1f, 0x80000026} {
				if e, ok := find(got, leaf, 0); ok {
					t.Errorf("the host's topology is left: %#x", e)
				}
			}
			if d := cmp.Diff(hostCPUID(tt.vendor), host); d != "" {
				t.Errorf("the host's entries were changed:\n%s", d)
			}
		})
	}
	if e, _ := find(guestCPUID(hostCPUID(intel), 0, 1, false), 1, 0); e.Ecx&ecxTSCDeadline != 0 {
		t.Error("TSC deadline timer offered, and KVM has none")
	}
}

// TestGuestCPUIDOfHost wants KVM to take what GuestCPUID makes of it, and to give it back.
func TestGuestCPUIDOfHost(t *testing.T) {
	g := newGuest(t, guestSpin)
	want, err := g.sys.GuestCPUID(0, 2)
	must(t, err)
	got, err := g.CPUID()
	must(t, err)
	for _, w := range want { // a host may leave out one that says nothing: AMX's without AMX
		if _, ok := find(got, w.Function, w.Index); !ok && w.Eax|w.Ebx|w.Ecx|w.Edx != 0 {
			t.Errorf("%#x was set and is not there", w)
		}
	}
	for _, leaf := range []uint32{0xb, 0x40000000, 0x40000001} {
		w, _ := find(want, leaf, 0)
		if g, ok := find(got, leaf, 0); !ok || g != w {
			t.Errorf("leaf %#x is %#x, %#x was set", leaf, g, w)
		}
	}
}
