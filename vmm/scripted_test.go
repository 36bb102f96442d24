package vmm

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"baton/devices/chipset"
	"baton/devices/pci"
	virtionet "baton/devices/virtio/net"
	"baton/tests/tiny"
	"baton/vmm/client"
	"baton/vmm/failover"
)

// scripted is a machine with a guest that does nothing: the test does, as a vCPU would, on the
// machine's buses. Only its state in the main loop is looked at from there.
type scripted struct {
	*Machine
	t   *testing.T
	dir string // short
	qmp *client.Conn
	seq map[string]uint64 // of the next event of that name to look at
}

// startScripted runs a machine with these options; a host without /dev/kvm skips the test.
func startScripted(t *testing.T, args ...string) *scripted {
	t.Helper()
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		t.Skip(err)
	} else {
		f.Close()
	}
	if os.Geteuid() != 0 {
		t.Skip("a TAP takes root")
	}
	dir, err := os.MkdirTemp("", "scripted") // t.TempDir's names are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "qmp")
	inv, err := ParseArgs(append([]string{"-kernel", tiny.Kernel(t, tiny.Halt), "-m", "64", "-nodefaults", "-qmp", "unix:" + socket + ",server,nowait"}, args...))
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(t.Context(), inv.Config, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error("run:", err)
		}
		if err := m.Close(); err != nil {
			t.Error("close:", err)
		}
	})
	s := &scripted{Machine: m, t: t, dir: dir, seq: map[string]uint64{}}
	if s.State() != StateRunning && m.cfg.Incoming == "" {
		s.event("RESUME", "")
	}
	s.do(func() {}) // the monitors are served
	if s.qmp, err = client.Dial(ctx, socket, func(json.RawMessage) {}); err != nil {
		t.Fatal(err)
	}
	return s
}

// patience is how long a test waits for what takes milliseconds.
const patience = time.Minute

// do runs f in the main loop, after all that was posted.
func (s *scripted) do(f func()) {
	s.t.Helper()
	done := make(chan struct{})
	s.post(func() { defer close(done); f() })
	select {
	case <-done:
	case <-time.After(patience):
		s.t.Fatal("the main loop hangs")
	}
}

// event waits for the next event of that name, past or future, and returns its data.
// With a text, the data must be it.
func (s *scripted) event(name, want string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	for e := range s.events.Since(ctx, max(s.seq[name], 1)) {
		s.seq[name] = e.Seq + 1
		if e.Name != name {
			continue
		}
		data, err := json.Marshal(e.Data)
		if err != nil {
			s.t.Fatal(err)
		}
		if want != "" && string(data) != want {
			s.t.Fatalf("%s %s, want %s", name, data, want)
		}
		return string(data)
	}
	s.t.Fatalf("no event %s", name)
	return ""
}

// heard says whether there was an event of that name since the start.
func (s *scripted) heard(name string) bool {
	events, _, _ := s.events.Poll(1)
	for _, e := range events {
		if e.Name == name {
			return true
		}
	}
	return false
}

// visible says whether the guest is shown the device: the test of QEMU's suite, query-pci
// and qom-get.
func (s *scripted) visible(id string) bool {
	s.t.Helper()
	var buses []pciBus
	if err := json.Unmarshal([]byte(s.execute("query-pci", nil)), &buses); err != nil {
		s.t.Fatal(err)
	}
	seen := false
	for _, d := range buses[0].Devices {
		seen = seen || d.QdevID == id
		if d.Bridge != nil {
			for _, d := range d.Bridge.Devices {
				seen = seen || d.QdevID == id
			}
		}
	}
	if _, err := s.command("qom-get", map[string]any{"path": "/machine/peripheral/" + id, "property": "mac"}); (err == nil) != seen {
		s.t.Fatalf("%s: in query-pci %v, qom-get: %v", id, seen, err)
	}
	return seen
}

// shown checks which of the pair standby0, primary0 the guest is shown.
func (s *scripted) shown(standby, primary bool) {
	s.t.Helper()
	if got := [2]bool{s.visible("standby0"), s.visible("primary0")}; got != [2]bool{standby, primary} {
		s.t.Fatalf("visible: standby0 and primary0 %v, want %v %v", got, standby, primary)
	}
}

