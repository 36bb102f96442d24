package vmm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
)

// kind is the type of a property's value.
type kind int

const (
	kindString kind = iota
	kindBool        // on, off and the spellings that QEMU takes for them
	kindUint        // decimal, 0x hexadecimal
	kindPow2        // a power of two
	kindSize        // bytes, or with a suffix B, K, M, G, T
	kindMiB         // a size whose bare number counts MiB
	kindMAC         // unicast Ethernet address
	kindAddr        // PCI slot[.function], hexadecimal: "a", "0xa.1"
	kindEnum
)

var kindNames = [...]string{"string", "on|off", "number", "power of two", "size", "size", "MAC", "slot[.function]", ""}

// prop is one row of a table of properties. The same row parses, checks, suggests and
// prints the help.
type prop struct {
	name     string
	kind     kind
	min, max uint64   // of kindUint and kindPow2; max 0: no limit
	enum     []string // of kindEnum
	def      any      // bool, uint64 or string; nil if there is none
	required bool
	feature  uint64 // the virtio feature that "off" takes away, as a mask
	ignored  string // why the value changes nothing, if it does not: told to the user
	help     string
}

// schema is what one kind of object takes.
type schema struct {
	name    string
	aliases []string
	help    string
	props   []prop
	device  bool
}

func (s *schema) prop(name string) *prop {
	return find(s.props, func(p *prop) bool { return p.name == name })
}

// parseObject reads an argument whose key names the kind of the object; if key is "" there
// is one kind, and the first word is its first property. With an error, the values are
// those that were right.
func parseObject(text, key string, kinds []schema) (s *schema, vals Values, notes []string, err error) {
	implied := key
	if key == "" {
		implied = kinds[0].props[0].name
	}
	pairs, err := splitPairs(text, implied)
	if err != nil {
		return nil, nil, nil, err
	}
	if key == "" {
		vals, notes, err = kinds[0].check(pairs)
		return &kinds[0], vals, notes, errors.Join(err, kinds[0].missing(vals))
	}
	i := slices.IndexFunc(pairs, func(p pair) bool { return p.key == key })
	if i < 0 {
		return nil, nil, nil, fmt.Errorf("%s= is missing\n`help` as the argument lists what there is", key)
	}
	name := fmt.Sprint(pairs[i].value)
	if s, err = findSchema(kinds, key, name); err != nil {
		return nil, nil, nil, err
	}
	vals, notes, err = s.check(slices.Delete(pairs, i, i+1))
	if !s.device { // of devices, Validate asks
		err = errors.Join(err, s.missing(vals))
	}
	if id, ok := vals["id"].(string); ok {
		name += " " + id
	}
	return s, vals, notes, inObject(name, err)
}

// parseArgs is parseObject for the arguments of a command, whose kind is that of key.
func parseArgs(key, kind string, args map[string]any, kinds []schema) (*schema, Values, error) {
	object := map[string]any{key: kind}
	maps.Copy(object, args)
	text, err := json.Marshal(object)
	if err != nil {
		return nil, nil, err
	}
	s, vals, _, err := parseObject(string(text), key, kinds)
	return s, vals, err
}

func (s *schema) names() (names []string) {
	for _, p := range s.props {
		names = append(names, p.name)
	}
	return names
}

// pair is one key of an option's argument with its value as it was written: a string, or
// from JSON also a bool or a json.Number. bare says that it was a word without "=".
type pair struct {
	key   string
	value any
	bare  bool
}

// splitPairs reads "first,key=value,flag" (a comma in a value is doubled) or a JSON object.
// A first word without "=" is the value of the key implied.
func splitPairs(text, implied string) ([]pair, error) {
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		return jsonPairs(text)
	}
	var pairs []pair
	for i, word := range splitCommas(text) {
		key, value, ok := strings.Cut(word, "=")
		switch {
		case ok:
			pairs = append(pairs, pair{key: key, value: value})
		case i == 0 && implied != "":
			pairs = append(pairs, pair{key: implied, value: word})
		default:
			pairs = append(pairs, pair{key: word, value: "on", bare: true})
		}
	}
	return pairs, nil
}

