package migrate

import (
	"sync"
	"sync/atomic"

	"baton/kvm/guestmem"
)

// prefault has the kernel find, and clear, the pages for guest memory that is about to come: that
// costs more than to receive it. Only what follows what came is touched, so that RAM
// of zeros stays free, and by other threads, so that it is paid for beside the network.
type prefault struct {
	regions []guestmem.Region
	blocks  [][]atomic.Uint32 // of each region: see below
	queue   chan faulting
	sweep   chan struct{}       // a round has ended
	mapping func(gpa, n uint64) // TargetMachine.Map
	mapped  [][]atomic.Bool     // by it, of each region
	starts  atomic.Bool         // the guest does: no more of that

	mu   sync.Mutex
	done *sync.Cond // a block has become there
}

// faulting is a block that is queued.
type faulting struct {
	region int
	block  uint64
}

// States of a block.
const (
	absent  = iota
	queued  // for another thread
	working // by one
	there   // or on the way to be, by who receives it
)

const (
	hugePage = 2 << 20  // the unit, in bytes: what the kernel may map at once
	ahead    = 2        // blocks that are prepared: what is never needed has cost time as well
	bulk     = 64 << 10 // bytes that let expect more
	// prefaulters is the most threads that do it.
	prefaulters = 4
)

func newPrefault(m *guestmem.Memory, mapping func(gpa, n uint64)) *prefault {
	p := &prefault{regions: m.Regions(), queue: make(chan faulting, 4*ahead), sweep: make(chan struct{}, 1), mapping: mapping}
	p.done = sync.NewCond(&p.mu)
	for _, r := range p.regions {
		n := (r.Size + hugePage - 1) / hugePage
		p.blocks = append(p.blocks, make([]atomic.Uint32, n))
		p.mapped = append(p.mapped, make([]atomic.Bool, n))
	}
	return p
}

// roundEnded has what came without being waited for mapped, too.
func (p *prefault) roundEnded() {
	select {
	case p.sweep <- struct{}{}:
	default:
	}
}

// memory is a block's.
func (f faulting) memory(r guestmem.Region) (gpa uint64, b []byte) {
	off := f.block * hugePage
	return r.GPA + off, r.Host[off:min(off+hugePage, r.Size)]
}

// mapIt has the vCPUs find a block that is there, unless they do.
func (p *prefault) mapIt(f faulting) {
	if !p.starts.Load() && p.mapped[f.region][f.block].CompareAndSwap(false, true) {
		gpa, b := f.memory(p.regions[f.region])
		p.mapping(gpa, uint64(len(b)))
	}
}

// run works until the channel is closed.
func (p *prefault) run(stop <-chan struct{}) {
	for {
		select {
		case f := <-p.queue:
			if s := &p.blocks[f.region][f.block]; s.CompareAndSwap(queued, working) {
				_, memory := f.memory(p.regions[f.region])
				populate(memory)
				p.mu.Lock()
				s.Store(there)
				p.mu.Unlock()
				p.done.Broadcast()
				p.mapIt(f)
			}
		case <-p.sweep:
			for region, blocks := range p.blocks {
				for b := range blocks {
					if blocks[b].Load() == there {
						p.mapIt(faulting{region, uint64(b)})
					}
				}
			}
		case <-stop:
			return
		}
	}
}

// coming is called before the n bytes at gpa, of one region, are written.
func (p *prefault) coming(gpa, n uint64) {
	for i, r := range p.regions {
		off := gpa - r.GPA
		if off >= r.Size {
			continue
		}
		first, last := off/hugePage, (off+n-1)/hugePage
		if n >= bulk {
			for b := last + 1; b <= last+ahead && b < uint64(len(p.blocks[i])); b++ {
				p.prepare(i, b)
			}
		}
		for b := first; b <= last; b++ {
			s := &p.blocks[i][b]
			if s.Load() == there || s.CompareAndSwap(absent, there) || s.CompareAndSwap(queued, there) {
				continue
			}
			p.mu.Lock()
			for s.Load() == working {
				p.done.Wait()
			}
			p.mu.Unlock()
		}
	}
}

// prepare queues a block, if nobody has.
func (p *prefault) prepare(region int, b uint64) {
	s := &p.blocks[region][b]
	if s.Load() != absent {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == cap(p.queue) || !s.CompareAndSwap(absent, queued) {
		return
	}
	p.queue <- faulting{region, b}
}
