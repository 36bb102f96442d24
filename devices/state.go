package devices

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/fxamacker/cbor/v2"
)

// StateInfo names one section of a machine's saved state.
type StateInfo struct {
	// ID is the address of what is saved, never an index: "ioapic", "serial/com1", "vcpu/0",
	// "pci/0000:00:02.0". What lies behind a root port is named by the way there, as the
	// guest may give the bus another number: "pci/0000:00:03.0/00.0".
	ID string
	// Type is the kind of thing, such as "virtio-net-pci". A section is loaded only into
	// the same kind.
	Type string
	// Version is the format that SaveState writes; formats from MinVersion on are loaded.
	Version, MinVersion uint16
}

func (i StateInfo) String() string { return i.ID + " (" + i.Type + ")" }

// Stater is what has state to save: what is modelled, not how it is kept here.
//
// SaveState is called while no vCPU runs and, for a Quiescer, between Quiesce and Unquiesce.
// It changes nothing. LoadState is called on one that was made with the same configuration,
// is as after its reset, and is quiesced if it is a Quiescer; it goes on with Unquiesce.
// Data is not to be trusted: an error names the section and the field, and what was loaded
// until then is of no use. A machine loads its vCPUs first, then the chipset, then the PCI
// tree from the root: interrupts that a section raises must find the LAPICs loaded.
type Stater interface {
	StateInfo() StateInfo
	SaveState() ([]byte, error)
	LoadState(version uint16, data []byte) error
}

// Quiescer is what does something by itself: moves data, raises interrupts.
//
// When Quiesce returns, the device touches neither guest memory nor a line or a vector, and
// what it had begun is finished or can begin anew. What the guest wrote to a doorbell
// meanwhile waits. Unquiesce goes on from there, on the same machine after a migration that
// failed, or on another one after LoadState. An error of Quiesce leaves the device running.
type Quiescer interface {
	Quiesce() error
	Unquiesce() error
}

// StateError says what is wrong with a section.
type StateError struct {
	Info  StateInfo
	Field string // "" for all of it
	Err   error
}

func (e *StateError) Error() string {
	if e.Field == "" {
		return fmt.Sprintf("load %s: %v", e.Info, e.Err)
	}
	return fmt.Sprintf("load %s: %s: %v", e.Info, e.Field, e.Err)
}

func (e *StateError) Unwrap() error { return e.Err }

// BadField is the error of a Stater for a value that cannot be.
func (i StateInfo) BadField(field, format string, args ...any) error {
	return &StateError{i, field, fmt.Errorf(format, args...)}
}

// SubState is a part of a section that has been added to its format later: written only
// when there is something to say, so that an older version loads what it can do justice to.
type SubState struct {
	Name string `cbor:"1,keyasint"`
	// Needed says that who does not know the part must not load the section.
	Needed bool            `cbor:"2,keyasint,omitempty"`
	Data   cbor.RawMessage `cbor:"3,keyasint"`
}

// NewSubState returns v, as EncodeState takes it, as an optional part.
func NewSubState(name string, needed bool, v any) (SubState, error) {
	data, err := stateEncoding.Marshal(v)
	return SubState{name, needed, data}, err
}

// section is the form of every section: CBOR (RFC 8949) with small integers as keys.
type section struct {
	Body cbor.RawMessage `cbor:"1,keyasint"`
	Subs []SubState      `cbor:"2,keyasint,omitempty"`
}

// Limits of a section. Byte strings are as long as the data says, and no longer than it.
const (
	stateMaxLevels   = 16
	stateMaxElements = 4096
	stateMaxPairs    = 256
)

var (
	stateEncoding = must(cbor.CoreDetEncOptions().EncMode())
	stateDecoding = must(cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		MaxNestedLevels:   stateMaxLevels,
		MaxArrayElements:  stateMaxElements,
		MaxMapPairs:       stateMaxPairs,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err) // the options are constant
	}
	return v
}

// EncodeState is the section of v, a struct whose fields have the tag `cbor:"N,keyasint"`, and of
// parts that were added later.
func EncodeState(v any, subs ...SubState) ([]byte, error) {
	body, err := stateEncoding.Marshal(v)
	if err != nil {
		return nil, err
	}
	return stateEncoding.Marshal(section{body, subs})
}

// DecodeState reads a section into the struct that v points to. Subs are the optional parts
// that are known, by name, as pointers to pointers to structs: one that is not in the
// data stays nil. Any error is a *StateError.
func DecodeState(info StateInfo, version uint16, data []byte, v any, subs map[string]any) error {
	if version < info.MinVersion || version > info.Version {
		return info.BadField("", "format %d; formats %d to %d are known here", version, info.MinVersion, info.Version)
	}
	var s section
	if err := stateDecoding.Unmarshal(data, &s); err != nil {
		return decodeError(info, "", s, err)
	}
	if err := stateDecoding.Unmarshal(s.Body, v); err != nil {
		return decodeError(info, "", v, err)
	}
	seen := make(map[string]bool)
	for _, sub := range s.Subs {
		into, known := subs[sub.Name]
		switch {
		case seen[sub.Name]:
			return info.BadField(sub.Name, "comes twice")
		case known:
			if err := stateDecoding.Unmarshal(sub.Data, into); err != nil {
				return decodeError(info, sub.Name, into, err)
			}
		case sub.Needed:
			return info.BadField(sub.Name, "this part is not known here and must not be left out")
		}
		seen[sub.Name] = true
	}
	return nil
}

// DecodeArray is UnmarshalCBOR for an array, which takes as many elements as it has: the decoder
// would leave out what is too much, and zero what is missing.
func DecodeArray[T any](data []byte, array []T) error {
	var list []T
	if err := stateDecoding.Unmarshal(data, &list); err != nil {
		return err
	}
	if copy(array, list); len(list) != len(array) {
		return fmt.Errorf("%d elements, not %d", len(list), len(array))
	}
	return nil
}

// decodeError names the field that CBOR's decoder stumbled over.
func decodeError(info StateInfo, field string, v any, err error) error {
	var typ *cbor.UnmarshalTypeError
	if errors.As(err, &typ) && typ.StructFieldName != "" {
		if field != "" {
			field += ", "
		}
		field += fieldName(reflect.TypeOf(v), typ.StructFieldName)
	}
	return &StateError{info, field, err}
}

// fieldName is the name of what the decoder calls package.type.key, somewhere in t.
func fieldName(t reflect.Type, key string) string {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Array:
		return fieldName(t.Elem(), key)
	case reflect.Struct:
		for _, f := range reflect.VisibleFields(t) {
			if n, _, _ := strings.Cut(f.Tag.Get("cbor"), ","); t.String()+"."+n == key {
				return f.Name
			}
			if name := fieldName(f.Type, key); name != key {
				return name
			}
		}
	}
	return key
}
