package console_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"baton/devices/virtio"
	"baton/devices/virtio/console"
	"baton/tests/virtiotest"
)

const (
	deviceReady = 0
	portAdd     = 1
	portReady   = 3
	consolePort = 4
	portOpen    = 6
	portName    = 7

	multiport = 1 << 1
)

// backend is the host's side of a port: Feed is what the port reads, and what it writes
// arrives in wrote. While hold is locked a write blocks.
type backend struct {
	*io.PipeReader
	feed  *io.PipeWriter
	hold  sync.Mutex
	wrote chan string
	busy  chan struct{} // a write has begun
}

func newBackend() *backend {
	b := &backend{wrote: make(chan string, 1000), busy: make(chan struct{}, 1)}
	b.PipeReader, b.feed = io.Pipe()
	return b
}

func (b *backend) Write(p []byte) (int, error) {
	select {
	case b.busy <- struct{}{}:
	default:
	}
	b.hold.Lock()
	defer b.hold.Unlock()
	b.wrote <- string(p)
	return len(p), nil
}

// next waits until n bytes were written.
func (b *backend) next(t testing.TB, n int) string {
	t.Helper()
	var s strings.Builder
	for s.Len() < n {
		select {
		case w := <-b.wrote:
			s.WriteString(w)
		case <-time.After(virtiotest.Patience):
			t.Fatalf("only %d of %d bytes came: %.60q", s.Len(), n, s.String())
		}
	}
	return s.String()
}

func ports(n ...int) (cfg []console.Port, backends map[int]*backend) {
	backends = map[int]*backend{}
	for _, i := range n {
		backends[i] = newBackend()
		p := console.Port{Number: i, Console: i == 0, Backend: backends[i]}
		if i > 0 {
			p.Name = fmt.Sprintf("org.test.%d", i)
		}
		cfg = append(cfg, p)
	}
	return cfg, backends
}

func newDevice(t testing.TB, cfg []console.Port) *console.Device {
	t.Helper()
	dev, err := console.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// start activates a device with the ports.
func start(t testing.TB, features uint64, n ...int) (*virtiotest.Driver, map[int]*backend) {
	t.Helper()
	cfg, backends := ports(n...)
	return virtiotest.NewDriver(t, newDevice(t, cfg), features), backends
}

func message(port uint32, event, value uint16) []byte {
	b := binary.LittleEndian.AppendUint32(nil, port)
	b = binary.LittleEndian.AppendUint16(b, event)
	return binary.LittleEndian.AppendUint16(b, value)
}

// say sends a control message and waits until the device has taken it.
func say(d *virtiotest.Driver, port uint32, event, value uint16) {
	d.Rings[3].Do([][]byte{message(port, event, value)})
}

// hear gives the control queue n buffers, and returns the messages that come.
func hear(d *virtiotest.Driver, n int) (s []string) {
	r := d.Rings[2]
	for range n {
		r.Add(nil, 64)
	}
	r.Kick()
	for range n {
		req, k := r.Wait()
		b := req.Written(k)
		s = append(s, fmt.Sprintf("%d:%d=%d%s", binary.LittleEndian.Uint32(b),
			binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:]), b[8:]))
	}
	return s
}

func equal(t testing.TB, got []string, want ...string) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("messages %q, want %q", got, want)
	}
}

func TestContract(t *testing.T) {
	virtiotest.Run(t, func(t testing.TB) virtio.Device {
		cfg, _ := ports(0, 2)
		return newDevice(t, cfg)
	})
}

func TestHandshake(t *testing.T) {
	d, _ := start(t, virtio.CoreFeatures|multiport, 0, 3)
	if n := len(d.Rings); n != 2*4+2 {
		t.Errorf("%d queues", n)
	}
	var max [4]byte
	d.Dev.ReadConfig(4, max[:])
	if max[0] != 4 {
		t.Errorf("max_nr_ports %d", max[0])
	}
	for range 2 { // the same again after a reset
		say(d, 0xffffffff, deviceReady, 1)
		equal(t, hear(d, 2), "0:1=1", "3:1=1")
		say(d, 0, portReady, 1)
		equal(t, hear(d, 2), "0:4=1", "0:6=1")
		say(d, 3, portReady, 1)
		equal(t, hear(d, 2), "3:7=1org.test.3", "3:6=1")
		d.Dev.Reset()
		d.Activate(virtio.CoreFeatures | multiport)
	}
}

