package hmp

import (
	"bytes"
	"io"
	"slices"
)

// Bytes of the telnet protocol: RFC 854 and, of the options, RFC 857, 858 and 1073.
const (
	iacSE   = 240 // end of a subnegotiation
	iacIP   = 244 // interrupt process: Ctrl-C
	iacAYT  = 246 // are you there
	iacEC   = 247 // erase character
	iacEL   = 248 // erase line
	iacSB   = 250 // begin of a subnegotiation
	iacWILL = 251
	iacWONT = 252
	iacDO   = 253
	iacDONT = 254
	iac     = 255

	optEcho            = 1
	optSuppressGoAhead = 3
	optWindowSize      = 31

	windowSizeBytes = 4 // columns and rows, 16 bits each
)

// Control characters that telnet's commands stand for.
const (
	ctrlC     = 0x03
	ctrlU     = 0x15
	backspace = 0x7f
)

// telnet is a connection to a telnet client, which it asks to send each key as it is pressed
// and not to show it: the editor does.
type telnet struct {
	io.ReadWriteCloser
	resize func(columns, rows int)

	state   byte // 0, iac, or the command whose option comes next
	inside  bool // a subnegotiation
	sub     []byte
	refused map[[2]byte]bool // what the client was told, which is to be said once: RFC 854
	cr      bool             // the last byte was a carriage return
}

func newTelnet(conn io.ReadWriteCloser, resize func(columns, rows int)) (*telnet, error) {
	t := &telnet{ReadWriteCloser: conn, resize: resize, refused: map[[2]byte]bool{}}
	_, err := conn.Write([]byte{
		iac, iacWILL, optEcho, iac, iacWILL, optSuppressGoAhead, iac, iacDO, optSuppressGoAhead, iac, iacDO, optWindowSize,
	})
	return t, err
}

// Read returns what was typed. It reads again where all of it was negotiation.
func (t *telnet) Read(p []byte) (int, error) {
	for {
		n, err := t.ReadWriteCloser.Read(p)
		typed, answer := t.parse(p[:n])
		if len(answer) > 0 {
			if _, err := t.ReadWriteCloser.Write(answer); err != nil {
				return len(typed), err
			}
		}
		if len(typed) > 0 || err != nil || len(p) == 0 {
			return len(typed), err
		}
	}
}

// Write sends text.
func (t *telnet) Write(p []byte) (int, error) {
	if _, err := t.ReadWriteCloser.Write(bytes.ReplaceAll(p, []byte{iac}, []byte{iac, iac})); err != nil {
		return 0, err
	}
	return len(p), nil
}

// parse separates what was typed, which it returns in the same memory, from what needs an
// answer.
func (t *telnet) parse(in []byte) (typed, answer []byte) {
	typed = in[:0]
	for _, c := range in {
		switch state := t.state; {
		case state == iac:
			t.state = 0
			switch c {
			case iacWILL, iacWONT, iacDO, iacDONT:
				t.state = c
			case iacSB:
				t.inside, t.sub = true, t.sub[:0]
			case iacSE:
				t.subnegotiated()
			case iacIP:
				typed = append(typed, ctrlC)
			case iacEC:
				typed = append(typed, backspace)
			case iacEL:
				typed = append(typed, ctrlU)
			case iacAYT:
				answer = append(answer, "\r\n[yes]\r\n"...)
			case iac:
				typed = t.data(typed, c)
			}
		case state != 0:
			t.state = 0
			answer = append(answer, t.negotiate(state, c)...)
		case c == iac:
			t.state = iac
		default:
			typed = t.data(typed, c)
		}
	}
	return typed, answer
}

// data takes a byte that is no command.
func (t *telnet) data(typed []byte, c byte) []byte {
	switch {
	case t.inside:
		if len(t.sub) <= 1+windowSizeBytes {
			t.sub = append(t.sub, c)
		}
		return typed
	case t.cr && (c == 0 || c == '\n'): // the second half of a new line: RFC 854, "The NVT Printer"
		t.cr = false
		return typed
	}
	t.cr = c == '\r'
	return append(typed, c)
}

// negotiate answers what the client offers, or wants: no to all that was not proposed here.
func (t *telnet) negotiate(verb, option byte) []byte {
	ours := option == optEcho || option == optSuppressGoAhead
	theirs := option == optWindowSize || option == optSuppressGoAhead
	no := byte(iacWONT)
	switch {
	case verb == iacWONT, verb == iacDO && ours, verb == iacWILL && theirs, verb == iacDONT && !ours:
		return nil
	case verb == iacWILL:
		no = iacDONT
	}
	if key := [2]byte{no, option}; !t.refused[key] {
		t.refused[key] = true
		return []byte{iac, no, option}
	}
	return nil
}

func (t *telnet) subnegotiated() {
	size := t.sub
	t.inside, t.sub = false, t.sub[:0]
	if len(size) == 1+windowSizeBytes && size[0] == optWindowSize && !slices.Equal(size[1:], make([]byte, windowSizeBytes)) {
		t.resize(int(size[1])<<8|int(size[2]), int(size[3])<<8|int(size[4]))
	}
}
