package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
)

// stream decodes all of the text into lines: JSON of the values, text of the errors.
func stream(r io.Reader) (lines []string) {
	d := NewDecoder(r)
	for {
		v, err := d.Next()
		var syntax SyntaxError
		switch {
		case err == nil:
			text, _ := json.Marshal(v)
			lines = append(lines, string(text))
		case errors.As(err, &syntax):
			lines = append(lines, strings.TrimPrefix(string(syntax), "JSON parse error, "))
		default:
			return lines
		}
	}
}

// What QEMU 10.0.2 says to each of these.
var streams = []struct {
	in   string
	want []string
}{
	{`{"a":1}{"b":[]}`, []string{`{"a":1}`, `{"b":[]}`}},
	{"  {\n\t'a' : 'it\\'s' }\r\n", []string{`{"a":"it's"}`}},
	{`[true,false,null,-0,-1,0.5,1e+3,1.5E-2]`, []string{`[true,false,null,-0,-1,0.5,1e+3,1.5E-2]`}},
	{`["é","\u00e9\/\b\f\n\r\t","\ud83d\ude00","\u0000"]`, []string{`["é","é/\b\f\n\r\t","😀","\u0000"]`}},
	{`42 "x" null `, []string{`42`, `"x"`, `null`}},
	{`{"execute" "q"}`, []string{`missing : in object pair`}},
	{`{"execute":"q",}`, []string{`expecting value`}},
	{`{"execute":}`, []string{`expecting value`}},
	{`{1:2}`, []string{`key is not a string in object`}},
	{`{"a":1 "b":2}`, []string{`expected separator in dict`}},
	{`{"a":1,"a":1}`, []string{`duplicate key`}},
	{`{"a":tru}`, []string{`invalid keyword 'tru'`}},
	{`[tru e]`, []string{`invalid keyword 'tru'`}},
	{`[nullx]`, []string{`invalid keyword 'nullx'`}},
	{`}`, []string{`expecting value`}},
	{`{"a":]}`, []string{`expecting value`, `expecting value`}},
	{`[1 2]`, []string{`expected separator in list`}},
	{`[1,]`, []string{`expecting value`}},
	{`{"\q":1}`, []string{`invalid escape sequence in string`}},
	{`["\ud800"]`, []string{`\ud800 is not a valid Unicode character`}},
	{`["\u12"]`, []string{`\u12 is not a valid Unicode character`}},
	{"[\"\xc3\"]", []string{`invalid UTF-8 sequence in string`}},
	{"{\"a\":\"\xff\"}\n{}", []string{"stray '\"\uFFFD'", `expecting value`, `{}`}},
	{"{\"a\":\"b\n\"}\n{}", []string{"stray '\"b\n'", `expecting value`, `{}`}},
	{"\xff{}", []string{"stray '\uFFFD'", `{}`}},
	{"[[[{\"a\":\xff{}", []string{"stray '\uFFFD'", `{}`}},
	{`[-1,-,1]`, []string{`stray '-,'`, `expecting value`}},
	{`[01]`, []string{`stray '01'`, `expecting value`}},
	{`[1.5e3,1.,2]`, []string{`stray '1.,'`, `expecting value`}},
	{`[+1]`, []string{`stray '+'`, `expecting value`}},
	{`@@@ x, 5 `, []string{`stray '@'`, `expecting value`, `5`}},
	{`{"a":@"b"} {}`, []string{`stray '@'`, `expecting value`, `{}`}},
}

func TestDecoder(t *testing.T) {
	for _, c := range streams {
		for how, r := range map[string]io.Reader{
			"at once": strings.NewReader(c.in), "by bytes": iotest.OneByteReader(strings.NewReader(c.in)),
		} {
			if got := stream(r); !reflect.DeepEqual(got, c.want) {
				t.Errorf("%q %s: %q, want %q", c.in, how, got, c.want)
			}
		}
	}
}

// A value is there as soon as its last byte is.
func TestDecoderDoesNotWait(t *testing.T) {
	r, w := io.Pipe()
	go w.Write([]byte(`{"a":1}`))
	if v, err := NewDecoder(r).Next(); err != nil || !reflect.DeepEqual(v, map[string]any{"a": json.Number("1")}) {
		t.Errorf("%v, %v", v, err)
	}
}

func TestDecoderLimits(t *testing.T) {
	for in, want := range map[string]string{
		strings.Repeat("[", maxNesting+1):       "JSON nesting depth limit exceeded",
		"[" + strings.Repeat("1,", maxTokens/2): "JSON token count limit exceeded",
		`"` + strings.Repeat("x", maxBytes+1):   "JSON token size limit exceeded",
	} {
		got := stream(strings.NewReader(in + "\n\"\n{}"))
		if len(got) < 2 || got[0] != want || got[len(got)-1] != "{}" {
			t.Errorf("%.10s...: %.100q, want %q and then {}", in, got, want)
		}
	}
	big := `{"a":"` + strings.Repeat("x", maxBytes-10) + `"}`
	if got := stream(strings.NewReader(big)); len(got) != 1 || got[0] != big {
		t.Error("a value below the limit is not read")
	}
}

// FuzzDecoder compares with encoding/json: what that takes, this takes too, and alike.
func FuzzDecoder(f *testing.F) {
	for _, c := range streams {
		f.Add([]byte(c.in))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		d := NewDecoder(iotest.OneByteReader(bytes.NewReader(in)))
		v, err := d.Next()
		var want any
		ref := json.NewDecoder(bytes.NewReader(in))
		ref.UseNumber()
		if ref.Decode(&want) == nil && err == nil && strings.HasPrefix(strings.TrimSpace(string(in)), "{") {
			if !reflect.DeepEqual(v, want) {
				t.Errorf("%q: %#v, want %#v", in, v, want)
			}
		}
		for err == nil || errors.As(err, new(SyntaxError)) {
			if err == nil {
				if _, e := json.Marshal(v); e != nil {
					t.Errorf("%q: %v cannot be marshalled: %v", in, v, e)
				}
			}
			v, err = d.Next()
		}
		if err != io.EOF {
			t.Errorf("%q: ends with %v", in, err)
		}
	})
}
