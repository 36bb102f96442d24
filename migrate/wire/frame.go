package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Type of a frame.
type Type uint8

// Types of frames: those that the source sends, then those that the target answers. Done is also
// what the target answers to the source's last frame, Done or Abort.
const (
	TypeHello   Type = 1  // first on the main connection: Hello
	TypeJoin    Type = 2  // first on a channel: Join
	TypeAsk     Type = 3  // first, and only, on a connection that asks: Ask
	TypePages   Type = 4  // guest memory: see Batch
	TypeRound   Type = 5  // end of a round: Round. No page of the next overtakes it
	TypeSection Type = 6  // Section
	TypeEnd     Type = 7  // all is sent: End
	TypeCommit  Type = 8  // the guest is the target's
	TypeDone    Type = 9  // the source knows that the target has it: nothing, or Done
	TypeAbort   Type = 10 // the guest stays where it is: Reason
	TypeAlive   Type = 11 // nothing to say; both sides

	TypeAccept    Type = 32 // the hello is good; channels may come
	TypeRefuse    Type = 33 // it is not, or the target has failed: Reason
	TypeReady     Type = 34 // all is reserved, all channels are there
	TypeLoaded    Type = 35 // all was received and loaded, nothing but the commit is missing
	TypeCommitted Type = 36 // the guest runs here
	TypeAnswer    Type = 37 // to Ask: Answer
)

var typeNames = map[Type]string{
	TypeHello: "hello", TypeJoin: "join", TypeAsk: "ask", TypePages: "pages", TypeRound: "round", TypeSection: "section",
	TypeEnd: "end", TypeCommit: "commit", TypeDone: "done", TypeAbort: "abort", TypeAlive: "alive", TypeAccept: "accept",
	TypeRefuse: "refuse", TypeReady: "ready", TypeLoaded: "loaded", TypeCommitted: "committed", TypeAnswer: "answer",
}

// Types are all types, in order.
func Types() []Type { return slices.Sorted(maps.Keys(typeNames)) }

