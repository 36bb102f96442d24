package acpi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"baton/kvm/guestmem"
)

const gib = 1 << 30

// testConfig is a machine with everything.
func testConfig() Config {
	return Config{
		Base:   0xe0000,
		CPUs:   4,
		IOAPIC: 0xfec00000,
		ECAM:   guestmem.Range{Base: 0xb0000000, Size: 256 << 20},
		MMIO32: guestmem.Range{Base: 0xc0000000, Size: 0x3ec00000},
		MMIO64: guestmem.Range{Base: 8 * gib, Size: 1000 * gib},
		Power: Power{
			SleepControl: 0x600, SleepStatus: 0x601, SleepTypeS5: 5, Reset: 0xcf9, ResetValue: 6,
			Event: 0x610, EventGSI: 9, PowerButton: 1, SlotEvent: 2,
		},
		SlotBlock: 0x620,
		RootPorts: []RootPort{{1, 0, 1}, {2, 0, 2}, {2, 1, 40}},
		Panic:     0x505,
		Serial:    true,
	}
}

var le = binary.LittleEndian

// find follows the pointers from the RSDP, as a guest does, and returns the tables by
// signature.
func find(t testing.TB, c Config) map[string][]byte {
	t.Helper()
	blob, addr := Tables(c)
	if addr != c.Base {
		t.Errorf("RSDP at %#x, want it first", addr)
	}
	root := blob[:rsdpSize]
	if string(root[:8]) != "RSD PTR " || checksum(root[:20]) != 0 || checksum(root) != 0 || root[15] != 2 {
		t.Errorf("bad RSDP: % x", root)
	}
	found := map[string][]byte{}
	end := uint64(rsdpSize)
	get := func(addr uint64) []byte {
		off := addr - c.Base
		if addr%16 != 0 || off >= uint64(len(blob)) {
			t.Fatalf("a table at %#x: not aligned or outside", addr)
		}
		n := uint64(le.Uint32(blob[off+4:]))
		table := blob[off:][:n:n]
		if checksum(table) != 0 {
			t.Errorf("%s: bad checksum", table[:4])
		}
		if string(table[10:16]) != oemID {
			t.Errorf("%s: OEM ID %q", table[:4], table[10:16])
		}
		found[string(table[:4])] = table
		end = max(end, off+n)
		return table
	}
	for entries := get(le.Uint64(root[24:]))[36:]; len(entries) > 0; entries = entries[8:] {
		if table := get(le.Uint64(entries)); string(table[:4]) == "FACP" {
			get(le.Uint64(table[fadtXDSDT:]))
		}
	}
	if end != uint64(len(blob)) {
		t.Errorf("%d bytes, the tables end at %d", len(blob), end)
	}
	return found
}

func TestTablesForEveryCPUCount(t *testing.T) {
	for _, n := range append(slices.Collect(func(yield func(int) bool) {
		for n := 1; n <= 64 && yield(n); n++ {
		}
	}), MaxCPUs) {
		c := testConfig()
		c.CPUs = n
		var ids []byte
		var ioapics, nmis int
		for e := find(t, c)["APIC"][44:]; len(e) > 0; e = e[e[1]:] {
			switch e[0] {
			case 0:
				if e[1] != 8 || e[2] != e[3] || le.Uint32(e[4:]) != 1 {
					t.Errorf("%d CPUs: LAPIC entry % x", n, e[:8])
				}
				ids = append(ids, e[3])
			case 1:
				ioapics++
				if e[1] != 12 || le.Uint32(e[4:]) != c.IOAPIC || le.Uint32(e[8:]) != 0 {
					t.Errorf("IOAPIC entry % x", e[:12])
				}
			case 4:
				nmis++
			default:
				t.Fatalf("entry of type %d", e[0])
			}
		}
		want := make([]byte, n)
		for i := range want {
			want[i] = byte(i)
		}
		if !bytes.Equal(ids, want) || ioapics != 1 || nmis != 1 {
			t.Errorf("%d CPUs: APIC IDs %v, %d IOAPICs, %d NMIs", n, ids, ioapics, nmis)
		}
	}
}

