package vfio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"baton/devices"

	"golang.org/x/sys/unix"
)

var le = binary.LittleEndian

// hardware is a function of the host as [Function] uses it.
type hardware interface {
	Host() string
	// region describes one: 0 to 5 are the BARs, regionConfig the configuration space.
	region(i int) (region, error)
	read(i int, off uint64, p []byte) error
	write(i int, off uint64, p []byte) error
	// mmap maps a part of a region.
	mmap(i int, part devices.Range) ([]byte, error)
	munmap(b []byte) error
	// setIRQs has the interrupts of an index signal the eventfds; without any they are off.
	setIRQs(index uint32, fds []int32) error
	// irqs is how many interrupts of an index the host can take.
	irqs(index uint32) (int, error)
	// unmask has the interrupt of an index, which the kernel masks when it fires, fire again.
	unmask(index uint32) error
	// fresh says that the kernel has reset the function when it was opened.
	fresh() bool
	reset() error
	Close() error
}

// region is a part of the device that can be read and written.
type region struct {
	size  uint64
	areas []devices.Range // that can be mapped
}

// Device is an open function of the host.
type Device struct {
	c       *Container
	bdf     string
	binding *binding
	group   string // "" before it was joined
	fd      int
	flags   uint32
	offsets [regionConfig + 1]uint64 // of the regions in fd
}

func (d *Device) open(group int) (err error) {
	name := [16]byte{}
	copy(name[:15], d.bdf)
	if d.fd, err = ioctl(group, groupGetDevice, &name); err != nil {
		d.fd = -1
		return err
	}
	info := deviceInfo{argsz: 20}
	if _, err := ioctl(d.fd, deviceGetInfo, &info); err != nil {
		return err
	}
	if info.flags&isPCI == 0 || info.regions <= regionConfig {
		return errors.New("it is not a PCI function, says VFIO")
	}
	d.flags = info.flags
	if !d.fresh() {
		return d.reset()
	}
	return nil
}

// Host is the function's address on the host, 0000:00:00.0.
func (d *Device) Host() string { return d.bdf }

// Close gives the function, which does no DMA, back to the kernel, which resets it, and to the
// driver that it was taken from.
func (d *Device) Close() error {
	d.c.opening.Lock()
	defer d.c.opening.Unlock()
	return d.close()
}

func (d *Device) close() (err error) {
	delete(d.c.devices, d.bdf)
	if d.fd >= 0 {
		var unmapping sync.WaitGroup
		if len(d.c.devices) == 0 { // while the kernel waits for the reset
			unmapping.Go(d.c.unmapMemory)
		}
		if !d.fresh() {
			err = d.reset() // the kernel cannot do it alone
		}
		err = errors.Join(err, unix.Close(d.fd))
		unmapping.Wait()
	}
	if d.group != "" {
		err = errors.Join(err, d.c.leave(d.group))
	}
	if d.binding != nil {
		err = errors.Join(err, d.binding.restore())
	}
	return err
}

func (d *Device) region(i int) (region, error) {
	info := regionInfo{index: uint32(i)}
	info.argsz = sizeOf(&info)
	if _, err := ioctl(d.fd, deviceGetRegion, &info); err != nil {
		return region{}, fmt.Errorf("region %d: %w", i, err)
	}
	d.offsets[i] = info.offset
	r := region{size: info.size}
	if info.flags&regionMmap != 0 && info.size > 0 {
		r.areas = []devices.Range{{Size: info.size}}
		if sparse, ok := sparseAreas(info.caps[:], info.capOffset); ok {
			r.areas = sparse
		}
	}
	return r, nil
}

