package steer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"baton/devices/tap"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// packetHdrSize is the length of the struct virtio_net_hdr before each frame of a packet
// socket: packet(7), PACKET_VNET_HDR.
const packetHdrSize = 10

// Uplink is an interface by which a primary that is no VF can be reached: a port of the TAP's
// bridge that is neither the TAP nor another one's; "" if there is none.
func (s *Steerer) Uplink() string {
	if s.c.Off || s.c.Script != "" {
		return ""
	}
	tapLink, err := netlink.LinkByName(s.c.TAP)
	if err != nil || tapLink.Attrs().MasterIndex == 0 {
		return ""
	}
	links, err := netlink.LinkList()
	if err != nil {
		return ""
	}
	for _, l := range links {
		if l.Attrs().MasterIndex == tapLink.Attrs().MasterIndex && l.Type() != "tuntap" {
			return l.Attrs().Name
		}
	}
	return ""
}

// Room gives the TAP a transmit queue for at least so many frames: those that come while the guest stands still, and
// until it has caught up. The default of 1000 is half a second of a busy guest's.
func (s *Steerer) Room(frames int) error {
	if s.c.Off || s.c.Script != "" {
		return nil
	}
	link, err := netlink.LinkByName(s.c.TAP)
	if err == nil && link.Attrs().TxQLen < frames {
		err = netlink.LinkSetTxQLen(link, frames)
	}
	if err != nil {
		return fmt.Errorf("steer %s: room for %d frames in the queue of %s: %w", s.c.MAC, frames, s.c.TAP, err)
	}
	return nil
}

// announce tells the wire of a PF that the MAC is there. Where the TAP is, its device does that.
func (s *Steerer) announce(pf string) error {
	if pf == "" || len(s.c.MAC) != 6 {
		return nil
	}
	_, err := Send(pf, [][]byte{append(make([]byte, tap.HeaderSize), tap.RARP([6]byte(s.c.MAC))...)})
	return err
}

// A VF throws away what its receive ring has no room for, and many drivers give it 256 buffers.
// What was held is therefore handed to it at a pace that a guest with one slow CPU keeps up with.
const (
	paceFrames = 64 // at a time, on the wire
	paceTime   = 8 * time.Millisecond
)

// SendPaced is Send, with time for a VF's driver to take what was sent. It ends early, between two
// frames, once more says that no more is wanted.
func SendPaced(ifname string, frames [][]byte, more func() bool) (sent int, err error) {
	for len(frames) > 0 {
		n, wire := 0, 0
		for n < len(frames) && wire < paceFrames {
			wire += segments(frames[n])
			n++
		}
		k, serr := Send(ifname, frames[:n])
		sent, frames = sent+k, frames[n:]
		if err == nil {
			err = serr
		}
		if len(frames) > 0 {
			if time.Sleep(paceTime * time.Duration(max(wire, paceFrames)) / paceFrames); !more() {
				break
			}
		}
	}
	return sent, err
}

// segments is how many frames there will be on the wire of one out of a TAP, which says in its
// header how much of a segment's payload goes into each: virtio 1.3, 5.1.6.
func segments(frame []byte) int {
	if len(frame) < tap.HeaderSize || frame[1] == unix.VIRTIO_NET_HDR_GSO_NONE {
		return 1
	}
	if size := int(binary.LittleEndian.Uint16(frame[4:])); size > 0 {
		return max(1, (len(frame)-tap.HeaderSize)/size)
	}
	return 1
}

// Send sends frames as they come out of a TAP, each with a header of tap.HeaderSize bytes, by an
// interface: a PF hands on those for its VFs. It returns how many were sent.
func Send(ifname string, frames [][]byte) (sent int, err error) {
	if len(frames) == 0 {
		return 0, nil
	}
	link, err := port(ifname)
	if err != nil {
		return 0, fmt.Errorf("send by %s: %w", ifname, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("send by %s: %w", ifname, err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return 0, fmt.Errorf("send by %s: %w", ifname, err)
	}
	to := &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index, Halen: 6}
	var errs []error
	for _, f := range frames {
		if len(f) < tap.HeaderSize+14 {
			continue
		}
		packet := append(append([]byte(nil), f[:packetHdrSize]...), f[tap.HeaderSize:]...)
		copy(to.Addr[:], f[tap.HeaderSize:])
		if serr := unix.Sendto(fd, packet, 0, to); serr == nil {
			sent++
		} else if len(errs) == 0 {
			errs = append(errs, fmt.Errorf("send by %s: %w", ifname, serr))
		}
	}
	return sent, errors.Join(errs...)
}
