package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestSplitPairs(t *testing.T) {
	for _, test := range []struct {
		text string
		want []pair
	}{
		{"", []pair{{key: "d", value: ""}}},
		{"x", []pair{{key: "d", value: "x"}}},
		{"x,a=b,,c,,,flag", []pair{{key: "d", value: "x"}, {key: "a", value: "b,c,"}, {key: "flag", value: "on", bare: true}}},
		{"a=b=c,d=", []pair{{key: "a", value: "b=c"}, {key: "d", value: ""}}},
		{"x,", []pair{{key: "d", value: "x"}, {key: "", value: "on", bare: true}}},
		{` {"b":{"c":1,"d":{"e":null}},"a":true}`, []pair{{key: "a", value: true}, {key: "b.c", value: json.Number("1")}, {key: "b.d.e"}}},
	} {
		got, err := splitPairs(test.text, "d")
		if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(pair{})); err != nil || diff != "" {
			t.Errorf("%q: %v (-want +got)\n%s", test.text, err, diff)
		}
	}
	for _, text := range []string{"{", `{"a":1}x`, `{"a":1}{}`, `{"a"}`, `{a=b}`} {
		if got, err := splitPairs(text, "d"); err == nil {
			t.Errorf("%q: no error, %v", text, got)
		}
	}
}

func TestParseValues(t *testing.T) {
	number := json.Number("12")
	for _, test := range []struct {
		p    prop
		in   any
		want any // nil: an error
	}{
		{prop{kind: kindBool}, "on", true}, {prop{kind: kindBool}, "yes", true}, {prop{kind: kindBool}, "true", true},
		{prop{kind: kindBool}, "off", false}, {prop{kind: kindBool}, "no", false}, {prop{kind: kindBool}, "false", false},
		{prop{kind: kindBool}, true, true}, {prop{kind: kindBool}, "ON", nil}, {prop{kind: kindBool}, number, nil},
		{prop{kind: kindUint}, "0x1F", uint64(31)}, {prop{kind: kindUint}, number, uint64(12)}, {prop{kind: kindUint}, "010", uint64(10)},
		{prop{kind: kindUint}, "-1", nil}, {prop{kind: kindUint}, "18446744073709551616", nil}, {prop{kind: kindUint}, "", nil},
		{prop{kind: kindUint}, "1_0", nil}, {prop{kind: kindUint}, json.Number("1.5"), nil}, {prop{kind: kindUint}, true, nil},
		{prop{kind: kindUint, min: 1, max: 4}, "4", uint64(4)}, {prop{kind: kindUint, min: 1, max: 4}, "0", nil}, {prop{kind: kindUint, min: 1, max: 4}, "5", nil},
		{prop{kind: kindPow2}, "256", uint64(256)}, {prop{kind: kindPow2}, "255", nil},
		{prop{kind: kindSize}, "12", uint64(12)}, {prop{kind: kindSize}, "1k", uint64(1024)}, {prop{kind: kindSize}, "7B", uint64(7)},
		{prop{kind: kindSize}, "1.5G", uint64(3 << 29)}, {prop{kind: kindSize}, "2T", uint64(2 << 40)}, {prop{kind: kindMiB}, "3", uint64(3 << 20)},
		{prop{kind: kindMiB}, "3K", uint64(3 << 10)}, {prop{kind: kindSize}, "", nil}, {prop{kind: kindSize}, "G", nil},
		{prop{kind: kindSize}, "-1G", nil}, {prop{kind: kindSize}, "1e3", nil}, {prop{kind: kindSize}, "inf", nil}, {prop{kind: kindSize}, "nan", nil},
		{prop{kind: kindSize}, "0x10", nil}, {prop{kind: kindSize}, "99999999999999999999G", nil}, {prop{kind: kindSize}, "1GB", nil}, {prop{kind: kindSize}, ".", nil},
		{prop{kind: kindMAC}, "52:54:00:6F:55:CC", "52:54:00:6f:55:cc"}, {prop{kind: kindMAC}, "52-54-00-6f-55-cc", "52:54:00:6f:55:cc"},
		{prop{kind: kindMAC}, "01:00:5e:00:00:01", nil}, {prop{kind: kindMAC}, "ff:ff:ff:ff:ff:ff", nil}, {prop{kind: kindMAC}, "00:00:00:00:00:00", nil},
		{prop{kind: kindMAC}, "52:54:00:12:34", nil}, {prop{kind: kindMAC}, "52:54:00:12:34:56:78:9a", nil}, {prop{kind: kindMAC}, "zz", nil},
		{prop{kind: kindAddr}, "0xa", "0a.0"}, {prop{kind: kindAddr}, "1f.7", "1f.7"}, {prop{kind: kindAddr}, "10", "10.0"}, {prop{kind: kindAddr}, number, "01.4"},
		{prop{kind: kindAddr}, "20", nil}, {prop{kind: kindAddr}, "1.8", nil}, {prop{kind: kindAddr}, "1.", nil}, {prop{kind: kindAddr}, "", nil},
		{prop{kind: kindAddr}, json.Number("256"), nil}, {prop{kind: kindAddr}, json.Number("-1"), nil},
		{prop{kind: kindEnum, enum: []string{"a", "b"}}, "b", "b"}, {prop{kind: kindEnum, enum: []string{"a", "b"}}, "c", nil},
		{prop{kind: kindEnum, enum: []string{"off"}}, false, "off"}, {prop{kind: kindString}, "", ""}, {prop{}, nil, nil}, {prop{}, []any{}, nil},
	} {
		got, err := test.p.parse(test.in)
		if (err != nil) != (test.want == nil) || err == nil && got != test.want {
			t.Errorf("%s %v: %v, %v; want %v", kindNames[test.p.kind], test.in, got, err, test.want)
		}
	}
}