func (t Type) String() string {
	if n, ok := typeNames[t]; ok {
		return n
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// Caps on a frame's payload in bytes.
const (
	maxSmall   = 64 << 10
	maxHello   = 4 << 20
	MaxSection = 16 << 20 // of one Section with all that is around its data
	maxPages   = batchSize + maxRuns*runSize + MaxBatch/pageSize*sumSize + MaxBatch
)

// limit is the longest payload of the type.
func (t Type) limit() uint32 {
	switch t {
	case TypeHello:
		return maxHello
	case TypePages:
		return maxPages
	case TypeSection, TypeDone:
		return MaxSection
	}
	return maxSmall
}

// A frame's header: type, 3 reserved bytes, length of the payload, CRC32C of the payload,
// CRC32C of these 12 bytes: a broken length is not waited for.
const headerSize = 16

// The preamble of a connection: magic, then the oldest and the newest version spoken.
const preambleSize = len(magic) + 4

const (
	magic = "batonmig"
	// Version of the protocol that is spoken here, and the oldest that is understood.
	Version, MinVersion = 1, 1
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

// Header of a frame.
type Header struct {
	Type   Type
	Length uint32 // of the payload in bytes, within the type's cap
	crc    uint32
}

func (h Header) put(b []byte) {
	clear(b[:4])
	b[0] = byte(h.Type)
	le.PutUint32(b[4:], h.Length)
	le.PutUint32(b[8:], h.crc)
	le.PutUint32(b[12:], crc32.Checksum(b[:12], castagnoli))
}

// ErrCorrupt is the cause when a checksum is wrong or a structure cannot be.
var ErrCorrupt = errors.New("corrupt stream")

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

// deadliner is what of a net.Conn ends a wait.
type deadliner interface {
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// Conn is a connection of frames. One goroutine may read; any may write. After an error of
// either direction, all that is left is Close.
type Conn struct {
	stream io.ReadWriteCloser
	dl     deadliner // nil: a stream without
	close  func() error

	setRead, setWrite func(time.Time) error // dl's

	socket                *rawSocket   // nil: a stream that is none
	readStall, writeStall atomic.Int64 // nanoseconds without progress that are an error, 0: any
	readSet, writeSet     atomic.Int64 // when the deadlines were set, in nanoseconds; 0: never
	interrupted           atomic.Bool
	broken                atomic.Bool // a frame may have gone out in part

	mu       sync.Mutex // of writes
	held     []byte     // what Hold keeps back; nil: nothing is
	sent     atomic.Uint64
	received atomic.Uint64
	ahead    [readAhead]byte
	unread   []byte // of ahead
	scratch  []byte // of the reader: small payloads, and batches that are decompressed
	unpack   decoders
}

// NewConn makes frames of a stream. Deadlines work if it has them, as a net.Conn does.
func NewConn(stream io.ReadWriteCloser) *Conn {
	c := &Conn{stream: stream, close: stream.Close, socket: newSocket(stream)}
	if d, ok := stream.(deadliner); ok {
		c.dl, c.setRead, c.setWrite = d, d.SetReadDeadline, d.SetWriteDeadline
	}
	if t, ok := stream.(interface{ NetConn() net.Conn }); ok {
		c.close = t.NetConn().Close // without TLS's farewell, which waits for a network that stalls
	}
	return c
}

// Direct says whether there is a socket, for Batch.Direct.
func (c *Conn) Direct() bool { return c.socket != nil }

// SetStall sets the time without progress after which reads and writes fail; 0 is for ever.
func (c *Conn) SetStall(read, write time.Duration) {
	c.readStall.Store(int64(read))
	c.writeStall.Store(int64(write))
	c.readSet.Store(0)
	c.writeSet.Store(0)
	if c.dl != nil && read == 0 {
		_ = c.dl.SetReadDeadline(time.Time{})
	}
}

// Close ends all that waits, at once.
func (c *Conn) Close() error { return c.close() }

// past is a deadline that is over.
var past = time.Unix(1, 0)

// Interrupt makes reads and writes fail, those that wait at once. WriteLast is still possible.
func (c *Conn) Interrupt() {
	c.interrupted.Store(true)
	if c.dl == nil || c.dl.SetReadDeadline(past) != nil || c.dl.SetWriteDeadline(past) != nil {
		_ = c.Close()
	}
}

// deadline makes a wait end after d or an eighth more, if not 0, or now if it was interrupted. What
// was set not long ago stays: it costs.
func (c *Conn) deadline(set func(time.Time) error, d int64, last *atomic.Int64) error {
	if now := time.Now(); c.dl != nil && d > 0 && now.UnixNano()-last.Load() >= d/8 {
		last.Store(now.UnixNano())
		_ = set(now.Add(time.Duration(d + d/8)))
		if c.interrupted.Load() { // between the check and the call, too
			_ = set(past)
		}
	}
	if c.interrupted.Load() {
		return net.ErrClosed
	}
	return nil
}

// WriteLast sends a frame within the time, also after Interrupt, unless the other side would
// not understand it any more. What was held is not sent.
func (c *Conn) WriteLast(t Type, v any, within time.Duration) error {
	if c.broken.Load() || c.dl == nil {
		return net.ErrClosed
	}
	c.mu.Lock()
	c.held = nil
	c.mu.Unlock()
	c.interrupted.Store(false)
	c.writeStall.Store(int64(within))
	c.writeSet.Store(0)
	return c.Write(t, v)
}

// Sent is the number of bytes written.
func (c *Conn) Sent() uint64 { return c.sent.Load() }

// Received is the number of bytes read.
func (c *Conn) Received() uint64 { return c.received.Load() }

// readAhead is what is read at once of small frames, and of what follows pages. What is larger goes where it should.
const readAhead = 8 << 10

// Read reads bytes, for what is not a frame.
func (c *Conn) Read(p []byte) (int, error) {
	if c.interrupted.Load() {
		return 0, net.ErrClosed
	}
	if len(c.unread) == 0 {
		if len(p) >= readAhead {
			return c.read(p)
		}
		n, err := c.read(c.ahead[:])
		if c.unread = c.ahead[:n]; n == 0 {
			return 0, err
		}
	}
	n := copy(p, c.unread)
	c.unread = c.unread[n:]
	return n, nil
}

// read reads from the stream into the buffers, of which there is one if that is no socket.
func (c *Conn) read(bufs ...[]byte) (n int, err error) {
	if err := c.deadline(c.setRead, c.readStall.Load(), &c.readSet); err != nil {
		return 0, err
	}
	if c.socket != nil {
		n, err = c.socket.read(bufs...)
	} else {
		n, err = c.stream.Read(bufs[0])
	}
	c.received.Add(uint64(n))
	return n, err
}

// readAll fills the buffers, which it changes. What has come of the next frame then is read with
// them.
func (c *Conn) readAll(bufs [][]byte) error {
	for len(bufs) > 0 {
		n, err := 0, error(nil)
		if len(c.unread) > 0 || c.socket == nil {
			n, err = c.Read(bufs[0])
		} else {
			c.unpack.more = append(append(c.unpack.more[:0], bufs...), c.ahead[:])
			n, err = c.read(c.unpack.more...)
		}
		for ; len(bufs) > 0 && n >= len(bufs[0]); bufs = bufs[1:] {
			n -= len(bufs[0])
		}
		if len(bufs) > 0 {
			if bufs[0] = bufs[0][n:]; err != nil {
				return noEOF(err)
			}
		} else if n > 0 {
			c.unread = c.ahead[:n]
		}
	}
	return nil
}

func (c *Conn) readFull(p []byte) error {
	_, err := io.ReadFull(c, p)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("the stream ends within a frame: %w", err)
	}
	return err
}

// writeAll writes a whole frame, or several.
func (c *Conn) writeAll(pieces ...[]byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil {
		return c.write(pieces...)
	}
	for _, p := range pieces {
		c.held = append(c.held, p...)
	}
	if len(c.held) < maxHeld {
		return nil
	}
	p := c.held
	c.held = []byte{}
	return c.write(p)
}

// maxHeld is about how many bytes are held at most.
const maxHeld = 1 << 20

// Hold keeps frames back until Release, or there are too many, and writes them as one.
func (c *Conn) Hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = []byte{}
}

// Release ends Hold.
func (c *Conn) Release() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.held
	c.held = nil
	return c.write(p)
}

// write writes; mu is held.
func (c *Conn) write(pieces ...[]byte) (err error) {
	if err := c.deadline(c.setWrite, c.writeStall.Load(), &c.writeSet); err != nil {
		return err
	}
	n := 0
	if c.socket != nil {
		n, err = c.socket.write(pieces...)
	}
	for i := 0; c.socket == nil && err == nil && i < len(pieces); i++ {
		k := 0
		k, err = c.stream.Write(pieces[i])
		n += k
	}
	c.sent.Add(uint64(n))
	if err != nil {
		c.broken.Store(true)
	}
	return err
}

// WritePreamble says who speaks.
func (c *Conn) WritePreamble() error {
	b := append(make([]byte, 0, preambleSize), magic...)
	b = le.AppendUint16(b, MinVersion)
	return c.writeAll(le.AppendUint16(b, Version))
}

// Begin says who speaks, and why.
func (c *Conn) Begin(t Type, v any) error {
	if err := c.WritePreamble(); err != nil {
		return err
	}
	return c.Write(t, v)
}

// ErrVersion is the cause when the two sides have no version in common.
var ErrVersion = errors.New("protocol version")

// ReadPreamble checks who speaks; a version that is not spoken here is an ErrVersion.
func (c *Conn) ReadPreamble() error {
	var b [preambleSize]byte
	if err := c.readFull(b[:]); err != nil {
		return err
	}
	if string(b[:len(magic)]) != magic {
		return corrupt("not a migration of baton's")
	}
	oldest, newest := le.Uint16(b[len(magic):]), le.Uint16(b[len(magic)+2:])
	if newest < MinVersion || oldest > Version {
		return fmt.Errorf("%w: the other side speaks %d to %d, this one %d to %d", ErrVersion, oldest, newest, MinVersion, Version)
	}
	return nil
}

// Write sends a frame. V is its message, a struct for CBOR, or nil for none.
func (c *Conn) Write(t Type, v any) error {
	payload := []byte(nil)
	if v != nil {
		var err error
		if payload, err = encoding.Marshal(v); err != nil {
			return fmt.Errorf("%s frame: %w", t, err)
		}
	}
	if uint64(len(payload)) > uint64(t.limit()) {
		return fmt.Errorf("%s frame: %d bytes, at most %d", t, len(payload), t.limit())
	}
	b := make([]byte, headerSize, headerSize+len(payload))
	Header{t, uint32(len(payload)), updateCRC(0, payload)}.put(b)
	return c.writeAll(append(b, payload...))
}

// ReadHeader waits for the next frame. What follows is ReadMessage or ReadPages. At the
// end of the stream between two frames the error is io.EOF.
func (c *Conn) ReadHeader() (Header, error) {
	var b [headerSize]byte
	if err := c.readFull(b[:]); err != nil {
		return Header{}, err
	}
	h := Header{Type(b[0]), le.Uint32(b[4:]), le.Uint32(b[8:])}
	switch {
	case crc32.Checksum(b[:12], castagnoli) != le.Uint32(b[12:]):
		return Header{}, corrupt("checksum of a frame's header")
	case b[1]|b[2]|b[3] != 0 || typeNames[h.Type] == "":
		return Header{}, corrupt("%s frame is not known", h.Type)
	case h.Length > h.Type.limit():
		return Header{}, corrupt("%s frame of %d bytes, at most %d", h.Type, h.Length, h.Type.limit())
	}
	return h, nil
}

// ReadMessage reads the payload of a frame into the struct that v points to; nil is for a
// frame without a message.
func (c *Conn) ReadMessage(h Header, v any) error {
	// The buffer grows with what arrives, whatever the length says.
	var b bytes.Buffer
	if _, err := io.CopyN(&b, c, int64(h.Length)); err != nil {
		return fmt.Errorf("%s frame: %w", h.Type, noEOF(err))
	}
	if updateCRC(0, b.Bytes()) != h.crc {
		return corrupt("checksum of a %s frame", h.Type)
	}
	if v == nil {
		if h.Length != 0 {
			return corrupt("%s frame with a message", h.Type)
		}
		return nil
	}
	if err := decoding.Unmarshal(b.Bytes(), v); err != nil {
		return corrupt("%s frame: %v", h.Type, err)
	}
	return nil
}

// noEOF makes an end within a frame what it is: unexpected.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
