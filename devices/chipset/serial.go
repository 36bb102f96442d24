package chipset

import (
	"io"
	"sync"

	"baton/devices"
)

// SerialPorts is how many I/O ports a 16550A decodes.
const SerialPorts = 8

// Registers, PC16550D data sheet, table II.
const (
	regData = 0 // RBR on read, THR on write; divisor latch low while DLAB is set
	regIER  = 1 // divisor latch high while DLAB is set
	regIIR  = 2 // FCR on write
	regLCR  = 3
	regMCR  = 4
	regLSR  = 5
	regMSR  = 6
	regSCR  = 7
)

// Register bits, PC16550D data sheet, 8.1 to 8.9.
const (
	ierRDA  = 1 << 0 // received data available, and its timeout
	ierTHRE = 1 << 1 // transmitter holding register empty
	ierRLS  = 1 << 2 // receiver line status
	ierMask = 0x0f

	iirNone    = 0x01
	iirTHRE    = 0x02
	iirRDA     = 0x04
	iirRLS     = 0x06
	iirTimeout = 0x0c
	iirFIFO    = 0xc0 // both set tell a 16550A from a 16450 and a 16550

	fcrEnable  = 1 << 0
	fcrClearRx = 1 << 1
	fcrTrigger = 0xc0

	lcrDLAB = 1 << 7

	mcrLoop = 1 << 4
	mcrMask = 0x1f

	lsrDR   = 1 << 0
	lsrOE   = 1 << 1
	lsrTHRE = 1 << 5
	lsrTEMT = 1 << 6

	msrCTS = 1 << 4
	msrDSR = 1 << 5
	msrRI  = 1 << 6
	msrDCD = 1 << 7
)

const fifoSize = 16

// triggerLevels are the receiver FIFO's, in bytes, by FCR bits 7:6.
var triggerLevels = [4]int{1, 4, 8, 14}

// Serial is a 16550A UART. The transmitter is infinitely fast: a byte has reached the
// backend when the guest's write ends. The receiver takes a byte from the backend only
// when it has room for it, so input is never lost to an overrun. In loopback the receiver is
// cut off from its input.
//
// The modem's lines always say that the peer is there and ready, hence no modem status
// interrupt. OUT2 does not gate the interrupt, as small guests never set it.
type Serial struct {
	irq     devices.Line
	backend io.ReadWriteCloser
	done    chan struct{} // closed when the receiver has ended

	mu       sync.Mutex
	room     sync.Cond // input has become empty, or the receiver shall end
	closed   bool
	dll, dlm byte
	ier, fcr byte
	lcr, mcr byte
	scr      byte
	overrun  bool
	thre     bool // THR has become empty since the guest last was told
	rx       [fifoSize]byte
	n        int // bytes in rx
	tx       [1]byte
	input    []byte // from the backend, for which rx had no room yet
	stopped  bool   // Quiesce: rx takes nothing
}

// NewSerial returns a port after reset and starts its receiver. The port owns the backend,
// whose Write must not block for long and whose Close must end a Read.
func NewSerial(irq devices.Line, backend io.ReadWriteCloser) *Serial {
	s := &Serial{irq: irq, backend: backend, done: make(chan struct{})}
	s.room.L = &s.mu
	s.Reset()
	go s.receive()
	return s
}

// Close closes the backend and waits for the receiver to end.
func (s *Serial) Close() error {
	s.mu.Lock()
	s.closed = true
	s.room.Broadcast()
	s.mu.Unlock()
	err := s.backend.Close()
	<-s.done
	return err
}

// Reset puts the port into its state after power-on, with a divisor of 1 (115200 baud),
// as Linux' earlycon divides by it before it sets it.
func (s *Serial) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dll, s.dlm, s.ier, s.fcr, s.lcr, s.mcr, s.scr = 1, 0, 0, 0, 0, 0, 0
	s.overrun, s.thre = false, false
	s.n = 0
	s.fill()
}

// Read implements devices.BusDevice.
func (s *Serial) Read(off uint64, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	readBytes(off, p, s.read)
	s.fill()
}

// Write implements devices.BusDevice.
func (s *Serial) Write(off uint64, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	writeBytes(off, p, s.write)
	s.fill()
}

func (s *Serial) read(reg uint64) byte {
	dlab := s.lcr&lcrDLAB != 0
	switch {
	case reg == regData && dlab:
		return s.dll
	case reg == regData:
		return s.pop()
	case reg == regIER && dlab:
		return s.dlm
	case reg == regIER:
		return s.ier
	case reg == regIIR:
		v := s.cause()
		if v == iirTHRE {
			s.thre = false // 8.6.1: reading it as the source acknowledges it
		}
		if s.fcr&fcrEnable != 0 {
			v |= iirFIFO
		}
		return v
	case reg == regLCR:
		return s.lcr
	case reg == regMCR:
		return s.mcr
	case reg == regLSR:
		v := byte(lsrTHRE | lsrTEMT)
		if s.n > 0 {
			v |= lsrDR
		}
		if s.overrun {
			v |= lsrOE
			s.overrun = false
		}
		return v
	case reg == regMSR:
		return s.modem()
	case reg == regSCR:
		return s.scr
	}
	return 0xff
}

