package harness

import (
	"strings"
	"testing"
)

func TestOwnMemory(t *testing.T) {
	const guest = "7f0000000000-7f0000100000 rw-p 00000000 00:00 0 \nSize:  1024 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 900 kB\nVmFlags: rd wr\n"
	const other = "400000-500000 r-xp 00000000 00:01 7   /bin/vmm\nSize:  100 kB\nShared_Clean: 50 kB\nPrivate_Clean: 8 kB\nPrivate_Dirty: 4 kB\n"
	for _, tt := range []struct {
		name, smaps string
		want        uint64
		ok          bool
	}{
		{"usual", other + guest + other, 24 << 10, true},
		{"a reservation of that size", guest + strings.Replace(guest, "rw-p", "---p", 1) + other, 912 << 10, true},
		{"no guest", other, 0, false},
		{"two of that size", guest + guest, 0, false},
		{"nonsense", guest + "Size: x kB\n", 0, false},
	} {
		got, err := OwnMemory(strings.NewReader(tt.smaps), 1<<20)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("%s: %d, %v; want %d", tt.name, got, err, tt.want)
		}
	}
}
