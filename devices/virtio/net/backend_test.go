package net

import (
	"bytes"
	"encoding/binary"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"baton/devices"
	"baton/devices/tap"
	"baton/devices/vhost"
	"baton/devices/virtio"
	"baton/tests/taptest"
	"baton/tests/virtiotest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func openTAP(t testing.TB, queues int) *tap.TAP {
	t.Helper()
	taptest.Netns(t)
	h, err := tap.Open(tap.Config{Name: "t0", Queues: queues})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.SetUp(); err != nil {
		t.Fatal(err)
	}
	return h
}

func newDevice(t testing.TB, c Config, b Backend) virtio.Device {
	t.Helper()
	n, err := New(c, b)
	if err != nil {
		t.Fatal(err)
	}
	return vectors{n, t}
}

func tapDevice(t testing.TB, c Config, queues int) virtio.Device {
	return newDevice(t, c, NewTAP(openTAP(t, queues)))
}

func vhostDevice(t testing.TB, c Config, queues int) virtio.Device {
	t.Helper()
	if _, err := os.Stat("/dev/vhost-net"); err != nil {
		t.Skipf("no vhost-net: %v", err)
	}
	h := openTAP(t, queues)
	var nets []*vhost.Net
	for range queues {
		n, err := vhost.Open()
		if err != nil {
			t.Fatal(err)
		}
		nets = append(nets, n)
	}
	b, err := NewVhost(h, nets)
	if err != nil {
		t.Fatal(err)
	}
	return newDevice(t, c, b)
}

// vectors gives each queue a vector, as the transport does when the driver uses MSI-X.
type vectors struct {
	*Net
	t testing.TB
}

func (v vectors) Activate(a virtio.Activation) error {
	for _, q := range a.Queues {
		call := &vector{interrupt: q.Interrupt, ended: make(chan struct{})}
		var err error
		if call.EventFD_, err = devices.NewEventFD(); err != nil {
			return err
		}
		go call.run()
		v.t.Cleanup(func() { _ = call.Close() })
		q.Call = call
	}
	return v.Net.Activate(a)
}

// vector is an irqfd.
type vector struct {
	devices.Vector
	EventFD_  *devices.EventFD
	interrupt func()
	stop      atomic.Bool
	ended     chan struct{}
}

func (v *vector) EventFD() int { return v.EventFD_.FD() }

func (v *vector) run() {
	defer close(v.ended)
	for v.EventFD_.Wait() == nil && !v.stop.Load() {
		v.interrupt()
	}
}

func (v *vector) Close() error {
	v.stop.Store(true)
	v.EventFD_.Signal()
	<-v.ended
	return v.EventFD_.Close()
}

// everywhere runs a test with each backend.
func everywhere(t *testing.T, queues int, f func(t *testing.T, dev virtio.Device)) {
	t.Run("tap", func(t *testing.T) { f(t, tapDevice(t, Config{MAC: testMAC}, queues)) })
	t.Run("vhost", func(t *testing.T) { f(t, vhostDevice(t, Config{MAC: testMAC}, queues)) })
}

func TestContractVhost(t *testing.T) {
	virtiotest.Run(t, func(t testing.TB) virtio.Device { return vhostDevice(t, Config{MAC: testMAC}, 2) })
}

func TestNewVhostErrors(t *testing.T) {
	h := openTAP(t, 2)
	if _, err := NewVhost(h, nil); err == nil || !strings.Contains(err.Error(), "0 instances for 2 queues") {
		t.Error(err)
	}
	if h.Queues() != 0 {
		t.Error("the TAP was left open")
	}
}

// transmit sends a frame, in two buffers, and waits until it has gone.
func transmit(r *virtiotest.Ring, header, frame []byte) {
	r.Do([][]byte{append(slices.Clone(header), frame[:3]...), frame[3:]})
}

// receive waits for a frame, which may span requests. It returns header and frame.
func receive(t *testing.T, r *virtiotest.Ring) (header, frame []byte) {
	t.Helper()
	req, n := r.Wait()
	b := req.Written(n)
	if len(b) < tap.HeaderSize {
		t.Fatalf("%d bytes were received", len(b))
	}
	// vhost leaves the field alone when buffers are not mergeable, before Linux 6.13.
	for range max(1, binary.LittleEndian.Uint16(b[headerBuffers:])) - 1 {
		req, n, ok := r.Poll()
		if !ok {
			t.Fatal("a part of the frame came later than the first")
		}
		b = append(b, req.Written(n)...)
	}
	return b[:tap.HeaderSize], b[tap.HeaderSize:]
}

