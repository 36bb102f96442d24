package l0

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"baton/boot"
	"baton/devices/chipset"
	"baton/tests/harness"
	"baton/tests/tiny"
)

// Places in the hostile guest's machine.
const (
	barBase   = 0xc100_0000 // of the functions on the root bus, a place of 64 KiB each
	farBase   = 0xc200_0000 // of the one behind the root port
	functions = 7           // on the root bus, from 00.0 on
	rings     = 0x30_0000   // queues that the guest makes up
	buffers   = 0x40_0000
	memory    = 64 << 20
)

// Registers of a virtio function's BAR: VIRTIO 1.2, 4.1.4.3; baton's places of the structures.
const (
	common  = 0x0000
	isr     = 0x1000
	device  = 0x2000
	notify  = 0x3000
	msix    = 0x4000
	barSize = 0x8000
)

func config(bus, dev, off uint32) uint32 { return boot.ECAMBase + bus<<20 + dev<<15 + off }

// A villain makes up a guest that does with its devices what no driver does. The same seed
// makes the same guest.
type villain struct {
	*rand.Rand
	code tiny.Code
}

func (v *villain) do(c tiny.Code) { v.code = append(v.code, c...) }

func pick[T any](v *villain, from ...T) T { return from[v.IntN(len(from))] }

// place gives the BARs places that 32-bit code can reach, and turns all functions on.
func (v *villain) place() {
	v.do(tiny.Write(config(0, 1, 0x20), 4, farBase>>16|farBase)) // the root port's memory window
	for dev := range uint32(functions) {
		if dev >= 3 {
			v.do(tiny.Write(config(0, dev, 0x10), 4, barBase+dev<<16))
			v.do(tiny.Write(config(0, dev, 0x14), 4, 0))
		}
		v.do(tiny.Write(config(0, dev, 0x04), 2, 0x0006)) // memory, bus master
	}
	v.do(tiny.Write(config(1, 0, 0x10), 4, farBase))
	v.do(tiny.Write(config(1, 0, 0x14), 4, 0))
	v.do(tiny.Write(config(1, 0, 0x04), 2, 0x0006))
}

// bar is one of the virtio functions' BARs.
func (v *villain) bar() uint32 {
	return pick[uint32](v, barBase+3<<16, barBase+4<<16, barBase+5<<16, barBase+6<<16, farBase)
}

// access reads or writes at any address, with any width.
func (v *villain) access(addr uint32) {
	switch width := pick(v, 1, 2, 4, 4, 8); {
	case v.IntN(2) == 0:
		v.do(tiny.Read(addr, width))
	case width == 8:
		v.do(tiny.WriteMM(addr))
	default:
		v.do(tiny.Write(addr, width, pick(v, 0, 1, 0xffff_ffff, v.Uint32(), v.Uint32N(256))))
	}
}

// configSpace touches any register of any function, and the ends of config spaces.
func (v *villain) configSpace() {
	off := pick(v, v.Uint32N(0x40), v.Uint32N(0x100), v.Uint32N(0x1000), 0xff9+v.Uint32N(8))
	v.access(config(v.Uint32N(4), v.Uint32N(functions+2), off))
}

// move gives a BAR a place where something else is, and touches it there.
func (v *villain) move() {
	dev := 3 + v.Uint32N(functions-3)
	to := pick[uint32](v, barBase+3<<16, barBase+4<<16, barBase+5<<16, farBase, 0x100_0000, buffers, boot.ECAMBase, boot.IOAPICAddr,
		0xfee0_0000, 0xffff_8000, memory, v.Uint32())
	v.do(tiny.Write(config(0, dev, 0x10), 4, to))
	v.do(tiny.Write(config(0, dev, 0x14), 4, pick[uint32](v, 0, 0, 1, 0xffff_ffff)))
	if to < 0x10_0000 || to > 0x20_1000 && to != 0xfee0_0000 { // neither our own code nor the LAPIC
		v.access(to + v.Uint32N(barSize)&^7)
	}
	if v.IntN(2) == 0 {
		v.do(tiny.Write(config(0, dev, 0x10), 4, barBase+dev<<16))
		v.do(tiny.Write(config(0, dev, 0x14), 4, 0))
	}
}

