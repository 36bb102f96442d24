package vmm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"baton/kvm"

	"golang.org/x/sys/unix"
)

// Status says what a finding means for a guest.
type Status string

// The statuses; a stock Linux guest runs where nothing is StatusBad.
const (
	StatusOK      Status = "ok"
	StatusMissing Status = "--" // something goes without, or slower
	StatusBad     Status = "!!"
)

// Finding is one thing that `baton check` looked at.
type Finding struct {
	Status Status `json:"status"`
	Name   string `json:"name"`
	Value  string `json:"value"`
	Hint   string `json:"hint,omitempty"` // how to get what is missing
}

// CheckHost looks at all that a guest may need of this host.
func CheckHost() []Finding {
	list := checkKVM()
	list = append(list, checkSystem(os.DirFS("/"))...)
	return append(list, checkMemlock())
}

// WriteFindings prints one line each, and a line for the hint.
func WriteFindings(w io.Writer, list []Finding) error {
	var b strings.Builder
	for _, f := range list {
		fmt.Fprintf(&b, "%s  %s: %s\n", f.Status, f.Name, f.Value)
		if f.Status != StatusOK && f.Hint != "" {
			fmt.Fprintf(&b, "      %s\n", strings.ReplaceAll(f.Hint, "\n", "\n      "))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func checkKVM() []Finding {
	s, err := kvm.Open()
	if err != nil {
		cause, hint, _ := strings.Cut(err.Error(), "\n")
		return []Finding{{StatusBad, "kvm", cause, hint}}
	}
	defer s.Close()
	return append([]Finding{kvmKind(s.Kind())}, kvmFeatures(s.Features())...)
}

func kvmKind(kind kvm.Kind) Finding {
	if kind == kvm.PVM {
		return Finding{StatusBad, "kvm", "kvm_pvm, in software: it cannot run a stock kernel",
			"`make nested` brings up a host that can; small PVH kernels run here, others with -accel kvm,force=on at their risk"}
	}
	return Finding{StatusOK, "kvm", string(kind), ""}
}

// kvmFeatures lists the features; what is there and needed takes one line together.
func kvmFeatures(features []kvm.Feature) (list []Finding) {
	needed := 0
	for _, f := range features {
		switch {
		case f.Supported && f.Needed:
			needed++
		case f.Supported:
			list = append(list, Finding{StatusOK, f.Name, fmt.Sprint(f.Value), ""})
		case f.Needed:
			list = append(list, Finding{StatusBad, f.Name, "missing: " + f.Hint, "Linux " + f.MinKernel + " or later has it"})
		default:
			list = append(list, Finding{StatusMissing, f.Name, "missing: " + f.Hint, "Linux " + f.MinKernel + " or later has it, where the CPU does"})
		}
	}
	return append([]Finding{{StatusOK, "kvm features", fmt.Sprintf("%d needed ones are there", needed), ""}}, list...)
}

// checkSystem looks at device nodes and sysfs below root.
func checkSystem(root fs.FS) (list []Finding) {
	read := func(name string) string {
		text, _ := fs.ReadFile(root, name)
		return strings.TrimSpace(string(text))
	}
	for _, module := range []string{"kvm_intel", "kvm_amd"} {
		if v := read("sys/module/" + module + "/parameters/nested"); v == "1" || v == "Y" {
			list = append(list, Finding{StatusOK, "nested virtualization", "offered to guests", ""})
		}
	}
	for _, node := range []struct{ name, path, hint string }{
		{"vhost-net", "dev/vhost-net", "modprobe vhost_net; without it a netdev needs vhost=off, and its packets pass through baton"},
		{"tun", "dev/net/tun", "modprobe tun; without it there is no -netdev tap"},
		{"vfio", "dev/vfio/vfio", "modprobe vfio-pci; passing a device through also needs an IOMMU"},
	} {
		f := Finding{StatusOK, node.name, "/" + node.path, node.hint}
		if _, err := fs.Stat(root, node.path); err != nil {
			f.Status, f.Value = StatusMissing, "/"+node.path+" is missing"
		} else if file, err := root.Open(node.path); errors.Is(err, fs.ErrPermission) {
			f.Status, f.Value, f.Hint = StatusMissing, "/"+node.path+": permission denied", "be root, or of the group that owns it"
		} else if err == nil {
			file.Close()
		}
		list = append(list, f)
	}
	list = append(list, iommuGroups(root)...)
	pools, _ := fs.Glob(root, "sys/kernel/mm/hugepages/hugepages-*")
	for _, dir := range pools {
		f := Finding{StatusOK, strings.ReplaceAll(path.Base(dir), "-", " of "),
			fmt.Sprintf("%s free of %s", read(dir+"/free_hugepages"), read(dir+"/nr_hugepages")), ""}
		if read(dir+"/free_hugepages") == "0" {
			f.Status, f.Hint = StatusMissing, "for -object memory-backend-memfd,hugetlb=on: echo N > /"+dir+"/nr_hugepages"
		}
		list = append(list, f)
	}
	return list
}

// iommuGroups lists each group with its devices and their drivers.
func iommuGroups(root fs.FS) (list []Finding) {
	groups, _ := fs.Glob(root, "sys/kernel/iommu_groups/*")
	for _, group := range groups {
		var members []string
		devices, _ := fs.Glob(root, group+"/devices/*")
		for _, dev := range devices {
			driver, err := fs.ReadLink(root, "sys/bus/pci/devices/"+path.Base(dev)+"/driver")
			if err != nil {
				driver = "no driver"
			}
			members = append(members, path.Base(dev)+" ("+path.Base(driver)+")")
		}
		list = append(list, Finding{StatusOK, "iommu group " + path.Base(group), strings.Join(members, ", "), ""})
	}
	if list == nil {
		return []Finding{{StatusMissing, "iommu", "no groups", "turn on VT-d or AMD-Vi in the firmware, and intel_iommu=on for an Intel kernel; VFIO needs it"}}
	}
	return list
}

// checkMemlock: VFIO pins the RAM of the guest.
func checkMemlock() Finding {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return Finding{StatusMissing, "locked memory", err.Error(), ""}
	}
	if limit.Cur == unix.RLIM_INFINITY {
		return Finding{StatusOK, "locked memory", "no limit", ""}
	}
	return Finding{StatusMissing, "locked memory", fmt.Sprintf("up to %d MiB", limit.Cur>>20), "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity); VFIO locks all of the guest's RAM"}
}
