package chipset

import "baton/devices"

// PanicPort is where the pvpanic device is: QEMU's docs/specs/pvpanic.rst. 1 port.
const PanicPort = 0x505

// panicked is the event bit for a guest kernel that has panicked; reading the port says
// which bits the host understands.
const panicked = 1 << 0

// NewPVPanic returns the device by which a guest kernel tells that it has panicked, on the
// vCPU's thread.
func NewPVPanic(report func()) devices.BusDevice {
	return registers{
		read: func(uint64) byte { return panicked },
		write: func(_ uint64, v byte) {
			if v&panicked != 0 {
				report()
			}
		},
	}
}
