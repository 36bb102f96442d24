package wire

import (
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"baton/kvm/guestmem"
)

// A batch is the payload of a Pages frame: this head, runs, the data of those that have some, in
// their order, compressed as one. With sums, the frame's CRC does not cover the data.
//
//	head  u16 runs, u8 compression, u8 check, u32 bytes of data before compression
//	run   u64 guest-physical address, u32 pages, u32 kind
//	sum   u32 for each page of the data, with checks 3 and 5
const (
	batchSize = 8
	runSize   = 16
	maxRuns   = 1024
	// MaxBatch is the most guest memory in bytes that a batch brings, without zero pages.
	MaxBatch = 256 << 10

	kindData, kindZero = 0, 1

	// What of the data is checked: they themselves, by the frame's CRC, or, where they are not compressed, each page by
	// its CRC or its digest's sum.
	checkData, checkPages, checkDigests = 0, 3, 5

	pageSize = guestmem.PageSize
	sumSize  = 4
)

// Compression of a batch.
type Compression uint8

// Compressions.
const (
	None Compression = iota
	Zstd
	S2
)

var compressions = []string{"none", "zstd", "s2"}

// ParseCompression knows none, zstd and s2.
func ParseCompression(name string) (Compression, error) {
	for i, n := range compressions {
		if n == name {
			return Compression(i), nil
		}
	}
	return None, fmt.Errorf("compression %s: not none, zstd or s2", name)
}

// Batch collects pages for one frame. It is for one goroutine.
type Batch struct {
	mem         *guestmem.Memory
	compression Compression
	zeroPages   bool // look for them
	touched     *guestmem.Bitmap
	check       uint8
	direct      bool // see Direct
	zstd        *zstd.Encoder

	runs    []byte   // encoded
	sums    []byte   // likewise
	frame   []byte   // room for the header, the head, maxRuns runs and the sums, then data
	data    []byte   // of frame; nothing if they go direct
	windows [][]byte // what is sent: the frame, and what goes direct
	packed  []byte   // as frame, when it is compressed
	size    int      // of the data, in bytes
	nzero   uint64   // zero pages
	nextGPA uint64   // of the last run, and its kind, so that it can grow
	kind    uint32
}

// NewBatch makes one that reads m. Level is zstd's, 0 to 20. ZeroPages says whether pages are
// looked at to leave those of zeros out.
func NewBatch(m *guestmem.Memory, c Compression, level int, zeroPages bool) (*Batch, error) {
	b := &Batch{mem: m, compression: c, zeroPages: zeroPages, frame: make([]byte, headerSize+maxPages), windows: make([][]byte, 1)}
	b.data = b.frame[beforeData:beforeData]
	if c != None {
		b.packed = make([]byte, headerSize+maxPages+MaxBatch) // s2 needs room for the worst case
	}
	if SlowCRC() {
		b.check = checkDigests
	}
	if c == Zstd {
		var err error
		b.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)), zstd.WithEncoderCRC(false))
		if err != nil {
			return nil, err
		}
	}
	return b, nil
}

// Touched has Add take pages that are not in the set for zeros, without a look at them, if it looks
// at all. Nil is all pages.
func (b *Batch) Touched(set *guestmem.Bitmap) { b.touched = set }

// Direct has pages written right from guest memory, by a socket, and without compression. A page that is written to
// between its sum and then is sent again: it is in a dirty log, and the target asks for it; see Sink.Changed.
func (b *Batch) Direct() {
	if b.direct = true; b.check == checkData {
		b.check = checkPages
	}
}

// zero says whether the page at gpa is to be sent as one of zeros.
func (b *Batch) zero(gpa uint64, page []byte) bool {
	return b.zeroPages && (b.touched != nil && !b.touched.Test(gpa) || isZero(page))
}

// isZero is hardly slower than bytes.Equal, and four times as fast where vectors are emulated.
func isZero(page []byte) bool {
	for ; len(page) >= 64; page = page[64:] {
		if le.Uint64(page)|le.Uint64(page[8:])|le.Uint64(page[16:])|le.Uint64(page[24:])|
			le.Uint64(page[32:])|le.Uint64(page[40:])|le.Uint64(page[48:])|le.Uint64(page[56:]) != 0 {
			return false
		}
	}
	return true
}

