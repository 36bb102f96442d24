package pci

import "fmt"

// BDF is the address of a function, as in the upper bits of an ECAM offset: bus (8 bits),
// device (5), function (3). There is one segment, 0000.
type BDF uint16

// NewBDF returns the address of function fn (0 to 7) of device dev (0 to 31) on bus.
func NewBDF(bus uint8, dev, fn int) BDF {
	return BDF(bus)<<8 | BDF(dev&31)<<3 | BDF(fn&7)
}

// Bus is the bus number.
func (b BDF) Bus() uint8 { return uint8(b >> 8) }

// Device is the device (slot) number, 0 to 31.
func (b BDF) Device() int { return int(b>>3) & 31 }

// Function is the function number, 0 to 7.
func (b BDF) Function() int { return int(b) & 7 }

// String is the address as Linux and lspci -D write it, such as 0000:00:02.0.
func (b BDF) String() string {
	return fmt.Sprintf("0000:%02x:%02x.%d", b.Bus(), b.Device(), b.Function())
}
