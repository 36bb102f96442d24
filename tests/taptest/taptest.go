// Package taptest gives tests a network namespace of their own, and a packet socket as the
// host's end of a TAP.
package taptest

import (
	"encoding/binary"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Thread moves the test's goroutine to a thread of its own in new namespaces (CLONE_NEW*).
// It skips the test where there are no rights.
func Thread(t testing.TB, namespaces int) {
	t.Helper()
	runtime.LockOSThread() // and never unlock: the runtime ends the thread with the goroutine
	if err := unix.Unshare(namespaces); err != nil {
		t.Skipf("no new namespaces (%#x): %v", namespaces, err)
	}
}

// EtherType marks the tests' frames: local experimental 1 of IEEE 802.
const EtherType = 0x88b5

// Netns moves the test's goroutine, on a thread of its own, into a new and empty network
// namespace that ends with it. It skips the test where there are no rights or no TUN driver.
func Netns(t testing.TB) {
	t.Helper()
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("no TUN driver: %v", err)
	}
	Thread(t, unix.CLONE_NEWNET)
	// The kernel would send neighbour and router discovery on every interface.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
}

// Frame returns an Ethernet broadcast frame of EtherType with n bytes of payload that
// depend on seed.
func Frame(seed byte, n int) []byte {
	f := append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01"), EtherType>>8, EtherType&0xff)
	for i := range n {
		f = append(f, seed+byte(i)+byte(i>>8))
	}
	return f
}

// Socket is a packet socket on one interface. With GSO a frame goes both ways with its
// 10-byte virtio_net_hdr before it.
type Socket struct {
	t   testing.TB
	fd  int
	buf []byte
}

// NewSocket opens a socket for the frames of one EtherType.
func NewSocket(t testing.TB, ifname string, ethertype uint16, gso bool) *Socket {
	t.Helper()
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if gso {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			t.Fatal(err)
		}
	}
	proto := binary.NativeEndian.Uint16([]byte{byte(ethertype >> 8), byte(ethertype)})
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: ifi.Index}); err != nil {
		t.Fatal(err)
	}
	timeout := unix.NsecToTimeval(int64(10 * time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	return &Socket{t, fd, make([]byte, 1<<17)}
}

// Send sends one frame out of the interface, which hands it to whoever reads the TAP.
func (s *Socket) Send(frame []byte) {
	s.t.Helper()
	if _, err := unix.Write(s.fd, frame); err != nil {
		s.t.Errorf("send %d bytes: %v", len(frame), err)
	}
}

// Recv returns the next frame that the interface received, or fails after 10 s. The bytes
// are valid until the next call.
func (s *Socket) Recv() []byte {
	s.t.Helper()
	for {
		n, err := unix.Read(s.fd, s.buf)
		if err == nil {
			return s.buf[:n]
		}
		if err != unix.EINTR {
			s.t.Errorf("receive: %v", err)
			return nil
		}
	}
}
