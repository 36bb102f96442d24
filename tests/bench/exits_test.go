package bench

import (
	"encoding/binary"
	"fmt"
	"os"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// exits is how many there are in one measurement: half a second or more on every KVM.
const exits = 20_000

// unassigned are a port and an address where neither VMM has a device: both go through
// their whole dispatch and find nothing.
const (
	unassignedPort = 0x2f0
	unassignedMMIO = 0xd000_0000
)

// TestExits measures what one exit to the VMM costs.
func TestExits(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skip(err)
	}
	cases := []struct {
		name string
		code tiny.Code
	}{
		// mov $0x2f0, %dx; mov $exits, %ecx; 1: out %al, (%dx); dec %ecx; jnz 1b
		{"exit: one port write", append(loop(tiny.Code{0x66, 0xba, unassignedPort & 0xff, unassignedPort >> 8}), 0xee, 0x49, 0x75, 0xfc)},
		// mov $0xd0000000, %ebx; mov $exits, %ecx; 1: mov (%ebx), %eax; dec %ecx; jnz 1b
		{"exit: one memory read", append(loop(binary.LittleEndian.AppendUint32(tiny.Code{0xbb}, unassignedMMIO)), 0x8b, 0x03, 0x49, 0x75, 0xfb)},
	}
	for i := range runs {
		for _, k := range cases {
			kernel := tiny.Kernel(t, tiny.Say("<"), k.code, tiny.Say(">"), tiny.Halt)
			for _, c := range contenders(t, "host,-arch-capabilities") { // kvm_pvm has no use for that MSR
				t.Run(fmt.Sprintf("%s/%d", c.name, i+1), func(t *testing.T) {
					g := harness.Start(t, harness.GuestConfig{VMM: c.vmm, NoAgent: true, Args: append(c.args[:len(c.args):len(c.args)],
						"-m", "64", "-kernel", kernel)})
					ctx := harness.Context(t, time.Minute)
					g.WaitSerial(ctx, "<")
					start := time.Now()
					g.WaitSerial(ctx, ">")
					record(t, c, k.name, "µs", target{}, float64(time.Since(start).Nanoseconds())/1e3/exits)
				})
			}
		}
	}
}

// loop adds the setting of the loop's counter to what goes before a loop.
func loop(before tiny.Code) tiny.Code {
	return binary.LittleEndian.AppendUint32(append(before, 0xb9), exits) // mov $exits, %ecx
}
