package vfio

import (
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

	mu     sync.Mutex
	groups map[string]*group
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
	c := &Container{host: realHost, mem: mem, files: files, fd: fd, groups: map[string]*group{}}
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

// Open opens a function (0000:00:00.0). With bind, one that has another driver is taken from
// it, and given back when the device is closed.
func (c *Container) Open(bdf string, bind bool) (_ *Device, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := &Device{c: c, bdf: bdf, fd: -1}
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
	if err := c.join(number); err != nil {
		return nil, fmt.Errorf("IOMMU group %s: %w", number, err)
	}
	d.group = number
	c.groups[number].users++
	return d, d.open(c.groups[number].fd)
}

// join opens a group and lets it see the guest's memory.
func (c *Container) join(number string) error {
	if c.groups[number] != nil {
		return nil
	}
	fd, err := unix.Open("/dev/vfio/"+number, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
	case unix.EBUSY:
		return fmt.Errorf("%w\nanother process has the group; fuser /dev/vfio/%s names it", err, number)
	case unix.EACCES, unix.EPERM:
		return fmt.Errorf("%w\nrun as root, or: chown $USER /dev/vfio/%s", err, number)
	default:
		return err
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
		return errors.Join(err, unix.Close(fd))
	}
	if len(c.groups) == 0 {
		err = c.mapMemory()
	}
	if err == nil {
		err = c.files.AddFile(fd)
	}
	if err != nil {
		_, uerr := ioctlValue(fd, groupUnset, 0)
		return errors.Join(err, uerr, unix.Close(fd))
	}
	c.groups[number] = &group{fd: fd}
	return nil
}

// mapMemory gives the container its IOMMU, which it keeps until the last group has left.
func (c *Container) mapMemory() error {
	if _, err := ioctlValue(c.fd, setIOMMU, type1v2); err != nil {
		return fmt.Errorf("VFIO_SET_IOMMU: %w\nan IOMMU without interrupt remapping needs vfio_iommu_type1.allow_unsafe_interrupts=1", err)
	}
	for _, r := range c.mem.Regions() {
		m := dmaMap{flags: dmaReadWrite, vaddr: address(r.Host), iova: r.GPA, size: r.Size}
		m.argsz = sizeOf(&m)
		if _, err := ioctl(c.fd, iommuMapDMA, &m); err != nil {
			return fmt.Errorf("map guest memory %#x+%#x for DMA: %w", r.GPA, r.Size, err)
		}
	}
	return nil
}

// leave takes a user from a group, and with the last one the group from the container.
func (c *Container) leave(number string) error {
	g := c.groups[number]
	if g.users--; g.users > 0 {
		return nil
	}
	delete(c.groups, number)
	err := c.files.RemoveFile(g.fd)
	_, uerr := ioctlValue(g.fd, groupUnset, 0)
	return errors.Join(err, uerr, unix.Close(g.fd))
}
