package qmp

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Limits of one JSON value. QEMU has them too, with greater numbers.
const (
	maxBytes   = 4 << 20
	maxTokens  = 1 << 18
	maxNesting = 1024
)

// SyntaxError is what is wrong with the JSON. Its text is QEMU's; the next value can be read.
type SyntaxError string

func (e SyntaxError) Error() string { return string(e) }

// Decoder reads a stream of JSON values. A value ends where it ends, whether anything
// follows or not, so that a client need not send a newline. As QEMU's it also takes strings
// in single quotes, and after an error it goes on at the next bracket, brace, comma, colon or
// control character.
type Decoder struct {
	in     *bufio.Reader
	state  state
	quote  byte // that ends the string
	text   []byte
	start  int // of the current token in text
	tokens []token
	depth  [2]int // open brackets and braces
}

type token struct {
	kind       byte // '{', '}', '[', ']', ',', ':', or kindString and so on
	start, end uint32
}

const (
	kindString  = 's'
	kindNumber  = 'n'
	kindKeyword = 'k'
	kindError   = 'e'
	kindEnd     = 0
)

// state is where the lexer is in a token: RFC 8259 has the grammar.
type state byte

const (
	inNothing state = iota
	inString
	inEscape
	inMinus
	inZero
	inInteger
	inPoint
	inFraction
	inE
	inSign
	inExponent
	inKeyword
	inRecovery
)

// NewDecoder returns a decoder that reads from r.
func NewDecoder(r io.Reader) *Decoder { return &Decoder{in: bufio.NewReader(r)} }

// Next returns the next value: nil, bool, string, json.Number, []any or map[string]any. The
// error is a SyntaxError, or r's.
func (d *Decoder) Next() (any, error) {
	for {
		c, err := d.in.ReadByte()
		if err != nil {
			return nil, err
		}
		kind, again := d.lex(c)
		if again { // c is not part of the token that it ended
			_ = d.in.UnreadByte()
		} else if d.state != inNothing || kind != kindEnd {
			d.text = append(d.text, c)
		}
		if kind == kindEnd && len(d.text) <= maxBytes {
			if d.state == inNothing || d.state == inRecovery {
				d.text = d.text[:d.start]
			}
			continue
		}
		if v, done, err := d.add(kind); done {
			d.text, d.start, d.tokens, d.depth = d.text[:0], 0, d.tokens[:0], [2]int{}
			return v, err
		}
	}
}

// lex advances by one byte. Kind is that of a token that is complete; again says that it was
// so before c, which has to be seen again.
func (d *Decoder) lex(c byte) (kind byte, again bool) {
	next := func(s state) (byte, bool) { d.state = s; return kindEnd, false }
	end := func(kind byte, again bool) (byte, bool) { d.state = inNothing; return kind, again }
	digit := c >= '0' && c <= '9'
	switch s := d.state; {
	case s == inRecovery:
		if strings.IndexByte("{}[],:", c) >= 0 || c < ' ' && c != '\t' || c >= 0xfe {
			d.state = inNothing
			return kindEnd, true
		}
		return kindEnd, false
	case s == inNothing && strings.IndexByte(" \t\r\n", c) >= 0:
		return kindEnd, false
	case s == inNothing && strings.IndexByte("{}[],:", c) >= 0:
		return end(c, false)
	case s == inNothing && (c == '"' || c == '\''):
		d.quote = c
		return next(inString)
	case s == inString && c == d.quote:
		return end(kindString, false)
	case s == inString && c == '\\':
		return next(inEscape)
	case (s == inString || s == inEscape) && c >= ' ' && c < 0xfe:
		return next(inString)
	case s == inNothing && c == '-':
		return next(inMinus)
	case (s == inNothing || s == inMinus) && c == '0':
		return next(inZero)
	case (s == inNothing || s == inMinus || s == inInteger) && digit:
		return next(inInteger)
	case (s == inZero || s == inInteger) && c == '.':
		return next(inPoint)
	case (s == inPoint || s == inFraction) && digit:
		return next(inFraction)
	case (s == inZero || s == inInteger || s == inFraction) && c|' ' == 'e':
		return next(inE)
	case s == inE && (c == '+' || c == '-'):
		return next(inSign)
	case (s == inE || s == inSign || s == inExponent) && digit:
		return next(inExponent)
	case s == inInteger || s == inZero && !digit || s == inFraction || s == inExponent:
		return end(kindNumber, true)
	case (s == inNothing || s == inKeyword) && c >= 'a' && c <= 'z':
		return next(inKeyword)
	case s == inKeyword:
		return end(kindKeyword, true)
	}
	d.state = inRecovery
	return kindError, false
}