// sparseAreas looks for the sparse mmap capability in what follows the fixed part of
// vfio_region_info; offsets count from the start of that.
func sparseAreas(caps []byte, off uint32) (areas []devices.Range, ok bool) {
	const fixed, header = 32, 8
	for range 64 { // a chain that is longer goes in circles
		at := int(off) - fixed
		if at < 0 || at+header+8 > len(caps) {
			return nil, false
		}
		if le.Uint16(caps[at:]) != capSparse {
			off = le.Uint32(caps[at+4:])
			continue
		}
		list := caps[at+header+8:]
		for range min(int(le.Uint32(caps[at+header:])), len(list)/16) {
			areas = append(areas, devices.Range{Base: le.Uint64(list), Size: le.Uint64(list[8:])})
			list = list[16:]
		}
		return areas, true
	}
	return nil, false
}

func (d *Device) read(i int, off uint64, p []byte) error {
	n, err := unix.Pread(d.fd, p, int64(d.offsets[i]+off))
	if err == nil && n < len(p) {
		err = unix.EIO
	}
	return err
}

func (d *Device) write(i int, off uint64, p []byte) error {
	_, err := unix.Pwrite(d.fd, p, int64(d.offsets[i]+off))
	return err
}

func (d *Device) mmap(i int, part devices.Range) ([]byte, error) {
	return unix.Mmap(d.fd, int64(d.offsets[i]+part.Base), int(part.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

func (d *Device) munmap(b []byte) error { return unix.Munmap(b) }

func (d *Device) setIRQs(index uint32, fds []int32) error {
	s := irqSet{flags: irqTrigger | irqEventFD, index: index, count: uint32(len(fds))}
	if len(fds) == 0 {
		s.flags = irqTrigger | irqNone
	}
	copy(s.fds[:], fds)
	s.argsz = 20 + 4*s.count
	n, err := ioctl(d.fd, deviceSetIRQs, &s)
	if err == nil && n > 0 {
		err = fmt.Errorf("the host has %d vectors left", n)
	}
	if err != nil {
		return fmt.Errorf("set %d interrupts: %w", len(fds), err)
	}
	return nil
}

func (d *Device) irqs(index uint32) (int, error) {
	info := irqInfo{index: index}
	info.argsz = sizeOf(&info)
	_, err := ioctl(d.fd, deviceGetIRQ, &info)
	return int(info.count), err
}

func (d *Device) unmask(index uint32) error {
	s := irqSet{argsz: 20, flags: irqUnmask | irqNone, index: index, count: 1}
	_, err := ioctl(d.fd, deviceSetIRQs, &s)
	return err
}

func (d *Device) fresh() bool { return d.flags&canReset != 0 }

// reset resets the function alone: by FLR, by power management, or by its bus if it has that
// to itself, as the kernel decides; and else its bus with all that is on it, which must be
// in groups of this container.
func (d *Device) reset() error {
	if d.fresh() {
		if _, err := ioctlValue(d.fd, deviceReset, 0); err != nil {
			return fmt.Errorf("reset %s: %w", d.bdf, err)
		}
		return nil
	}
	var peers hotResetDevices
	peers.argsz = sizeOf(&peers)
	if _, err := ioctl(d.fd, hotResetInfo, &peers); err != nil {
		return fmt.Errorf("reset %s: there is no way to (neither FLR nor power management, and not its bus): %w", d.bdf, err)
	}
	var groups hotResetGroups
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	for _, p := range peers.devices[:min(peers.count, maxResetPeers)] {
		g := d.c.groups[fmt.Sprint(p.group)]
		if g == nil {
			return fmt.Errorf("reset %s: its bus has to be reset, which %04x:%02x:%02x.%d of IOMMU group %d is on too\npass that one through as well",
				d.bdf, p.segment, p.bus, p.devfn>>3, p.devfn&7, p.group)
		}
		if !slices.Contains(groups.fds[:groups.count], int32(g.fd)) {
			groups.fds[groups.count] = int32(g.fd)
			groups.count++
		}
	}
	groups.argsz = 12 + 4*groups.count
	if _, err := ioctl(d.fd, hotReset, &groups); err != nil {
		return fmt.Errorf("reset %s with its bus: %w", d.bdf, err)
	}
	return nil
}