func TestFrames(t *testing.T) {
	for _, tc := range []struct {
		name     string
		features uint64
		buffers  []int // of each receive request
	}{
		{"plain", virtio.FeatureVersion1, []int{12, 1514}},
		{"header apart", virtio.FeatureVersion1, []int{7, 4, 100, 2000}},
		{"event index", virtio.CoreFeatures, []int{1526}},
		{"mergeable", virtio.CoreFeatures | featureMergeRX, []int{1526}},
		{"small and mergeable", virtio.CoreFeatures | featureMergeRX, []int{5, 60}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
				d := virtiotest.NewDriver(t, dev, tc.features)
				host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
				rx, tx := d.Rings[0], d.Rings[1]
				for range 32 {
					rx.Add(nil, tc.buffers...)
				}
				rx.Kick()
				for i := range 300 { // more than a ring holds
					size := 46 + i*4
					transmit(tx, make([]byte, tap.HeaderSize), taptest.Frame(byte(i), size))
					if got := host.Recv(); !bytes.Equal(got, taptest.Frame(byte(i), size)) {
						t.Fatalf("frame %d: the host received %x", i, got)
					}
					host.Send(taptest.Frame(byte(i+1), size))
					header, got := receive(t, rx)
					if !bytes.Equal(got, taptest.Frame(byte(i+1), size)) {
						t.Fatalf("frame %d: the guest received %x", i, got)
					}
					length, want := 0, 1
					for _, n := range tc.buffers {
						length += n
					}
					want = (tap.HeaderSize + len(got) + length - 1) / length
					_, kernel := dev.(vectors).backend.(*vhostBackend)
					if merge := tc.features&featureMergeRX != 0; int(header[headerBuffers]) != want && (merge || !kernel) {
						t.Fatalf("frame %d in %d buffers, want %d", i, header[headerBuffers], want)
					}
					for range want {
						rx.Add(nil, tc.buffers...)
					}
					rx.Kick()
				}
			})
		})
	}
}

// segment returns a TCP segment of n bytes of payload over IPv4 that is to be cut into
// segments of 1448 bytes, and its virtio_net_hdr: 5.1.6.
func segment(n int) (header, frame []byte) {
	header = []byte{1, 1, 54, 0, 1448 & 0xff, 1448 >> 8, 34, 0, 16, 0} // needs checksum, TCPv4
	frame = append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x08\x00"), 0x45, 0)
	frame = binary.BigEndian.AppendUint16(frame, uint16(40+n))
	frame = append(frame, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2)
	sum := uint32(0)
	for i := 14; i < 34; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(frame[i:]))
	}
	binary.BigEndian.PutUint16(frame[24:], ^uint16(sum+sum>>16))
	frame = append(frame, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0)
	for i := range n {
		frame = append(frame, byte(i)^byte(i>>8))
	}
	return header, frame
}

// TestLargeFrames passes segments of 60 KB, uncut, both ways.
func TestLargeFrames(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		d := virtiotest.NewDriver(t, dev, dev.Features()&^featureMQ)
		host := taptest.NewSocket(t, "t0", unix.ETH_P_IP, true)
		rx, tx := d.Rings[0], d.Rings[1]
		for range 60 {
			rx.Add(nil, 1526)
		}
		rx.Kick()
		for _, n := range []int{60000, 65000, 3000, 60001} {
			header, frame := segment(n)
			host.Send(append(slices.Clone(header), frame...))
			gotHeader, got := receive(t, rx)
			if !bytes.Equal(got[54:], frame[54:]) || gotHeader[1] != 1 {
				t.Errorf("%d bytes: the guest received %d with header % x", n, len(got), gotHeader)
			}
			buffers := binary.LittleEndian.Uint16(gotHeader[headerBuffers:])
			if want := (12 + len(frame) + 1525) / 1526; int(buffers) != want {
				t.Errorf("%d bytes: %d buffers, want %d", n, buffers, want)
			}
			for range buffers {
				rx.Add(nil, 1526)
			}
			rx.Kick()

			transmit(tx, append(header, 0, 0), frame)
			if got := host.Recv(); len(got) < 64 || !bytes.Equal(got[64:], frame[54:]) || got[1] != 1 {
				t.Errorf("%d bytes: the host received %d", n, len(got))
			}
		}
	})
}

