package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/vishvananda/netlink"

	"baton/tests/harness"
)

// TestBridge has the guest behind a bridge, as on a real host: beside the rest of the
// world, which is at the other end of a wire, and an endpoint that knows every single frame.
func TestBridge(t *testing.T) {
	peer := harness.NewPeer(t, "10.77.0.2/24")
	packets := harness.NewPacketTap(t, "pkt0")
	for _, vhost := range []string{"on", "off"} {
		t.Run("vhost="+vhost, func(t *testing.T) {
			harness.Tap(t, "bat2", 1)
			harness.Bridge(t, "br0", peer.Uplink, packets.Name, "bat2")
			n := &nic{tap: "bat2", mac: "52:54:00:00:66:02", host: "10.77.0.2", guest: "10.77.0.3"}
			n.g = harness.Start(t, harness.GuestConfig{Args: append(harness.Linux(t), "-m", "256M",
				"-netdev", "tap,id=n,ifname=bat2,script=no,downscript=no,vhost="+vhost,
				"-device", "pcie-root-port,id=r", "-device", "virtio-net-pci,netdev=n,bus=r,host_mtu=1400,mac="+n.mac)})
			n.g.Output(harness.Context(t, bootLimit), "true")
			n.up(t)
			ctx := harness.Context(t, limit)
			if got := n.g.Sh(ctx, "cat /sys/class/net/"+n.name+"/mtu"); got != "1400" {
				t.Errorf("MTU %s, want 1400", got)
			}
			peer.Ping(ctx, n.guest)
			n.g.Sh(ctx, "ping -c 2 -W 20 -s 3000 10.77.0.2")
			frames(t, ctx, packets, n)

			n.g.Output(ctx, "@poweroff")
			if code := n.g.Wait(ctx); code != 0 {
				t.Errorf("exit code %d", code)
			}
			if _, err := netlink.LinkByName("bat2"); err != nil {
				t.Errorf("the TAP was not baton's to remove: %v", err)
			}
		})
	}
}

// An endpoint's own addresses.
var (
	endMAC = net.HardwareAddr{2, 0, 0, 0, 0x66, 9}
	endIP  = net.IPv4(10, 77, 0, 9).To4()
)

// frames exchanges single frames with the guest, byte by byte.
func frames(t *testing.T, ctx context.Context, p *harness.PacketTap, n *nic) {
	guestMAC, err := net.ParseMAC(n.mac)
	if err != nil {
		t.Fatal(err)
	}
	guestIP := net.ParseIP(n.guest).To4()

	p.Send(ethernet(net.HardwareAddr{255, 255, 255, 255, 255, 255}, 0x0806, arp(1, endMAC, endIP, make([]byte, 6), guestIP)))
	want := ethernetFrom(endMAC, guestMAC, 0x0806, arp(2, guestMAC, guestIP, endMAC, endIP))
	p.Receive(ctx, func(f []byte) bool { return bytes.HasPrefix(f, want) })

	// What is nothing for the guest does not upset it: no payload, no known protocol, lengths
	// that the headers do not have.
	p.Send(ethernet(guestMAC, 0x0800, nil))
	p.Send(ethernet(guestMAC, 0x88b5, make([]byte, 1386)))
	p.Send(ethernet(guestMAC, 0x86dd, bytes.Repeat([]byte{0xff}, 41)))

	r := rand.NewChaCha8([32]byte{3})
	for i, size := range []int{0, 1, 17, 18, 19, 63, 64, 65, 511, 1000, 1371, 1372} {
		data := make([]byte, size)
		r.Read(data)
		p.Send(ethernet(guestMAC, 0x0800, echo(8, uint16(i), data, endIP, guestIP)))
		answer := echo(0, uint16(i), data, guestIP, endIP)
		const ipHeader = 14 + 20 // whose identification and time to live are the guest's choice
		p.Receive(ctx, func(f []byte) bool {
			return len(f) >= ipHeader && bytes.Equal(f[:6], endMAC) && bytes.HasPrefix(f[ipHeader:], answer[20:])
		})
	}
}

func ethernet(to net.HardwareAddr, kind uint16, payload []byte) []byte {
	return ethernetFrom(to, endMAC, kind, payload)
}

func ethernetFrom(to, from net.HardwareAddr, kind uint16, payload []byte) []byte {
	f := append(append([]byte{}, to...), from...)
	return append(binary.BigEndian.AppendUint16(f, kind), payload...)
}

// arp is a packet of RFC 826 for IPv4 on Ethernet: 1 asks, 2 answers.
func arp(op byte, mac, ip, targetMAC, target []byte) []byte {
	p := []byte{0, 1, 8, 0, 6, 4, 0, op}
	for _, a := range [][]byte{mac, ip, targetMAC, target} {
		p = append(p, a...)
	}
	return p
}

// echo is an IPv4 packet with an ICMP echo: 8 asks, 0 answers (RFC 791, RFC 792).
func echo(kind byte, seq uint16, data []byte, from, to net.IP) []byte {
	icmp := binary.BigEndian.AppendUint16([]byte{kind, 0, 0, 0, 'b', 'a'}, seq)
	icmp = append(icmp, data...)
	binary.BigEndian.PutUint16(icmp[2:], checksum(icmp))
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0}
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(icmp)))
	ip = append(append(ip, from...), to...)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return append(ip, icmp...)
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := range b {
		sum += uint32(b[i]) << (8 * (1 - i%2))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func TestChecksum(t *testing.T) {
	// The example of RFC 1071, section 3, whose sum is ddf2.
	if got := checksum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}); got != ^uint16(0xddf2) {
		t.Errorf("%#x", got)
	}
}
