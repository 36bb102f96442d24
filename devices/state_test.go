package devices

import (
	"bytes"
	"strings"
	"testing"
)

type oldState struct {
	A uint8  `cbor:"1,keyasint"`
	B []byte `cbor:"2,keyasint,omitempty"`
}

type added struct {
	C uint32 `cbor:"1,keyasint"`
}

var testInfo = StateInfo{ID: "pci/0000:00:02.0", Type: "thing", Version: 3, MinVersion: 2}

func encode(t *testing.T, v any, subs ...SubState) []byte {
	t.Helper()
	data, err := EncodeState(v, subs...)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func sub(t *testing.T, name string, needed bool, v any) SubState {
	t.Helper()
	s, err := NewSubState(name, needed, v)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestState(t *testing.T) {
	want := oldState{7, []byte("bytes")}
	data := encode(t, want, sub(t, "more", false, added{9}), sub(t, "unknown", false, added{1}))
	var got oldState
	var more, none *added
	if err := DecodeState(testInfo, 2, data, &got, map[string]any{"more": &more, "none": &none}); err != nil {
		t.Fatal(err)
	}
	if got.A != 7 || !bytes.Equal(got.B, want.B) || more == nil || more.C != 9 || none != nil {
		t.Errorf("got %+v, %v, %v", got, more, none)
	}
	if again := encode(t, want, sub(t, "more", false, added{9}), sub(t, "unknown", false, added{1})); !bytes.Equal(data, again) {
		t.Error("the encoding differs from time to time")
	}
}

func TestStateErrors(t *testing.T) {
	good := encode(t, oldState{A: 1})
	type wider struct {
		A uint64 `cbor:"1,keyasint"`
	}
	type longer struct {
		A uint8  `cbor:"1,keyasint"`
		X uint64 `cbor:"9,keyasint"`
	}
	twice := sub(t, "more", false, added{})
	for _, tt := range []struct {
		name    string
		version uint16
		data    []byte
		want    string
	}{
		{"too new", 4, good, "format 4; formats 2 to 3"},
		{"too old", 1, good, "format 1"},
		{"empty", 3, nil, "EOF"},
		{"truncated", 3, good[:len(good)-1], "EOF"},
		{"trailing", 3, append(bytes.Clone(good), 0), "extraneous"},
		{"value too wide", 3, encode(t, wider{300}), "A: cbor"},
		{"field unknown", 3, encode(t, longer{1, 2}), "unknown field"},
		{"needed part", 3, encode(t, oldState{}, sub(t, "new", true, added{})), "new: this part is not known"},
		{"part twice", 3, encode(t, oldState{}, twice, twice), "more: comes twice"},
		{"part malformed", 3, encode(t, oldState{}, SubState{"more", false, []byte{0x41, 0}}), "more: "},
		{"huge array", 3, []byte{0xa1, 1, 0x9b, 1, 0, 0, 0, 0, 0, 0, 0}, "exceed"},
		{"huge string", 3, []byte{0xa1, 1, 0x5b, 0, 0, 0, 1, 0, 0, 0, 0}, "EOF"},
		{"indefinite", 3, []byte{0xbf, 1, 0xa0, 0xff}, "indefinite"},
		{"deep", 3, append([]byte{0xa1, 1}, bytes.Repeat([]byte{0x81}, 1000)...), "nested level"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var v oldState
			var more *added
			err := DecodeState(testInfo, tt.version, tt.data, &v, map[string]any{"more": &more})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "load pci/0000:00:02.0 (thing): ") {
				t.Errorf("error %v, want the section and %q", err, tt.want)
			}
		})
	}
}

func FuzzState(f *testing.F) {
	data, err := EncodeState(oldState{1, []byte{2}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		var v oldState
		var more *added
		_ = DecodeState(testInfo, 3, data, &v, map[string]any{"more": &more})
	})
}