// splitCommas splits at single commas and makes double ones single.
func splitCommas(text string) (words []string) {
	var word []byte
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] != ',':
			word = append(word, text[i])
		case i+1 < len(text) && text[i+1] == ',':
			word = append(word, ',')
			i++
		default:
			words, word = append(words, string(word)), nil
		}
	}
	return append(words, string(word))
}

// jsonPairs flattens {"a":{"b":1}} to a.b=1, in the order of the keys.
func jsonPairs(text string) ([]pair, error) {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	var object map[string]any
	if err := d.Decode(&object); err != nil {
		return nil, fmt.Errorf("JSON: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("JSON: text after the object")
	}
	var pairs []pair
	var flatten func(prefix string, object map[string]any)
	flatten = func(prefix string, object map[string]any) {
		for key, v := range object {
			if inner, ok := v.(map[string]any); ok {
				flatten(prefix+key+".", inner)
			} else {
				pairs = append(pairs, pair{key: prefix + key, value: v})
			}
		}
	}
	flatten("", object)
	slices.SortFunc(pairs, func(a, b pair) int { return strings.Compare(a.key, b.key) })
	return pairs, nil
}

// check turns the pairs into values; the error holds all that is wrong, and the values
// all that is right. Notes are for the user.
func (s *schema) check(pairs []pair) (vals Values, notes []string, err error) {
	vals = Values{}
	given := map[string]bool{}
	var errs []error
	for _, kv := range pairs {
		p := s.prop(kv.key)
		if off, ok := strings.CutPrefix(kv.key, "no"); p == nil && ok && kv.bare {
			if q := s.prop(off); q != nil && q.kind == kindBool { // as in "server,nowait"
				p, kv.value = q, "off"
			}
		}
		if p == nil {
			errs = append(errs, unknown("key", kv.key, s.names()))
			continue
		}
		v, err := p.parse(kv.value)
		switch {
		case given[p.name]:
			errs = append(errs, fmt.Errorf("%s: given twice", p.name))
		case kv.bare && p.kind != kindBool:
			errs = append(errs, fmt.Errorf("%s: a value is missing: %[1]s=%s", p.name, p.kindName()))
		case err != nil:
			errs = append(errs, fmt.Errorf("%s=%v: %w", p.name, kv.value, err))
		case p.ignored != "":
			notes = append(notes, fmt.Sprintf("%s=%v changes nothing: %s", p.name, kv.value, p.ignored))
		default:
			vals[p.name] = v
		}
		given[p.name] = true
	}
	return vals, notes, errors.Join(errs...)
}

// missing says which of the values that there have to be are not there.
func (s *schema) missing(v Values) error {
	var errs []error
	for _, p := range s.props {
		if _, ok := v[p.name]; p.required && !ok {
			errs = append(errs, fmt.Errorf("%s= is missing\n%s", p.name, p.help))
		}
	}
	return errors.Join(errs...)
}

// parse checks one value. It takes its own results too, so that a printed configuration
// can be read back.
func (p *prop) parse(v any) (any, error) {
	v = spell(v)
	if n, ok := v.(json.Number); ok {
		if v = n.String(); p.kind == kindAddr { // QEMU: a number is slot<<3 | function
			devfn, err := strconv.ParseUint(n.String(), 10, 8)
			return fmt.Sprintf("%02x.%x", devfn>>3, devfn&7), err
		}
	}
	s, ok := v.(string)
	if !ok {
		return nil, fmt.Errorf("want %s", p.kindName())
	}
	switch p.kind {
	case kindBool:
		switch s {
		case "on", "yes", "true", "y":
			return true, nil
		case "off", "no", "false", "n":
			return false, nil
		}
		return nil, errors.New("want on or off")
	case kindUint, kindPow2:
		n, err := parseUint(s)
		if err != nil || n < p.min || p.max != 0 && n > p.max || p.kind == kindPow2 && n&(n-1) != 0 {
			return nil, fmt.Errorf("want %s", p.kindName())
		}
		return n, nil
	case kindSize:
		return parseSize(s, 1)
	case kindMiB:
		return parseSize(s, 1<<20)
	case kindMAC:
		return parseMAC(s)
	case kindAddr:
		return parseAddr(s)
	case kindEnum:
		if !slices.Contains(p.enum, s) {
			if len(p.enum) == 1 {
				return nil, fmt.Errorf("baton has %s=%s only\n%s", p.name, p.enum[0], p.help)
			}
			return nil, fmt.Errorf("want %s", p.kindName())
		}
	}
	return s, nil
}

// spell writes a bool as the user would.
func spell(v any) any {
	if on, ok := v.(bool); ok {
		return map[bool]string{true: "on", false: "off"}[on]
	}
	return v
}

// take removes a string.
func (v Values) take(name string) string {
	s, _ := v[name].(string)
	delete(v, name)
	return s
}

// into sets the fields of a struct whose JSON names are the keys.
func (v Values) into(target any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, target)
}

