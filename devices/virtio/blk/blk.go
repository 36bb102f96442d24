// Package blk is the virtio block device on a raw image file or a host block device:
// Virtual I/O Device specification 1.2, section 5.2.
//
//	queue ─> Worker ─ in the page cache ─> preadv2/pwritev2(RWF_NOWAIT) ─> Push
//	            └──── has to wait ───────> goroutine, at most 32 a queue ─> Push, Notify
//
// Data moves directly between the file and the guest's buffers.
package blk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
	"sync"

	"baton/devices"
	"baton/devices/virtio"
)

// Feature bits: 5.2.3.
const (
	featureSegMax      = 1 << 2
	featureReadOnly    = 1 << 5
	featureBlockSize   = 1 << 6
	featureFlush       = 1 << 9
	featureTopology    = 1 << 10
	featureMQ          = 1 << 12
	featureDiscard     = 1 << 13
	featureWriteZeroes = 1 << 14
)

// Request types and status: 5.2.6.
const (
	reqIn          = 0
	reqOut         = 1
	reqFlush       = 4
	reqGetID       = 8
	reqDiscard     = 11
	reqWriteZeroes = 13

	statusOK          = 0
	statusIOError     = 1
	statusUnsupported = 2

	headerSize  = 16 // type, reserved, sector
	rangeSize   = 16 // sector, number of sectors, flags
	rangeUnmap  = 1 << 0
	idSize      = 20
	configSize  = 60
	maxQueues   = 256
	queueSize   = 256
	maxInFlight = 32 // requests of a queue that wait for the host
)

// Limits of one discard or write-zeroes request. The latter is the smaller because a host
// that cannot do it has to write that much.
const (
	maxRanges  = 16
	maxDiscard = 1 << 30 / SectorSize // sectors
	maxZero    = 16 << 20 / SectorSize
)

// Config says what the guest sees of a disk.
type Config struct {
	Disk *Disk
	// Serial is what the guest reads as the disk's serial number, at most 20 bytes.
	Serial string
	// Queues is the number of queues, 1 to 256; 0 is 1.
	Queues int
	// BlockSize is the logical block size in bytes, a power of two of 512 to 32768; 0 is 512.
	BlockSize uint32
}

// Device is a virtio block device.
type Device struct {
	cfg      Config
	features uint64
	space    [configSize]byte

	workers []*virtio.Worker
}

// New returns a device that owns the disk. On an error the disk stays the caller's.
func New(cfg Config) (*Device, error) {
	fail := func(format string, args ...any) (*Device, error) {
		return nil, fmt.Errorf("disk %s: "+format, append([]any{cfg.Disk.path}, args...)...)
	}
	if cfg.Queues == 0 {
		cfg.Queues = 1
	}
	if cfg.BlockSize == 0 {
		cfg.BlockSize = SectorSize
	}
	switch bs := cfg.BlockSize; {
	case cfg.Queues < 1 || cfg.Queues > maxQueues:
		return fail("%d queues, not 1 to %d", cfg.Queues, maxQueues)
	case len(cfg.Serial) > idSize:
		return fail("serial %q is longer than %d bytes", cfg.Serial, idSize)
	case bs < SectorSize || bs > 32<<10 || bits.OnesCount32(bs) != 1:
		return fail("block size %d is not a power of two of 512 to 32768", bs)
	case cfg.Disk.size%int64(bs) != 0:
		return fail("size of %d bytes is not a multiple of the block size %d", cfg.Disk.size, bs)
	}
	d := &Device{cfg: cfg, features: virtio.CoreFeatures |
		featureSegMax | featureBlockSize | featureFlush | featureTopology | featureMQ | featureDiscard | featureWriteZeroes}
	if cfg.Disk.o.ReadOnly {
		d.features = d.features&^(featureDiscard|featureWriteZeroes) | featureReadOnly
	}
	// struct virtio_blk_config: 5.2.4.
	le, physical := binary.LittleEndian, max(cfg.Disk.blockSize, cfg.BlockSize)
	le.PutUint64(d.space[0:], uint64(cfg.Disk.size/SectorSize))
	le.PutUint32(d.space[12:], queueSize-2) // seg_max: all but header and status
	le.PutUint32(d.space[20:], cfg.BlockSize)
	d.space[24] = uint8(bits.Len32(physical/cfg.BlockSize) - 1) // physical_block_exp
	le.PutUint16(d.space[26:], uint16(physical/cfg.BlockSize))  // min_io_size
	le.PutUint16(d.space[34:], uint16(cfg.Queues))
	le.PutUint32(d.space[36:], maxDiscard)
	le.PutUint32(d.space[40:], maxRanges)
	le.PutUint32(d.space[44:], physical/SectorSize) // discard_sector_alignment
	le.PutUint32(d.space[48:], maxZero)
	le.PutUint32(d.space[52:], maxRanges)
	d.space[56] = 1 // write_zeroes_may_unmap
	return d, nil
}