// command executes a QMP command.
func (s *scripted) command(name string, args any) (json.RawMessage, error) {
	line, err := json.Marshal(map[string]any{"execute": name, "arguments": args})
	if args == nil {
		line = []byte(`{"execute":"` + name + `"}`)
	}
	if err != nil {
		return nil, err
	}
	text, err := s.qmp.Run(string(line))
	if err != nil && text == "" {
		return nil, err
	}
	var r struct {
		Return json.RawMessage
		Error  *struct{ Desc string }
	}
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return nil, err
	}
	if r.Error != nil {
		return nil, errors.New(r.Error.Desc)
	}
	return r.Return, nil
}

func (s *scripted) execute(name string, args any) string {
	s.t.Helper()
	r, err := s.command(name, args)
	if err != nil {
		s.t.Fatalf("%s %v: %v", name, args, err)
	}
	return string(r)
}

// fails executes a command that has to fail with this text.
func (s *scripted) fails(name string, args any, want string) {
	s.t.Helper()
	if r, err := s.command(name, args); err == nil || err.Error() != want {
		s.t.Fatalf("%s %v: %s, %v, want %s", name, args, r, err, want)
	}
}

// slotEvent takes the next event of the slots, as the guest's AML does: the number of the port
// and the code, 0 if there is none.
func (s *scripted) slotEvent() (port, code uint32) {
	var b [4]byte
	s.Machine.ports.Read(chipset.SlotPort, b[:])
	v := binary.LittleEndian.Uint32(b[:])
	return v >> 8, v & 0xff
}

// ejects waits for the request to let go of what is in a port's slot, and does.
func (s *scripted) ejects(port uint32) {
	s.t.Helper()
	s.notified(port, 3)
	s.eject(port)
}

// checks looks at a port's slot when it is told to, and says so.
func (s *scripted) checks(port uint32) {
	s.t.Helper()
	s.notified(port, 2)
	s.Machine.ports.Write(chipset.SlotPort+8, binary.LittleEndian.AppendUint32(nil, 1<<16|port))
}

// notified waits for an event of a port's slot.
func (s *scripted) notified(port, want uint32) {
	s.t.Helper()
	for begin := time.Now(); ; {
		p, code := s.slotEvent()
		if code == want && p == port {
			return
		}
		if time.Since(begin) > patience {
			s.t.Fatalf("no event %d of port %d", want, port)
		}
	}
}

// eject lets go of what is in a port's slot.
func (s *scripted) eject(port uint32) {
	s.Machine.ports.Write(chipset.SlotPort+4, binary.LittleEndian.AppendUint32(nil, port))
}

// pair waits until the pair of standby0 is in the state.
func (s *scripted) pair(state failover.State) failover.Status {
	s.t.Helper()
	begin := time.Now()
	for {
		var got failover.Status
		s.do(func() { got = s.pairOf("standby0").Status() })
		if got.State == state {
			return got
		}
		if time.Since(begin) > patience {
			s.t.Fatalf("the pair is %s (%v), want %s", got.State, got.Why, state)
		}
	}
}

// guestDriver is a guest's driver of one virtio device behind a root port.
type guestDriver struct {
	s   *scripted
	cfg uint64 // of the function, in guest-physical memory
	bar uint64 // the common configuration is at its beginning
}

// Registers: PCIe 7.5.1, VIRTIO 1.2, 4.1.4.3.
const (
	drvCommand = 0x04
	drvBAR     = 0x10
	drvWindow  = 0x24 // of a bridge: prefetchable base and limit, in MiB, and their upper halves

	drvFeatureSelect = 0x00
	drvFeature       = 0x04
	drvAckSelect     = 0x08
	drvAck           = 0x0c
	drvStatus        = 0x14
	drvQueueSelect   = 0x16
	drvQueueEnable   = 0x1c
	drvQueueAreas    = 0x20
)

