package vhost

import (
	"bytes"
	"errors"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"baton/devices"
	"baton/devices/tap"
	"baton/devices/virtio"
	"baton/kvm/guestmem"
	"baton/tests/taptest"
	"baton/tests/virtiotest"

	"golang.org/x/sys/unix"
)

func TestMemTable(t *testing.T) {
	mem := virtiotest.Memory(t)
	table, err := newMemTable(mem)
	if err != nil {
		t.Fatal(err)
	}
	if int(table.n) != len(mem.Regions()) {
		t.Errorf("%d regions, want %d", table.n, len(mem.Regions()))
	}
	for i, r := range mem.Regions() {
		host, _ := mem.HostAddr(r.GPA, r.Size)
		if got := table.regions[i]; got != (memRegion{gpa: r.GPA, size: r.Size, host: host}) || host == 0 {
			t.Errorf("region %d: %#x", i, got)
		}
	}

	var ranges []guestmem.Range
	for i := range uint64(maxRegions + 1) {
		ranges = append(ranges, guestmem.Range{Base: i * 2 * guestmem.PageSize, Size: guestmem.PageSize})
	}
	many, err := guestmem.New(ranges, guestmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer many.Close()
	if _, err := newMemTable(many); err == nil || !strings.Contains(err.Error(), "65 regions") {
		t.Errorf("too many regions: %v", err)
	}
}

func TestRingAddr(t *testing.T) {
	const size, high = 64 << 10, 4 << 30
	mem, err := guestmem.New([]guestmem.Range{{Base: 0, Size: size}, {Base: high, Size: size}}, guestmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	low, _ := mem.HostAddr(0, 1)
	up, _ := mem.HostAddr(high, 1)
	for _, tc := range []struct {
		name string
		ring Vring
		want vringAddr
		err  string
	}{
		{"in both regions", Vring{Size: 256, Desc: 0x1000, Avail: high + 0x2000, Used: 0x3000},
			vringAddr{index: 1, desc: low + 0x1000, avail: up + 0x2000, used: low + 0x3000}, ""},
		{"up to the end", Vring{Size: 256, Desc: size - 4096, Avail: high + size - 518, Used: size - 2054},
			vringAddr{index: 1, desc: low + size - 4096, avail: up + size - 518, used: low + size - 2054}, ""},
		{"descriptors beyond", Vring{Size: 256, Desc: size - 4095}, vringAddr{}, "descriptor table"},
		{"available beyond", Vring{Size: 256, Avail: size - 517}, vringAddr{}, "available ring"},
		{"used beyond", Vring{Size: 256, Used: size - 2053}, vringAddr{}, "used ring"},
		{"no RAM", Vring{Size: 1, Desc: 1 << 40}, vringAddr{}, "descriptor table"},
		{"wraps around", Vring{Size: 2, Desc: 1<<64 - 16}, vringAddr{}, "descriptor table"},
		{"greatest size", Vring{Size: 32768, Desc: 0}, vringAddr{}, "descriptor table"},
	} {
		got, err := new(Net).ringAddr(mem, 1, tc.ring)
		var outside *guestmem.RangeError
		switch {
		case tc.err == "" && (err != nil || got != tc.want):
			t.Errorf("%s: %#x, %v, want %#x", tc.name, got, err, tc.want)
		case tc.err != "" && (!errors.As(err, &outside) || !strings.Contains(err.Error(), tc.err)):
			t.Errorf("%s: error %v", tc.name, err)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	taptest.Thread(t, unix.CLONE_NEWNS) // to hide the device, if there is one
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Skipf("no mount: %v", err)
	}
	if err := unix.Mount("none", "/dev", "tmpfs", unix.MS_NODEV, ""); err != nil {
		t.Skipf("no mount: %v", err)
	}
	if _, err := Open(); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "modprobe vhost_net") {
		t.Errorf("no device: %v", err)
	}
	if err := unix.Mknod(device, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 238))); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(); !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "kvm") {
		t.Errorf("no access: %v", err)
	}
}