// TestFewBuffers has a long frame wait for the driver's buffers.
func TestFewBuffers(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		d := virtiotest.NewDriver(t, dev, virtio.CoreFeatures|featureMergeRX)
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		rx := d.Rings[0]
		rx.Add(nil, 100)
		rx.Kick()
		for i := range 20 {
			host.Send(taptest.Frame(byte(i), 1000))
		}
		for i := range 20 {
			for range 11 {
				rx.Add(nil, 100)
				rx.Kick()
			}
			if _, got := receive(t, rx); !bytes.Equal(got, taptest.Frame(byte(i), 1000)) {
				t.Fatalf("frame %d: %d bytes, % x", i, len(got), got[:min(20, len(got))])
			}
		}
	})
}

// TestTooLong drops a frame that no buffer can hold, and goes on.
func TestTooLong(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		d := virtiotest.NewDriver(t, dev, virtio.CoreFeatures)
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		rx := d.Rings[0]
		for range 4 {
			rx.Add(nil, 200)
		}
		rx.Kick()
		host.Send(taptest.Frame(1, 1000))
		host.Send(taptest.Frame(2, 100))
		if _, got := receive(t, rx); !bytes.Equal(got, taptest.Frame(2, 100)) {
			t.Errorf("received %x", got)
		}
	})
}

// TestMalformedFrames sends what no driver should; the device then still works.
func TestMalformedFrames(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		d := virtiotest.NewDriver(t, dev, virtio.FeatureVersion1)
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		tx := d.Rings[1]
		for _, out := range [][][]byte{
			{bytes.Repeat([]byte{0xff}, tap.HeaderSize), taptest.Frame(1, 100)},
			{make([]byte, tap.HeaderSize), {1, 2, 3}},
			{make([]byte, tap.HeaderSize), make([]byte, 200000)},
		} {
			tx.Do(out)
		}
		transmit(tx, make([]byte, tap.HeaderSize), taptest.Frame(9, 100))
		if got := host.Recv(); !bytes.Equal(got, taptest.Frame(9, 100)) {
			t.Errorf("the host received %x", got)
		}
	})
	t.Run("short", func(t *testing.T) { // vhost calls this a broken ring
		d := virtiotest.NewDriver(t, tapDevice(t, Config{}, 1), virtio.FeatureVersion1)
		d.Rings[1].Do([][]byte{{1, 2, 3}})
		d.Rings[1].Do(nil, 100)
		if len(d.Failures) != 0 {
			t.Error(<-d.Failures)
		}
	})
}

func TestLink(t *testing.T) {
	everywhere(t, 1, func(t *testing.T, dev virtio.Device) {
		n := dev.(vectors).Net
		d := virtiotest.NewDriver(t, dev, virtio.CoreFeatures|featureMergeRX|featureStatus)
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		rx, tx := d.Rings[0], d.Rings[1]
		for range 100 {
			rx.Add(nil, 100)
		}
		rx.Kick()
		for i := range byte(5) {
			n.SetLink(false)
			<-d.Changes
			host.Send(taptest.Frame(100, 60)) // lost
			tx.Add([][]byte{make([]byte, tap.HeaderSize), taptest.Frame(10+i, 60)})
			tx.Kick()
			n.SetLink(true)
			<-d.Changes
			if got := host.Recv(); !bytes.Equal(got, taptest.Frame(10+i, 60)) {
				t.Errorf("the host received %x", got)
			}
			tx.Wait()
			host.Send(taptest.Frame(i, 60))
			if _, got := receive(t, rx); !bytes.Equal(got, taptest.Frame(i, 60)) {
				t.Errorf("the guest received %x, want %x", got, taptest.Frame(i, 60))
			}
		}
		n.SetLink(false)
		if rx.Position() != 5 || tx.Position() != 5 {
			t.Errorf("the queues stand at %d and %d, want 5", rx.Position(), tx.Position())
		}
	})
}

func TestQueuePairs(t *testing.T) {
	everywhere(t, 3, func(t *testing.T, dev virtio.Device) {
		d := virtiotest.NewDriver(t, dev, dev.Features())
		host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
		for _, k := range []int{1, 3, 2, 1} {
			if ack := control(d.Rings[6], 4, 0, le(uint16(k))); ack != 0 {
				t.Fatalf("%d pairs: ack %d", k, ack)
			}
			link, err := netlink.LinkByName("t0")
			if err != nil {
				t.Fatal(err)
			}
			if l := link.(*netlink.Tuntap); l.Queues != k {
				t.Errorf("%d pairs: the TAP has %d queues enabled", k, l.Queues)
			}
			for i := range k {
				frame := taptest.Frame(byte(i), 100)
				transmit(d.Rings[2*i+1], make([]byte, tap.HeaderSize), frame)
				if got := host.Recv(); !bytes.Equal(got, frame) {
					t.Errorf("pair %d of %d: the host received %x", i, k, got)
				}
			}
		}
	})
}