func TestControlIgnoresNonsense(t *testing.T) {
	d, _ := start(t, virtio.CoreFeatures|multiport, 0)
	for _, m := range [][]byte{
		{0},
		make([]byte, 7),
		message(0, deviceReady, 0), // the driver failed
		message(1, portReady, 1),
		message(0xffffffff, portReady, 1),
		message(1<<31, portOpen, 1),
		message(0, portReady, 0),
		message(0, 99, 1),
		message(0, portAdd, 1),
	} {
		d.Rings[3].Do([][]byte{m})
	}
	say(d, 0, deviceReady, 1)
	equal(t, hear(d, 1), "0:1=1") // and nothing before it
	d.Rings[3].Do([][]byte{append(message(0, portReady, 1), "some more"...)})
	equal(t, hear(d, 2), "0:4=1", "0:6=1")
}

func TestControlBufferTooSmall(t *testing.T) {
	d, _ := start(t, virtio.CoreFeatures|multiport, 0)
	d.Rings[2].Add(nil, 7)
	d.Rings[3].Add([][]byte{message(0, deviceReady, 1)})
	d.Rings[3].Kick()
	if err := d.WaitFailure(); !strings.Contains(err.Error(), "queue 2: buffer of 7 bytes") {
		t.Error(err)
	}
}

// TestControlFlood asks without end and takes no answer: only the guest waits.
func TestControlFlood(t *testing.T) {
	d, _ := start(t, virtio.CoreFeatures|multiport, 0)
	for range 100 {
		d.Rings[3].Do([][]byte{message(0, deviceReady, 1)})
	}
	for range 100 {
		d.Rings[3].Add([][]byte{message(0, deviceReady, 1)})
	}
	d.Rings[3].Kick()
	d.Dev.Reset()
	d.Activate(virtio.CoreFeatures | multiport)
	say(d, 0, portReady, 1)
	equal(t, hear(d, 2), "0:4=1", "0:6=1")
}

func TestOutput(t *testing.T) {
	d, b := start(t, virtio.CoreFeatures|multiport, 0, 1)
	d.Rings[1].Do([][]byte{[]byte("hello "), []byte("world")})
	if s := b[0].next(t, 11); s != "hello world" {
		t.Errorf("port 0 wrote %q", s)
	}
	d.Rings[5].Do([][]byte{[]byte("to one")})
	if s := b[1].next(t, 6); s != "to one" {
		t.Errorf("port 1 wrote %q", s)
	}
}

// TestSlowBackend: nothing is lost, the guest's buffers wait, and a reset does not.
func TestSlowBackend(t *testing.T) {
	d, b := start(t, virtio.CoreFeatures|multiport, 0)
	r := d.Rings[1]
	var want strings.Builder
	b[0].hold.Lock()
	for i := range 60 {
		p := bytes.Repeat([]byte{byte('A' + i)}, 4096)
		want.Write(p)
		r.Add([][]byte{p})
	}
	r.Kick()
	r.Wait() // the first ones are taken
	b[0].hold.Unlock()
	for range 59 {
		r.Wait()
	}
	if got := b[0].next(t, want.Len()); got != want.String() {
		t.Error("output was lost or reordered")
	}
	b[0].hold.Lock()
	for range 60 {
		r.Add([][]byte{make([]byte, 4096)})
	}
	r.Kick()
	d.Dev.Reset()
	b[0].hold.Unlock()
}

func TestInput(t *testing.T) {
	d, b := start(t, virtio.CoreFeatures|multiport, 0, 2)
	r := d.Rings[6]
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		_, _ = b[2].feed.Write([]byte("held until the port is open"))
		_, _ = b[2].feed.Write([]byte(" and more"))
	}()
	r.Add(nil, 10)
	r.Add(nil, 100)
	r.Kick()
	say(d, 2, portOpen, 0) // as it was
	if _, _, ok := r.Poll(); ok {
		t.Error("input for a port that is closed")
	}
	say(d, 2, portOpen, 1)
	say(d, 2, portOpen, 1)
	req, n := r.Wait()
	got := string(req.Written(n))
	if n != 10 {
		t.Errorf("%d bytes in the first buffer", n)
	}
	req, n = r.Wait()
	got += string(req.Written(n))
	if got != "held until the port is open" {
		t.Errorf("input %q", got)
	}
	if s := string(r.Do(nil, 100)); s != " and more" {
		t.Errorf("input %q", s)
	}
	<-fed
	// What came while the device was reset is there afterwards.
	d.Dev.Reset()
	go func() { _, _ = b[2].feed.Write([]byte("after")) }()
	d.Activate(virtio.CoreFeatures | multiport)
	r = d.Rings[6]
	r.Add(nil, 2)
	r.Add(nil, 2)
	r.Kick()
	say(d, 2, portOpen, 1)
	r.Wait()
	req, n = r.Wait()
	if s := string(req.Written(n)); s != "te" {
		t.Errorf("second buffer has %q", s)
	}
	d.Dev.Reset() // with one byte left over
	d.Activate(virtio.CoreFeatures | multiport)
	say(d, 2, portOpen, 1)
	if s := string(d.Rings[6].Do(nil, 2)); s != "r" {
		t.Errorf("the rest is %q", s)
	}
}

