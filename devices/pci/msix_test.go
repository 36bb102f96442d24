package pci

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"baton/devices"
)

// newMSIX returns MSI-X with n vectors, the table at the start of the window and the
// pending bits right behind it.
func newMSIX(t testing.TB, n int) (*MSIX, []*fakeVector) {
	t.Helper()
	src := &fakeSource{}
	m, err := AddMSIX(NewConfig(Header{ID: "f"}), 1, 0, uint32(n*16), n, src)
	if err != nil {
		t.Fatal(err)
	}
	return m, src.vectors
}

func (m *MSIX) control(v uint16) { m.c.Write(uint64(m.off+msixControl), le.AppendUint16(nil, v)) }

func (m *MSIX) put32(off uint64, v uint32) { m.Write(off, le.AppendUint32(nil, v)) }

func TestMSIXMasks(t *testing.T) {
	m, vs := newMSIX(t, 3)
	v := vs[1]
	told := 0
	step := func(what string, masked bool, wantTold int) {
		t.Helper()
		if v.masked != masked || m.Masked(1) != masked {
			t.Errorf("%s: masked %v (told %v), want %v", what, m.Masked(1), v.masked, masked)
		}
		if v.sets-told != wantTold || vs[0].sets+vs[2].sets != 0 {
			t.Errorf("%s: told %d times, others %d times, want %d", what, v.sets-told, vs[0].sets+vs[2].sets, wantTold)
		}
		told = v.sets
	}
	step("power-on", true, 0)
	m.put32(16, 0xfee0_1000)
	m.put32(20, 0)
	m.put32(24, 0x31)
	m.put32(28, 0)
	step("unmasked while disabled", true, 0)
	if v.sets != 0 || m.Enabled() {
		t.Errorf("vector was told %d times while disabled; enabled %v", v.sets, m.Enabled())
	}
	m.Signal(1)
	m.control(msixEnable | msixMaskAll)
	step("all masked", true, 0)
	if p := make([]byte, 8); !v.Pending() || !m.Enabled() {
		t.Error("not pending or not enabled")
	} else if m.Read(48, p); le.Uint64(p) != 2 {
		t.Errorf("pending bits %x, want vector 1", p)
	}
	m.control(msixEnable)
	step("enabled", false, 1)
	if v.raised != 1 || v.msg != (devices.MSI{Addr: 0xfee0_1000, Data: 0x31}) {
		t.Errorf("raised %d times with %+v, want the waiting signal", v.raised, v.msg)
	}
	m.put32(28, 0xffff_fff0)
	step("reserved bits of the vector control", false, 0)
	m.Write(24, le.AppendUint64(nil, 0x1_0000_0032)) // data and mask in one write
	step("masked by an 8-byte write", true, 1)
	m.put32(24, 0x33)
	step("message while masked", true, 0)
	m.Signal(1)
	m.put32(28, 0)
	step("unmasked", false, 1)
	if v.raised != 2 || v.msg.Data != 0x33 {
		t.Errorf("raised %d times with %+v", v.raised, v.msg)
	}
	m.put32(24, 0x34)
	step("message while unmasked", false, 1)
	m.control(0)
	step("disabled", true, 1)
	m.control(msixEnable)
	step("enabled again", false, 1)
	m.c.Reset()
	step("reset", true, 1)
	m.control(msixEnable)
	step("enabled after reset", true, 0)
	m.Signal(3) // not there
	m.Signal(0xffff)
	m.Signal(-1)
	if err := m.Close(); err != nil || !vs[0].closed || !vs[2].closed {
		t.Errorf("close: %v", err)
	}
}