// Type implements [virtio.Device].
func (d *Device) Type() uint32 { return virtio.TypeBlock }

// Features implements [virtio.Device].
func (d *Device) Features() uint64 { return d.features }

// QueueSizes implements [virtio.Device].
func (d *Device) QueueSizes() []uint16 {
	return slices.Repeat([]uint16{queueSize}, d.cfg.Queues)
}

// ReadConfig implements [virtio.Device].
func (d *Device) ReadConfig(off uint64, p []byte) { virtio.CopyConfig(p, d.space[:], off) }

// Activate implements [virtio.Device].
func (d *Device) Activate(a virtio.Activation) error {
	for _, q := range a.Queues {
		if q.Enabled {
			s := &server{
				Disk:         d.cfg.Disk,
				serial:       d.cfg.Serial,
				q:            q,
				failed:       a.Failed,
				writeThrough: a.Features&featureFlush == 0,
				slots:        make(chan struct{}, maxInFlight),
			}
			d.workers = append(d.workers, q.Go(a.Failed, s.run))
		}
	}
	return nil
}

// Reset implements [virtio.Device]. Requests under way are completed first.
func (d *Device) Reset() {
	for _, w := range d.workers {
		w.Stop()
	}
	d.workers = nil
}

// Pause implements [virtio.Device]. Requests under way are completed first.
func (d *Device) Pause() { d.Reset() }

// Resume implements [virtio.Device].
func (d *Device) Resume(a virtio.Activation) error { return d.Activate(a) }

// state is what the driver was told of the disk, which may not change under it.
type state struct {
	Sectors   uint64 `cbor:"1,keyasint"`
	BlockSize uint32 `cbor:"2,keyasint"`
}

func (d *Device) state() state { return state{uint64(d.cfg.Disk.size / SectorSize), d.cfg.BlockSize} }

// SaveState implements [virtio.Device].
func (d *Device) SaveState() ([]byte, error) { return devices.EncodeState(d.state()) }

// LoadState implements [virtio.Device].
func (d *Device) LoadState(info devices.StateInfo, version uint16, data []byte) error {
	var s state
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	switch here := d.state(); {
	case s.Sectors != here.Sectors:
		return info.BadField("Sectors", "the guest's disk has %d, %s has %d: another disk", s.Sectors, d.cfg.Disk.path, here.Sectors)
	case s.BlockSize != here.BlockSize:
		return info.BadField("BlockSize", "%d bytes, here %d\nset logical_block_size", s.BlockSize, here.BlockSize)
	}
	return nil
}

// Disk is the disk that New was given.
func (d *Device) Disk() *Disk { return d.cfg.Disk }

// Close implements [virtio.Device].
func (d *Device) Close() error {
	d.Reset()
	return d.cfg.Disk.Close()
}

// server serves one queue.
type server struct {
	*Disk
	serial string
	q      *virtio.Queue
	failed func(error)
	// writeThrough: a driver without VIRTIO_BLK_F_FLUSH relies on every write (5.2.6.2).
	writeThrough bool
	slots        chan struct{} // one element per request that waits for the host
	report       sync.Once     // of the host's errors
}

// request is one chain, taken apart.
type request struct {
	chain  *virtio.Chain
	typ    uint32
	off    int64  // bytes
	data   uint32 // bytes of the data buffers
	status []byte // the last byte of the chain
}

var errMalformed = errors.New("request without header or status")

func (s *server) run(w *virtio.Worker) {
	var waiting sync.WaitGroup
	defer waiting.Wait()
	w.Gather()
	for c := w.Next(); c != nil; c = w.Next() {
		r := request{chain: c}
		var header [headerSize]byte
		if c.Read(header[:]) < headerSize || len(c.In) == 0 {
			s.failed(fmt.Errorf("queue %d: %w", s.q.Index, errMalformed))
			return
		}
		r.takeStatus()
		r.typ = binary.LittleEndian.Uint32(header[:])
		if err := s.locate(&r, binary.LittleEndian.Uint64(header[8:])); err != nil {
			s.finish(r, err)
			continue
		}
		if err := s.do(&r, true); err != errWouldBlock {
			s.finish(r, err)
			continue
		}
		s.slots <- struct{}{}
		s.background(r, &waiting)
	}
}