func TestEndOfInput(t *testing.T) {
	d, b := start(t, virtio.CoreFeatures|multiport, 0)
	_ = b[0].feed.Close() // as a terminal's EOF
	d.Rings[1].Do([][]byte{[]byte("still writes")})
	if s := b[0].next(t, 12); s != "still writes" {
		t.Errorf("wrote %q", s)
	}
}

func TestSinglePort(t *testing.T) {
	d, b := start(t, virtio.CoreFeatures, 0, 1)
	go func() { _, _ = b[0].feed.Write([]byte("no handshake")) }()
	if s := string(d.Rings[0].Do(nil, 100)); s != "no handshake" {
		t.Errorf("input %q", s)
	}
	d.Rings[1].Do([][]byte{[]byte("out")})
	if s := b[0].next(t, 3); s != "out" {
		t.Errorf("output %q", s)
	}
}

// TestClose delivers what the guest has written, and gives up on a backend that hangs.
func TestClose(t *testing.T) {
	cfg, b := ports(0)
	d := virtiotest.NewDriver(t, newDevice(t, cfg), virtio.CoreFeatures|multiport)
	b[0].hold.Lock()
	d.Rings[1].Do([][]byte{[]byte("last words")})
	b[0].hold.Unlock()
	t.Cleanup(func() { // after the driver's, which closes the device
		if s := b[0].next(t, 10); s != "last words" {
			t.Errorf("output %q", s)
		}
	})

	cfg, hung := ports(0)
	dev := newDevice(t, cfg)
	e := virtiotest.NewDriver(t, nil, virtio.CoreFeatures)
	e.Dev = dev
	e.Activate(virtio.CoreFeatures)
	hung[0].hold.Lock()
	defer hung[0].hold.Unlock()
	e.Rings[1].Do([][]byte{[]byte("never read")})
	done := make(chan error)
	go func() { done <- dev.Close() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(virtiotest.Patience):
		t.Fatal("close hangs with the backend")
	}
}

func TestNewErrors(t *testing.T) {
	for _, tt := range []struct {
		ports []console.Port
		want  string
	}{
		{[]console.Port{{Number: -1}}, "console port -1: not 0 to 30"},
		{[]console.Port{{Number: 31}}, "console port 31: not 0 to 30"},
		{[]console.Port{{Number: 1}, {Number: 1}}, "console port 1: defined twice"},
		{[]console.Port{{Number: 1, Name: "a"}, {Number: 2, Name: "a"}}, `its name "a" is taken by port 1`},
	} {
		if dev, err := console.New(tt.ports); dev != nil || err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want %q", tt.ports, err, tt.want)
		}
	}
}

// FuzzControl takes bytes as a guest's control messages.
func FuzzControl(f *testing.F) {
	f.Add(message(0, deviceReady, 1))
	f.Add(bytes.Repeat(message(2, portReady, 1), 100))
	f.Add(append(message(2, portOpen, 1), message(2, portOpen, 0)...))
	f.Fuzz(func(t *testing.T, msgs []byte) {
		d, _ := start(t, virtio.CoreFeatures|multiport, 0, 2)
		for range 50 {
			d.Rings[2].Add(nil, 64)
		}
		d.Rings[2].Kick()
		for range 100 {
			n := min(len(msgs), 8)
			if n == 0 {
				break
			}
			d.Rings[3].Add([][]byte{msgs[:n]})
			msgs = msgs[n:]
		}
		d.Rings[3].Kick()
		d.Dev.Reset()
		select {
		case err := <-d.Failures:
			t.Fatal(err)
		default:
		}
	})
}
