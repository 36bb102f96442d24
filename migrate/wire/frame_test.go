package wire

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"

	"baton/kvm/guestmem"
)

// buffer is a stream that is written first and read then.
type buffer struct{ bytes.Buffer }

func (*buffer) Close() error { return nil }

const mib = 1 << 20

func newMemory(t testing.TB, ranges ...guestmem.Range) *guestmem.Memory {
	t.Helper()
	m, err := guestmem.New(ranges, guestmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

// guest has RAM whose size is no multiple of a batch, with pages of zeros, of noise and of text.
func guest(t testing.TB) *guestmem.Memory {
	m := newMemory(t, guestmem.Range{Base: 0, Size: 3*mib + 5*pageSize}, guestmem.Range{Base: 1 << 32, Size: 7 * pageSize})
	r := rand.New(rand.NewPCG(1, 2))
	for _, region := range m.Regions() {
		for off := uint64(0); off < region.Size; off += pageSize {
			p := region.Host[off : off+pageSize]
			switch kind := r.IntN(4); {
			case kind == 0:
				copy(p, strings.Repeat("all work and no play ", 100))
				p[pageSize-1] = byte(off >> 12)
			case kind == 1 || off > mib && off < 2*mib: // a long run
				for i := range p {
					p[i] = byte(r.Uint32())
				}
			}
		}
	}
	return m
}

func fresh(t testing.TB, m *guestmem.Memory) *Sink {
	var ranges []guestmem.Range
	for _, r := range m.Regions() {
		ranges = append(ranges, guestmem.Range{Base: r.GPA, Size: r.Size})
	}
	to := newMemory(t, ranges...)
	return NewSink(to)
}

func same(t testing.TB, a, b *guestmem.Memory) {
	t.Helper()
	for i, r := range a.Regions() {
		if !bytes.Equal(r.Host, b.Regions()[i].Host) {
			t.Errorf("RAM at %#x differs", r.GPA)
		}
	}
}

// sendAll sends all pages of m in batches.
func sendAll(t testing.TB, c *Conn, m *guestmem.Memory, b *Batch) (normal, zero uint64) {
	t.Helper()
	send := func() {
		n, z := b.Pages()
		normal, zero = normal+n, zero+z
		if err := b.Send(c); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range m.Regions() {
		for off := uint64(0); off < r.Size; {
			n, err := b.Add(r.GPA+off, r.Size-off)
			if err != nil {
				t.Fatal(err)
			}
			if off += n; off < r.Size {
				send()
			}
		}
	}
	send()
	return normal, zero
}

// receiveAll takes pages frames to the end of the stream.
func receiveAll(c *Conn, s *Sink) (normal, zero uint64, err error) {
	for {
		h, err := c.ReadHeader()
		if err == io.EOF {
			return normal, zero, nil
		}
		if err != nil {
			return 0, 0, err
		}
		if h.Type != TypePages {
			return 0, 0, errors.New("no pages frame")
		}
		n, z, err := c.ReadPages(h, s)
		if err != nil {
			return 0, 0, err
		}
		normal, zero = normal+n, zero+z
	}
}

func TestPages(t *testing.T) {
	for _, compression := range compressions {
		for _, zeroPages := range []bool{true, false} {
			t.Run(compression, func(t *testing.T) {
				from := guest(t)
				how, err := ParseCompression(compression)
				if err != nil {
					t.Fatal(err)
				}
				b, err := NewBatch(from, how, 1, zeroPages)
				if err != nil {
					t.Fatal(err)
				}
				to := fresh(t, from)
				// More than once: other pages are zero then, and have sums of their own.
				for _, check := range []uint8{checkData, checkPages, checkDigests} {
					b.check = check
					c := NewConn(new(buffer))
					normal, zero := sendAll(t, c, from, b)
					n, z, err := receiveAll(c, to)
					if err != nil || n != normal || z != zero || n+z != from.Size()/pageSize || (z > 0) != zeroPages {
						t.Errorf("%d and %d pages, %d and %d sent, %v", n, z, normal, zero, err)
					}
					if size := c.Sent(); c.Received() != size || compression != "none" && size > n*pageSize*9/10 {
						t.Errorf("%d bytes for %d pages, %d received", size, n, c.Received())
					}
					same(t, from, to.Memory)
					for _, r := range from.Regions() {
						for off := uint64(0); off < r.Size; off += 2 * pageSize {
							clear(r.Host[off : off+pageSize])
						}
					}
				}
			})
		}
	}
	if _, err := ParseCompression("zlib"); err == nil || err.Error() != "compression zlib: not none, zstd or s2" {
		t.Error(err)
	}
}

// TestDirect sends pages by a socket right from guest memory, which changes meanwhile: those that are not what their
// sums say are known until they have come again.
func TestDirect(t *testing.T) {
	for _, check := range []uint8{checkPages, checkDigests} {
		from := guest(t)
		b, err := NewBatch(from, None, 0, true)
		if err != nil {
			t.Fatal(err)
		}
		b.Direct()
		b.check = check
		a, z := sockets(t)
		_ = a.SetWriteBuffer(64 << 10) // so that a batch goes in many pieces
		_ = z.SetReadBuffer(64 << 10)
		out, in := NewConn(a), NewConn(z)
		out.SetStall(time.Minute, time.Minute)
		in.SetStall(time.Minute, time.Minute)
		to := fresh(t, from)
		received := func(f func()) {
			t.Helper()
			done := make(chan error, 1)
			go func() {
				for {
					h, err := in.ReadHeader()
					if err == nil && h.Type == TypeRound {
						done <- in.ReadMessage(h, new(Round))
						return
					}
					if err == nil {
						_, _, err = in.ReadPages(h, to)
					}
					if err != nil {
						done <- err
						return
					}
				}
			}()
			f()
			if err := errors.Join(out.Write(TypeRound, Round{Number: 1}), <-done); err != nil {
				t.Fatal(err)
			}
		}
		received(func() { sendAll(t, out, from, b) })
		if n := to.Changed.Count(); n != 0 {
			t.Errorf("%d pages have changed", n)
		}
		same(t, from, to.Memory)

		page := from.Regions()[0].Host[mib+mib/2:][:pageSize] // one of the long run
		gpa := from.Regions()[0].GPA + mib + mib/2
		received(func() {
			if _, err := b.Add(gpa, 2*pageSize); err != nil {
				t.Fatal(err)
			}
			b.windows[0] = b.seal()
			page[100]++ // after its sum
			if err := out.writeAll(b.windows...); err != nil {
				t.Fatal(err)
			}
			b.reset()
		})
		if n := to.Changed.Count(); n != 1 || !to.Changed.Test(gpa) {
			t.Errorf("%d pages have changed", n)
		}
		received(func() {
			_, _ = b.Add(gpa, pageSize)
			if err := b.Send(out); err != nil {
				t.Fatal(err)
			}
		})
		if n := to.Changed.Count(); n != 0 {
			t.Errorf("%d pages have changed when they have come again", n)
		}
		same(t, from, to.Memory)
	}
}

// sockets are the two ends of a connection.
func sockets(t testing.TB) (a, b *net.TCPConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

func TestAddOutside(t *testing.T) {
	m := newMemory(t, guestmem.Range{Base: 0, Size: pageSize})
	b, err := NewBatch(m, None, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Add(pageSize, pageSize); err == nil {
		t.Error("a page that is not there")
	}
}

// batch encodes a pages frame by hand.
func batch(runs [][3]uint64, compression byte, raw uint32, data []byte) []byte {
	p := le.AppendUint16(nil, uint16(len(runs)))
	p = append(p, compression, 0)
	p = le.AppendUint32(p, raw)
	for _, r := range runs {
		p = le.AppendUint64(p, r[0])
		p = le.AppendUint32(p, uint32(r[1]))
		p = le.AppendUint32(p, uint32(r[2]))
	}
	return append(p, data...)
}

// frame puts a header before a payload.
func frame(t Type, payload []byte) []byte {
	b := make([]byte, headerSize)
	Header{t, uint32(len(payload)), crcOf(payload)}.put(b)
	return append(b, payload...)
}

func TestHostilePages(t *testing.T) {
	page := make([]byte, pageSize)
	many := make([][3]uint64, maxRuns+1)
	for i := range many {
		many[i] = [3]uint64{0, 1, kindZero}
	}
	for name, payload := range map[string][]byte{
		"no runs":                  batch(nil, 0, 0, page),
		"too many runs":            batch(many, 0, 0, nil),
		"no data":                  batch([][3]uint64{{0, 1, kindData}}, 0, pageSize, nil),
		"less data":                batch([][3]uint64{{0, 2, kindData}}, 0, pageSize, page),
		"more data":                batch([][3]uint64{{0, 1, kindZero}}, 0, pageSize, page),
		"unknown compression":      batch([][3]uint64{{0, 1, kindData}}, 3, pageSize, page),
		"unknown kind":             batch([][3]uint64{{0, 1, 2}}, 0, pageSize, page),
		"empty run":                batch([][3]uint64{{0, 0, kindZero}}, 0, 0, nil),
		"not RAM":                  batch([][3]uint64{{64 * mib, 1, kindData}}, 0, pageSize, page),
		"beyond RAM":               batch([][3]uint64{{pageSize, 1 << 31, kindZero}}, 0, 0, nil),
		"across regions":           batch([][3]uint64{{3 * pageSize, 2, kindZero}}, 0, 0, nil),
		"wraps":                    batch([][3]uint64{{1<<64 - pageSize, 2, kindZero}}, 0, 0, nil),
		"not aligned":              batch([][3]uint64{{8, 1, kindData}}, 0, pageSize, page),
		"too much":                 batch([][3]uint64{{0, 1, kindData}}, 2, MaxBatch+1, page),
		"s2 of another length":     batch([][3]uint64{{0, 1, kindData}}, 2, pageSize, []byte{0xff, 0xff, 0xff, 0x7f, 0}),
		"s2 nonsense":              batch([][3]uint64{{0, 1, kindData}}, 2, pageSize, []byte{0x80, 0x20, 1, 2, 3}),
		"zstd nonsense":            batch([][3]uint64{{0, 1, kindData}}, 1, pageSize, []byte("zstd? no")),
		"shorter than its head":    {1, 0, 0, 0},
		"runs beyond the payload":  batch([][3]uint64{{0, 1, kindData}}, 0, 0, nil)[:batchSize+8],
		"unknown check":            append([]byte{1, 0, 0, 1}, batch([][3]uint64{{0, 1, kindZero}}, 0, 0, nil)[4:]...),
		"no longer used check":     append([]byte{1, 0, 0, 2}, batch([][3]uint64{{0, 1, kindData}}, 0, pageSize, page)[4:]...),
		"another such":             append([]byte{1, 0, 0, 4}, batch([][3]uint64{{0, 1, kindData}}, 0, pageSize, append([]byte{0, 0, 0, 0}, page...))[4:]...),
		"no sums":                  append([]byte{1, 0, 0, checkPages}, batch([][3]uint64{{0, 1, kindData}}, 0, pageSize, page)[4:]...),
		"sums beyond the payload":  append([]byte{1, 0, 0, checkDigests}, batch([][3]uint64{{0, 1, kindData}}, 0, pageSize, nil)[4:]...),
		"sums of compressed data":  append([]byte{1, 0, byte(S2), checkPages}, batch([][3]uint64{{0, 1, kindData}}, 0, pageSize, append([]byte{0, 0, 0, 0}, s2.Encode(nil, page)...))[4:]...),
		"a bad run after good one": batch([][3]uint64{{0, 1, kindData}, {64 * mib, 1, kindZero}}, 0, pageSize, page),
	} {
		m := newMemory(t, guestmem.Range{Base: 0, Size: 4 * pageSize}, guestmem.Range{Base: mib, Size: 4 * pageSize})
		var b buffer
		b.Write(frame(TypePages, payload))
		if _, _, err := receiveAll(NewConn(&b), NewSink(m)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestReadAhead: pages, a whole frame and part of a header that have come together are read as if each had come alone, by
// a socket and by a stream that gives its end with the last bytes, and by one that gives them one by one.
func TestReadAhead(t *testing.T) {
	from := guest(t)
	var all buffer
	out := NewConn(&all)
	b, err := NewBatch(from, None, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		sendAll(t, out, from, b)
		if err := out.Write(TypeRound, Round{Number: 1}); err != nil {
			t.Fatal(err)
		}
	}
	for name, stream := range map[string]func() io.ReadWriteCloser{
		"socket": func() io.ReadWriteCloser {
			source, target := sockets(t)
			go func() {
				_, _ = source.Write(all.Bytes())
				source.Close()
			}()
			return target
		},
		"end with data": func() io.ReadWriteCloser { return reading{iotest.DataErrReader(bytes.NewReader(all.Bytes()))} },
		"one by one":    func() io.ReadWriteCloser { return reading{iotest.OneByteReader(bytes.NewReader(all.Bytes()))} },
	} {
		t.Run(name, func(t *testing.T) {
			to := fresh(t, from)
			c := NewConn(stream())
			for n := 0; n < 3; {
				h, err := c.ReadHeader()
				if err != nil {
					t.Fatal(err)
				}
				if h.Type == TypeRound {
					var r Round
					if err := c.ReadMessage(h, &r); err != nil || r.Number != 1 {
						t.Fatal(r, err)
					}
					n++
				} else if _, _, err := c.ReadPages(h, to); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := c.ReadHeader(); err != io.EOF {
				t.Errorf("after the last frame: %v", err)
			}
			if c.Received() != uint64(all.Len()) {
				t.Errorf("%d bytes received of %d", c.Received(), all.Len())
			}
			same(t, from, to.Memory)
		})
	}
}

// reading is a stream that is read only.
type reading struct{ io.Reader }

func (reading) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }
func (reading) Close() error              { return nil }

// TestEveryByte breaks each byte of a stream in turn: it never passes.
func TestEveryByte(t *testing.T) {
	t.Run("CRC", func(t *testing.T) { everyByte(t, checkData) })
	t.Run("CRC of pages", func(t *testing.T) { everyByte(t, checkPages) })
	t.Run("digest", func(t *testing.T) { everyByte(t, checkDigests) })
}

func everyByte(t *testing.T, check uint8) {
	m := newMemory(t, guestmem.Range{Base: 0, Size: 4 * pageSize})
	m.Regions()[0].Host[0] = 1
	m.Regions()[0].Host[2*pageSize] = 1
	b, err := NewBatch(m, None, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	b.check = check
	var good buffer
	c := NewConn(&good)
	sendAll(t, c, m, b)
	if err := c.Write(TypeSection, Section{SectionInfo{"ioapic", "ioapic", 1}, []byte("state")}); err != nil {
		t.Fatal(err)
	}
	read := func(stream []byte) error {
		c, to := NewConn(&buffer{*bytes.NewBuffer(stream)}), fresh(t, m)
		h, err := c.ReadHeader()
		if err != nil {
			return err
		}
		if _, _, err := c.ReadPages(h, to); err != nil {
			return err
		}
		if to.Changed.Count() != 0 {
			return errors.New("a page has changed")
		}
		if h, err = c.ReadHeader(); err != nil {
			return err
		}
		return c.ReadMessage(h, new(Section))
	}
	stream := bytes.Clone(good.Bytes())
	if err := read(bytes.Clone(stream)); err != nil {
		t.Fatal(err)
	}
	step := 1
	for i := 0; i < len(stream); i += step {
		bad := bytes.Clone(stream)
		bad[i] ^= 0x10
		if err := read(bad); err == nil {
			t.Errorf("byte %d of %d broken: not noticed", i, len(stream))
		}
		if err := read(bytes.Clone(stream[:i])); err == nil {
			t.Errorf("cut after %d of %d bytes: not noticed", i, len(stream))
		}
		if step = 1; i > 200 && i < len(stream)-200 {
			step = 97
		}
	}
}

func TestMessages(t *testing.T) {
	c := NewConn(new(buffer))
	hello := Hello{Session: Session{1, 2}, Channels: 2, Facts: []Fact{{"ram", "1 GiB"}}, Sections: []SectionInfo{{"vcpu/0", "vcpu", 1}}}
	if err := errors.Join(c.WritePreamble(), c.Write(TypeHello, hello), c.Write(TypeCommit, nil)); err != nil {
		t.Fatal(err)
	}
	var got Hello
	if err := c.ReadPreamble(); err != nil {
		t.Fatal(err)
	}
	h, err := c.ReadHeader()
	if err != nil || h.Type != TypeHello {
		t.Fatal(h, err)
	}
	if err := c.ReadMessage(h, &got); err != nil || got.Session != hello.Session || got.Facts[0] != hello.Facts[0] || got.Sections[0] != hello.Sections[0] {
		t.Errorf("%+v, %v", got, err)
	}
	if h, err = c.ReadHeader(); err != nil || h.Type != TypeCommit || c.ReadMessage(h, nil) != nil {
		t.Errorf("%+v, %v", h, err)
	}
	if _, err := c.ReadHeader(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	if err := c.Write(TypeRefuse, Reason{[]string{strings.Repeat("x", maxSmall)}}); err == nil {
		t.Error("a frame over its cap is sent")
	}
	if err := c.Write(TypeRefuse, NewReason(errors.New(strings.Repeat("x\n", maxSmall)))); err != nil {
		t.Errorf("a long reason: %v", err)
	}
	if got := (Reason{[]string{"a\x1b[2J", "b\xff"}}).Err().Error(); got != "a?[2J\nb?" {
		t.Errorf("%q", got)
	}
}

func TestHostileFrames(t *testing.T) {
	reserved := frame(TypeCommit, nil)
	reserved[1] = 1
	for name, b := range map[string][]byte{
		"unknown type":        frame(99, nil),
		"longer than its cap": frame(TypeCommit, make([]byte, maxSmall+1)),
		"message unexpected":  frame(TypeCommit, []byte{0}),
		"reserved":            reserved,
		"no CBOR":             frame(TypeRound, []byte{0xff}),
		"huge array":          frame(TypeHello, []byte{0xa1, 7, 0x9a, 0xff, 0xff, 0xff, 0xff}),
	} {
		var s buffer
		s.Write(b)
		c := NewConn(&s)
		h, err := c.ReadHeader()
		if err == nil {
			v := map[Type]any{TypeRound: new(Round), TypeHello: new(Hello)}[h.Type]
			err = c.ReadMessage(h, v)
		}
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, pre := range map[string]string{"not ours": "QEVM\x00\x00\x00\x03\x00\x00\x00\x00", "newer": magic + "\x07\x00\x09\x00", "older": magic + "\x00\x00\x00\x00"} {
		var s buffer
		s.WriteString(pre)
		if err := NewConn(&s).ReadPreamble(); err == nil || errors.Is(err, ErrVersion) != strings.HasPrefix(pre, magic) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestStall(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	c := NewConn(a)
	c.SetStall(time.Millisecond, time.Millisecond)
	if _, err := c.ReadHeader(); !errors.Is(err, errTimeout) {
		t.Errorf("read: %v", err)
	}
	if err := c.Write(TypeAlive, nil); !errors.Is(err, errTimeout) {
		t.Errorf("write: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func cpuTime() int64 {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return u.Utime.Nano() + u.Stime.Nano()
}

func FuzzStream(f *testing.F) {
	var good buffer
	m := newMemory(f, guestmem.Range{Base: 0, Size: 16 * pageSize}, guestmem.Range{Base: mib, Size: 4 * pageSize})
	copy(m.Regions()[0].Host, "text")
	for how := range Compression(len(compressions)) {
		b, err := NewBatch(m, how, 1, true)
		if err != nil {
			f.Fatal(err)
		}
		for _, b.check = range []uint8{checkData, checkPages, checkDigests} {
			sendAll(f, NewConn(&good), m, b)
		}
	}
	c := NewConn(&good)
	_ = c.Write(TypeSection, Section{SectionInfo{"ioapic", "ioapic", 1}, []byte("state")})
	_ = c.Write(TypeHello, Hello{Facts: []Fact{{"a", "b"}}})
	f.Add(good.Bytes(), false)
	f.Add(batch([][3]uint64{{0, 1, kindData}}, 1, pageSize, []byte("zstd? no")), true)
	f.Add(batch([][3]uint64{{0, 1, kindData}}, 2, pageSize, []byte{0x80, 0x20, 1, 2, 3}), true)
	sink := NewSink(m)
	f.Fuzz(func(t *testing.T, stream []byte, isBatch bool) {
		if isBatch { // with checksums that are right
			stream = frame(TypePages, stream[:min(len(stream), maxPages)])
		}
		c := NewConn(&buffer{*bytes.NewBuffer(stream)})
		for {
			h, err := c.ReadHeader()
			if err != nil {
				return
			}
			switch h.Type {
			case TypePages:
				_, _, err = c.ReadPages(h, sink)
			case TypeSection:
				err = c.ReadMessage(h, new(Section))
			case TypeHello:
				err = c.ReadMessage(h, new(Hello))
			default:
				err = c.ReadMessage(h, new(Reason))
			}
			if err != nil {
				return
			}
		}
	})
}

// BenchmarkLoopback is the rate of pages over one TCP connection, the guest's RAM being noise.
func BenchmarkLoopback(b *testing.B) {
	for _, compression := range compressions {
		b.Run(compression, func(b *testing.B) {
			const size = 256 * mib
			from := newMemory(b, guestmem.Range{Base: 0, Size: size})
			host := from.Regions()[0].Host
			for i := 0; i < size; i += 8 {
				le.PutUint64(host[i:], uint64(i>>6)*0x9e3779b97f4a7c15)
			}
			to := fresh(b, from)
			out, in := sockets(b)
			ended := make(chan error)
			go func() {
				_, _, err := receiveAll(NewConn(in), to)
				ended <- err
			}()
			how, _ := ParseCompression(compression)
			batch, err := NewBatch(from, how, 1, true)
			if err != nil {
				b.Fatal(err)
			}
			if how == None {
				batch.Direct()
			}
			c := NewConn(out)
			b.SetBytes(size)
			before := cpuTime()
			for b.Loop() {
				sendAll(b, c, from, batch)
			}
			// What counts on a machine that has other things to do as well: both sides together.
			b.ReportMetric(float64(cpuTime()-before)/float64(c.Sent()), "cpu-ns/byte")
			out.Close()
			if err := <-ended; err != nil {
				b.Fatal(err)
			}
			same(b, from, to.Memory)
		})
	}
}
