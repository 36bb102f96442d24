package console_test

import (
	"strings"
	"testing"

	"baton/devices/virtio"
	"baton/devices/virtio/console"
	"baton/tests/virtiotest"
)

// control message to be sent through a Function's driver.
func sayTo(f *virtiotest.Function, port uint32, event, value uint16) {
	say(f.Driver, port, event, value)
}

func TestState(t *testing.T) {
	make := func(t testing.TB) virtio.Device {
		cfg, _ := ports(0, 2)
		return newDevice(t, cfg)
	}
	virtiotest.State(t, make, func(_ testing.TB, f *virtiotest.Function) {
		sayTo(f, 0, deviceReady, 1)
		sayTo(f, 2, portOpen, 1)
	})
}

func function(t testing.TB, n ...int) (*virtiotest.Function, *console.Device, map[int]*backend) {
	t.Helper()
	cfg, backends := ports(n...)
	dev := newDevice(t, cfg)
	f := virtiotest.NewFunction(t, dev, virtiotest.Memory(t))
	f.Start(dev.Features())
	return f, dev, backends
}

// migrate moves the guest to a new device with the same ports.
func migrate(t testing.TB, f *virtiotest.Function, n ...int) (*virtiotest.Function, map[int]*backend) {
	t.Helper()
	cfg, backends := ports(n...)
	return f.Migrate(newDevice(t, cfg)), backends
}

// What the guest has asked and not been told yet, it is told on the other side.
func TestMigrateMessages(t *testing.T) {
	f, _, _ := function(t, 0, 2)
	sayTo(f, 0, deviceReady, 1)
	sayTo(f, 2, portReady, 1)
	f, _ = migrate(t, f, 0, 2)
	equal(t, hear(f.Driver, 2), "0:1=1", "2:1=1")
	f, _ = migrate(t, f, 0, 2)
	equal(t, hear(f.Driver, 2), "2:7=1org.test.2", "2:6=1")
}

// Input that the guest has had no buffer for comes on the other side, before what the host
// says there; an open port stays open.
func TestMigrateInput(t *testing.T) {
	f, _, backends := function(t, 0, 2)
	sayTo(f, 2, portOpen, 1)
	if _, err := backends[2].feed.Write([]byte("early ")); err != nil {
		t.Fatal(err)
	}
	r := f.Rings[6]
	r.Add(nil, 3)
	r.Kick()
	req, n := r.Wait()
	if got := string(req.Written(n)); got != "ear" {
		t.Fatalf("read %q", got)
	}
	f, backends = migrate(t, f, 0, 2)
	go func() { _, _ = backends[2].feed.Write([]byte("late")) }()
	got := ""
	for !strings.HasSuffix(got, "late") {
		got += string(f.Rings[6].Do(nil, 64))
	}
	if got != "ly late" {
		t.Errorf("read %q", got)
	}
}

// A host that does not take the guest's output stops it in the middle of a buffer: the rest
// goes to the other side, and nothing twice.
func TestMigrateOutput(t *testing.T) {
	f, _, backends := function(t, 0, 2)
	b := backends[2]
	b.hold.Lock()
	text := strings.Repeat("0123456789abcdef", 8192) // 128 KiB, more than is let wait
	f.Rings[7].Add([][]byte{[]byte(text)})
	f.Rings[7].Kick()
	<-b.busy
	f, after := migrate(t, f, 0, 2)
	f.Rings[7].Wait()
	f.Rings[7].Do([][]byte{[]byte("END")})
	b.hold.Unlock()
	var got strings.Builder
	for !strings.HasSuffix(got.String(), "END") {
		got.WriteString(after[2].next(t, 1))
	}
	before := b.next(t, len(text)+3-got.Len())
	if before+got.String() != text+"END" {
		t.Errorf("%d bytes before and %d after are not the %d that were written", len(before), got.Len(), len(text)+3)
	}
	if len(before) == 0 || got.Len() == 3 {
		t.Errorf("not split: %d before, %d after", len(before), got.Len())
	}
}