// Add takes pages of the n bytes at gpa, whole pages of one region, until the batch is full,
// and returns how many bytes it took. The guest may write meanwhile.
func (b *Batch) Add(gpa, n uint64) (uint64, error) {
	window, err := b.mem.Bytes(gpa, n)
	if err != nil {
		return 0, err
	}
	done := uint64(0)
	for done < n {
		rest := window[done:]
		same := 0 // pages of the same kind
		zero := b.zero(gpa+done, rest[:pageSize])
		room := len(rest)
		if !zero {
			room = min(room, MaxBatch-b.size)
		}
		for same += pageSize; same < room && b.zero(gpa+done+uint64(same), rest[same:same+pageSize]) == zero; {
			same += pageSize
		}
		kind := uint32(kindData)
		if zero {
			kind = kindZero
		}
		if same > room || !b.run(gpa+done, uint64(same), kind) {
			return done, nil
		}
		if zero {
			b.nzero += uint64(same / pageSize)
		} else {
			if b.size += same; b.direct {
				b.windows = append(b.windows, rest[:same])
			} else {
				b.data = append(b.data, rest[:same]...)
			}
		}
		done += uint64(same)
	}
	return done, nil
}

// run adds a run, or makes the last one longer, if there is room.
func (b *Batch) run(gpa, n uint64, kind uint32) bool {
	if last := len(b.runs) - runSize; last >= 0 && b.nextGPA == gpa && b.kind == kind {
		le.PutUint32(b.runs[last+8:], le.Uint32(b.runs[last+8:])+uint32(n/pageSize))
	} else if len(b.runs) == maxRuns*runSize {
		return false
	} else {
		b.runs = le.AppendUint64(b.runs, gpa)
		b.runs = le.AppendUint32(b.runs, uint32(n/pageSize))
		b.runs = le.AppendUint32(b.runs, kind)
	}
	b.nextGPA, b.kind = gpa+n, kind
	return true
}

// Full says that there is hardly room for more.
func (b *Batch) Full() bool { return b.size >= MaxBatch || len(b.runs) >= maxRuns*runSize }

// Pages are those with data and those of zeros that are in the batch.
func (b *Batch) Pages() (normal, zero uint64) { return uint64(b.size / pageSize), b.nzero }

// beforeData is the room in bytes for what comes before a batch's data.
const beforeData = headerSize + maxPages - MaxBatch

// Send writes the batch as a frame, if there is something in it, and empties it.
func (b *Batch) Send(c *Conn) error {
	if len(b.runs) == 0 {
		return nil
	}
	b.windows[0] = b.seal()
	defer b.reset()
	return c.writeAll(b.windows...)
}

// reset empties the batch.
func (b *Batch) reset() {
	b.runs, b.data, b.size, b.nzero = b.runs[:0], b.data[:0], 0, 0
	clear(b.windows)
	b.windows = b.windows[:1]
}

// seal makes the frame but for data that go direct.
func (b *Batch) seal() []byte {
	frame, data, how, check := b.frame, b.data, None, b.check
	if packed := b.pack(); len(packed) < len(data) {
		frame, data, how, check = b.packed, packed, b.compression, checkData
	}
	b.sums = b.sums[:0]
	if check != checkData {
		b.windows[0] = data
		for _, w := range b.windows {
			for ; len(w) > 0; w = w[pageSize:] {
				b.sums = le.AppendUint32(b.sums, pageSum(check, w[:pageSize]))
			}
		}
	}
	// What comes first is put right before the data, so that they are written as one.
	length := batchSize + len(b.runs) + len(b.sums)
	head := frame[beforeData-length : beforeData]
	clear(head[:batchSize])
	le.PutUint16(head, uint16(len(b.runs)/runSize))
	head[2], head[3] = byte(how), check
	le.PutUint32(head[4:], uint32(b.size))
	copy(head[batchSize+copy(head[batchSize:], b.runs):], b.sums)
	frame = frame[beforeData-length-headerSize : beforeData+len(data)]
	covered := head
	if check == checkData {
		covered = frame[headerSize:]
	}
	if length += len(data); b.direct {
		length += b.size
	}
	Header{TypePages, uint32(length), updateCRC(0, covered)}.put(frame)
	return frame
}