// TestHostGone removes the interface under the device.
func TestHostGone(t *testing.T) {
	d := virtiotest.NewDriver(t, tapDevice(t, Config{}, 1), virtio.FeatureVersion1)
	d.Rings[0].Add(nil, 1526)
	d.Rings[0].Kick()
	link, err := netlink.LinkByName("t0")
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := d.WaitFailure(); !strings.Contains(err.Error(), "read TAP t0") {
		t.Error(err)
	}
}

// TestAllocations counts what a frame costs the garbage collector in userspace.
func TestAllocations(t *testing.T) {
	if info, _ := debug.ReadBuildInfo(); slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		t.Skip("the race detector's own allocations would be counted")
	}
	call, err := devices.NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer call.Close()
	d := virtiotest.NewDriver(t, called{tapDevice(t, Config{}, 1), call}, virtio.FeatureVersion1|featureMergeRX)
	host := taptest.NewSocket(t, "t0", taptest.EtherType, false)
	rx, tx := d.Rings[0], d.Rings[1]
	frame := taptest.Frame(1, 100)
	out, in := tx.Add([][]byte{append(make([]byte, tap.HeaderSize), frame...)}), rx.Add(nil, 1526)
	allocs := testing.AllocsPerRun(300, func() {
		tx.Queue.Kick.Signal()
		rx.Queue.Kick.Signal()
		host.Recv()
		host.Send(frame)
		if err := call.Wait(); err != nil {
			t.Fatal(err)
		}
		tx.Offer(out.Head)
		rx.Offer(in.Head)
	})
	if allocs != 0 {
		t.Errorf("%v allocations for a frame each way", allocs)
	}
}

// called is a device whose receive queue interrupts by an eventfd.
type called struct {
	virtio.Device
	call *devices.EventFD
}

func (c called) Activate(a virtio.Activation) error {
	a.Queues[0].Interrupt = c.call.Signal
	return c.Device.Activate(a)
}

// TestVector has chains of more buffers than readv takes.
func TestVector(t *testing.T) {
	r := &receiver{spare: make([]byte, maxFrame)}
	memory := make([]byte, 3000)
	for i := range 3 {
		r.take(&virtio.Chain{In: slices.Collect(slices.Chunk(memory[1000*i:][:1000], 2))})
	}
	if direct := r.vector(); direct != 2000 || len(r.vec) != 1001 {
		t.Errorf("%d bytes in %d buffers, want 2000 in 1000 and the spare", direct, len(r.vec)-1)
	}
	for _, off := range []int{0, 1, 999, 1000, 1997, 2990} {
		clear(memory)
		r.scatter(off, []byte("0123456789"))
		if got := string(memory[off:][:10]); got != "0123456789" {
			t.Errorf("at %d: %q", off, got)
		}
		if n := bytes.Count(memory, []byte{0}); n != 2990 {
			t.Errorf("at %d: %d bytes changed", off, 3000-n)
		}
	}
}

func TestOffload(t *testing.T) {
	for _, tc := range []struct {
		features uint64
		want     tap.Offload
	}{
		{0, 0},
		{featureGuestCSUM, tap.CSUM},
		{featureGuestTSO4 | featureGuestUFO, 0},
		{featureGuestCSUM | featureGuestTSO4 | featureHostTSO6, tap.CSUM | tap.TSO4},
		{featureGuestCSUM | featureGuestECN, tap.CSUM},
		{featureGuestCSUM | featureGuestTSO6 | featureGuestECN, tap.CSUM | tap.TSO6 | tap.TSOECN},
		{featureGuestCSUM | featureGuestUFO | featureGuestUSO4, tap.CSUM | tap.UFO},
		{featureGuestCSUM | featureGuestUSO4 | featureGuestUSO6, tap.CSUM | tap.USO4 | tap.USO6},
	} {
		if got := offload(tc.features); got != tc.want {
			t.Errorf("features %#x: offloads %#x, want %#x", tc.features, got, tc.want)
		}
	}
	h := host{openTAP(t, 1)}
	defer h.tap.Close()
	for bits := range uint64(1 << 7) { // the kernel takes each subset
		var features uint64
		for i, o := range offloads {
			if bits>>i&1 != 0 && h.tap.Offloads()&o.tap != 0 {
				features |= o.guest
			}
		}
		if err := h.SetOffloads(features); err != nil {
			t.Error(err)
		}
	}
	if f := h.Features(); f&(featureGuestCSUM|featureCSUM|featureGuestTSO4|featureHostTSO6) == 0 {
		t.Errorf("features %#x", f)
	}
}