func (s *Serial) write(reg uint64, v byte) {
	dlab := s.lcr&lcrDLAB != 0
	switch {
	case reg == regData && dlab:
		s.dll = v
	case reg == regData:
		s.transmit(v)
	case reg == regIER && dlab:
		s.dlm = v
	case reg == regIER:
		// Enabling it while THR is empty, which it always is, raises it at once. Linux
		// tests for that and falls back to a timer where it does not happen.
		if v&^s.ier&ierTHRE != 0 {
			s.thre = true
		}
		s.ier = v & ierMask
	case reg == regIIR:
		if v&fcrEnable == 0 {
			v = 0 // 8.5: the other bits are programmed only together with this one
		}
		if (v^s.fcr)&fcrEnable != 0 || v&fcrClearRx != 0 {
			s.n = 0
		}
		s.fcr = v & (fcrEnable | fcrTrigger)
	case reg == regLCR:
		s.lcr = v
	case reg == regMCR:
		s.mcr = v & mcrMask
	case reg == regSCR:
		s.scr = v
	}
}

// transmit sends one byte. The interrupt goes away and comes back, which gives an
// edge-triggered pin its next edge even if the guest never read the cause.
func (s *Serial) transmit(v byte) {
	s.thre = false
	s.update()
	switch {
	case s.mcr&mcrLoop == 0:
		s.tx[0] = v
		_, _ = s.backend.Write(s.tx[:]) // a backend that is gone is a cable that is not plugged
	case s.n < s.depth():
		s.push(v)
	default:
		s.overrun = true
	}
	s.thre = true
}

// maxInput is how much is read from the backend at a time.
const maxInput = 256

// receive moves input from the backend to the FIFO until the backend ends.
func (s *Serial) receive() {
	defer close(s.done)
	buf := make([]byte, maxInput)
	for {
		n, err := s.backend.Read(buf)
		if !s.feed(buf[:n]) || err != nil {
			return
		}
	}
}

// feed waits until all of p has found room in the FIFO; it says no once the port is closed.
// What was there before, a saved state's, goes first.
func (s *Serial) feed(p []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.empty() {
		return false
	}
	s.input = p
	s.fill()
	return s.empty()
}

// empty waits until there is no input left; it says no once the port is closed.
func (s *Serial) empty() bool {
	for !s.closed && len(s.input) > 0 {
		s.room.Wait()
	}
	return !s.closed
}

// fill moves input to the FIFO, as far as there is room, and brings the line up to date.
func (s *Serial) fill() {
	for len(s.input) > 0 && !s.stopped && s.mcr&mcrLoop == 0 && s.n < s.depth() {
		s.push(s.input[0])
		if s.input = s.input[1:]; len(s.input) == 0 {
			s.room.Broadcast()
		}
	}
	s.update()
}

// depth is how many bytes the receiver holds: without its FIFO there is just RBR.
func (s *Serial) depth() int {
	if s.fcr&fcrEnable != 0 {
		return fifoSize
	}
	return 1
}

func (s *Serial) push(v byte) {
	s.rx[s.n] = v
	s.n++
}

func (s *Serial) pop() byte {
	if s.n == 0 {
		return 0
	}
	v := s.rx[0]
	copy(s.rx[:], s.rx[1:s.n])
	s.n--
	return v
}

// modem is MSR. In loopback the four inputs are MCR's outputs (8.7): Linux knows a UART
// by that.
func (s *Serial) modem() byte {
	if s.mcr&mcrLoop == 0 {
		return msrCTS | msrDSR | msrDCD
	}
	var v byte
	for i, in := range []byte{msrDSR, msrCTS, msrRI, msrDCD} { // DTR, RTS, OUT1, OUT2
		if s.mcr>>i&1 != 0 {
			v |= in
		}
	}
	return v
}

// cause is the pending interrupt of the highest priority (table IV). The timeout of four
// character times that ends a wait for the trigger level passes at once.
func (s *Serial) cause() byte {
	switch {
	case s.ier&ierRLS != 0 && s.overrun:
		return iirRLS
	case s.ier&ierRDA != 0 && s.n >= triggerLevels[s.fcr>>6]:
		return iirRDA
	case s.ier&ierRDA != 0 && s.n > 0:
		return iirTimeout
	case s.ier&ierTHRE != 0 && s.thre:
		return iirTHRE
	}
	return iirNone
}

func (s *Serial) update() { s.irq.SetLevel(s.cause() != iirNone) }
