package vmm

import (
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"baton/kvm"
)

func findings(t *testing.T, list []Finding) string {
	t.Helper()
	var b strings.Builder
	if err := WriteFindings(&b, list); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestCheckSystem(t *testing.T) {
	link := func(to string) *fstest.MapFile { return &fstest.MapFile{Mode: fs.ModeSymlink, Data: []byte(to)} }
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text + "\n")} }
	host := fstest.MapFS{
		"dev/vhost-net":                                              file(""),
		"dev/net/tun":                                                file(""),
		"sys/module/kvm_amd/parameters/nested":                       file("1"),
		"sys/kernel/iommu_groups/3/devices/0000:01:10.0":             link("../../../../devices/0000:01:10.0"),
		"sys/kernel/iommu_groups/3/devices/0000:01:10.1":             link("../../../../devices/0000:01:10.1"),
		"sys/bus/pci/devices/0000:01:10.0/driver":                    link("../../../drivers/vfio-pci"),
		"sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages":      file("512"),
		"sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages":    file("128"),
		"sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages":   file("0"),
		"sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages": file("0"),
	}
	golden(t, "check.txt", findings(t, checkSystem(host)))
	bare := findings(t, checkSystem(fstest.MapFS{}))
	for _, want := range []string{"--  vhost-net: /dev/vhost-net is missing", "--  iommu: no groups", "modprobe tun"} {
		if !strings.Contains(bare, want) {
			t.Errorf("a bare host does not say %q:\n%s", want, bare)
		}
	}
}

func TestCheckKVM(t *testing.T) {
	if f := kvmKind(kvm.PVM); f.Status != StatusBad || !strings.Contains(f.Value, "cannot run a stock kernel") || !strings.Contains(f.Hint, "make nested") {
		t.Errorf("kvm_pvm: %+v", f)
	}
	if f := kvmKind(kvm.SVM); f.Status != StatusOK {
		t.Errorf("kvm_amd: %+v", f)
	}
	list := kvmFeatures([]kvm.Feature{
		{Name: "A", Needed: true, Supported: true, Value: 1},
		{Name: "B", Needed: true, MinKernel: "4.4", Hint: "for this"},
		{Name: "C", MinKernel: "5.2", Hint: "for that"},
		{Name: "D", Supported: true, Value: 7},
	})
	want := `ok  kvm features: 1 needed ones are there
!!  B: missing: for this
      Linux 4.4 or later has it
--  C: missing: for that
      Linux 5.2 or later has it, where the CPU does
ok  D: 7
`
	if got := findings(t, list); got != want {
		t.Errorf("got\n%s", got)
	}
}

func TestCheckHost(t *testing.T) {
	list := CheckHost()
	if len(list) < 5 || list[0].Name != "kvm" {
		t.Errorf("%+v", list)
	}
}