// background goes on with a request that has to wait for the host. (A function of its own,
// for only these requests are worth an allocation.)
func (s *server) background(r request, waiting *sync.WaitGroup) {
	waiting.Go(func() {
		s.finish(r, s.do(&r, false))
		s.q.Notify()
		<-s.slots
	})
}

// takeStatus cuts the last byte off the chain's writable buffers.
func (r *request) takeStatus() {
	in := &r.chain.In
	i := len(*in) - 1
	last := (*in)[i]
	n := len(last) - 1
	r.status, (*in)[i] = last[n:], last[:n]
	if n == 0 {
		*in = (*in)[:i]
	}
}

var (
	errRange       = errors.New("outside of the disk or not whole sectors")
	errUnsupported = errors.New("unknown request")
)

// locate checks where a transfer goes.
func (s *server) locate(r *request, sector uint64) error {
	switch r.typ {
	case reqIn:
		r.data = r.chain.InLen()
	case reqOut:
		r.data = r.chain.OutLen()
	default:
		return nil
	}
	if !s.contains(sector, uint64(r.data)/SectorSize) || r.data%SectorSize != 0 {
		return errRange
	}
	r.off = int64(sector) * SectorSize
	return nil
}

// contains says whether the n sectors from sector are on the disk.
func (s *server) contains(sector, n uint64) bool {
	all := uint64(s.size) / SectorSize
	return sector <= all && n <= all-sector
}

// do carries a request out; with noWait, up to the point where the host has to wait, from
// where a second call goes on.
func (s *server) do(r *request, noWait bool) error {
	if s.o.ReadOnly && r.typ != reqIn && r.typ != reqGetID && r.typ != reqFlush {
		return errRange
	}
	switch r.typ {
	case reqIn:
		return s.transfer(&r.chain.In, &r.off, false, noWait)
	case reqGetID:
		var id [idSize]byte
		copy(id[:], s.serial)
		r.data = uint32(r.chain.Write(id[:]))
		return nil
	case reqOut:
		if err := s.transfer(&r.chain.Out, &r.off, true, noWait); err != nil || !s.writeThrough {
			return err
		}
		fallthrough
	case reqFlush:
		if noWait && !s.inMemory && !s.o.IgnoreFlush {
			return errWouldBlock
		}
		return s.flush()
	case reqDiscard, reqWriteZeroes:
		if noWait && !s.inMemory {
			return errWouldBlock
		}
		return s.ranges(r)
	}
	return errUnsupported
}

// ranges carries out a discard or write-zeroes request.
func (s *server) ranges(r *request) error {
	n := r.chain.OutLen()
	if n == 0 || n%rangeSize != 0 || n > maxRanges*rangeSize {
		return errRange
	}
	var b [rangeSize]byte
	for r.chain.Read(b[:]) == rangeSize {
		sector, n := binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint32(b[8:])
		flags := binary.LittleEndian.Uint32(b[12:])
		limit, known := uint32(maxDiscard), uint32(0)
		if r.typ == reqWriteZeroes {
			limit, known = maxZero, rangeUnmap
		}
		if flags&^known != 0 {
			return errUnsupported // 5.2.6.2
		}
		if n > limit || !s.contains(sector, uint64(n)) {
			return errRange
		}
		if n == 0 {
			continue
		}
		off, size := int64(sector)*SectorSize, int64(n)*SectorSize
		var err error
		if r.typ == reqDiscard {
			err = s.discard(off, size)
		} else {
			err = s.writeZeroes(off, size, flags&rangeUnmap != 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// finish gives the request back to the driver.
func (s *server) finish(r request, err error) {
	switch {
	case err == nil:
		r.status[0] = statusOK
	case err == errUnsupported:
		r.status[0] = statusUnsupported
	case err == errRange:
		r.status[0] = statusIOError
	default:
		r.status[0] = statusIOError
		s.report.Do(func() {
			slog.Warn("disk: the first failed request", "disk", s.path, "type", r.typ, "offset", r.off, "err", err)
		})
	}
	written := uint32(1)
	if r.typ == reqIn || r.typ == reqGetID {
		written += r.data // after an error part of it may be, which has to count as dirty
	}
	s.q.Push(r.chain, written)
}
