package migrate

import (
	"sync"
	"sync/atomic"

	"baton/kvm/guestmem"
)

// prefault has the vCPUs find the guest memory that has come, before they run. To have the memory itself made before it
// is written to, by other threads, would take CPUs from the network, and was slower.
type prefault struct {
	regions []guestmem.Region
	mapping func(gpa, n uint64) // TargetMachine.Map
	came    [][]atomic.Bool     // blocks of each region
	mapped  [][]bool            // run's
	queue   chan faulting       // blocks that have come
	sweep   chan struct{}       // a round has ended

	mu     sync.Mutex // of mapping
	starts bool       // the guest does: no more of that
}

// faulting is a block that is queued.
type faulting struct {
	region int
	block  uint64
}

// hugePage is a block, in bytes: what the kernel may map at once.
const hugePage = 2 << 20

func newPrefault(m *guestmem.Memory, mapping func(gpa, n uint64)) *prefault {
	p := &prefault{regions: m.Regions(), mapping: mapping, queue: make(chan faulting, 16), sweep: make(chan struct{}, 1)}
	for _, r := range p.regions {
		n := (r.Size + hugePage - 1) / hugePage
		p.came = append(p.came, make([]atomic.Bool, n))
		p.mapped = append(p.mapped, make([]bool, n))
	}
	return p
}

// coming is called before the n bytes at gpa, of one region, are written. Where a block begins, the one before it has
// come but for its end, or for what comes by another connection; what else has, roundEnded finds.
func (p *prefault) coming(gpa, n uint64) {
	for i, r := range p.regions {
		off := gpa - r.GPA
		if off >= r.Size {
			continue
		}
		for b := off / hugePage; b <= (off+n-1)/hugePage; b++ {
			if p.came[i][b].Load() || p.came[i][b].Swap(true) || b == 0 || !p.came[i][b-1].Load() {
				continue
			}
			select {
			case p.queue <- faulting{i, b - 1}:
			default:
			}
		}
	}
}

// roundEnded has all mapped that has come.
func (p *prefault) roundEnded() {
	select {
	case p.sweep <- struct{}{}:
	default:
	}
}

// guestStarts returns when nothing is being mapped, and never will be.
func (p *prefault) guestStarts() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.starts = true
}

// mapIt has the vCPUs find a block, unless they do.
func (p *prefault) mapIt(f faulting) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.starts || p.mapped[f.region][f.block] {
		return
	}
	p.mapped[f.region][f.block] = true
	r, off := p.regions[f.region], f.block*hugePage
	p.mapping(r.GPA+off, min(hugePage, r.Size-off))
}

// run works until the channel is closed.
func (p *prefault) run(stop <-chan struct{}) {
	for {
		select {
		case f := <-p.queue:
			p.mapIt(f)
		case <-p.sweep:
			for region, blocks := range p.came {
				for b := range blocks {
					select {
					case <-stop:
						return
					default:
					}
					if blocks[b].Load() {
						p.mapIt(faulting{region, uint64(b)})
					}
				}
			}
		case <-stop:
			return
		}
	}
}