// add takes a token; done says that a value is complete, or that there will be none.
func (d *Decoder) add(kind byte) (v any, done bool, err error) {
	t := token{kind, uint32(d.start), uint32(len(d.text))}
	switch kind {
	case kindError:
		return nil, true, SyntaxError("JSON parse error, stray '" + d.string(t) + "'")
	case '{', '[':
		d.depth[kind>>5&1]++
	case '}', ']':
		d.depth[kind>>5&1]--
	}
	d.tokens, d.start = append(d.tokens, t), len(d.text)
	open, a, b := d.depth[0]+d.depth[1], d.depth[0], d.depth[1]
	switch {
	case len(d.text) > maxBytes:
		return nil, true, d.giveUp("JSON token size limit exceeded")
	case len(d.tokens) > maxTokens:
		return nil, true, d.giveUp("JSON token count limit exceeded")
	case open > maxNesting:
		return nil, true, d.giveUp("JSON nesting depth limit exceeded")
	case open > 0 && a >= 0 && b >= 0:
		return nil, false, nil
	}
	p := parser{d, d.tokens}
	v, err = p.value()
	return v, true, err
}

func (d *Decoder) giveUp(why string) error { d.state = inRecovery; return SyntaxError(why) }

func (d *Decoder) string(t token) string {
	return strings.ToValidUTF8(string(d.text[t.start:t.end]), "\uFFFD")
}

// parser makes a value of tokens. After an error it stops.
type parser struct {
	*Decoder
	rest []token
}

func (p *parser) peek() byte {
	if len(p.rest) == 0 {
		return kindEnd
	}
	return p.rest[0].kind
}

// take says whether the next token is of that kind, and then removes it.
func (p *parser) take(kind byte) bool {
	if p.peek() != kind {
		return false
	}
	p.rest = p.rest[1:]
	return true
}

func parseError(format string, args ...any) error {
	return SyntaxError("JSON parse error, " + fmt.Sprintf(format, args...))
}

func (p *parser) value() (any, error) {
	if p.peek() == kindEnd {
		return nil, parseError("premature EOI")
	}
	t := p.rest[0]
	p.rest = p.rest[1:]
	switch t.kind {
	case '{':
		return p.object()
	case '[':
		return p.array()
	case kindString:
		return unquote(p.text[t.start+1 : t.end-1])
	case kindNumber:
		return json.Number(p.string(t)), nil
	case kindKeyword:
		switch word := p.string(t); word {
		case "true", "false":
			return word == "true", nil
		case "null":
			return nil, nil
		default:
			return nil, parseError("invalid keyword '%s'", word)
		}
	}
	return nil, parseError("expecting value")
}

func (p *parser) object() (any, error) {
	object := map[string]any{}
	if p.take('}') {
		return object, nil
	}
	for {
		k, err := p.value()
		if err != nil {
			return nil, err
		}
		key, ok := k.(string)
		if !ok {
			return nil, parseError("key is not a string in object")
		}
		if !p.take(':') {
			return nil, parseError("missing : in object pair")
		}
		v, err := p.value()
		if err != nil {
			return nil, err
		}
		if _, twice := object[key]; twice {
			return nil, parseError("duplicate key")
		}
		object[key] = v
		if p.take('}') {
			return object, nil
		}
		if !p.take(',') {
			return nil, parseError("expected separator in dict")
		}
	}
}

func (p *parser) array() (any, error) {
	array := []any{}
	if p.take(']') {
		return array, nil
	}
	for {
		v, err := p.value()
		if err != nil {
			return nil, err
		}
		array = append(array, v)
		if p.take(']') {
			return array, nil
		}
		if !p.take(',') {
			return nil, parseError("expected separator in list")
		}
	}
}

// unquote decodes what stands between the quotes.
func unquote(s []byte) (any, error) {
	var b strings.Builder
	for len(s) > 0 {
		if s[0] != '\\' {
			r, n := utf8.DecodeRune(s)
			if r == utf8.RuneError && n == 1 {
				return nil, parseError("invalid UTF-8 sequence in string")
			}
			b.Write(s[:n])
			s = s[n:]
			continue
		}
		if i := strings.IndexByte(`"'\/bfnrt`, s[1]); i >= 0 {
			b.WriteByte("\"'\\/\b\f\n\r\t"[i])
			s = s[2:]
			continue
		}
		if s[1] != 'u' {
			return nil, parseError("invalid escape sequence in string")
		}
		r, n := hex4(s), min(6, len(s))
		if utf16.IsSurrogate(r) && n < len(s) {
			r, n = utf16.DecodeRune(r, hex4(s[n:])), min(12, len(s))
		}
		if r < 0 || r == utf8.RuneError && n == 12 || utf16.IsSurrogate(r) {
			return nil, parseError("%s is not a valid Unicode character", strings.ToValidUTF8(string(s[:n]), "\uFFFD"))
		}
		b.WriteRune(r)
		s = s[n:]
	}
	return b.String(), nil
}

// hex4 reads \uXXXX; it is -1 if that is not what s begins with.
func hex4(s []byte) rune {
	if len(s) < 6 || s[0] != '\\' || s[1] != 'u' {
		return -1
	}
	n, err := strconv.ParseUint(string(s[2:6]), 16, 16)
	if err != nil {
		return -1
	}
	return rune(n)
}
