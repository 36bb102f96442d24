package vfio

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"baton/kvm/guestmem"

	"golang.org/x/sys/unix"
)

// Files is the VM's list of the VFIO groups that its devices belong to (KVM-VFIO device).
type Files interface {
	AddFile(fd int) error
	RemoveFile(fd int) error
}

// Container is the guest's memory as devices see it, and the IOMMU groups that do.
type Container struct {
	host  host
	mem   *guestmem.Memory
	files Files
	fd    int

	opening sync.Mutex // one device opens or closes at a time, which may take seconds
	devices map[string]bool
	mu      sync.Mutex // never held for long: a guest's reset needs it
	groups  map[string]*group
}

type group struct {
	fd    int
	users int // open devices
}

// NewContainer opens /dev/vfio/vfio. Mem is mapped for as long as there are devices; it must
// not be closed before the container.
func NewContainer(mem *guestmem.Memory, files Files) (*Container, error) {
	if err := checkMemlock(mem.Size()); err != nil {
		return nil, err
	}
	const dev = "/dev/vfio/vfio"
	fd, err := unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
	case unix.ENOENT, unix.ENODEV:
		return nil, fmt.Errorf("open %s: %w\nmodprobe vfio-pci", dev, err)
	case unix.EACCES, unix.EPERM:
		return nil, fmt.Errorf("open %s: %w\nrun as root, or let it and the group's file belong to you", dev, err)
	default:
		return nil, fmt.Errorf("open %s: %w", dev, err)
	}
	c := &Container{host: realHost, mem: mem, files: files, fd: fd, groups: map[string]*group{}, devices: map[string]bool{}}
	version, err := ioctlValue(fd, getAPIVersion, 0)
	if err == nil && version != apiVersion {
		err = fmt.Errorf("API version %d instead of %d", version, apiVersion)
	}
	if err == nil {
		var has int
		if has, err = ioctlValue(fd, checkExtension, type1v2); err == nil && has == 0 {
			err = errors.New("no type 1 v2 IOMMU\nmodprobe vfio_iommu_type1")
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", dev, err), unix.Close(fd))
	}
	return c, nil
}

// checkMemlock says beforehand what else would be "cannot allocate memory": the kernel
// counts all that a device may reach as locked.
func checkMemlock(size uint64) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil || limit.Cur >= size {
		return nil // the kernel will tell
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil || caps[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0 {
		return nil
	}
	return fmt.Errorf("VFIO locks all of the guest's RAM: %d KiB, but the limit is %d KiB\nulimit -l %[1]d (systemd: LimitMEMLOCK=%[3]d), or give baton CAP_IPC_LOCK",
		size>>10, limit.Cur>>10, size)
}

// Close gives back what the container holds. Its devices must be closed.
func (c *Container) Close() error { return unix.Close(c.fd) }

// Open opens a function (0000:00:00.0), resets it and gives it all of the guest's memory, which
// takes as long as it takes to allocate and pin that, unless ctx ends. With bind, one that has
// another driver is taken from it, and given back when the device is closed.
func (c *Container) Open(ctx context.Context, bdf string, bind bool) (_ *Device, err error) {
	c.opening.Lock()
	defer c.opening.Unlock()
	if c.devices[bdf] { // the kernel would open it once more
		return nil, fmt.Errorf("open PCI function %s: this guest has it already", bdf)
	}
	d := &Device{c: c, bdf: bdf, fd: -1}
	c.devices[bdf] = true
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open PCI function %s: %w", bdf, err), d.close())
		}
	}()
	number, members, err := c.host.group(bdf)
	if err != nil {
		return nil, err
	}
	if bind {
		if d.binding, err = c.host.bind(bdf); err != nil {
			return nil, err
		}
	} else if driver := c.host.driver(bdf); driver != Driver {
		return nil, fmt.Errorf("its driver is %q, not %s\nbind=auto takes it from there, and gives it back at the end", driver, Driver)
	}
	if err := c.host.viable(number, members); err != nil {
		return nil, err
	}
	g, err := c.join(ctx, number)
	if err != nil {
		return nil, fmt.Errorf("IOMMU group %s: %w", number, err)
	}
	d.group = number
	g.users++
	return d, d.open(g.fd)
}

// join opens a group and lets it see the guest's memory.
func (c *Container) join(ctx context.Context, number string) (*group, error) {
	if g := c.groups[number]; g != nil { // only its opener changes the map: no lock to read it
		return g, nil
	}
	fd, err := unix.Open("/dev/vfio/"+number, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
	case unix.EBUSY:
		return nil, fmt.Errorf("%w: %s", err, holder("/proc", "/dev/vfio/"+number))
	case unix.EACCES, unix.EPERM:
		return nil, fmt.Errorf("%w\nrun as root, or: chown $USER /dev/vfio/%s", err, number)
	default:
		return nil, err
	}
	status := groupStatus{argsz: 8}
	if _, err = ioctl(fd, groupGetStatus, &status); err == nil && status.flags&groupViable == 0 {
		err = errors.New("it is not viable, says the kernel: a driver of the host uses a device of it")
	}
	if err == nil {
		container := int32(c.fd)
		_, err = ioctl(fd, groupSet, &container)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	if len(c.groups) == 0 {
		err = c.mapMemory(ctx)
	}
	if err == nil {
		err = c.files.AddFile(fd)
	}
	if err != nil {
		_, uerr := ioctlValue(fd, groupUnset, 0)
		return nil, errors.Join(err, uerr, unix.Close(fd))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g := &group{fd: fd}
	c.groups[number] = g
	return g, nil
}

// mapStep is how much is mapped at once: what has begun cannot be called off.
const mapStep = 1 << 30

// mapMemory gives the container its IOMMU, which it keeps until the last group has left.
func (c *Container) mapMemory(ctx context.Context) error {
	if _, err := ioctlValue(c.fd, setIOMMU, type1v2); err != nil {
		return fmt.Errorf("VFIO_SET_IOMMU: %w\nan IOMMU without interrupt remapping needs vfio_iommu_type1.allow_unsafe_interrupts=1", err)
	}
	for _, r := range c.mem.Regions() {
		for off := uint64(0); off < r.Size; off += mapStep {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			part := r.Host[off:min(off+mapStep, r.Size)]
			m := dmaMap{flags: dmaReadWrite, vaddr: address(part), iova: r.GPA + off, size: uint64(len(part))}
			m.argsz = sizeOf(&m)
			if _, err := ioctl(c.fd, iommuMapDMA, &m); err != nil {
				return fmt.Errorf("map guest memory %#x+%#x for DMA: %w", m.iova, m.size, err)
			}
		}
	}
	return nil
}

// unmapMemory takes the guest's memory from devices that do not use it any more. Linux before 5.12,
// which cannot unmap all at once, does it when the last group leaves.
func (c *Container) unmapMemory() {
	u := dmaUnmap{flags: dmaUnmapAll}
	u.argsz = sizeOf(&u)
	_, _ = ioctl(c.fd, iommuUnmapDMA, &u)
}

// leave takes a user from a group, and with the last one the group from the container.
func (c *Container) leave(number string) error {
	g := c.groups[number]
	if g.users--; g.users > 0 {
		return nil
	}
	c.mu.Lock()
	delete(c.groups, number)
	c.mu.Unlock()
	err := c.files.RemoveFile(g.fd)
	_, uerr := ioctlValue(g.fd, groupUnset, 0)
	return errors.Join(err, uerr, unix.Close(g.fd))
}
