package vmm

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (go test -update writes it; -want +got):\n%s", file, diff)
	}
}

// inTemp changes to a directory with the files that command lines of the tests name.
func inTemp(t testing.TB) {
	t.Helper()
	t.Chdir(t.TempDir())
	for name, mode := range map[string]os.FileMode{"vmlinuz": 0o644, "disk.raw": 0o644, "up.sh": 0o755} {
		if err := os.WriteFile(name, make([]byte, 512), mode); err != nil {
			t.Fatal(err)
		}
	}
}

// split cuts a command line at spaces, "_" standing for a space in an argument.
func split(line string) []string {
	words := strings.Fields(line)
	for i, w := range words {
		words[i] = strings.ReplaceAll(w, "_", " ")
	}
	return words
}

// patchSeries is the command line that started it all, without its monitors and its disk.
const patchSeries = `-enable-kvm -m 3072 -smp 3
 -machine q35,kernel-irqchip=split -cpu host
 -k fr
 -serial stdio
 -net none
 -qmp unix:/tmp/qmp.socket,server,nowait -monitor telnet:127.0.0.1:5555,server,nowait
 -device pcie-root-port,id=root0,multifunction=on,chassis=0,addr=0xa
 -device pcie-root-port,id=root1,bus=pcie.0,chassis=1
 -device pcie-root-port,id=root2,bus=pcie.0,chassis=2
 -netdev tap,script=./up.sh,downscript=no,id=hostnet1,vhost=on
 -device virtio-net-pci,netdev=hostnet1,id=net1,mac=52:54:00:6f:55:cc,bus=root2,failover=on
 disk.raw -kernel vmlinuz`

