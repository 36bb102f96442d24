package qmp

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Command is a row of the table of commands; New makes it.
type Command struct {
	Name string

	args, ret reflect.Type
	run       func(args reflect.Value) (any, error)
}

// None is the type of no arguments and of no result.
type None struct{}

// Rest, as the type of a field, holds the arguments that no other field is for. Without such
// a field they are errors.
type Rest map[string]any

// Enum is a string type whose values are these.
type Enum interface{ Values() []string }

// New makes a command of a function. Args is a struct; its fields are the arguments, with
// names by JSON tags. A pointer or "omitempty" is optional. There are string, Enum, bool,
// int64, any, slices and structs of them. Ret is what the reply's "return" shows. An error
// that is not an *Error has class GenericError.
func New[Args, Ret any](name string, run func(Args) (Ret, error)) Command {
	return Command{
		Name: name, args: reflect.TypeFor[Args](), ret: reflect.TypeFor[Ret](),
		run: func(v reflect.Value) (any, error) { return run(v.Interface().(Args)) },
	}
}

// Act makes a command that has no result.
func Act[Args any](name string, run func(Args) error) Command {
	return New(name, func(a Args) (None, error) { return None{}, run(a) })
}

// Query makes a command that has no arguments and does not fail.
func Query[Ret any](name string, get func() Ret) Command {
	return New(name, func(None) (Ret, error) { return get(), nil })
}

// Classes of errors: QEMU's qapi/error.json.
const (
	GenericError    = "GenericError"
	CommandNotFound = "CommandNotFound"
	DeviceNotFound  = "DeviceNotFound"
)

// Error is an error of a command as the client sees it.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return e.Desc }

// Errorf makes an error of the class GenericError.
func Errorf(format string, args ...any) *Error {
	return &Error{GenericError, fmt.Sprintf(format, args...)}
}

// NoDevice is QEMU's error for a name that nothing has.
func NoDevice(name string) *Error {
	return &Error{DeviceNotFound, fmt.Sprintf("Device '%s' not found", name)}
}

func noCommand(name string) *Error {
	return &Error{CommandNotFound, fmt.Sprintf("The command %s has not been found", name)}
}

// execute checks the arguments and runs the command, whose File comes from files.
func (c *Command) execute(args map[string]any, files *fileReader) (any, error) {
	v := reflect.New(c.args).Elem()
	if err := bind(v, args, ""); err != nil {
		return nil, err
	}
	for i := range v.NumField() {
		if v.Field(i).Type() == reflect.TypeFor[File]() {
			v.Field(i).Set(reflect.ValueOf(File{files.take()}))
		}
	}
	return c.run(v)
}

// field is a member of a struct as JSON shows it.
type field struct {
	index    int
	name     string
	typ      reflect.Type
	optional bool
}

func fields(t reflect.Type) (list []field) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" || name == "-" {
			continue
		}
		list = append(list, field{i, name, f.Type, f.Type.Kind() == reflect.Pointer || strings.Contains(options, "omitempty")})
	}
	return list
}

// bind sets v, which is zero, to the value in that the client calls name.
func bind(v reflect.Value, in any, name string) error {
	want := func(what string) error {
		return Errorf("Invalid parameter type for '%s', expected: %s", name, what)
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return bind(v.Elem(), in, name)
	case reflect.Interface:
		v.Set(reflect.ValueOf(&in).Elem())
	case reflect.String:
		s, ok := in.(string)
		if !ok {
			return want("string")
		}
		if e, ok := v.Interface().(Enum); ok && !slices.Contains(e.Values(), s) {
			return Errorf("Parameter '%s' does not accept value '%s'", lastName(name), s)
		}
		v.SetString(s)
	case reflect.Bool:
		b, ok := in.(bool)
		if !ok {
			return want("boolean")
		}
		v.SetBool(b)
	case reflect.Int64:
		n, _ := in.(json.Number)
		i, err := strconv.ParseInt(string(n), 10, 64)
		if err != nil {
			return want("integer")
		}
		v.SetInt(i)
	case reflect.Slice:
		list, ok := in.([]any)
		if !ok {
			return want("array")
		}
		v.Set(reflect.MakeSlice(v.Type(), len(list), len(list)))
		for i, e := range list {
			if err := bind(v.Index(i), e, fmt.Sprintf("%s[%d]", name, i)); err != nil {
				return err
			}
		}
	case reflect.Struct:
		object, ok := in.(map[string]any)
		if !ok {
			return want("object")
		}
		return bindStruct(v, object, name)
	default:
		panic("qmp: arguments of type " + v.Type().String())
	}
	return nil
}

// lastName is what QEMU calls a value of an enumeration: by the member alone, and an element of
// an array by nothing.
func lastName(path string) string {
	name := path[strings.LastIndexByte(path, '.')+1:]
	if strings.HasSuffix(name, "]") {
		return "null"
	}
	return name
}

func bindStruct(v reflect.Value, object map[string]any, prefix string) error {
	if prefix != "" {
		prefix += "."
	}
	rest := maps.Clone(object)
	for _, f := range fields(v.Type()) {
		in, given := object[f.name]
		switch {
		case given:
			if err := bind(v.Field(f.index), in, prefix+f.name); err != nil {
				return err
			}
			delete(rest, f.name)
		case !f.optional:
			return Errorf("Parameter '%s' is missing", prefix+f.name)
		}
	}
	for i := range v.NumField() {
		if v.Field(i).Type() == reflect.TypeFor[Rest]() {
			v.Field(i).Set(reflect.ValueOf(Rest(rest)))
			return nil
		}
	}
	for _, name := range slices.Sorted(maps.Keys(rest)) {
		return Errorf("Parameter '%s' is unexpected", prefix+name)
	}
	return nil
}