func TestSuggest(t *testing.T) {
	known := []string{"virtio-net-pci", "virtio-net", "virtio-blk-pci", "pcie-root-port"}
	for word, want := range map[string]string{
		"virtio-nte":             "virtio-net",
		"virtio-net-pc":          "virtio-net-pci",
		"Virtio-Blk-Pci":         "virtio-blk-pci",
		"pcie-root":              "pcie-root-port",
		"pcie-rootport":          "pcie-root-port",
		"x":                      "there is pcie-root-port, virtio-blk-pci",
		"":                       "there is pcie-root-port",
		strings.Repeat("x", 1e6): "there is pcie-root-port",
	} {
		if got := suggest(word, known); !strings.Contains(got, want) {
			t.Errorf("%.20q: %q", word, got)
		}
	}
	if got := suggest("x", nil); got != "\nthere is none" {
		t.Errorf("of none: %q", got)
	}
	for _, d := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "", 3}, {"", "abc", 3}, {"kitten", "sitting", 3}, {"abc", "abc", 0}, {"ab", "ba", 2}} {
		if got := distance(d.a, d.b); got != d.want {
			t.Errorf("%s to %s: %d, want %d", d.a, d.b, got, d.want)
		}
	}
}

func TestErrors(t *testing.T) {
	one, two, three := errors.New("1"), errors.New("2"), errors.New("3")
	err := errors.Join(errors.Join(one, nil), inObject("x", errors.Join(two, three)))
	if got := fmt.Sprint(Errors(err)); got != "[1 x: 2 x: 3]" {
		t.Error(got)
	}
	if Errors(nil) != nil || inObject("x", nil) != nil {
		t.Error("error out of nothing")
	}
	if !errors.Is(err, three) {
		t.Error("cause is lost")
	}
}

func FuzzSize(f *testing.F) {
	for _, s := range []string{"1.5G", "0", "9007199254740992", "1T", ".5k", "0.0000001"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseSize(s, 1<<20)
		if err != nil {
			return
		}
		if back, err := parseSize(fmt.Sprint(n)+"B", 1); err != nil || back != n {
			t.Errorf("%q is %d bytes, but reads back as %d, %v", s, n, back, err)
		}
	})
}

func FuzzDevice(f *testing.F) {
	f.Add("virtio-net-pci,netdev=n,mac=52:54:00:00:00:01,mq=on,addr=1.2")
	f.Add(`{"driver":"virtio-blk-pci","drive":"d","serial":"a,b","num-queues":4,"addr":16}`)
	f.Add("virtconsole,chardev=c,nr=0")
	f.Add("driver=pcie-root-port,id=a,,b,chassis=0x10")
	kinds := driverSchemas()
	f.Fuzz(func(t *testing.T, text string) {
		s, vals, _, err := parseObject(text, "driver", kinds)
		if err != nil || !utf8.ValidString(text) {
			return
		}
		d := newDevice(s.name, vals)
		printed, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		var back Device
		if err := json.Unmarshal(printed, &back); err != nil {
			t.Fatalf("%q prints as %s: %v", text, printed, err)
		}
		if again, _ := json.Marshal(back); string(again) != string(printed) {
			t.Errorf("%q prints as %s, and that as %s", text, printed, again)
		}
	})
}
