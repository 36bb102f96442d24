package acpi

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"baton/kvm/guestmem"
)

var update = flag.Bool("update", false, "write testdata from the tables as they are")

// tool skips the test only if ACPICA's program is not installed.
func tool(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); errors.Is(err, exec.ErrNotFound) {
		t.Skipf("%s is not installed: it is in the package acpica-tools", name)
	}
}

// clean is how iasl reports a compilation without any complaint.
var clean = regexp.MustCompile(`Compilation successful\. 0 Errors, 0 Warnings, 0 Remarks`)

// compile returns what iasl makes of a source file, without optimizing it.
func compile(dir, source string) ([]byte, error) {
	out := filepath.Join(dir, "compiled")
	log, err := exec.Command("iasl", "-oa", "-p", out, source).CombinedOutput()
	if err == nil && !clean.Match(log) {
		err = errors.New("iasl complains")
	}
	if err != nil {
		return nil, fmt.Errorf("compile %s: %w\n%s", source, err, log)
	}
	return os.ReadFile(out + ".aml")
}

// disassemble returns the source of a table, without the parts that change with iasl's
// version and the date.
func disassemble(dir string, table []byte) ([]byte, error) {
	file := filepath.Join(dir, "table.dat")
	if err := os.WriteFile(file, table, 0o600); err != nil {
		return nil, err
	}
	log, err := exec.Command("iasl", "-p", filepath.Join(dir, "table"), "-d", file).CombinedOutput()
	if err == nil && regexp.MustCompile(`(?i)error|warning`).Match(log) {
		err = errors.New("iasl complains")
	}
	if err != nil {
		return nil, fmt.Errorf("disassemble %s: %w\n%s", table[:4], err, log)
	}
	source, err := os.ReadFile(filepath.Join(dir, "table.dsl"))
	source = regexp.MustCompile(`(?s)\A/\*.*?\*/\n`).ReplaceAll(source, nil)
	source, _, _ = bytes.Cut(source, []byte("\nRaw Table Data:"))
	return source, err
}

// same compares two tables but for the compiler's name and the checksum.
func same(a, b []byte) bool {
	const checksumAt, creator, body = 9, 28, 36
	return len(a) == len(b) && len(a) >= body &&
		bytes.Equal(a[:checksumAt], b[:checksumAt]) &&
		bytes.Equal(a[checksumAt+1:creator], b[checksumAt+1:creator]) && bytes.Equal(a[body:], b[body:])
}

// roundTrip says whether a table means to iasl exactly what its bytes are.
func roundTrip(dir string, table []byte) error {
	source, err := disassemble(dir, table)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "again.dsl")
	if err := os.WriteFile(file, source, 0o600); err != nil {
		return err
	}
	again, err := compile(dir, file)
	if err == nil && !same(table, again) {
		err = fmt.Errorf("%s: compiled again it differs\n%x\n%x\n%s", table[:4], table, again, source)
	}
	return err
}

