package vfio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Driver is the one that VFIO speaks to.
const Driver = "vfio-pci"

// host is a sysfs, which tests replace, and where the state files of bindings are.
type host struct {
	sys, state string
	write      func(path, text string) error // to a file of sysfs
}

var realHost = host{"/sys", "/run/baton/vfio", write}

var bdfPattern = regexp.MustCompile(`^(?:([0-9a-fA-F]{4}):)?([0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7])$`)

// ParseHost returns the address 0000:00:00.0 of host=, where the domain may be left out.
func ParseHost(s string) (string, error) {
	m := bdfPattern.FindStringSubmatch(s)
	if m == nil {
		return "", fmt.Errorf("host=%s: not a PCI address such as 0000:01:10.0", s)
	}
	if m[1] == "" {
		m[1] = "0000"
	}
	return strings.ToLower(m[1] + ":" + m[2]), nil
}

// ParseSysfs returns the address of a PCI function's folder, as for sysfsdev=.
func ParseSysfs(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", fmt.Errorf("sysfsdev=%s: %w", path, err)
	}
	bdf, err := ParseHost(filepath.Base(real))
	if err != nil {
		return "", fmt.Errorf("sysfsdev=%s: %s is not a PCI function\nmediated devices are not supported", path, real)
	}
	return bdf, nil
}

func (h host) device(bdf string, elem ...string) string {
	return filepath.Join(append([]string{h.sys, "bus/pci/devices", bdf}, elem...)...)
}

// driver is the name of a function's driver, "" if it has none.
func (h host) driver(bdf string) string {
	target, err := os.Readlink(h.device(bdf, "driver"))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

// group is the IOMMU group of a function with all of its members.
func (h host) group(bdf string) (number string, members []string, err error) {
	if _, err := os.Stat(h.device(bdf)); err != nil {
		return "", nil, fmt.Errorf("there is no such PCI function\nlspci -D lists them; a VF is there once its PF's sriov_numvfs says so")
	}
	target, err := os.Readlink(h.device(bdf, "iommu_group"))
	if err != nil {
		return "", nil, fmt.Errorf("it is in no IOMMU group\nturn on VT-d or AMD-Vi in the firmware, and intel_iommu=on for an Intel kernel")
	}
	entries, err := os.ReadDir(h.device(bdf, "iommu_group", "devices"))
	for _, e := range entries {
		members = append(members, e.Name())
	}
	return filepath.Base(target), members, err
}

// holder says which process has a file open, as far as proc, normally /proc, shows it.
func holder(proc, file string) string {
	links, _ := filepath.Glob(proc + "/[0-9]*/fd/*")
	for _, l := range links {
		if target, err := os.Readlink(l); err == nil && target == file {
			pid := filepath.Base(filepath.Dir(filepath.Dir(l)))
			comm, _ := os.ReadFile(filepath.Join(proc, pid, "comm"))
			return fmt.Sprintf("process %s (%s) has it", pid, strings.TrimSpace(string(comm)))
		}
	}
	return "another process has it"
}

// harmless are the drivers that leave a group viable: they do no DMA.
var harmless = []string{"", Driver, "pci-stub", "pcieport"}

// viable says who keeps a group from being passed through: drivers of the host would share
// the guest's view of memory.
func (h host) viable(number string, members []string) error {
	var held []string
	for _, m := range members {
		if d := h.driver(m); !slices.Contains(harmless, d) && !strings.Contains(d, "vfio") {
			held = append(held, fmt.Sprintf("%s by %s", m, d))
		}
	}
	if held == nil {
		return nil
	}
	return fmt.Errorf("IOMMU group %s is not viable: %s\nwhat is in one group goes to one guest, or stays without a driver: unbind these",
		number, strings.Join(held, ", "))
}

// binding is a function that was taken from its driver. While it is, a locked file says
// which one that was: when its owner has died, nobody holds the lock.
type binding struct {
	host
	bdf, was string
	file     *os.File
}

// bind gives a function to vfio-pci; nil if it is there.
func (h host) bind(bdf string) (*binding, error) {
	was := h.driver(bdf)
	if was == Driver {
		return nil, h.unowned(bdf)
	}
	if _, err := os.Stat(filepath.Join(h.sys, "bus/pci/drivers", Driver)); err != nil {
		return nil, fmt.Errorf("bind it to %s: the driver is not there\nmodprobe %[1]s", Driver)
	}
	if err := os.MkdirAll(h.state, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(h.state, bdf), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	b := &binding{h, bdf, was, f}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("bind it to %s: another baton does so: lock %s: %w", Driver, f.Name(), err), f.Close())
	}
	if _, err = f.WriteString(was + "\n"); err == nil {
		err = errors.Join(h.write(h.device(bdf, "driver_override"), Driver), h.unbind(bdf), h.write(filepath.Join(h.sys, "bus/pci/drivers_probe"), bdf))
	}
	if now := h.driver(bdf); err == nil && now != Driver {
		err = fmt.Errorf("its driver is %q after the probe\nsee dmesg", now)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("bind it to %s: %w", Driver, err), b.restore())
	}
	return b, nil
}

// unowned fails if somebody has bound the function and is going to give it back, which the
// kernel would put off until this process has closed it.
func (h host) unowned(bdf string) error {
	f, err := os.Open(filepath.Join(h.state, bdf))
	if err != nil {
		return nil // nobody
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another baton has it: lock %s: %w", f.Name(), err)
	}
	return nil
}

// restore gives the function back to the driver that had it. One that is gone, as VFs may
// be, needs nothing.
func (b *binding) restore() (err error) {
	if _, gone := os.Stat(b.device(b.bdf)); gone == nil {
		// An empty override is written as a newline: the kernel ignores a write of nothing.
		err = b.write(b.device(b.bdf, "driver_override"), "\n")
		if b.driver(b.bdf) != b.was {
			err = errors.Join(err, b.unbind(b.bdf))
			if b.was != "" {
				err = errors.Join(err, b.write(filepath.Join(b.sys, "bus/pci/drivers", b.was, "bind"), b.bdf))
			}
		}
	}
	if err != nil {
		err = fmt.Errorf("give %s back to driver %q: %w", b.bdf, b.was, err)
	}
	return errors.Join(err, os.Remove(b.file.Name()), b.file.Close())
}

func (h host) unbind(bdf string) error {
	if h.driver(bdf) == "" {
		return nil
	}
	return h.write(h.device(bdf, "driver/unbind"), bdf)
}

// write is one write to a file that has to be there.
func write(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// Recover gives the functions back that processes bound to vfio-pci and could not give back
// themselves, because they were killed. It returns their addresses.
func Recover() (bdfs []string, err error) { return realHost.recover() }

func (h host) recover() (bdfs []string, err error) {
	entries, err := os.ReadDir(h.state)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		f, ferr := os.OpenFile(filepath.Join(h.state, e.Name()), os.O_RDWR, 0)
		if ferr != nil {
			err = errors.Join(err, ferr)
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			f.Close() // its owner lives
			continue
		}
		text := make([]byte, 256)
		n, _ := f.Read(text) // nothing was written: nothing was changed
		was, complete := strings.CutSuffix(string(text[:n]), "\n")
		if bdf, perr := ParseHost(e.Name()); complete && perr == nil && !strings.Contains(was, "/") {
			bdfs = append(bdfs, bdf)
			err = errors.Join(err, (&binding{h, bdf, was, f}).restore())
			continue
		}
		err = errors.Join(err, os.Remove(f.Name()), f.Close())
	}
	return bdfs, err
}