// pageSum is the sum of a page.
func pageSum(check uint8, page []byte) uint32 {
	if check == checkPages {
		return updateCRC(0, page)
	}
	var d digest
	d.add(page)
	return d.sum()
}

// pack compresses the data; what is no shorter is not wanted.
func (b *Batch) pack() []byte {
	room := b.packed
	switch {
	case len(b.data) == 0:
	case b.compression == Zstd:
		return b.zstd.EncodeAll(b.data, room[beforeData:beforeData])
	case b.compression == S2:
		return s2.Encode(room[beforeData:], b.data)
	}
	return b.data
}

// decoders of a connection, made when they are needed.
type decoders struct {
	zstd *zstd.Decoder
	in   []byte
	runs []byte   // and the sums
	bufs [][]byte // windows of the runs that are read straight into guest memory
	rest [][]byte // of those, what is not read yet
	more [][]byte // that, and room for what comes next
}

// Sink is where pages go: guest memory, and what of it has been written. Several
// connections may have the same one.
type Sink struct {
	Memory *guestmem.Memory
	// Written are pages that were received at least once: those that need not be zero.
	Written *guestmem.Bitmap
	// Changed are pages that were not what their sums say: somebody has written to them meanwhile. They are asked
	// for again, by Round; those of the last round have not changed, but are corrupt.
	Changed *guestmem.Bitmap
	// Coming, if not nil, is called before n bytes at gpa are written to.
	Coming func(gpa, n uint64)
}

// NewSink has pages go to m.
func NewSink(m *guestmem.Memory) *Sink {
	return &Sink{Memory: m, Written: guestmem.NewBitmap(m), Changed: guestmem.NewBitmap(m)}
}

// window is where a run goes, if it is RAM.
func (s *Sink) window(run []byte) (gpa uint64, b []byte, zero bool, err error) {
	gpa, n, kind := le.Uint64(run), uint64(le.Uint32(run[8:]))*pageSize, le.Uint32(run[12:])
	if gpa%pageSize != 0 || n == 0 || kind > kindZero {
		return 0, nil, false, corrupt("run of %d bytes at %#x of kind %d", n, gpa, kind)
	}
	b, err = s.Memory.Bytes(gpa, n)
	if err != nil {
		return 0, nil, false, corrupt("pages that are not RAM: %v", err)
	}
	return gpa, b, kind == kindZero, nil
}

// clear makes a run zero; what was never written is.
func (s *Sink) clear(gpa uint64, b []byte) {
	for off := uint64(0); off < uint64(len(b)); off += pageSize {
		if s.Written.Test(gpa + off) {
			clear(b[off : off+pageSize])
		}
	}
}

// compare finds the pages that have changed on the way.
func (s *Sink) compare(runs, sums []byte, check uint8) {
	for ; len(runs) > 0; runs = runs[runSize:] {
		gpa, b, isZero, _ := s.window(runs)
		if isZero {
			continue
		}
		for ; len(b) > 0; b, sums, gpa = b[pageSize:], sums[sumSize:], gpa+pageSize {
			if pageSum(check, b[:pageSize]) != le.Uint32(sums) {
				s.Changed.Set(gpa, pageSize)
			}
		}
	}
}

