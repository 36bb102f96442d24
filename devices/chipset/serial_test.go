package chipset

import (
	"bytes"
	"io"
	"sync"
	"testing"
	"time"
)

const patience = 10 * time.Second

// wire is an interrupt line that counts its edges.
type wire struct {
	mu    sync.Mutex
	high  bool
	edges int
	edge  chan struct{} // one for every edge, if someone listens
}

func (w *wire) SetLevel(high bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if high && !w.high {
		w.edges++
		select {
		case w.edge <- struct{}{}:
		default:
		}
	}
	w.high = high
}

func (w *wire) state() (high bool, edges int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.high, w.edges
}

// cable is a backend: what the guest sends is in out, and what a test writes to in, the
// guest receives. A write to in ends when the port has taken all of it.
type cable struct {
	*io.PipeReader
	in  *io.PipeWriter
	out bytes.Buffer
}

func (c *cable) Write(p []byte) (int, error) { return c.out.Write(p) }

type uart struct {
	*Serial
	t    testing.TB
	irq  *wire
	host *cable
}

func newUART(t testing.TB) *uart {
	r, w := io.Pipe()
	u := &uart{t: t, irq: &wire{edge: make(chan struct{}, 64)}, host: &cable{PipeReader: r, in: w}}
	u.Serial = NewSerial(u.irq, u.host)
	t.Cleanup(func() { u.Close() })
	return u
}

func (u *uart) in(reg uint64) byte {
	var p [1]byte
	u.Read(reg, p[:])
	return p[0]
}

func (u *uart) outb(reg uint64, v byte) { u.Write(reg, []byte{v}) }

func (u *uart) want(what string, reg uint64, want byte) {
	u.t.Helper()
	if got := u.in(reg); got != want {
		u.t.Errorf("%s: register %d is %#02x, want %#02x", what, reg, got, want)
	}
}

func (u *uart) wantLine(what string, want bool) {
	u.t.Helper()
	if high, _ := u.irq.state(); high != want {
		u.t.Errorf("%s: interrupt line is %v, want %v", what, high, want)
	}
}

func (u *uart) waitEdge(what string) {
	u.t.Helper()
	select {
	case <-u.irq.edge:
	case <-time.After(patience):
		u.t.Fatalf("%s: no interrupt", what)
	}
}

// The steps by which Linux' 8250 driver tells a 16550A from its relatives
// (autoconfig and autoconfig_16550a in drivers/tty/serial/8250/8250_port.c).
func TestSerialIsA16550A(t *testing.T) {
	u := newUART(t)
	u.outb(regIER, 0)
	u.want("no interrupts enabled", regIER, 0)
	u.outb(regIER, 0x0f)
	u.want("all interrupts enabled", regIER, 0x0f)
	u.outb(regIER, 0)

	mcr := u.in(regMCR)
	u.outb(regMCR, mcrLoop|0x0a)
	if v := u.in(regMSR) & 0xf0; v != 0x90 {
		t.Errorf("loopback of RTS and OUT2: MSR %#x, want 0x90", v)
	}
	u.outb(regMCR, mcr)

	u.outb(regLCR, 0xbf) // no EFR: neither a 16650 nor a 16850
	u.outb(regIIR, 0)
	u.outb(regLCR, 0)
	u.outb(regIIR, fcrEnable)
	if v := u.in(regIIR); v>>6 != 3 {
		t.Errorf("FIFO enabled: IIR %#x, want a 16550A's", v)
	}
	for _, lcr := range []byte{0x80, 0xbf} {
		u.outb(regLCR, lcr)
		if u.in(regIIR) == 0 {
			t.Errorf("with LCR %#x there is an EFR", lcr)
		}
		u.outb(regLCR, 0)
	}
	u.outb(regIIR, fcrEnable|1<<5) // 64-byte FIFO: only a 16750
	if u.in(regIIR)&(1<<5) != 0 {
		t.Error("it claims a 64-byte FIFO")
	}
	u.outb(regIER, 1<<6) // UUE: only an XScale
	u.want("UUE", regIER, 0)

	// serial8250_do_startup: the THRE interrupt must come back when enabled again.
	for range 2 {
		u.outb(regIER, ierTHRE)
		if v := u.in(regIIR); v&iirNone != 0 {
			t.Errorf("THRE enabled: IIR %#x, no interrupt", v)
		}
		u.outb(regIER, 0)
	}
	u.outb(regSCR, 0xa5)
	u.want("scratch", regSCR, 0xa5)
}

func TestSerialDivisorLatch(t *testing.T) {
	u := newUART(t)
	u.outb(regLCR, lcrDLAB|3)
	if u.in(regData) == 0 && u.in(regIER) == 0 {
		t.Error("the divisor is zero: Linux' earlycon divides by it")
	}
	u.outb(regData, 0x0c)
	u.outb(regIER, 0x34)
	u.want("divisor low", regData, 0x0c)
	u.want("divisor high", regIER, 0x34)
	u.outb(regLCR, 3)
	u.want("LCR", regLCR, 3)
	u.want("IER behind the latch", regIER, 0)
	if u.host.out.Len() != 0 {
		t.Error("the divisor was sent")
	}
}