func TestMSIXAccessWidths(t *testing.T) {
	m, vs := newMSIX(t, 2)
	m.control(msixEnable)
	entry := []byte{0, 0x10, 0xe0, 0xfe, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0}
	m.Write(0, entry[:8])
	m.Write(8, entry[8:])
	for _, w := range []struct {
		off uint64
		n   int
	}{{0, 1}, {0, 2}, {2, 4}, {4, 8}, {0, 16}, {0, 0}, {1, 3}, {28, 8}, {32, 4}, {36, 8}, {40, 8}, {1 << 40, 8}, {^uint64(0) - 3, 4}, {^uint64(0), 8}} {
		m.Write(w.off, bytes.Repeat([]byte{0xff}, w.n))
	}
	got := make([]byte, 48)
	m.Read(0, got)
	want := append(append([]byte{}, entry...), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0)
	if !bytes.Equal(got, append(want, make([]byte, 16)...)) {
		t.Errorf("table % x, want % x and zeros", got, want)
	}
	if vs[0].msg != (devices.MSI{Addr: 0x0403_0201_fee0_1000, Data: 0x0807_0605}) {
		t.Errorf("message %+v", vs[0].msg)
	}
	odd := make([]byte, 7)
	if m.Read(11, odd); !bytes.Equal(odd, want[11:18]) {
		t.Errorf("odd read % x, want % x", odd, want[11:18])
	}
	m.Read(^uint64(0)-2, odd) // wraps around; must not panic
}

func TestAddMSIXErrors(t *testing.T) {
	for _, x := range []struct {
		bar        int
		table, pba uint32
		n          int
		want       string
	}{
		{0, 0, 0x800, 0, "0 vectors"}, {0, 0, 0x8000, 2049, "2049 vectors"}, {0, 4, 0x800, 1, "aligned"}, {0, 0, 0x804, 1, "aligned"},
		{0, 0, 8, 1, "overlap"}, {0, 8, 0, 65, "overlap"}, {6, 0, 0x800, 1, "no BAR 6"}, {-1, 0, 0x800, 1, "no BAR -1"},
	} {
		_, err := AddMSIX(NewConfig(Header{ID: "f"}), x.bar, x.table, x.pba, x.n, &fakeSource{})
		wantError(t, err, "add MSI-X to f", x.want)
	}
	src := &fakeSource{limit: 2}
	_, err := AddMSIX(NewConfig(Header{ID: "f"}), 0, 0, 0x800, 3, src)
	if !errors.Is(err, errNoVectors) || !src.vectors[0].closed || !src.vectors[1].closed {
		t.Errorf("%v; the vectors that there were must be closed", err)
	}
}

func TestMSIXVectorErrorIsReportedOnce(t *testing.T) {
	m := newMachine(t, testLayout)
	f := newFunction(t, "f", 0)
	add(t, m.Root(), 2, 0, f)
	f.msix.Vector(0).(*fakeVector).fail = errors.New("no route left")
	f.msix.put32(12, 0)
	for range 3 {
		f.msix.control(msixEnable)
		f.msix.control(0)
	}
	if n := strings.Count(m.logs.String(), "no route left"); n != 1 {
		t.Errorf("reported %d times, want once: %s", n, m.logs)
	}
}

func FuzzMSIX(f *testing.F) {
	f.Add([]byte{0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8, 12, 4, 0, 0, 0, 0})
	f.Add([]byte{0xff, 0x80, 12, 4, 0, 0, 0, 0, 0xff, 0xc0, 0xff, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		const n = 5
		m, vs := newMSIX(t, n)
		for len(ops) >= 2 {
			off, width := uint64(ops[0]), int(ops[1]%18)
			if ops = ops[2:]; off == 0xff {
				m.control(uint16(width) << 12)
				continue
			}
			p := make([]byte, width)
			ops = ops[copy(p, ops):]
			m.Write(off, p)
			m.Signal(int(off))
			a, b := bytes.Repeat([]byte{0x5a}, width), bytes.Repeat([]byte{0xa5}, width)
			m.Read(off, a)
			if m.Read(off, b); !bytes.Equal(a, b) {
				t.Fatalf("read of %d at %d does not fill: % x, % x", width, off, a, b)
			}
		}
		table := make([]byte, n*16)
		m.Read(0, table)
		control := m.c.Uint16(m.off + msixControl)
		for i, v := range vs {
			e := table[i*16:]
			open := control&0xc000 == 0x8000 && e[12] == 0
			want := devices.MSI{Addr: le.Uint64(e), Data: le.Uint32(e[8:])}
			if v.masked == open || open && v.msg != want || le.Uint32(e[12:]) > 1 {
				t.Errorf("vector %d has %+v masked %v; table % x control %#x", i, v.msg, v.masked, e[:16], control)
			}
		}
	})
}
