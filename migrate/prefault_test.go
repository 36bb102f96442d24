package migrate

import (
	"testing"

	"baton/kvm/guestmem"
)

// TestPrefault: a block that has come is mapped when the next one begins, or its round has ended, each once, and
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
	p.coming(5*hugePage, 4096)
	p.coming(7*hugePage-4096, 8192) // of two blocks, the first of which follows one that is mapped
	if a := <-mapped; a != 6*hugePage {
		t.Errorf("mapped %#x", a)
	}
	p.guestStarts()
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