func TestPatchSeries(t *testing.T) {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	inTemp(t)
	inv, err := ParseArgs(split(patchSeries))
	if err != nil {
		t.Fatal(err)
	}
	if len(inv.Notes) != 1 || !strings.Contains(inv.Notes[0], "no display") {
		t.Errorf("notes: %q", inv.Notes)
	}
	text, err := json.MarshalIndent(inv.Config, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	golden(t, "patch-series.json", string(text)+"\n")
}

// TestConfig runs command lines and compares what they change in the machine of
// "-kernel vmlinuz -nodefaults".
func TestConfig(t *testing.T) {
	inTemp(t)
	pci := func(driver, id, addr string, props Values) Device {
		return Device{Driver: driver, ID: id, Bus: "pcie.0", Addr: addr, Props: props}
	}
	tests := []struct {
		args string
		want func(c *Config)
	}{
		{"", func(c *Config) {}},
		{"--enable-kvm -accel kvm -machine q35,accel=kvm,usb=off -M q35 -cpu host -nographic -display none -vga none -nic none -no-user-config", func(c *Config) {}},
		{"-accel kvm,force=on", func(c *Config) { c.Accel.Force = true }},
		{"-accel kvm,dirty-ring-size=4096", func(c *Config) { c.Accel.DirtyRing = 4096 }},
		{"-machine native-hotplug=on", func(c *Config) { c.Machine.NativeHotplug = true }},
		{"-m 256", func(c *Config) { c.Memory.Size = 256 << 20 }},
		{"-m size=1.5G", func(c *Config) { c.Memory.Size = 3 << 29 }},
		{"-m 0x40", nil},
		{"-m 64g -mem-prealloc", func(c *Config) { c.Memory = MemoryConfig{Size: 64 << 30, Prealloc: true} }},
		{"-smp 4", func(c *Config) { c.SMP = 4 }},
		{"-smp cpus=4,sockets=1,cores=2,threads=2,maxcpus=4", func(c *Config) { c.SMP = 4 }},
		{"-smp sockets=2,cores=3", func(c *Config) { c.SMP = 6 }},
		{"-smp 8,cores=2", func(c *Config) { c.SMP = 8 }},
		{"-name guest=a,,b", func(c *Config) { c.Name = "a,b" }},
		{"-name vm1,debug-threads=on -append console=ttyS0_a,b -no-reboot -pidfile p -D l -event-log e", func(c *Config) {
			c.Name, c.Append, c.NoReboot, c.PIDFile, c.LogFile, c.EventLog = "vm1", "console=ttyS0 a,b", true, "p", "l", "e"
		}},
		{"-m 512 -object memory-backend-memfd,id=ram,size=512M,hugetlb=on,prealloc=on,share=on -machine memory-backend=ram", func(c *Config) {
			c.Memory = MemoryConfig{Size: 512 << 20, HugePages: 2 << 20, Prealloc: true}
		}},
		{"-serial none", func(c *Config) { c.Serials = []string{"none"} }},
		{"-serial chardev:c -chardev stdio,id=c", func(c *Config) {
			c.Serials, c.Chardevs = []string{"chardev:c"}, []Chardev{{"c", "stdio"}}
		}},
		{"-chardev socket,id=a,path=/x,,y,server,nowait -chardev socket,id=b,host=::1,port=5 -chardev file,id=f,path=/x,,y", func(c *Config) {
			c.Chardevs = []Chardev{{"a", "unix:/x,,y,server=on,wait=off"}, {"b", "tcp:[::1]:5"}, {"f", "file:/x,y"}}
		}},
		{"-netdev tap,id=n,ifname=t0,queues=4,vhost=on,downscript=./up.sh -device virtio-net,netdev=n,mq=on", func(c *Config) {
			c.Netdevs = []Netdev{{ID: "n", Type: "tap", IfName: "t0", DownScript: "./up.sh", VHost: true, Queues: 4}}
			c.Devices = []Device{pci("virtio-net-pci", "", "01.0", Values{"netdev": "n", "mq": true, "mac": "52:54:00:12:34:56"})}
		}},
		{"-netdev tap,id=n,fds=3:4", func(c *Config) {
			c.Netdevs = []Netdev{{ID: "n", Type: "tap", Queues: 2, FDs: []int{3, 4}}}
		}},
		{"disk.raw", func(c *Config) {
			c.Blockdevs = []Blockdev{{ID: "drive0", File: "disk.raw"}}
			c.Devices = []Device{pci("virtio-blk-pci", "", "01.0", Values{"drive": "drive0"})}
		}},
		{"-drive file=disk.raw,format=raw,if=none,id=d,readonly=on,cache=unsafe -device virtio-blk-pci,drive=d,serial=abc,addr=5", func(c *Config) {
			c.Blockdevs = []Blockdev{{ID: "d", File: "disk.raw", ReadOnly: true, NoFlush: true}}
			c.Devices = []Device{pci("virtio-blk-pci", "", "05.0", Values{"drive": "d", "serial": "abc"})}
		}},
		{"-blockdev driver=file,node-name=f,filename=disk.raw -blockdev raw,node-name=d,file=f,read-only=on", func(c *Config) {
			c.Blockdevs = []Blockdev{{ID: "d", File: "disk.raw", ReadOnly: true}}
		}},
		{`-blockdev {"driver":"raw","node-name":"d","file":{"driver":"file","filename":"disk.raw"}}`, func(c *Config) {
			c.Blockdevs = []Blockdev{{ID: "d", File: "disk.raw"}}
		}},
		{"-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci-non-transitional,rng=r", func(c *Config) {
			c.Devices = []Device{pci("virtio-rng-pci", "", "01.0", Values{})}
		}},
		{`-device {"driver":"virtio-rng-pci","id":"r","addr":10,"multifunction":true,"disable-legacy":"on"}`, func(c *Config) {
			c.Devices = []Device{pci("virtio-rng-pci", "r", "01.2", Values{"multifunction": true, "disable-legacy": "on"})}
		}},
		// Devices before their buses; free slots, chassis and MACs around the given ones.
		{"-device virtio-rng,bus=rp -device virtconsole,chardev=c -device virtio-serial -chardev null,id=c " +
			"-device pcie-root-port,id=rp -device pcie-root-port,chassis=1,addr=1,multifunction -device pcie-root-port,addr=1.1", func(c *Config) {
			c.Chardevs = []Chardev{{"c", "null"}}
			c.Devices = []Device{
				pci("virtio-serial-pci", "virtio-serial0", "02.0", Values{}),
				pci("pcie-root-port", "rp", "03.0", Values{"chassis": uint64(2)}),
				pci("pcie-root-port", "", "01.0", Values{"chassis": uint64(1), "multifunction": true}),
				pci("pcie-root-port", "", "01.1", Values{"chassis": uint64(3)}),
				{Driver: "virtio-rng-pci", Bus: "rp", Addr: "00.0", Props: Values{}},
				{Driver: "virtconsole", Bus: "virtio-serial0.0", Props: Values{"chardev": "c"}},
			}
		}},
	}
	for _, test := range tests {
		inv, err := ParseArgs(append([]string{"-kernel", "vmlinuz", "-nodefaults"}, split(test.args)...))
		if test.want == nil {
			if err == nil {
				t.Errorf("%s: no error", test.args)
			}
			continue
		}
		// A chained function 1.2 without function 0 is refused; the JSON form is what counts here.
		if err != nil && !strings.Contains(err.Error(), "function 0 of that slot") {
			t.Errorf("%s: %v", test.args, err)
			continue
		}
		want := DefaultConfig()
		want.Kernel, want.NoDefaults = "vmlinuz", true
		test.want(want)
		if diff := cmp.Diff(want, inv.Config); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.args, diff)
		}
		checkRoundTrip(t, inv.Config)
	}
}

