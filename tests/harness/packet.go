package harness

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
)

// A PacketTap is an endpoint that sends and receives single Ethernet frames on an
// interface of its own; make it a bridge's port to reach a guest.
type PacketTap struct {
	Name string

	t   testing.TB
	dev *water.Interface

	mu     sync.Mutex
	frames [][]byte
	more   chan struct{}
	closed error
}

// NewPacketTap makes the interface and sets it up.
func NewPacketTap(t testing.TB, name string) *PacketTap {
	t.Helper()
	dev, err := water.New(water.Config{DeviceType: water.TAP, PlatformSpecificParams: water.PlatformSpecificParams{Name: name}})
	must(t, "tap "+name, err)
	p := &PacketTap{Name: name, t: t, dev: dev, more: make(chan struct{})}
	undo(t, "tap "+name, dev.Close)
	must(t, "tap "+name, netlink.LinkSetUp(link(t, name)))
	go p.read()
	return p
}

func (p *PacketTap) read() {
	for {
		buf := make([]byte, 64<<10)
		n, err := p.dev.Read(buf)
		p.mu.Lock()
		if err != nil {
			p.closed = fmt.Errorf("tap %s: %w", p.Name, err)
		} else {
			p.frames = append(p.frames, buf[:n:n])
		}
		close(p.more)
		p.more = make(chan struct{})
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// Send sends one frame, without its checksum.
func (p *PacketTap) Send(frame []byte) {
	p.t.Helper()
	n, err := p.dev.Write(frame)
	if err == nil && n != len(frame) {
		err = os.ErrInvalid
	}
	must(p.t, "send on "+p.Name, err)
}

// Receive returns the first frame that came since the last call, or comes before ctx ends,
// for which match holds; the frames before it are dropped. Without one the test ends.
func (p *PacketTap) Receive(ctx context.Context, match func(frame []byte) bool) []byte {
	p.t.Helper()
	for {
		p.mu.Lock()
		for i, f := range p.frames {
			if match(f) {
				p.frames = p.frames[i+1:]
				p.mu.Unlock()
				return f
			}
		}
		dropped, more, err := len(p.frames), p.more, p.closed
		p.frames = nil
		p.mu.Unlock()
		must(p.t, "receive on "+p.Name, err)
		select {
		case <-more:
		case <-ctx.Done():
			p.t.Fatalf("receive on %s: %v; the last %d frames did not match", p.Name, context.Cause(ctx), dropped)
		}
	}
}
