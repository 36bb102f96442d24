package migrate

import (
	"testing"

	"baton/kvm/guestmem"
)

// TestPrefault: a block that has come is mapped when its round has ended, one that was prepared at once, each once, and
// none when the guest is about to start.
func TestPrefault(t *testing.T) {
	m, err := guestmem.New([]guestmem.Range{{Base: 0, Size: 16 * hugePage}}, guestmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	mapped := make(chan uint64, 16)
	p := newPrefault(m, func(gpa, n uint64) {
		if n != hugePage {
			t.Errorf("%d bytes at %#x", n, gpa)
		}
		mapped <- gpa
	})
	stop := make(chan struct{})
	ended := make(chan struct{})
	go func() { defer close(ended); p.run(stop) }()

	p.coming(0, 4096)
	p.coming(5*hugePage+4096, 8192)
	p.roundEnded()
	if a, b := <-mapped, <-mapped; a != 0 || b != 5*hugePage {
		t.Errorf("mapped %#x and %#x", a, b)
	}
	p.coming(5*hugePage, bulk) // much: more follows it
	if a, b := <-mapped, <-mapped; a != 6*hugePage || b != 7*hugePage {
		t.Errorf("prepared %#x and %#x", a, b)
	}
	p.starts.Store(true)
	p.coming(9*hugePage, 4096)
	p.roundEnded()
	for len(p.sweep) > 0 { // which run takes before it can end
		select {
		case gpa := <-mapped:
			t.Fatalf("mapped %#x", gpa)
		default:
		}
	}
	close(stop)
	<-ended
	if len(mapped) > 0 {
		t.Errorf("mapped %#x", <-mapped)
	}
}