func TestRoundTrip(t *testing.T) {
	tool(t, "iasl")
	for name, change := range map[string]func(*Config){
		"full":           func(*Config) {},
		"one CPU":        func(c *Config) { c.CPUs = 1 },
		"64 CPUs":        func(c *Config) { c.CPUs = 64 },
		"all CPUs":       func(c *Config) { c.CPUs = MaxCPUs },
		"no serial port": func(c *Config) { c.Serial = false },
		"native hotplug": func(c *Config) { c.NativeHotplug = true },
		"one window":     func(c *Config) { c.MMIO64 = guestmem.Range{} },
		"huge window":    func(c *Config) { c.MMIO64 = guestmem.Range{Base: 1 << 51, Size: 1 << 51} },
		"one bus":        func(c *Config) { c.ECAM.Size = 1 << 20 },
		"no root ports":  func(c *Config) { c.RootPorts = nil },
		"all root ports": func(c *Config) {
			c.RootPorts = nil
			for i := range uint8(248) {
				c.RootPorts = append(c.RootPorts, RootPort{1 + i/8, i % 8, 8191 - uint16(i)})
			}
		},
		"high tables":  func(c *Config) { c.Base = 5 * gib },
		"other events": func(c *Config) { c.Power.EventGSI, c.Power.PowerButton = 23, 1<<31 },
	} {
		t.Run(name, func(t *testing.T) {
			c := testConfig()
			change(&c)
			for _, table := range find(t, c) {
				if err := roundTrip(t.TempDir(), table); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// The check above must see what is wrong.
func TestRoundTripSeesErrors(t *testing.T) {
	tool(t, "iasl")
	fadt := testConfig()
	for name, table := range map[string][]byte{
		"reserved argument count": table("DSDT", 2, method("_OSC", 2)),
		"statement cut short":     table("DSDT", 2, method("TEST", 0, []byte{opStore})),
		"unknown name":            table("DSDT", 2, method("TEST", 0, notify(`\_SB.NONE`, 1))),
		"window of wrong length":  table("DSDT", 2, name("BUF0", resources(window(windowMemory, 32, guestmem.Range{Base: 1, Size: 0})))),
		"no end tag":              table("DSDT", 2, device("DEV0", name("_HID", eisaID("PNP0C02")), name("_CRS", buffer(ports(1, 1))))),
		"FADT cut short":          table("FACP", 6, fadt.fadt(0)[36:200]),
	} {
		if err := roundTrip(t.TempDir(), table); err == nil {
			t.Errorf("%s: not seen", name)
		}
	}
}

// The files in testdata say, in ASL, what the tables are; iasl must compile them to our
// bytes. So any version of iasl will do, and a reader sees what a guest is told.
func TestGolden(t *testing.T) {
	tool(t, "iasl")
	c := testConfig()
	tables := find(t, c)
	c.NativeHotplug = true
	tables["DSDT-native-hotplug"] = find(t, c)["DSDT"]
	for name, table := range tables {
		golden := filepath.Join("testdata", strings.ToLower(name)+".dsl")
		source, err := disassemble(t.TempDir(), table)
		if err != nil {
			t.Error(err)
			continue
		}
		if *update {
			if err := os.WriteFile(golden, source, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := compile(t.TempDir(), golden); err != nil {
			t.Error(err)
		} else if !same(table, want) {
			t.Errorf("%s says otherwise (go test -update writes it anew); now it is\n%s", golden, source)
		}
	}
	files, err := os.ReadDir("testdata")
	if err != nil || len(files) != len(tables) {
		t.Errorf("%d files in testdata, %d tables: %v", len(files), len(tables), err)
	}
}

// execute runs methods of the DSDT in ACPICA's interpreter, which Linux has too. I/O ports
// read as the byte fill, repeated.
func execute(t *testing.T, c Config, fill, command string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "dsdt.aml")
	if err := os.WriteFile(file, find(t, c)["DSDT"], 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("acpiexec", "-fv", fill, "-b", command, file).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("AE_")) {
		t.Fatalf("acpiexec %s: %v\n%s", command, err, out)
	}
	return string(out)
}

func TestOSC(t *testing.T) {
	tool(t, "acpiexec")
	const rootBridge = "5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66"
	const another = "00 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66"
	cases := []struct {
		name         string
		uuid, rev    string
		query, asked string // the first byte of the first and third double word
		want         string // the same two in the answer
		native       string // and with native hotplug, if that differs
	}{
		{"all there is", rootBridge, "1", "00", "FF", "10 1C", "10 1D"},
		{"query", rootBridge, "1", "01", "FF", "11 1C", "11 1D"},
		{"native hotplug", rootBridge, "1", "00", "1D", "10 1C", "00 1D"},
		{"no SHPC", rootBridge, "1", "00", "02", "10 00", ""},
		{"nothing masked", rootBridge, "1", "00", "14", "00 14", ""},
		{"unknown revision", rootBridge, "2", "00", "04", "08 04", ""},
		{"unknown UUID", another, "1", "00", "1F", "04 1F", ""},
	}
	var commands []string
	for _, c := range cases {
		commands = append(commands, fmt.Sprintf(`execute \_SB.PCI0._OSC (%s) %s 3 (%s 00 00 00 1F 00 00 00 %s 00 00 00)`, c.uuid, c.rev, c.query, c.asked))
	}
	for _, native := range []bool{false, true} {
		conf := testConfig()
		conf.NativeHotplug = native
		out := execute(t, conf, "0", strings.Join(commands, ";"))
		answers := regexp.MustCompile(`Length 0C = +0000: (..) 00 00 00 1F 00 00 00 (..) 00 00 00 `).FindAllStringSubmatch(out, -1)
		if len(answers) != len(cases) {
			t.Fatalf("%d answers, want %d\n%s", len(answers), len(cases), out)
		}
		for i, c := range cases {
			want := c.want
			if native && c.native != "" {
				want = c.native
			}
			if got := answers[i][1] + " " + answers[i][2]; got != want {
				t.Errorf("%s, native hotplug %v: status and control %s, want %s", c.name, native, got, want)
			}
		}
	}
}

func TestPowerButtonEvent(t *testing.T) {
	tool(t, "acpiexec")
	for fill, want := range map[string]bool{"0x01": true, "0xff": true, "0xfe": false} {
		t.Run(fill, func(t *testing.T) {
			t.Parallel()
			out := execute(t, testConfig(), fill, `execute \_SB.GED._EVT 9`)
			if got := strings.Contains(out, "Received a Device Notify on [PWRB]") && strings.Contains(out, "Value 0x80"); got != want {
				t.Errorf("event register %s: notified %v, want %v\n%s", fill, got, want, out)
			}
		})
	}
}

func TestSlotEvents(t *testing.T) {
	tool(t, "acpiexec")
	for fill, want := range map[string]string{
		"0x02": `Received a System Notify on \[S10_\] .*Value 0x01`, // port 2 is to look again
		"0x03": `Received a System Notify on \[S00_\] .*Value 0x03`, // the device behind port 3 is to go
		"0xff": "",                                                  // a port that is not there
	} {
		t.Run(fill, func(t *testing.T) {
			t.Parallel()
			out := strings.ReplaceAll(execute(t, testConfig(), fill, `execute \_SB.GED._EVT 9`), "[PWRB]", "")
			if want == "" && regexp.MustCompile(`Notify on \[S`).MatchString(out) || !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("event register %s: want %q\n%s", fill, want, out)
			}
		})
	}
	execute(t, testConfig(), "0", `execute \_SB.PCI0.S11.S00._EJ0 1;execute \_SB.PCI0.S11.S00._OST 3 0x81 (00);execute \_SB.PCI0.S08._OST 1 0 (00)`)
}
