package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"

	"baton/devices"
	"baton/kvm/guestmem"
)

// Limits of a queue.
const (
	// MaxQueueSize is the greatest number of entries of a queue.
	MaxQueueSize = 1024
	// MaxChain is the greatest number of buffers in a chain, those of an indirect table
	// included: what one readv or writev takes (IOV_MAX).
	MaxChain = 1024
)

// Descriptor and ring layout: 2.7.5 to 2.7.8.
const (
	descSize         = 16
	descFlagNext     = 1 << 0
	descFlagWrite    = 1 << 1
	descFlagIndirect = 1 << 2

	availHeader          = 4 // flags, idx; then 2 bytes per entry, then used_event
	availFlagNoInterrupt = 1 << 0

	usedHeader       = 4 // flags, idx; then 8 bytes per entry, then avail_event
	usedElemSize     = 8
	usedFlagNoNotify = 1 << 0
)

// Queue is one split virtqueue (2.7). The exported fields are set by the transport and fixed
// while the device is active.
//
// Pop, EnableKicks and DisableKicks belong to one goroutine at a time; Push and Notify may
// be called by any.
type Queue struct {
	Index uint16
	Size  uint16 // entries, a power of two
	// Desc, Avail and Used are the guest-physical addresses of the descriptor area, the
	// driver area and the device area.
	Desc, Avail, Used uint64
	// Enabled says that the driver has set the queue up.
	Enabled bool

	// Kick is signalled when the driver has made buffers available.
	Kick *devices.EventFD
	// Call is the vector that the driver gave to the queue, nil for none. A backend in the
	// kernel signals its EventFD; who uses Notify need not care.
	Call devices.Vector
	// Interrupt tells the driver that buffers were used. Notify calls it.
	Interrupt func()

	mem      *guestmem.Memory
	desc     []byte // windows of the three areas
	avail    []byte
	used     []byte
	indirect bool // VIRTIO_F_INDIRECT_DESC was negotiated
	eventIdx bool // VIRTIO_F_EVENT_IDX was negotiated
	next     uint16
	err      error // why the queue stopped

	mu       sync.Mutex
	free     []*Chain
	usedIdx  uint16
	notified uint16 // usedIdx at the last Notify
}

// NewQueue returns a queue that is not set up, with a Kick of its own.
func NewQueue(index, size uint16) (*Queue, error) {
	kick, err := devices.NewEventFD()
	return &Queue{Index: index, Size: size, Kick: kick, Interrupt: func() {}}, err
}

// Close gives back the Kick.
func (q *Queue) Close() error { return q.Kick.Close() }

// Start makes the queue ready to Pop from its beginning. It fails when an area is not
// aligned (2.7) or not in one region of guest RAM.
func (q *Queue) Start(mem *guestmem.Memory, features uint64) error {
	if q.Size == 0 || q.Size > MaxQueueSize || q.Size&(q.Size-1) != 0 {
		return fmt.Errorf("queue %d: size %d is no power of two up to %d", q.Index, q.Size, MaxQueueSize)
	}
	n := uint64(q.Size)
	for _, a := range []struct {
		name             string
		addr, size, mask uint64
		window           *[]byte
	}{
		{"descriptor area", q.Desc, descSize * n, 15, &q.desc},
		{"driver area", q.Avail, availHeader + 2*n + 2, 1, &q.avail},
		{"device area", q.Used, usedHeader + usedElemSize*n + 2, 3, &q.used},
	} {
		if a.addr&a.mask != 0 {
			return fmt.Errorf("queue %d: %s %#x is not aligned to %d bytes", q.Index, a.name, a.addr, a.mask+1)
		}
		var err error
		if *a.window, err = mem.Bytes(a.addr, a.size); err != nil {
			return fmt.Errorf("queue %d: %s: %w", q.Index, a.name, err)
		}
	}
	q.mem = mem
	q.indirect = features&FeatureIndirectDesc != 0
	q.eventIdx = features&FeatureEventIdx != 0
	q.next, q.err = 0, nil
	q.mu.Lock()
	defer q.mu.Unlock()
	q.usedIdx, q.notified, q.free = 0, 0, nil
	return nil
}

// Pop takes the next chain of buffers that the driver made available, or nil when there is
// none. The chain is the caller's until Push. A malformed chain or ring is an error, and the
// queue stays stopped: every later Pop returns the same error.
func (q *Queue) Pop() (*Chain, error) {
	if q.err != nil {
		return nil, q.err
	}
	n := q.pending()
	if n == 0 {
		return nil, nil
	}
	if n > q.Size {
		return nil, q.fail(fmt.Errorf("available index jumps by %d, the size is %d", n, q.Size))
	}
	head := binary.LittleEndian.Uint16(q.avail[availHeader+2*int(q.next&(q.Size-1)):])
	c := q.chain()
	if err := q.walk(c, head); err != nil {
		return nil, q.fail(fmt.Errorf("descriptor chain %d: %w", head, err))
	}
	q.next++
	return c, nil
}

func (q *Queue) fail(err error) error {
	q.err = fmt.Errorf("queue %d: %w", q.Index, err)
	return q.err
}

// pending is how far the driver's index is ahead of ours.
func (q *Queue) pending() uint16 {
	idx, _ := q.mem.Load16(q.Avail + 2) // Start has checked the address
	return idx - q.next
}

func (q *Queue) chain() *Chain {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := len(q.free)
	if n == 0 {
		return new(Chain)
	}
	c := q.free[n-1]
	q.free = q.free[:n-1]
	c.reset()
	return c
}