func TestNewNetErrors(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(f.Fd()))
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewNet(fd); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("/dev/null as vhost-net: %v", err)
	}
	if err := unix.Close(fd); err != unix.EBADF {
		t.Errorf("the descriptor was left open")
	}
}

// TestOpenUnderSignals has Go's scheduler interrupt the thread as often as can be.
func TestOpenUnderSignals(t *testing.T) {
	if _, err := os.Stat(device); err != nil {
		t.Skipf("no vhost-net: %v", err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid := unix.Gettid()
	var stop atomic.Bool
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for !stop.Load() {
			_ = unix.Tgkill(unix.Getpid(), tid, unix.SIGURG)
		}
	}()
	defer func() {
		stop.Store(true)
		<-ended
	}()
	for range 50 {
		n, err := Open()
		if err != nil {
			t.Fatal(err)
		}
		n.Close()
	}
}

// idle is a device whose rings the test serves by other means.
type idle struct{ virtio.Stateless }

func (idle) Type() uint32                     { return virtio.TypeNet }
func (idle) Features() uint64                 { return virtio.CoreFeatures }
func (idle) QueueSizes() []uint16             { return []uint16{256, 256} }
func (idle) ReadConfig(_ uint64, p []byte)    { clear(p) }
func (idle) Activate(virtio.Activation) error { return nil }
func (idle) Resume(virtio.Activation) error   { return nil }
func (idle) Reset()                           {}
func (idle) Pause()                           {}
func (idle) Close() error                     { return nil }

// rig is a vhost-net with a TAP on one side and a driver on the other.
type rig struct {
	*virtiotest.Driver
	net  *Net
	tap  *tap.TAP
	host *taptest.Socket
	call [2]*devices.EventFD
}

func newRig(t *testing.T) *rig {
	t.Helper()
	if _, err := os.Stat(device); err != nil {
		t.Skipf("no vhost-net: %v", err)
	}
	taptest.Netns(t)
	r := &rig{Driver: virtiotest.NewDriver(t, idle{}, virtio.CoreFeatures)}
	var err error
	if r.tap, err = tap.Open(tap.Config{Name: "t0"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.tap.Close() })
	if err := r.tap.SetUp(); err != nil {
		t.Fatal(err)
	}
	r.host = taptest.NewSocket(t, "t0", taptest.EtherType, false)
	if r.net, err = Open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.net.Close(); err != nil {
			t.Error(err)
		}
	})
	for i, ring := range r.Rings {
		if r.call[i], err = devices.NewEventFD(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		var stop atomic.Bool
		go func() { // what the irqfd does
			defer close(ended)
			for r.call[i].Wait() == nil && !stop.Load() {
				ring.Interrupt()
			}
		}()
		t.Cleanup(func() {
			stop.Store(true)
			r.call[i].Signal()
			<-ended
			r.call[i].Close()
		})
	}
	return r
}

func (r *rig) rings(base [2]uint16) (v [2]Vring) {
	for i, q := range r.Rings {
		v[i] = Vring{Size: q.Size, Base: base[i], Desc: q.Queue.Desc, Avail: q.Avail, Used: q.Used, Kick: q.Queue.Kick.FD(), Call: r.call[i].FD()}
	}
	return v
}

func (r *rig) start(t *testing.T, base [2]uint16) {
	t.Helper()
	features := r.net.Features() & virtio.CoreFeatures
	if err := r.net.Start(r.Mem, features, r.rings(base), r.tap.FD(0), func(err error) { r.Failures <- err }); err != nil {
		t.Fatal(err)
	}
}

