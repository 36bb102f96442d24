package vmm

import (
	"slices"
	"strings"
	"testing"

	"baton/migrate"
)

const sourceFacts = `machine=q35
native-hotplug=off
cpus=2
memory=256 MiB
serial=on
cpu/vendor=AuthenticAMD
cpu/0x1.0/ecx=0x10000001
cpu/0x7.0/ebx=0x20
cpu/xsave/2=256 bytes at 576, 0x0
cpu/xsave=4096 bytes
cpu/tsc=3000000 kHz
cpu/capabilities=0x3
cpu/msrs=0x10 0x6e0 0x1234
device/pci/0000:00:01.0=pcie-root-port root1
device/pci/0000:00:01.0/chassis=1
device/pci/0000:00:01.0/00.0=virtio-net-pci net1
device/pci/0000:00:01.0/00.0/mac=52:54:00:00:00:01
device/pci/0000:00:02.0=virtio-rng-pci
device/pci/0000:00:02.0/features=0x1`

func parseFacts(text string) (list []migrate.Fact) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		list = append(list, migrate.Fact{Name: name, Value: value})
	}
	return list
}

func TestDifferences(t *testing.T) {
	for name, c := range map[string]struct {
		change []string // old, new, ...
		want   []string
	}{
		"none":         {nil, nil},
		"machine":      {[]string{"hotplug=off", "hotplug=on", "256 MiB", "512 MiB"}, []string{"native-hotplug: off at the source, on at the target", "memory: 256 MiB at the source, 512 MiB at the target"}},
		"vendor":       {[]string{"AuthenticAMD", "GenuineIntel"}, []string{"cpu/vendor: AuthenticAMD at the source, GenuineIntel at the target"}},
		"feature":      {[]string{"ebx=0x20", "ebx=0x0"}, []string{"CPU feature avx2 (CPUID 0x7.0/ebx bit 5): not at the target"}},
		"no leaf":      {[]string{"cpu/0x7.0/ebx=0x20\n", "", "0x10000001", "0x1"}, []string{"CPU feature avx (CPUID 0x1.0/ecx bit 28): not at the target", "CPU feature avx2 (CPUID 0x7.0/ebx bit 5): not at the target"}},
		"more feature": {[]string{"ebx=0x20", "ebx=0xffffffff"}, nil},
		"more leaves":  {[]string{"cpu/xsave=", "cpu/0x7.1/eax=0xff\ncpu/xsave="}, nil},
		"xsave":        {[]string{"at 576", "at 640"}, []string{"cpu/xsave/2: 256 bytes at 576, 0x0 at the source, 256 bytes at 640, 0x0 at the target"}},
		"msr":          {[]string{" 0x6e0 0x1234", ""}, []string{"MSR TSC_DEADLINE (0x6e0): not at the target", "MSR 0x1234: not at the target"}},
		"more msrs":    {[]string{"0x1234", "0x1234 0x4567"}, nil},
		"flaws":        {[]string{"capabilities=0x3", "capabilities=0x5"}, []string{"cpu/capabilities: 0x3 at the source, 0x5 at the target"}},
		"fewer flaws":  {[]string{"capabilities=0x3", "capabilities=0x7"}, nil},
		"tsc":          {[]string{"3000000", "3000751"}, []string{"cpu/tsc: 3000000 kHz at the source, 3000751 kHz at the target"}},
		"tsc near":     {[]string{"3000000", "3000750"}, nil},
		"property":     {[]string{"00:01\n", "00:02\n", "/chassis=1", "/slot=1"}, []string{"device/pci/0000:00:01.0/chassis: 1 at the source, not at the target", "device/pci/0000:00:01.0/00.0/mac: 52:54:00:00:00:01 at the source, 52:54:00:00:00:02 at the target", "device/pci/0000:00:01.0/slot: not at the source, 1 at the target"}},
		"id":           {[]string{"virtio-net-pci net1", "virtio-net-pci"}, nil},
		"driver":       {[]string{"virtio-net-pci", "virtio-blk-pci", "52:54", "52:55"}, []string{"device/pci/0000:00:01.0/00.0: virtio-net-pci net1 at the source, virtio-blk-pci net1 at the target"}},
		"devices": {[]string{"device/pci/0000:00:02.0", "device/pci/0000:00:03.0"}, []string{
			"device/pci/0000:00:02.0: virtio-rng-pci at the source, not at the target", "device/pci/0000:00:03.0: not at the source, virtio-rng-pci at the target"}},
	} {
		target := strings.NewReplacer(c.change...).Replace(sourceFacts)
		if got := differences(parseFacts(sourceFacts), parseFacts(target), false); !slices.Equal(got, c.want) {
			t.Errorf("%s:\n%s\nwant\n%s", name, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
		}
	}
	if got := differences(parseFacts("cpu/tsc=1 kHz"), parseFacts("cpu/tsc=2 kHz"), true); got != nil {
		t.Errorf("a TSC that can be scaled: %s", got)
	}
	if got := differences(parseFacts("cpu/tsc=x\ncpu/msrs=y\ncpu/0x7.0/ebx=z\ndevice/=\n="), nil, true); len(got) == 0 { // not to be trusted
		t.Error("rubbish is no difference")
	}
}