// ReadPages reads the payload of a Pages frame into guest memory. It returns the number of
// pages with data and of zero pages. After an error, guest memory is of no use.
func (c *Conn) ReadPages(h Header, s *Sink) (normal, zero uint64, err error) {
	if h.Length < batchSize+runSize {
		return 0, 0, corrupt("pages frame of %d bytes", h.Length)
	}
	var head [batchSize]byte
	if err := c.readFull(head[:]); err != nil {
		return 0, 0, noEOF(err)
	}
	n, compression, check, raw := int(le.Uint16(head[:])), Compression(head[2]), head[3], le.Uint32(head[4:])
	sums := 0 // bytes
	if check != checkData {
		sums = int(raw / pageSize * sumSize)
	}
	packed := int(h.Length) - batchSize - n*runSize - sums
	switch {
	case n == 0 || n > maxRuns || raw > MaxBatch || packed < 0 || int(compression) >= len(compressions) ||
		check != checkData && (check != checkPages && check != checkDigests || compression != None):
		return 0, 0, corrupt("batch of %d runs, %d bytes, compression %d, check %d", n, raw, compression, check)
	case compression == None && packed != int(raw):
		return 0, 0, corrupt("batch of %d bytes in %d", raw, packed)
	}
	c.unpack.runs = grow(c.unpack.runs, n*runSize+sums)
	if err := c.readFull(c.unpack.runs); err != nil {
		return 0, 0, noEOF(err)
	}
	crc := updateCRC(updateCRC(0, head[:]), c.unpack.runs)
	if check != checkData && crc != h.crc {
		return 0, 0, corrupt("checksum of a pages frame")
	}
	runs, wanted := c.unpack.runs[:n*runSize], c.unpack.runs[n*runSize:]

	// Look at all runs before any is written.
	sum := uint64(0)
	for run := runs; len(run) > 0; run = run[runSize:] {
		_, b, isZero, err := s.window(run)
		switch {
		case err != nil:
			return 0, 0, err
		case isZero:
			zero += uint64(len(b) / pageSize)
		default:
			sum += uint64(len(b))
		}
	}
	if sum != uint64(raw) {
		return 0, 0, corrupt("runs of %d bytes with %d bytes of data", sum, raw)
	}
	data := []byte(nil) // what is not read straight
	if compression != None {
		c.unpack.in = grow(c.unpack.in, packed)
		if err := c.readFull(c.unpack.in); err != nil {
			return 0, 0, noEOF(err)
		}
		if crc = updateCRC(crc, c.unpack.in); crc != h.crc {
			return 0, 0, corrupt("checksum of a pages frame")
		}
		if data, err = c.decompress(compression, int(raw)); err != nil {
			return 0, 0, err
		}
	}
	c.unpack.bufs = c.unpack.bufs[:0]
	for run := runs; len(run) > 0; run = run[runSize:] {
		gpa, b, isZero, _ := s.window(run)
		s.Changed.Unset(gpa, uint64(len(b)))
		if isZero {
			s.clear(gpa, b)
			continue
		}
		if s.Coming != nil {
			s.Coming(gpa, uint64(len(b)))
		}
		s.Written.Set(gpa, uint64(len(b)))
		if data != nil {
			data = data[copy(b, data):]
		} else {
			c.unpack.bufs = append(c.unpack.bufs, b)
		}
	}
	into := c.unpack.bufs
	c.unpack.rest = append(c.unpack.rest[:0], into...)
	if err := c.readAll(c.unpack.rest); err != nil {
		return 0, 0, err
	}
	if check != checkData {
		s.compare(runs, wanted, check)
		return sum / pageSize, zero, nil
	}
	for _, b := range into {
		crc = updateCRC(crc, b)
	}
	if crc != h.crc {
		return 0, 0, corrupt("checksum of a pages frame")
	}
	return sum / pageSize, zero, nil
}

// decompress returns the batch's data, of exactly n bytes, valid until the next one.
func (c *Conn) decompress(how Compression, n int) ([]byte, error) {
	var err error
	out := []byte(nil)
	switch c.scratch = grow(c.scratch, MaxBatch); how {
	case None:
		return c.unpack.in, nil
	case S2:
		if got, err := s2.DecodedLen(c.unpack.in); err != nil || got != n {
			return nil, corrupt("s2 data of %d bytes, want %d (%v)", got, n, err)
		}
		out, err = s2.Decode(c.scratch[:n], c.unpack.in)
	case Zstd:
		if c.unpack.zstd == nil {
			c.unpack.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxBatch), zstd.WithDecoderMaxWindow(8<<20))
			if err != nil {
				return nil, err
			}
		}
		out, err = c.unpack.zstd.DecodeAll(c.unpack.in, c.scratch[:0])
	}
	if err != nil || len(out) != n {
		return nil, corrupt("%s data of %d bytes, want %d (%v)", compressions[how], len(out), n, err)
	}
	return out, nil
}

func grow(b []byte, n int) []byte {
	if cap(b) < n {
		b = make([]byte, n)
	}
	return b[:n]
}