// vector writes an entry of an MSI-X table, turns MSI-X on or off, and chooses vectors that
// exist or do not. Of the messages that a LAPIC takes, those that would end this guest (NMI,
// INIT, SMI) are left out.
func (v *villain) vector() {
	bar := v.bar()
	entry := bar + msix + 16*v.Uint32N(12)
	v.do(tiny.Write(entry, 4, pick(v, 0xfee0_0000, 0xfee0_0000|v.Uint32N(1<<20), 0, buffers, v.Uint32())))
	v.do(tiny.Write(entry+4, 4, pick(v, 0, 0, 1, v.Uint32())))
	v.do(tiny.Write(entry+8, 4, v.Uint32()&^0x700|pick[uint32](v, 0, 0x100, 0x300, 0x700)))
	v.do(tiny.Write(entry+12, 4, v.Uint32N(2)))
	v.do(tiny.Write(bar+common+0x10, 2, pick(v, 0, 1, 0xffff, v.Uint32N(32))))
	v.do(tiny.Write(bar+common+0x1a, 2, pick(v, 0, 1, 0xffff, v.Uint32N(32))))
}

// address is one for a ring or a buffer, inside of RAM or not.
func (v *villain) address() (low, high uint32) {
	return pick(v, buffers+v.Uint32N(1<<20), rings+v.Uint32N(0x8000)&^0xfff, memory-1, memory-8, memory, boot.ECAMBase, boot.IOAPICAddr, 0xffff_fff0),
		pick[uint32](v, 0, 0, 0, 0, 0, 1, 0xffff_ffff)
}

// drive is a driver without scruples: it negotiates, sets up queues that may be anywhere,
// fills them with what may be anything, and says that there is work.
func (v *villain) drive() {
	bar := v.bar()
	for _, status := range pick(v, []uint32{0, 1, 3}, []uint32{0}, []uint32{0, 0xf}, []uint32{3, 0xff}) {
		v.do(tiny.Write(bar+common+0x14, 1, status))
	}
	for half := range uint32(2) { // VERSION_1, and perhaps indirect descriptors and event indexes
		features := half
		switch v.IntN(12) {
		case 0:
			features = v.Uint32()
		case 1, 2, 3, 4:
			features |= v.Uint32() & (1<<28 | 1<<29) * (1 - half)
		}
		v.do(tiny.Write(bar+common+0x08, 4, half))
		v.do(tiny.Write(bar+common+0x0c, 4, features))
	}
	v.do(tiny.Write(bar+common+0x14, 1, 0xb))
	for queue := range 1 + v.Uint32N(4) {
		v.do(tiny.Write(bar+common+0x16, 2, pick(v, queue, queue, queue, v.Uint32N(0x1_0000))))
		v.do(tiny.Write(bar+common+0x18, 2, pick[uint32](v, 2, 8, 256, 0, 3, 0x8000)))
		for area := range uint32(3) {
			low, high := rings+queue<<16+area<<12, uint32(0)
			if v.IntN(8) == 0 {
				low, high = v.address()
			}
			v.do(tiny.Write(bar+common+0x20+8*area, 4, low))
			v.do(tiny.Write(bar+common+0x24+8*area, 4, high))
		}
		v.do(tiny.Write(bar+common+0x1c, 2, pick[uint32](v, 1, 1, 1, 0, 2)))
		v.fill(rings + queue<<16)
	}
	v.do(tiny.Write(bar+common+0x14, 1, pick[uint32](v, 0xf, 0xf, 0xf, 4)))
	for range 1 + v.IntN(3) {
		v.do(tiny.Write(bar+notify+4*v.Uint32N(6), pick(v, 1, 2, 4), v.Uint32N(8)))
	}
}

// fill makes up descriptors, chains that may be circular, and an available ring.
func (v *villain) fill(queue uint32) {
	for d := range uint32(8) {
		low, high := v.address()
		at := queue + 16*d
		v.do(tiny.Write(at, 4, low))
		v.do(tiny.Write(at+4, 4, high))
		v.do(tiny.Write(at+8, 4, pick(v, 0, 1, 16, 512, 4096, v.Uint32N(1<<20), 0xffff_ffff)))
		v.do(tiny.Write(at+12, 2, pick[uint32](v, 0, 1, 1, 2, 3, 4, 5, 7, 0xffff)))
		v.do(tiny.Write(at+14, 2, pick(v, d+1, 0, d, v.Uint32N(8), 0xffff)))
	}
	v.do(tiny.Write(queue+0x1000, 2, v.Uint32N(2)))
	v.do(tiny.Write(queue+0x1002, 2, pick[uint32](v, 1, 1, 4, 8, 0x8000, 0xffff)))
	for i := range uint32(8) {
		v.do(tiny.Write(queue+0x1004+2*i, 2, pick(v, i, v.Uint32N(8), 0xffff)))
	}
}