// checkRoundTrip prints and reads back, and completes once more.
func checkRoundTrip(t testing.TB, c *Config) {
	t.Helper()
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	back, err := ReadConfig(text)
	if err != nil {
		t.Fatalf("%v\nin %s", err, text)
	}
	back.Complete()
	if diff := cmp.Diff(c, back); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
}

func TestReadConfig(t *testing.T) {
	for text, want := range map[string]string{
		``:                       "EOF",
		`{} {}`:                  "text after",
		`{"smpp":1}`:             `unknown field "smpp"`,
		`{"device":[{}]}`:        "driver= is missing",
		`{"device":[null]}`:      `unknown driver "null"`,
		`{"device":[1]}`:         `unknown driver "1"`,
		`{"smp":"many"}`:         "smp",
		`{"memory":{"size":-1}}`: "memory.size",
		`{"device":[{"driver":"virtio-rng-pci","vectorz":1}]}`: `did you mean "vectors"?`,
	} {
		if _, err := ReadConfig([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// TestTables checks what no reader of a table would notice.
func TestTables(t *testing.T) {
	names := map[string]bool{}
	for _, o := range options() {
		for _, name := range []string{o.name, o.alias} {
			if name == "" {
				continue
			}
			if names[name] {
				t.Errorf("-%s is there twice", name)
			}
			names[name] = true
			if hint := insteadOf("-" + name); hint != "" {
				t.Errorf("-%s is there, and also not here: %s", name, hint)
			}
		}
		if o.help == "" || (o.set == nil) == (o.add == nil) || (o.add == nil) != (o.kinds == nil) || o.kinds != nil && o.arg == "" {
			t.Errorf("-%s: incomplete row", o.name)
		}
		if !strings.Contains(Help(), "\n  -"+o.name) {
			t.Errorf("-%s: not in the help; group %q", o.name, o.group)
		}
		for _, s := range o.kinds {
			checkSchema(t, o.name, s)
		}
	}
	words := map[string]bool{}
	for group := range notHere {
		for _, w := range strings.Fields(group) {
			if words[w] {
				t.Errorf("%s is twice not here", w)
			}
			words[w] = true
		}
	}
}

func checkSchema(t *testing.T, option string, s schema) {
	seen := map[string]bool{}
	for _, p := range s.props {
		name := option + " " + s.name + " " + p.name
		if seen[p.name] {
			t.Errorf("%s is there twice", name)
		}
		seen[p.name] = true
		if (p.kind == kindEnum) != (len(p.enum) > 0) || p.min > p.max && p.max != 0 {
			t.Errorf("%s: values %v, %d to %d", name, p.enum, p.min, p.max)
		}
		if p.feature != 0 && (p.kind != kindBool || p.def != true) {
			t.Errorf("%s: a feature has to be a bool that is on", name)
		}
		if p.def != nil {
			if v, err := p.parse(jsonValue(t, p.def)); err != nil || v != p.def {
				t.Errorf("%s: the default %v reads as %v, %v", name, p.def, v, err)
			}
		}
	}
}

// jsonValue is v as the JSON decoder of -device hands it on.
func jsonValue(t *testing.T, v any) any {
	text, err := json.Marshal(map[string]any{"v": v})
	if err != nil {
		t.Fatal(err)
	}
	pairs, err := jsonPairs(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return pairs[0].value
}

func TestHelp(t *testing.T) {
	golden(t, "help.txt", Help())
	for _, arg := range []string{"-device", "-netdev", "-chardev", "-blockdev", "-object", "-machine", "-drive", "-smp"} {
		inv, err := ParseArgs([]string{arg, "help"})
		if err != nil || !strings.Contains(inv.Print, "  ") {
			t.Errorf("%s help: %v, %q", arg, err, inv.Print)
		}
	}
	var all strings.Builder
	for _, d := range drivers {
		inv, err := ParseArgs([]string{"-device", d.name + ",help"})
		if err != nil {
			t.Error(err)
		}
		all.WriteString(inv.Print + "\n")
	}
	golden(t, "drivers.txt", all.String())
	for _, line := range strings.Split(Help(), "\n") {
		if len(line) > 110 {
			t.Errorf("long line: %s", line)
		}
	}
	if _, err := ParseArgs([]string{"-device", "virtio-nt,help"}); err == nil {
		t.Error("help on an unknown driver")
	}
}

func TestGetters(t *testing.T) {
	d := Device{Driver: "virtio-net-pci", ID: "n", Props: Values{"mac": "52:54:00:00:00:01", "mq": true, "csum": false, "event_idx": false}}
	if mac, ok := d.MAC(); !ok || mac != [6]byte{0x52, 0x54, 0, 0, 0, 1} {
		t.Errorf("MAC %x, %t", mac, ok)
	}
	if !d.Bool("mq") || d.Bool("failover") || d.Uint("rx_queue_size") != 256 || d.Given("failover") || d.Text("netdev") != "" {
		t.Error("getters")
	}
	if off := d.FeaturesOff(); off != 1<<0|1<<29 {
		t.Errorf("features off: %#x", off)
	}
	if _, ok := (&Device{Driver: "virtio-net-pci"}).MAC(); ok {
		t.Error("MAC out of nothing")
	}
	if v := (&Device{Driver: "none-such"}); v.Uint("x") != 0 || v.FeaturesOff() != 0 {
		t.Error("unknown driver")
	}
}

func TestCompleteFills(t *testing.T) {
	c := DefaultConfig()
	for range 33 {
		c.Devices = append(c.Devices, Device{Driver: "virtio-rng-pci"})
	}
	c.Complete()
	var addrs []string
	for _, d := range c.Devices {
		addrs = append(addrs, d.Addr)
	}
	if addrs[0] != "01.0" || addrs[30] != "1f.0" || addrs[31] != "" || addrs[32] != "" {
		t.Errorf("addresses %q", addrs)
	}
	if err := c.Validate(); err == nil || strings.Count(err.Error(), "bus pcie.0 is full") != 2 {
		t.Errorf("full bus: %v", err)
	}
	if !slices.Equal(c.Serials, []string{"stdio"}) {
		t.Errorf("serial ports %q", c.Serials)
	}
}

func FuzzParseArgs(f *testing.F) {
	f.Add(patchSeries)
	f.Add("-smp 4,sockets=2 -m 1.5G,slots=3 -device virtio-rng,addr=1.7 -serial file:x -machine help")
	f.Add("-drive file=a,,b,if=none -blockdev raw,node-name=d,file=f -object memory-backend-memfd,id=a,size=1 -netdev tap,id=n,fds=1:2")
	f.Add("-chardev socket,id=c,server,nowait -qmp x -bios y -kernel")
	f.Fuzz(func(t *testing.T, line string) {
		args := split(line)
		if slices.ContainsFunc(args, func(a string) bool { return strings.HasSuffix(a, "config") }) {
			return // reads files
		}
		inv, err := ParseArgs(args)
		for _, e := range Errors(err) {
			if e == nil || e.Error() == "" {
				t.Errorf("empty error for %q", args)
			}
		}
		if inv == nil || inv.Config == nil {
			t.Fatal("no configuration")
		}
		if inv.Print == "" && utf8.ValidString(line) && inv.Config.Validate() == nil { // JSON could not hold other text
			checkRoundTrip(t, inv.Config)
		}
	})
}