// probe finds the device and gives it an address in its port's window.
func (s *scripted) probe(id string) *guestDriver {
	s.t.Helper()
	d := &guestDriver{s: s}
	var port uint64
	s.do(func() {
		for _, dev := range s.devices {
			if dev.ID == id {
				s.pci.Walk(func(at pci.BDF, f pci.Function) {
					address := s.layout.ECAM.Base + uint64(at)<<12
					switch {
					case f == dev.fn:
						d.cfg = address
					case f.Config().ID() == s.port(dev.Bus):
						port = address
					}
				})
			}
		}
	})
	if d.cfg == 0 || port == 0 {
		s.t.Fatalf("%s is not there", id)
	}
	s.write(port+drvCommand, 2, 6)
	d.bar = uint64(s.read(port+drvWindow, 2)&0xfff0)<<16 | uint64(s.read(port+drvWindow+4, 4))<<32
	s.write(d.cfg+drvBAR, 4, uint32(d.bar))
	s.write(d.cfg+drvBAR+4, 4, uint32(d.bar>>32))
	s.write(d.cfg+drvCommand, 2, 6)
	return d
}

// port is what the function of a root port is called.
func (s *scripted) port(bus string) string {
	for _, d := range s.devices {
		if d.ID == bus {
			return d.fn.Config().ID()
		}
	}
	return ""
}

func (s *scripted) read(addr uint64, n int) uint32 {
	var b [4]byte
	s.mmio.Read(addr, b[:n])
	return binary.LittleEndian.Uint32(b[:])
}

func (s *scripted) write(addr uint64, n int, v uint32) {
	s.mmio.Write(addr, binary.LittleEndian.AppendUint32(nil, v)[:n])
}

// offered are the features of the device.
func (d *guestDriver) offered() (f uint64) {
	for i := range uint64(2) {
		d.s.write(d.bar+drvFeatureSelect, 4, uint32(i))
		f |= uint64(d.s.read(d.bar+drvFeature, 4)) << (32 * i)
	}
	return f
}

// start resets the device and serves it with all features but those.
func (d *guestDriver) start(without uint64) {
	d.s.t.Helper()
	d.s.write(d.bar+drvStatus, 1, 0)
	d.s.write(d.bar+drvStatus, 1, 3)
	ack := d.offered() & (virtionet.FeatureStandby | 1<<32) &^ without
	for i := range uint64(2) {
		d.s.write(d.bar+drvAckSelect, 4, uint32(i))
		d.s.write(d.bar+drvAck, 4, uint32(ack>>(32*i)))
	}
	d.s.write(d.bar+drvStatus, 1, 11)
	for q := range uint32(3) {
		const rings, each = 0x100_0000, 0x8000 // in RAM; a part of the address tells the devices apart
		at := rings + uint32(d.cfg&0xff000)>>4 + q*each
		d.s.write(d.bar+drvQueueSelect, 2, q)
		for i := range uint32(3) {
			d.s.write(d.bar+drvQueueAreas+uint64(8*i), 4, at+i*0x2000)
		}
		d.s.write(d.bar+drvQueueEnable, 2, 1)
	}
	d.s.write(d.bar+drvStatus, 1, 15)
	if got := d.s.read(d.bar+drvStatus, 1); got != 15 {
		d.s.t.Fatalf("status %#x", got)
	}
	d.s.do(func() {})
}

// msix turns MSI-X on with a vector unmasked, or off.
func (d *guestDriver) msix(on bool) {
	const unmasked, masked, table = 0, 1, 0x4000 // virtio's table is at 0x4000
	var at uint64
	for c := uint64(d.s.read(d.cfg+0x34, 1)); c != 0; c = uint64(d.s.read(d.cfg+c+1, 1)) {
		if d.s.read(d.cfg+c, 1) == 0x11 {
			at = d.cfg + c + 2
		}
	}
	if !on {
		d.s.write(d.bar+table+12, 4, masked)
		d.s.write(at, 2, 0)
		return
	}
	d.s.write(at, 2, 1<<15)
	d.s.write(d.bar+table, 4, 0xfee00000)
	d.s.write(d.bar+table+8, 4, 0x40)
	d.s.write(d.bar+table+12, 4, unmasked)
}

// machines is how many there have been, each with TAPs of its own.
var machines int

// failoverNets are the root ports and TAPs that the tests of QEMU's suite have.
func failoverNets() []string {
	var args []string
	machines++
	for i := range 4 {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=root%d,addr=%d.0,chassis=%d", i, i+1, i+1))
		args = append(args, "-netdev", fmt.Sprintf("tap,id=hs%d,ifname=f%d-%d-%d,script=no", i, os.Getpid()%100000, machines, i))
	}
	return args
}