func TestSerialTransmits(t *testing.T) {
	u := newUART(t)
	u.want("nothing sent", regLSR, lsrTHRE|lsrTEMT)
	for _, c := range []byte("hi\n") {
		u.outb(regData, c)
		u.want("after a byte", regLSR, lsrTHRE|lsrTEMT)
	}
	if got := u.host.out.String(); got != "hi\n" {
		t.Errorf("sent %q", got)
	}
	u.wantLine("no interrupt enabled", false)
}

func TestSerialTransmitInterrupt(t *testing.T) {
	u := newUART(t)
	u.outb(regIER, ierTHRE)
	u.wantLine("enabled while empty", true)
	u.want("cause", regIIR, iirTHRE)
	u.want("cause, once acknowledged", regIIR, iirNone)
	u.wantLine("acknowledged", false)
	u.outb(regData, 'a')
	u.wantLine("empty again", true)
	// Each byte gives a new edge even to a guest that never looks at the cause.
	_, before := u.irq.state()
	u.outb(regData, 'b')
	u.outb(regData, 'c')
	if _, after := u.irq.state(); after != before+2 {
		t.Errorf("%d edges for 2 bytes", after-before)
	}
	u.outb(regIER, 0)
	u.wantLine("disabled", false)
	u.outb(regIER, ierTHRE)
	u.wantLine("enabled again", true)
	u.outb(regIER, ierTHRE)
	u.in(regIIR)
	u.outb(regIER, ierTHRE) // not a change: nothing new
	u.wantLine("written again", false)
}

func TestSerialReceiveInterrupt(t *testing.T) {
	for _, c := range []struct {
		name  string
		fcr   byte
		bytes int
		cause byte
	}{
		{"no FIFO", 0, 1, iirRDA},
		{"trigger 1", fcrEnable, 1, iirFIFO | iirRDA},
		{"below trigger 4", fcrEnable | 1<<6, 3, iirFIFO | iirTimeout},
		{"at trigger 4", fcrEnable | 1<<6, 4, iirFIFO | iirRDA},
		{"below trigger 8", fcrEnable | 2<<6, 7, iirFIFO | iirTimeout},
		{"at trigger 8", fcrEnable | 2<<6, 8, iirFIFO | iirRDA},
		{"below trigger 14", fcrEnable | 3<<6, 13, iirFIFO | iirTimeout},
		{"full", fcrEnable | 3<<6, fifoSize, iirFIFO | iirRDA},
		{"trigger without the FIFO", 3 << 6, 1, iirRDA},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := newUART(t)
			u.outb(regIIR, c.fcr)
			input := []byte("0123456789abcdef")[:c.bytes]
			u.feed(input)
			u.wantLine("not enabled", false)
			u.outb(regIER, ierRDA|ierTHRE)
			u.wantLine("enabled", true)
			u.want("received data go before THRE", regIIR, c.cause)
			for _, v := range input {
				u.want("data ready", regLSR, lsrDR|lsrTHRE|lsrTEMT)
				u.want("data", regData, v)
			}
			u.want("all read", regLSR, lsrTHRE|lsrTEMT)
			u.want("empty", regData, 0)
			u.want("THRE is next", regIIR, c.cause&iirFIFO|iirTHRE)
			u.wantLine("all served", false)
		})
	}
}

