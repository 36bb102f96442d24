package harness

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

const pciDevices = "/sys/bus/pci/devices"

// A PF is the physical function of an SR-IOV NIC.
type PF struct {
	Name string // of its interface
	PCI  string // its address, such as 0000:01:00.0
}

// PFs returns the SR-IOV NICs that a test may use, by PCI address: all of the nested
// host's, or those that BATON_PFS names. If there are none the test ends.
func PFs(t testing.TB) []PF {
	t.Helper()
	var names []string
	if Nested() {
		found, _ := filepath.Glob("/sys/class/net/*/device/sriov_totalvfs")
		for _, f := range found {
			names = append(names, filepath.Base(filepath.Dir(filepath.Dir(f))))
		}
	} else if list := os.Getenv(EnvPFs); list != "" {
		names = strings.Split(list, ",")
	}
	var pfs []PF
	for _, n := range names {
		dev, err := filepath.EvalSymlinks("/sys/class/net/" + n + "/device")
		must(t, "PF "+n, err)
		pfs = append(pfs, PF{n, filepath.Base(dev)})
	}
	if len(pfs) == 0 {
		t.Fatalf("no SR-IOV NIC\non a host, %s names those to use", EnvPFs)
	}
	sort.Slice(pfs, func(i, j int) bool { return pfs[i].PCI < pfs[j].PCI })
	return pfs
}

// A VF is a virtual function of a PF.
type VF struct {
	PF    PF
	Index int
	PCI   string
}

// CreateVFs sets the PF up and makes n VFs, with none there before and after.
func (pf PF) CreateVFs(t testing.TB, n int) []VF {
	t.Helper()
	Up(t, pf.Name)
	dir := filepath.Join(pciDevices, pf.PCI)
	count := filepath.Join(dir, "sriov_numvfs")
	must(t, "create VFs", writeSys(count, strconv.Itoa(n)))
	undo(t, "create VFs", func() error { return writeSys(count, "0") })
	vfs := make([]VF, n)
	for i := range vfs {
		target, err := os.Readlink(filepath.Join(dir, fmt.Sprintf("virtfn%d", i)))
		must(t, "VF", err)
		vfs[i] = VF{pf, i, filepath.Base(target)}
	}
	return vfs
}

// SetMAC gives the VF a MAC, by its PF, which must be up.
func (vf VF) SetMAC(t testing.TB, mac string) {
	t.Helper()
	hw, err := net.ParseMAC(mac)
	must(t, "VF", err)
	must(t, fmt.Sprintf("MAC of %s", vf.PCI), netlink.LinkSetVfHardwareAddr(link(t, vf.PF.Name), vf.Index, hw))
}

// MAC returns the VF's MAC as its PF has it.
func (vf VF) MAC(t testing.TB) string {
	t.Helper()
	for _, info := range link(t, vf.PF.Name).Attrs().Vfs {
		if info.ID == vf.Index {
			return info.Mac.String()
		}
	}
	t.Fatalf("%s: PF %s does not list VF %d", vf.PCI, vf.PF.Name, vf.Index)
	return ""
}

// BindVFIO takes the VF from its driver and gives it to vfio-pci; at the end it goes back.
func (vf VF) BindVFIO(t testing.TB) {
	t.Helper()
	was := driverOf(vf.PCI)
	must(t, "bind "+vf.PCI+" to vfio-pci", bind(vf.PCI, "vfio-pci"))
	undo(t, "bind "+vf.PCI, func() error {
		if err := bind(vf.PCI, ""); err != nil {
			return err
		}
		if now := driverOf(vf.PCI); now != was {
			return fmt.Errorf("driver is %q, was %q", now, was)
		}
		return nil
	})
}

// Driver returns the name of the VF's driver, "" if it has none.
func (vf VF) Driver() string { return driverOf(vf.PCI) }

// IOMMUGroup returns the number of the VF's group and the PCI addresses of all its members.
func (vf VF) IOMMUGroup(t testing.TB) (group int, members []string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(filepath.Join(pciDevices, vf.PCI, "iommu_group"))
	must(t, "IOMMU group", err)
	group, err = strconv.Atoi(filepath.Base(dir))
	must(t, "IOMMU group", err)
	entries, err := os.ReadDir(filepath.Join(dir, "devices"))
	must(t, "IOMMU group", err)
	for _, e := range entries {
		members = append(members, e.Name())
	}
	return group, members
}

// bind gives a PCI function to the driver, or to whichever claims it if that is "".
func bind(pci, driver string) error {
	dir := filepath.Join(pciDevices, pci)
	// An empty override is written as a newline: the kernel ignores a write of nothing.
	if err := writeSys(filepath.Join(dir, "driver_override"), driver+"\n"); err != nil {
		return err
	}
	if driverOf(pci) != "" {
		if err := writeSys(filepath.Join(dir, "driver", "unbind"), pci); err != nil {
			return err
		}
	}
	if err := writeSys("/sys/bus/pci/drivers_probe", pci); err != nil {
		return err
	}
	if now := driverOf(pci); driver != "" && now != driver {
		return fmt.Errorf("driver is %q after the probe", now)
	}
	return nil
}

func driverOf(pci string) string {
	target, err := os.Readlink(filepath.Join(pciDevices, pci, "driver"))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

// writeSys writes to a file that must be there, in one write.
func writeSys(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