// kindName says what may stand as the value.
func (p *prop) kindName() string {
	switch {
	case p.kind == kindEnum:
		return strings.Join(p.enum, "|")
	case p.max != 0 && p.kind == kindUint:
		return fmt.Sprintf("%d..%d", p.min, p.max)
	case p.max != 0:
		return fmt.Sprintf("power of two, %d..%d", p.min, p.max)
	}
	return kindNames[p.kind]
}

func parseUint(s string) (uint64, error) {
	if digits, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		return strconv.ParseUint(digits, 16, 64)
	}
	return strconv.ParseUint(s, 10, 64)
}

// parseSize reads a number with an optional fraction and suffix; one without a suffix
// counts units of unit bytes.
func parseSize(s string, unit uint64) (uint64, error) {
	digits := s
	if n := len(s); n > 0 {
		if i := strings.IndexByte("BKMGT", s[n-1]&^0x20); i >= 0 {
			digits, unit = s[:n-1], 1<<(10*i)
		}
	}
	f, err := strconv.ParseFloat(digits, 64)
	f *= float64(unit)
	if err != nil || strings.Trim(digits, "0123456789.") != "" || f >= 1<<53 { // all that a float64 counts exactly
		return 0, errors.New("want a size, such as 512M or 1.5G (suffixes B, K, M, G, T)")
	}
	return uint64(f), nil
}

// parseMAC checks an address as IEEE 802 has it: bit 0 of the first byte is the group bit.
func parseMAC(s string) (string, error) {
	hw, err := net.ParseMAC(s)
	switch {
	case err != nil || len(hw) != 6:
		return "", errors.New("not a MAC address\nwrite six bytes, such as 52:54:00:12:34:56")
	case hw[0]&1 != 0:
		return "", fmt.Errorf("a multicast address (bit 0 of the first byte is set)\na NIC needs a unicast one, such as %02x%s", hw[0]&^1|2, hw.String()[2:])
	case bytes.Equal(hw, make([]byte, 6)):
		return "", errors.New("all zero\nleave mac= away to have one made up")
	}
	return hw.String(), nil
}

// parseAddr reads QEMU's devfn, always hexadecimal: slot 0 to 1f, function 0 to 7.
func parseAddr(s string) (string, error) {
	slot, fn, dotted := strings.Cut(s, ".")
	if !dotted {
		fn = "0"
	}
	n, err1 := strconv.ParseUint(strings.TrimPrefix(slot, "0x"), 16, 64)
	m, err2 := strconv.ParseUint(fn, 16, 64)
	if err1 != nil || err2 != nil || n > 0x1f || m > 7 {
		return "", errors.New("want slot[.function] in hexadecimal: 0 to 1f and 0 to 7")
	}
	return fmt.Sprintf("%02x.%x", n, m), nil
}