// exchange sends frames both ways.
func (r *rig) exchange(t *testing.T, frames int) {
	t.Helper()
	rx, tx := r.Rings[0], r.Rings[1]
	for i := range frames {
		frame := taptest.Frame(byte(i), 60+i)
		tx.Do([][]byte{make([]byte, tap.HeaderSize), frame})
		if got := r.host.Recv(); !bytes.Equal(got, frame) {
			t.Errorf("frame %d: the host received %x, want %x", i, got, frame)
		}
		rx.Add(nil, 2048)
		rx.Kick()
		r.host.Send(frame)
		r.receive(t, frame)
	}
}

func (r *rig) receive(t *testing.T, frame []byte) {
	t.Helper()
	req, n := r.Rings[0].Wait()
	if got := req.Written(n); len(got) < tap.HeaderSize || !bytes.Equal(got[tap.HeaderSize:], frame) {
		t.Errorf("the guest received %x, want %x", got, frame)
	}
}

func TestServe(t *testing.T) {
	r := newRig(t)
	r.start(t, [2]uint16{})
	r.exchange(t, 300) // more than the rings hold
	base, err := r.net.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if base != [2]uint16{300, 300} {
		t.Errorf("the rings stand at %d, want 300", base)
	}

	// What comes now waits, on both sides.
	r.Rings[0].Add(nil, 2048)
	r.Rings[0].Kick()
	r.host.Send(taptest.Frame(7, 100))
	r.Rings[1].Add([][]byte{make([]byte, tap.HeaderSize), taptest.Frame(8, 100)})
	r.Rings[1].Kick()
	if _, _, ok := r.Rings[1].Poll(); ok {
		t.Error("a stopped ring was served")
	}
	r.start(t, base)
	r.receive(t, taptest.Frame(7, 100))
	r.Rings[1].Wait()
	if got := r.host.Recv(); !bytes.Equal(got, taptest.Frame(8, 100)) {
		t.Errorf("after the restart the host received %x", got)
	}
	r.exchange(t, 10)
}

func TestBrokenRing(t *testing.T) {
	r := newRig(t)
	r.start(t, [2]uint16{})
	r.Rings[1].Desc(0, 0, 64, 1, 0) // a loop
	r.Rings[1].Offer(0)
	r.Rings[1].Queue.Kick.Signal()
	if err := r.WaitFailure(); !strings.Contains(err.Error(), "broken a ring") {
		t.Error(err)
	}
	done := make(chan error)
	go func() {
		_, err := r.net.Stop()
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(virtiotest.Patience):
		t.Fatal("Stop hangs")
	}
}

func TestStartErrors(t *testing.T) {
	r := newRig(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, tc := range []struct {
		name   string
		change func(v *[2]Vring, tap *int, features *uint64)
		want   string
	}{
		{"not a TAP", func(_ *[2]Vring, tap *int, _ *uint64) { *tap = int(null.Fd()) }, "attach ring 0 to the TAP"},
		{"ring outside of RAM", func(v *[2]Vring, _ *int, _ *uint64) { v[1].Used = 1 << 50 }, "ring 1: used ring"},
		{"misaligned ring", func(v *[2]Vring, _ *int, _ *uint64) { v[1].Used++ }, "ring 1"},
		{"size", func(v *[2]Vring, _ *int, _ *uint64) { v[0].Size = 3 }, "ring 0: size 3"},
		{"no eventfd", func(v *[2]Vring, _ *int, _ *uint64) { v[0].Kick = int(null.Fd()) }, "ring 0: kick"},
		{"unknown feature", func(_ *[2]Vring, _ *int, features *uint64) { *features |= 1 << 61 }, "features"},
	} {
		v, fd, features := r.rings([2]uint16{}), r.tap.FD(0), uint64(virtio.FeatureVersion1)
		tc.change(&v, &fd, &features)
		err := r.net.Start(r.Mem, features, v, fd, func(err error) { t.Errorf("%s: failed: %v", tc.name, err) })
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	r.start(t, [2]uint16{}) // none of them left anything behind
	r.exchange(t, 3)
}