func TestTablesForMemoryLayouts(t *testing.T) {
	for _, base := range []uint64{0xe0000, 0xf0010, 0x7fff0000, 5 * gib} {
		for _, buses := range []uint64{1, 16, 256} {
			for _, high := range []guestmem.Range{{}, {Base: 4 * gib, Size: gib}, {Base: 65 * gib, Size: 0xfd<<32 - 65*gib}, {Base: 1 << 51, Size: 1 << 51}} {
				c := testConfig()
				c.Base, c.MMIO64, c.ECAM.Size = base, high, buses<<20
				tables := find(t, c)
				mcfg := tables["MCFG"][44:]
				if len(mcfg) != 16 || le.Uint64(mcfg) != c.ECAM.Base || mcfg[10] != 0 || uint64(mcfg[11]) != buses-1 {
					t.Errorf("MCFG % x for %d buses", mcfg, buses)
				}
				dsdt := tables["DSDT"]
				for _, r := range []guestmem.Range{c.MMIO32, c.MMIO64} {
					limits := le.AppendUint64(le.AppendUint64(nil, r.Base), r.Base+r.Size-1)
					if r == c.MMIO32 {
						limits = le.AppendUint32(le.AppendUint32(nil, uint32(r.Base)), uint32(r.Base+r.Size-1))
					}
					if got := bytes.Contains(dsdt, limits); got != (r.Size > 0) {
						t.Errorf("window %#x+%#x in the DSDT: %v", r.Base, r.Size, got)
					}
				}
			}
		}
	}
}

func TestFADT(t *testing.T) {
	fadt := find(t, testConfig())["FACP"]
	if len(fadt) != 276 || fadt[8] != 6 {
		t.Fatalf("revision %d, %d bytes", fadt[8], len(fadt))
	}
	flags := le.Uint32(fadt[112:])
	for bit, name := range map[int]string{10: "RESET_REG_SUP", 20: "HW_REDUCED_ACPI", 4: "PWR_BUTTON"} {
		if flags>>bit&1 == 0 {
			t.Errorf("flag %s is not set: %#x", name, flags)
		}
	}
	// A hardware-reduced machine has none of the fixed registers (5.2.9).
	for _, r := range [][2]int{{36, 45}, {46, 108}, {132, 140}, {148, 244}} {
		if !bytes.Equal(fadt[r[0]:r[1]], make([]byte, r[1]-r[0])) {
			t.Errorf("bytes %d to %d are not zero: % x", r[0], r[1], fadt[r[0]:r[1]])
		}
	}
}

func TestPackageLength(t *testing.T) {
	for _, c := range []struct {
		n    int
		want []byte
	}{
		{0, []byte{0}},
		{0x3f, []byte{0x3f}},
		{0x40, []byte{0x40, 0x04}},
		{0xfff, []byte{0x4f, 0xff}},
		{0x1000, []byte{0x80, 0x00, 0x01}},
		{0xfffff, []byte{0x8f, 0xff, 0xff}},
		{0x100000, []byte{0xc0, 0x00, 0x00, 0x01}},
		{0xfffffff, []byte{0xcf, 0xff, 0xff, 0xff}},
	} {
		if got := packageLength(c.n); !bytes.Equal(got, c.want) {
			t.Errorf("%#x: % x, want % x", c.n, got, c.want)
		}
	}
	// The length counts itself, also where that makes it longer.
	for n := range 0x1100 {
		p := packaged([]byte{opBuffer}, make([]byte, n))
		lead := int(p[1])
		length, size := lead&0x3f, 1+lead>>6
		if size > 1 {
			length = lead & 0x0f
			for i, v := range p[2 : 1+size] {
				length |= int(v) << (4 + 8*i)
			}
		}
		if length != n+size || length != len(p)-1 {
			t.Fatalf("%d bytes: length %d, %d bytes long", n, length, size)
		}
	}
}

func TestAMLEncoding(t *testing.T) {
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"zero", integer(0), "00"},
		{"one", integer(1), "01"},
		{"byte", integer(0xff), "0aff"},
		{"word", integer(0x100), "0b0001"},
		{"double word", integer(1 << 16), "0c00000100"},
		{"quad word", integer(1 << 32), "0e0000000001000000"},
		{"string", text("ab"), "0d616200"},
		{"EISA ID", eisaID("PNP0A08"), "0c41d00a08"},
		{"segment", path("_SB"), "5f53425f"},
		{"root", path(`\_SB`), "5c5f53425f"},
		{"parents", path("^^GED"), "5e5e4745445f"},
		{"two segments", path(`\_SB.PCI0`), "5c2e5f53425f50434930"},
		{"three segments", path("A.B.C"), "2f03415f5f5f425f5f5f435f5f5f"},
	} {
		if got := fmt.Sprintf("%x", c.got); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