// Input that does not fit waits until the guest has made room; nothing is lost.
func TestSerialInputWaitsForRoom(t *testing.T) {
	for _, fcr := range []byte{0, fcrEnable, fcrEnable | 3<<6} {
		u := newUART(t)
		u.outb(regIIR, fcr)
		u.outb(regIER, ierRDA)
		input := bytes.Repeat([]byte("0123456789abcdefghijklmnopqrstuvwxyz"), 20)
		sent := make(chan error, 1)
		go func() {
			_, err := u.host.in.Write(input)
			sent <- err
		}()
		var got []byte
		for len(got) < len(input) {
			u.waitEdge("input")
			for u.in(regLSR)&lsrDR != 0 {
				got = append(got, u.in(regData))
			}
		}
		if !bytes.Equal(got, input) {
			t.Errorf("FCR %#x: got %q", fcr, got)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		u.wantLine("all read", false)
		u.Close()
	}
}

func TestSerialLoopback(t *testing.T) {
	u := newUART(t)
	u.outb(regIIR, fcrEnable)
	u.want("modem lines", regMSR, msrCTS|msrDSR|msrDCD)
	for out, in := range []byte{msrDSR, msrCTS, msrRI, msrDCD} {
		u.outb(regMCR, mcrLoop|1<<out)
		u.want("looped modem line", regMSR, in)
	}
	u.outb(regIER, ierRDA|ierRLS)
	for i := range byte(fifoSize) {
		u.outb(regData, i)
	}
	u.want("full", regIIR, iirFIFO|iirRDA)
	u.outb(regData, 0xff)
	u.want("overrun", regIIR, iirFIFO|iirRLS)
	u.want("overrun", regLSR, lsrOE|lsrDR|lsrTHRE|lsrTEMT)
	u.want("reading LSR acknowledges", regLSR, lsrDR|lsrTHRE|lsrTEMT)
	for i := range byte(fifoSize) {
		u.want("looped byte", regData, i)
	}
	u.wantLine("all read", false)
	if u.host.out.Len() != 0 {
		t.Errorf("loopback sent %q", u.host.out.String())
	}

	// Input from outside waits until the loop is opened.
	go u.host.in.Write([]byte{'x'})
	u.outb(regData, 'y')
	u.want("looped", regData, 'y')
	for len(u.irq.edge) > 0 {
		<-u.irq.edge
	}
	u.outb(regMCR, 0)
	u.waitEdge("input after the loop")
	u.want("input", regData, 'x')
}

func TestSerialFIFOControl(t *testing.T) {
	u := newUART(t)
	u.outb(regIIR, fcrEnable)
	for _, c := range []struct {
		name  string
		fcr   byte
		empty bool
	}{
		{"trigger changed", fcrEnable | 1<<6, false},
		{"receiver cleared", fcrEnable | fcrClearRx, true},
		{"disabled", 0, true},
		{"clear without enable", fcrClearRx, false},
	} {
		u.feed([]byte{'a'})
		u.outb(regIIR, c.fcr)
		if empty := u.in(regLSR)&lsrDR == 0; empty != c.empty {
			t.Errorf("%s: empty is %v", c.name, empty)
		}
		u.in(regData)
		if c.fcr&fcrEnable != 0 {
			u.want(c.name+": enabled, and commands clear themselves", regIIR, iirFIFO|iirNone)
		} else {
			u.want(c.name+": disabled", regIIR, iirNone)
		}
	}
}

func TestSerialReset(t *testing.T) {
	u := newUART(t)
	u.feed([]byte{'a'})
	u.outb(regIER, ierMask)
	u.outb(regMCR, 0x0b)
	u.outb(regSCR, 1)
	u.outb(regLCR, 3)
	u.wantLine("before", true)
	u.Reset()
	u.wantLine("after", false)
	for reg, want := range []byte{0, 0, iirNone, 0, 0, lsrTHRE | lsrTEMT, msrCTS | msrDSR | msrDCD, 0} {
		u.want("after reset", uint64(reg), want)
	}
}

// A wide access touches the registers one after the other, as on an 8-bit bus.
func TestSerialOddWidths(t *testing.T) {
	u := newUART(t)
	u.Write(regLCR, []byte{0x1b, 0x0b, 0xff, 0xff, 0x5a, 0x77, 0x77})
	p := make([]byte, 8)
	u.Read(regLCR, p)
	want := []byte{0x1b, 0x0b, lsrTHRE | lsrTEMT, msrCTS | msrDSR | msrDCD, 0x5a, 0xff, 0xff, 0xff}
	if !bytes.Equal(p, want) {
		t.Errorf("got % x, want % x", p, want)
	}
	u.Read(regSCR, nil)
	u.Write(regSCR, nil)
}

// Close ends a receiver that waits for input and one that waits for room.
func TestSerialClose(t *testing.T) {
	for _, input := range []string{"", "more than fits"} {
		u := newUART(t)
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			u.host.in.Write([]byte(input))
		}()
		if input != "" {
			<-sent // the receiver has it all, and no room
		}
		closed := make(chan error, 1)
		go func() { closed <- u.Close() }()
		select {
		case err := <-closed:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatalf("input %q: close hangs", input)
		}
		u.outb(regData, 'a') // vCPUs may still run
	}
}

// FuzzSerial lets a hostile guest at the port: each pair of bytes is an access. After all
// it did, a reset makes a working port.
func FuzzSerial(f *testing.F) {
	f.Add([]byte{regIIR | 8, 1, regMCR | 8, mcrLoop, regData | 8, 'a', regData, 1, regLSR, 4})
	f.Add([]byte{regLCR | 8, 0x80, regData | 8, 0, regIER | 8, 0, regData, 8})
	f.Fuzz(func(t *testing.T, ops []byte) {
		u := newUART(t)
		for ; len(ops) >= 2; ops = ops[2:] {
			reg, v := uint64(ops[0]&7), ops[1]
			switch {
			case ops[0]&0x10 != 0 && u.mcr&mcrLoop == 0 && u.n < u.depth():
				u.feed([]byte{v})
			case ops[0]&8 != 0:
				u.Write(reg, bytes.Repeat([]byte{v}, int(ops[0]>>5)))
				u.outb(reg, v)
			default:
				u.Read(reg, make([]byte, v%16))
			}
			if high, _ := u.irq.state(); high != (u.cause() != iirNone) {
				t.Fatalf("line is %v, cause is %#x", high, u.cause())
			}
		}
		u.Reset()
		u.host.out.Reset()
		u.outb(regData, 'z')
		u.feed([]byte{'a'})
		u.want("after reset", regData, 'a')
		if got := u.host.out.String(); got != "z" {
			t.Errorf("sent %q after reset", got)
		}
	})
}