// port touches I/O ports, but for those that end or reset the machine.
func (v *villain) port() {
	port := pick(v, 0x60+uint16(v.IntN(16)), 0x70+uint16(v.IntN(2)), 0x3f6+uint16(v.IntN(12)), 0x600+uint16(v.IntN(0x20)), 0xcf8+uint16(v.IntN(8)), uint16(v.Uint32()))
	width := pick(v, 1, 2, 4)
	touches := func(p uint16) bool { return port <= p && int(p) < int(port)+width }
	if v.IntN(2) == 0 || touches(chipset.KeyboardCommandPort) || touches(chipset.SleepControlPort) || touches(chipset.ResetPort) {
		v.do(tiny.InN(port, width))
		return
	}
	v.do(tiny.OutN(port, width, v.Uint32()))
}

// ops makes up n of all that.
func (v *villain) ops(n int) {
	v.place()
	for range n {
		switch v.IntN(20) {
		case 0, 1, 2, 3:
			v.configSpace()
		case 4, 5, 6, 7, 8:
			v.access(v.bar() + pick(v, v.Uint32N(barSize), common+v.Uint32N(0x40), pick[uint32](v, isr, device, notify, msix)+0xfff&v.Uint32N(32)))
		case 9, 10, 11:
			v.drive()
		case 12, 13:
			v.vector()
		case 14:
			v.move()
		case 15:
			v.access(boot.IOAPICAddr + v.Uint32N(0x14))
		case 16:
			v.access(0xc000_0000 + v.Uint32N(0x3ec0_0000))
		case 17:
			v.place()
		default:
			v.port()
		}
	}
}

// A hostile guest hurts nobody but itself: baton lives on, and after a reset every function
// is what it was when the machine was turned on.
func TestHostileGuest(t *testing.T) {
	seeds, n := 12, 400
	if os.Getenv("BATON_LONG") != "" {
		seeds = 300
	}
	var all []uint32 // what of the config spaces is compared
	for dev := range uint32(functions + 1) {
		for off := uint32(0); off < 0x100; off += 4 {
			all = append(all, config(dev/functions, dev%functions, off))
		}
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			v := &villain{Rand: rand.New(rand.NewPCG(uint64(seed), 0))}
			v.ops(n)
			// COM1 as Say needs it: no divisor latch, no loop.
			v.do(slices.Concat(tiny.Out(0x3fb, 3), tiny.Out(0x3fc, 0), tiny.Say("alive\n"), tiny.Reset, tiny.Halt))
			kernel := tiny.Kernel(t, tiny.Sum(all), tiny.Say("\n"), tiny.Twice(v.code, slices.Concat(tiny.PowerOff, tiny.Halt)))
			disks := [2]string{filepath.Join(t.TempDir(), "disk0"), filepath.Join(t.TempDir(), "disk1")}
			for _, d := range disks {
				if err := os.WriteFile(d, make([]byte, 1<<20), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			args := []string{"-m", "64M", "-device", "pcie-root-port,id=r1,addr=1", "-device", "pcie-root-port,id=r2,addr=2",
				"-drive", "if=none,id=d0,format=raw,file=" + disks[0], "-device", "virtio-blk-pci,drive=d0,addr=3,num-queues=3",
				"-drive", "if=none,id=d1,format=raw,file=" + disks[1], "-device", "virtio-blk-pci,drive=d1,bus=r1",
				"-device", "virtio-rng-pci,addr=4", "-device", "virtio-serial-pci,addr=5", "-chardev", "null,id=c", "-device", "virtconsole,chardev=c", "-D", filepath.Join(harness.Artifacts(t), "log")}
			if os.Geteuid() == 0 {
				args = append(args, "-netdev", "tap,id=n,ifname=hostile%d", "-device", "virtio-net-pci,netdev=n,addr=6")
			}
			g := start(t, kernel, args...)
			ends(t, g, "guest-shutdown")
			if !regexp.MustCompile(`(?s)^([A-P]{8})\n.*alive\n$`).MatchString(beforeLast(g.Serial.String())) {
				t.Fatalf("the guest says %q", g.Serial)
			}
			lines := strings.Split(strings.TrimSpace(g.Serial.String()), "\n")
			if first, last := lines[0], lines[len(lines)-1]; first != last {
				t.Errorf("the functions' config spaces add up to %s at first, to %s after the reset", first, last)
			}
			if g.Stderr.String() != "" {
				t.Errorf("stderr: %s", g.Stderr)
			}
		})
	}
}

// beforeLast is text without its last line.
func beforeLast(text string) string {
	return text[:strings.LastIndex(strings.TrimSuffix(text, "\n"), "\n")+1]
}
