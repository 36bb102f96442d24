package tap

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"baton/tests/taptest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func open(t *testing.T, c Config) *TAP {
	t.Helper()
	tap, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	return tap
}

// persistent creates a TAP, as an administrator would before the VM starts.
func persistent(t *testing.T, name string, mode netlink.TuntapMode, multi bool) {
	t.Helper()
	flags := netlink.TUNTAP_ONE_QUEUE
	if multi {
		flags = netlink.TUNTAP_MULTI_QUEUE_DEFAULTS
	}
	l := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: mode, Flags: flags}
	if multi {
		l.Queues = 1
	}
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatal(err)
	}
	for _, f := range l.Fds {
		f.Close()
	}
}

func exists(name string) bool {
	_, err := netlink.LinkByName(name)
	return err == nil
}

func TestOpen(t *testing.T) {
	taptest.Netns(t)
	persistent(t, "single", netlink.TUNTAP_MODE_TAP, false)
	persistent(t, "multi", netlink.TUNTAP_MODE_TAP, true)
	for _, tc := range []struct {
		name   string
		config Config
		want   string
		after  bool // still there after Close
	}{
		{"kernel picks the name", Config{}, "tap0", false},
		{"pattern", Config{Name: "vm%d"}, "vm0", false},
		{"new", Config{Name: "new"}, "new", false},
		{"new with queues", Config{Name: "new", Queues: 4}, "new", false},
		{"attach", Config{Name: "single", Queues: 1}, "single", true},
		{"attach to queues", Config{Name: "multi", Queues: 3}, "multi", true},
	} {
		tap, err := Open(tc.config)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if tap.Name() != tc.want || tap.Queues() != max(tc.config.Queues, 1) {
			t.Errorf("%s: name %q, %d queues", tc.name, tap.Name(), tap.Queues())
		}
		if !exists(tc.want) {
			t.Errorf("%s: no interface %s", tc.name, tc.want)
		}
		if err := tap.Close(); err != nil {
			t.Errorf("%s: close: %v", tc.name, err)
		}
		if exists(tc.want) != tc.after {
			t.Errorf("%s: after Close the interface exists: %v, want %v", tc.name, !tc.after, tc.after)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	taptest.Netns(t)
	persistent(t, "single", netlink.TUNTAP_MODE_TAP, false)
	persistent(t, "multi", netlink.TUNTAP_MODE_TAP, true)
	persistent(t, "busy", netlink.TUNTAP_MODE_TAP, false)
	persistent(t, "busymulti", netlink.TUNTAP_MODE_TAP, true)
	persistent(t, "tun", netlink.TUNTAP_MODE_TUN, false)
	open(t, Config{Name: "busy"})
	open(t, Config{Name: "busymulti", Queues: 2})
	plain := rawQueue(t, "plain", unix.IFF_TAP|unix.IFF_NO_PI)
	queue1 := rawQueue(t, "one", unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
	queue2 := rawQueue(t, "two", unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
	null, err := unix.Open("/dev/null", unix.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		config Config
		want   []string
		is     error
	}{
		{Config{Name: "lo"}, []string{"open TAP lo", "is no TAP"}, nil},
		{Config{Name: "tun"}, []string{"open TAP tun", "is no TAP"}, nil},
		{Config{Name: "busy"}, []string{"open TAP busy", "another program has it open"}, unix.EBUSY},
		{Config{Name: "busymulti", Queues: 2}, []string{"open TAP busymulti", "another program has it open"}, unix.EBUSY},
		{Config{Name: "single", Queues: 2}, []string{"single queue and 2 are asked for", "multi_queue"}, nil},
		{Config{Name: "multi"}, []string{"is multi-queue and one queue is asked for", "without multi_queue"}, nil},
		{Config{Name: "sixteen-letters."}, []string{"at most 15 bytes"}, nil},
		{Config{Name: "a/b"}, []string{"open TAP a/b", "neither /"}, unix.EINVAL},
		{Config{Name: "new", Queues: MaxQueues + 1}, []string{"at most 256"}, nil},
		{Config{FDs: []int{null}}, []string{"must be a queue of a TAP"}, nil},
		{Config{FDs: []int{plain}}, []string{"IFF_VNET_HDR"}, nil},
		{Config{FDs: []int{queue1, queue2}}, []string{"a queue of two, but", "of one"}, nil},
	} {
		tap, err := Open(tc.config)
		if err == nil {
			t.Errorf("%+v: no error", tc.config)
			tap.Close()
			continue
		}
		for _, want := range tc.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%+v: error %q does not say %q", tc.config, err, want)
			}
		}
		if tc.is != nil && !errors.Is(err, tc.is) {
			t.Errorf("%+v: error %q is not %v", tc.config, err, tc.is)
		}
		for _, fd := range tc.config.FDs {
			if err := unix.Close(fd); err != unix.EBADF {
				t.Errorf("%+v: fd %d was left open", tc.config, fd)
			}
		}
	}
	if exists("new") || exists("a") {
		t.Error("a failed Open left an interface")
	}
}

// TestOpenWithoutRights drops CAP_NET_ADMIN, on a thread that ends with the test.
func TestOpenWithoutRights(t *testing.T) {
	taptest.Netns(t)
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		t.Skipf("capset: %v", err)
	}
	for name, want := range map[string]string{
		"absent": "ip tuntap add dev absent mode tap user USER",
		"vm%d":   "ip tuntap add dev vm0 mode tap user USER",
	} {
		_, err := Open(Config{Name: name})
		if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// rawQueue opens a queue as a manager that passes descriptors does.
func rawQueue(t *testing.T, name string, flags uint16) int {
	t.Helper()
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestPassedQueues(t *testing.T) {
	taptest.Netns(t)
	const flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE
	fds := []int{rawQueue(t, "passed", flags), rawQueue(t, "passed", flags)}
	ifr, _ := unix.NewIfreq("")
	ifr.SetUint16(unix.IFF_DETACH_QUEUE)
	if err := unix.IoctlIfreq(fds[1], unix.TUNSETQUEUE, ifr); err != nil {
		t.Fatal(err)
	}
	tap := open(t, Config{FDs: fds})
	if tap.Name() != "passed" || tap.Queues() != 2 || tap.FD(1) != fds[1] {
		t.Errorf("name %q, %d queues, fd %d", tap.Name(), tap.Queues(), tap.FD(1))
	}
	for _, n := range []int{1, 2, 2, 1} { // the manager had detached the second one
		if err := tap.SetQueues(n); err != nil {
			t.Error(err)
		}
	}
	if _, err := tap.Readv(0, []unix.Iovec{{Base: new(byte), Len: 1}}); err != unix.EAGAIN {
		t.Errorf("a passed queue blocks: %v", err)
	}
}

func TestSetUp(t *testing.T) {
	taptest.Netns(t)
	tap := open(t, Config{Name: "t0"})
	if err := tap.SetUp(); err != nil {
		t.Error(err)
	}
	if link, err := netlink.LinkByName("t0"); err != nil || link.Attrs().RawFlags&unix.IFF_UP == 0 {
		t.Errorf("%+v, %v", link, err)
	}
}

func TestOffloads(t *testing.T) {
	taptest.Netns(t)
	tap := open(t, Config{})
	if must := CSUM | TSO4 | TSO6 | TSOECN; tap.Offloads()&must != must {
		t.Errorf("offloads %#x lack some of %#x", tap.Offloads(), must)
	}
	if err := tap.SetOffload(tap.Offloads()); err != nil {
		t.Error(err)
	}
	if err := tap.SetOffload(1 << 20); !errors.Is(err, unix.EINVAL) {
		t.Errorf("an unknown offload: %v", err)
	}
}

func iov(bufs ...[]byte) (v []unix.Iovec) {
	for _, b := range bufs {
		v = append(v, unix.Iovec{Base: &b[0], Len: uint64(len(b))})
	}
	return v
}

func TestFrames(t *testing.T) {
	taptest.Netns(t)
	tap := open(t, Config{Name: "t0"})
	if err := tap.SetUp(); err != nil {
		t.Fatal(err)
	}
	host := taptest.NewSocket(t, "t0", taptest.EtherType, false)

	out := taptest.Frame(1, 100)
	n, err := tap.Writev(0, iov(make([]byte, HeaderSize), out[:20], out[20:]))
	if err != nil || n != HeaderSize+len(out) {
		t.Fatalf("write: %d, %v", n, err)
	}
	if got := host.Recv(); !bytes.Equal(got, out) {
		t.Errorf("the host received %x, want %x", got, out)
	}

	header, in := make([]byte, HeaderSize), make([]byte, 200)
	if _, err := tap.Readv(0, iov(header, in)); err != unix.EAGAIN {
		t.Errorf("read without a frame: %v", err)
	}
	host.Send(taptest.Frame(2, 60))
	n, err = tap.Readv(0, iov(header, in))
	if err != nil || !bytes.Equal(in[:n-HeaderSize], taptest.Frame(2, 60)) {
		t.Errorf("read: %x, %v", in[:max(n, HeaderSize)-HeaderSize], err)
	}

	for i := range 100 {
		host.Send(taptest.Frame(byte(i), 60))
	}
	if frames, dropped := tap.Take(0, 10*(HeaderSize+len(taptest.Frame(0, 60)))); len(frames) != 10 || dropped != 90 || !bytes.Equal(frames[9][HeaderSize:], taptest.Frame(9, 60)) {
		t.Errorf("%d frames, %d dropped", len(frames), dropped)
	}
	if _, err := tap.Readv(0, iov(header, in)); err != unix.EAGAIN {
		t.Errorf("after Take: %v", err)
	}

	if _, err := tap.Writev(0, iov(bytes.Repeat([]byte{0xff}, HeaderSize), out)); err != unix.EINVAL {
		t.Errorf("a header of nonsense: %v", err)
	}
	v := iov(header, in)
	if a := testing.AllocsPerRun(100, func() { tap.Readv(0, v) }); a != 0 {
		t.Errorf("%v allocations per read", a)
	}
}

// TestSetQueues counts the kernel's view of the queues.
// What Send sends is what the host receives.
func TestSend(t *testing.T) {
	taptest.Netns(t)
	tap := open(t, Config{})
	if err := tap.SetUp(); err != nil {
		t.Fatal(err)
	}
	frame := taptest.Frame(3, 60)
	socket := taptest.NewSocket(t, tap.Name(), taptest.EtherType, false)
	if err := tap.Send(frame); err != nil {
		t.Fatal(err)
	}
	if got := socket.Recv(); !bytes.Equal(got, frame) {
		t.Errorf("received % x, want % x", got, frame)
	}
	if err := tap.Send(frame[:3]); err == nil {
		t.Error("three bytes are no frame")
	}
}

func TestSetQueues(t *testing.T) {
	taptest.Netns(t)
	tap := open(t, Config{Name: "t0", Queues: 4})
	for _, n := range []int{1, 3, 2, 4, 4, 1} {
		if err := tap.SetQueues(n); err != nil {
			t.Fatal(err)
		}
		link, err := netlink.LinkByName("t0")
		if err != nil {
			t.Fatal(err)
		}
		if l := link.(*netlink.Tuntap); l.Queues != n || l.DisabledQueues != 4-n {
			t.Errorf("%d queues set: the kernel has %d enabled, %d disabled", n, l.Queues, l.DisabledQueues)
		}
	}
}

// TestOpenWithoutDevice hides /dev/net/tun in a mount namespace of its thread.
func TestOpenWithoutDevice(t *testing.T) {
	taptest.Netns(t)
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Skipf("no mount namespace: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", "/dev/net", "tmpfs", unix.MS_NODEV, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{}); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "modprobe tun") {
		t.Errorf("no /dev/net/tun: %v", err)
	}
	if err := unix.Mknod(device, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{}); !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "run as root") {
		t.Errorf("no access to /dev/net/tun: %v", err)
	}
}