// walk fills c with the buffers that start at head: 2.7.5, indirect tables 2.7.5.3. Each
// descriptor is read once, for the driver may change it at any time.
func (q *Queue) walk(c *Chain, head uint16) error {
	c.Head = head
	table, inTable := q.desc, false
	total := uint64(0)
	for i, left := uint32(head), len(table)/descSize; ; left-- {
		if left == 0 {
			return errors.New("has a loop")
		}
		if i >= uint32(len(table)/descSize) {
			return fmt.Errorf("descriptor %d is not in the table", i)
		}
		d := table[i*descSize:][:descSize]
		addr := binary.LittleEndian.Uint64(d)
		size := uint64(binary.LittleEndian.Uint32(d[8:]))
		flags := binary.LittleEndian.Uint16(d[12:])
		next := binary.LittleEndian.Uint16(d[14:])
		switch {
		case size == 0:
			return fmt.Errorf("descriptor %d has no length", i)
		case flags&descFlagIndirect == 0:
		case !q.indirect || inTable:
			return fmt.Errorf("descriptor %d is indirect where none may be", i)
		case flags&descFlagNext != 0:
			return fmt.Errorf("descriptor %d is indirect and has a next", i)
		case size%descSize != 0 || size > MaxChain*descSize:
			return fmt.Errorf("descriptor %d: indirect table of %d bytes", i, size)
		}
		b, err := q.mem.Bytes(addr, size)
		if err != nil {
			return fmt.Errorf("descriptor %d: %w", i, err)
		}
		if flags&descFlagIndirect != 0 {
			table, inTable = b, true
			i, left = 0, len(table)/descSize+1
			continue
		}
		if total += size; total > math.MaxUint32 {
			return errors.New("is longer than 4 GiB")
		}
		if len(c.segments)+len(c.Out) == MaxChain {
			return fmt.Errorf("has more than %d buffers", MaxChain)
		}
		if flags&descFlagWrite != 0 {
			c.In = append(c.In, b)
			c.segments = append(c.segments, guestmem.Range{Base: addr, Size: size})
		} else if len(c.In) > 0 {
			return fmt.Errorf("descriptor %d is readable after a writable one", i)
		} else {
			c.Out = append(c.Out, b)
		}
		if flags&descFlagNext == 0 {
			c.out, c.in = c.Out, c.In
			return nil
		}
		i = uint32(next)
	}
}

// Push gives the chain back to the driver, who is told by the next Notify. Written is how
// many bytes the device has written, from the beginning of In. The chain must not be used
// after.
func (q *Queue) Push(c *Chain, written uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.put(c, written)
	_ = q.mem.Store16(q.Used+2, q.usedIdx)
}

// PushAll is Push of several chains of which the driver sees all or none, as a frame in
// several buffers needs (5.1.6.4).
func (q *Queue) PushAll(chains []*Chain, written []uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, c := range chains {
		q.put(c, written[i])
	}
	_ = q.mem.Store16(q.Used+2, q.usedIdx)
}

// put fills the next element of the used ring, which the driver does not see yet.
func (q *Queue) put(c *Chain, written uint32) {
	left := uint64(written)
	for _, s := range c.segments {
		n := min(left, s.Size)
		q.mem.MarkDirty(s.Base, n)
		if left -= n; left == 0 {
			break
		}
	}
	off := usedHeader + usedElemSize*uint64(q.usedIdx&(q.Size-1))
	binary.LittleEndian.PutUint32(q.used[off:], uint32(c.Head))
	binary.LittleEndian.PutUint32(q.used[off+4:], written)
	q.mem.MarkDirty(q.Used+off, usedElemSize)
	q.usedIdx++
	q.free = append(q.free, c)
}

// Position is the free-running index of the chain that Pop takes next: where a backend that
// reads the rings itself has to begin.
func (q *Queue) Position() uint16 { return q.next }

// Seek makes Pop continue at next, and Push behind what the used ring holds: where such a
// backend has stopped. Chains from next on that were popped and not pushed will be popped
// again.
func (q *Queue) Seek(next uint16) {
	used, _ := q.mem.Load16(q.Used + 2)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.next, q.usedIdx, q.notified = next, used, used
}

// inFlight is how many chains are taken and not given back.
func (q *Queue) inFlight() uint16 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.next - q.usedIdx
}

// Notify tells the driver about the chains pushed since the last Notify, unless it does
// not want to know (2.7.7.2).
func (q *Queue) Notify() {
	q.mu.Lock()
	last, idx := q.notified, q.usedIdx
	q.notified = idx
	q.mu.Unlock()
	if last == idx {
		return
	}
	// The store of the used index in Push and these loads are sequentially consistent: either
	// we see the driver's wish, or the driver sees the new index.
	if q.eventIdx {
		event, _ := q.mem.Load16(q.Avail + availHeader + 2*uint64(q.Size))
		if idx-event-1 >= idx-last {
			return
		}
	} else if flags, _ := q.mem.Load16(q.Avail); flags&availFlagNoInterrupt != 0 {
		return
	}
	q.Interrupt()
}

// unnotified says whether chains were pushed since the last Notify.
func (q *Queue) unnotified() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.notified != q.usedIdx
}

// EnableKicks asks the driver to signal Kick for the next buffer (2.7.10), and says whether
// there are buffers already, for which no signal will come.
func (q *Queue) EnableKicks() (more bool) {
	if q.eventIdx {
		_ = q.mem.Store16(q.Used+usedHeader+usedElemSize*uint64(q.Size), q.next)
	} else {
		_ = q.mem.Store16(q.Used, 0)
	}
	return q.pending() != 0
}

// DisableKicks tells the driver that buffers will be found without a signal; it may signal
// all the same.
func (q *Queue) DisableKicks() {
	if !q.eventIdx { // with event indexes the stale index already says so
		_ = q.mem.Store16(q.Used, usedFlagNoNotify)
	}
}
