package vmm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestValidate checks configurations that did not come from options: nothing may rely on
// the parser.
func TestValidate(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(c *Config)
		want  string // "": valid
	}{
		{"valid", func(c *Config) {}, ""},
		{"smallest", func(c *Config) { c.Memory.Size, c.SMP = MinMemory, 1 }, ""},
		{"largest", func(c *Config) { c.Memory.Size, c.SMP = MaxMemory, MaxCPUs }, ""},
		{"vfio without a host", func(c *Config) { c.Devices = append(c.Devices, Device{Driver: "vfio-pci"}) }, "which function of the host?"},
		{"vfio with two", func(c *Config) {
			c.Devices = append(c.Devices, Device{Driver: "vfio-pci", Props: Values{"host": "01:10.0", "sysfsdev": "/sys"}})
		}, "which function of the host?"},
		{"vfio with half an address", func(c *Config) {
			c.Devices = append(c.Devices, Device{Driver: "vfio-pci", Props: Values{"host": "10.0"}})
		}, "host=10.0: not a PCI address"},
		{"vfio twice", func(c *Config) {
			for _, host := range []string{"01:10.0", "0000:01:10.0"} {
				c.Devices = append(c.Devices, Device{Driver: "vfio-pci", Props: Values{"host": host}})
			}
		}, "0000:01:10.0: "},
		{"no RAM", func(c *Config) { c.Memory.Size = 0 }, "memory: 0 bytes"},
		{"little RAM", func(c *Config) { c.Memory.Size = MinMemory - 4096 }, "want 64M to 64G"},
		{"much RAM", func(c *Config) { c.Memory.Size = MaxMemory + 4096 }, "want 64M to 64G"},
		{"odd RAM", func(c *Config) { c.Memory.Size++ }, "not a multiple of its pages, 4096 bytes"},
		{"huge pages", func(c *Config) { c.Memory.HugePages = 2 << 20 }, ""},
		{"odd huge pages", func(c *Config) { c.Memory = MemoryConfig{Size: 129 << 20, HugePages: 2 << 20} }, "not a multiple of its pages, 2097152 bytes"},
		{"unknown huge pages", func(c *Config) { c.Memory.HugePages = 4 << 20 }, "want 2M or 1G"},
		{"no vCPUs", func(c *Config) { c.SMP = 0 }, "smp: 0 vCPUs: want 1 to 64"},
		{"negative vCPUs", func(c *Config) { c.SMP = -1 }, "smp: -1 vCPUs"},
		{"many vCPUs", func(c *Config) { c.SMP = 65 }, "smp: 65 vCPUs"},
		{"machine", func(c *Config) { c.Machine.Type = "q53" }, `unknown type "q53"`},
		{"cpu", func(c *Config) { c.CPU.Model = "hots" }, `unknown model "hots"`},
		{"kernel", func(c *Config) { c.Kernel = "" }, "kernel: there is none"},
		{"driver", func(c *Config) { c.Devices[0].Driver = "pcie-rootport" }, `did you mean "pcie-root-port"`},
		{"netdev type", func(c *Config) { c.Netdevs[0].Type = "tab" }, `unknown type "tab"`},
		{"no queues", func(c *Config) { c.Netdevs[0].Queues = 0 }, "queues=0"},
		{"ifname", func(c *Config) { c.Netdevs[0].IfName = "a/b" }, "ifname=a/b"},
		{"longest ifname", func(c *Config) { c.Netdevs[0].IfName = "fifteen-letters" }, ""},
		{"descriptors", func(c *Config) { c.Netdevs[0].FDs = []int{3, 4} }, "one descriptor for each of 1 queues"},
		{"netdev id", func(c *Config) { c.Netdevs[0].ID = "" }, `unknown netdev "net0"`},
		{"no netdev", func(c *Config) { delete(c.Devices[1].Props, "netdev") }, "netdev= is missing"},
		{"two users", func(c *Config) { c.Devices = append(c.Devices, netDevice("b", "net0")) }, "uses it already"},
		{"no file", func(c *Config) { c.Blockdevs[0].File = "" }, "drive d: it has no file"},
		{"serial", func(c *Config) { c.Serials = []string{"unix:"} }, "the path is missing"},
		{"chardev", func(c *Config) { c.Chardevs = []Chardev{{"c", "nul"}} }, `unknown kind "nul"`},
		{"queue sizes", func(c *Config) { c.Devices[1].Props["tx_queue_size"] = uint64(1024) }, "one size for both directions"},
		{"root port in a root port", func(c *Config) {
			c.Devices = append(c.Devices, Device{Driver: "pcie-root-port", Bus: "root1"})
		}, "a root port belongs on pcie.0"},
		{"the host bridge's place", func(c *Config) { c.Devices[0].Addr = "00.0" }, "the host bridge is there"},
		{"function without its slot", func(c *Config) { c.Devices[0].Addr = "03.5" }, "needs a device with multifunction=on"},
		{"function of a slot", func(c *Config) {
			c.Devices[0].Addr = "03.5"
			c.Devices = append(c.Devices, Device{Driver: "virtio-rng-pci", Addr: "03.0", Props: Values{"multifunction": true}})
		}, ""},
	}
	for _, test := range tests {
		c := DefaultConfig()
		c.Kernel = "vmlinuz"
		c.Netdevs = []Netdev{{ID: "net0", Type: "tap", Queues: 1}}
		c.Blockdevs = []Blockdev{{ID: "d", File: "disk.raw"}}
		c.Devices = []Device{{Driver: "pcie-root-port", ID: "root1"}, netDevice("a", "net0")}
		test.spoil(c)
		c.Complete()
		err := c.Validate()
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}

func netDevice(id, netdev string) Device {
	return Device{Driver: "virtio-net-pci", ID: id, Props: Values{"netdev": netdev}}
}

func TestValidateReportsAll(t *testing.T) {
	c := &Config{Devices: []Device{{Driver: "x"}, {Driver: "y", ID: "?"}}}
	c.Complete()
	if n := len(Errors(c.Validate())); n != 8 { // machine, cpu, smp, memory, kernel, two drivers, id
		t.Errorf("%d errors: %v", n, c.Validate())
	}
}

func TestCheckFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		c    Config
		want string
	}{
		"nothing":  {Config{}, ""},
		"all":      {Config{Kernel: file("k", "x"), Initrd: file("i", "xxxxxx"), Blockdevs: []Blockdev{{File: file("d", "")}}}, ""},
		"missing":  {Config{Kernel: dir + "/nope"}, "kernel: stat"},
		"folder":   {Config{Initrd: dir}, "initrd: " + dir + " is neither"},
		"fifo":     {Config{Blockdevs: []Blockdev{{ID: "d", File: fifo}}}, "drive d: " + fifo + " is neither"},
		"terminal": {Config{Kernel: "/dev/null"}, "neither a file nor a block device"},
		"qcow2":    {Config{Blockdevs: []Blockdev{{ID: "d", File: file("q", "QFI\xfb\x00\x00\x00\x03")}}}, "qemu-img convert"},
		"script":   {Config{Netdevs: []Netdev{{ID: "n", Script: file("s", "")}}}, "permission denied"},
	} {
		err := test.c.CheckFiles()
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}
