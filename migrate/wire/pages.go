package wire

import (
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"baton/kvm/guestmem"
)

// A batch is the payload of a Pages frame: this head, runs, the data of those that have some, in
// their order, compressed as one.
//
//	head  u16 runs, u8 compression, u8 check, u32 bytes of data before compression
//	run   u64 guest-physical address, u32 pages, u32 kind
const (
	batchSize = 8
	runSize   = 16
	maxRuns   = 1024
	// MaxBatch is the most guest memory in bytes that a batch brings, without zero pages.
	MaxBatch = 256 << 10

	kindData, kindZero = 0, 1

	// What of the data the frame's CRC is made of: they themselves, or, of data that are not compressed, their digest.
	checkData, checkDigest = 0, 2

	pageSize = guestmem.PageSize
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
	digest      bool // see Digest
	zstd        *zstd.Encoder

	runs    []byte // encoded
	frame   []byte // room for the header, the head and maxRuns runs, then data
	data    []byte // of frame
	packed  []byte // the same when it is compressed
	pages   uint64 // in data
	nzero   uint64 // zero pages
	nextGPA uint64 // of the last run, and its kind, so that it can grow
	kind    uint32
}

// NewBatch makes one that reads m. Level is zstd's, 0 to 20. ZeroPages says whether pages are
// looked at to leave those of zeros out.
func NewBatch(m *guestmem.Memory, c Compression, level int, zeroPages bool) (*Batch, error) {
	b := &Batch{mem: m, compression: c, zeroPages: zeroPages, frame: make([]byte, headerSize+maxPages)}
	b.data = b.frame[beforeData:beforeData]
	if c != None {
		b.packed = make([]byte, headerSize+maxPages+MaxBatch) // s2 needs room for the worst case
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

// Digest has batches carry the CRC of a digest of their pages, FeatureDigest, in place of one of all that they
// are: where SlowCRC says so.
func (b *Batch) Digest() { b.digest = true }

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

// Add copies pages of the n bytes at gpa, whole pages of one region, until the batch is full,
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
			room = min(room, MaxBatch-len(b.data))
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
			b.data = append(b.data, rest[:same]...)
			b.pages += uint64(same / pageSize)
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
func (b *Batch) Full() bool { return len(b.data) >= MaxBatch || len(b.runs) >= maxRuns*runSize }

// Pages are those with data and those of zeros that are in the batch.
func (b *Batch) Pages() (normal, zero uint64) { return b.pages, b.nzero }

// beforeData is the room in bytes for what comes before a batch's data.
const beforeData = headerSize + batchSize + maxRuns*runSize

// Send writes the batch as a frame, if there is something in it, and empties it.
func (b *Batch) Send(c *Conn) error {
	if len(b.runs) == 0 {
		return nil
	}
	frame := b.seal()
	b.runs, b.data, b.pages, b.nzero = b.runs[:0], b.data[:0], 0, 0
	return c.writeAll(frame)
}

// seal makes the frame.
func (b *Batch) seal() []byte {
	frame, data, how := b.frame, b.data, None
	if packed := b.pack(); len(packed) < len(data) {
		frame, data, how = b.packed, packed, b.compression
	}
	// What comes first is put right before the data, so that they are written as one.
	head := frame[beforeData-len(b.runs)-batchSize : beforeData]
	clear(head[:batchSize])
	le.PutUint16(head, uint16(len(b.runs)/runSize))
	head[2] = byte(how)
	le.PutUint32(head[4:], uint32(len(b.data)))
	copy(head[batchSize:], b.runs)
	frame = frame[beforeData-len(head)-headerSize : beforeData+len(data)]
	crc := uint32(0)
	if how == None && b.digest {
		var d digest
		head[3] = checkDigest
		d.add(data)
		crc = d.update(updateCRC(0, head))
	} else {
		crc = updateCRC(0, frame[headerSize:])
	}
	Header{TypePages, uint32(len(frame) - headerSize), crc}.put(frame)
	return frame
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
	runs []byte
	bufs [][]byte // windows of the runs that are read straight into guest memory
	rest [][]byte // of those, what is not read yet
}

// Sink is where pages go: guest memory, and what of it has been written. Several
// connections may have the same one.
type Sink struct {
	Memory *guestmem.Memory
	// Written are pages that were received at least once: those that need not be zero.
	Written *guestmem.Bitmap
	// Coming, if not nil, is called before n bytes at gpa are written to.
	Coming func(gpa, n uint64)
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
	packed := int(h.Length) - batchSize - n*runSize
	switch {
	case n == 0 || n > maxRuns || raw > MaxBatch || packed < 0 || int(compression) >= len(compressions) ||
		check != checkData && (check != checkDigest || compression != None):
		return 0, 0, corrupt("batch of %d runs, %d bytes, compression %d", n, raw, compression)
	case compression == None && packed != int(raw):
		return 0, 0, corrupt("batch of %d bytes in %d", raw, packed)
	}
	c.unpack.runs = grow(c.unpack.runs, n*runSize)
	if err := c.readFull(c.unpack.runs); err != nil {
		return 0, 0, noEOF(err)
	}
	crc := updateCRC(updateCRC(0, head[:]), c.unpack.runs)

	// Look at all runs before any is written.
	sum := uint64(0)
	for run := c.unpack.runs; len(run) > 0; run = run[runSize:] {
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
	for run := c.unpack.runs; len(run) > 0; run = run[runSize:] {
		gpa, b, isZero, _ := s.window(run)
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
	var d digest
	for _, b := range into {
		if check == checkDigest {
			d.add(b)
		} else {
			crc = updateCRC(crc, b)
		}
	}
	if check == checkDigest {
		crc = d.update(crc)
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
