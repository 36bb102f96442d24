package qmp

import (
	"fmt"
	"reflect"
	"slices"
)

// schemaInfo describes a command, an event or a type: SchemaInfo of QEMU's
// qapi/introspect.json.
type schemaInfo struct {
	Name    string          `json:"name"`
	Meta    string          `json:"meta-type"`
	Args    string          `json:"arg-type,omitempty"`
	Ret     string          `json:"ret-type,omitempty"`
	Builtin string          `json:"json-type,omitempty"`
	Element string          `json:"element-type,omitempty"`
	Members *[]schemaMember `json:"members,omitempty"`
	Values  []string        `json:"values,omitempty"`
}

type schemaMember struct {
	Name    string `json:"name"`
	Type    string `json:"type,omitempty"`
	Default *any   `json:"default,omitempty"` // null if the member is optional
}

// schema collects the types that commands and events use. As QEMU does it gives numbers to
// those that are not built in: their names are no part of the interface.
type schema struct {
	infos []schemaInfo
	types []schemaInfo
	names map[reflect.Type]string
}

func describe(commands []Command, events []EventType) []schemaInfo {
	s := schema{names: map[reflect.Type]string{}}
	for _, c := range commands {
		s.infos = append(s.infos, schemaInfo{Name: c.Name, Meta: "command", Args: s.name(c.args), Ret: s.name(c.ret)})
	}
	for _, e := range events {
		s.infos = append(s.infos, schemaInfo{Name: e.Name, Meta: "event", Args: s.name(reflect.TypeOf(e.Data))})
	}
	return slices.Concat(s.infos, s.types)
}

// name is the name of a type, which is described when it is first seen.
func (s *schema) name(t reflect.Type) string {
	if t == nil {
		t = reflect.TypeFor[None]()
	}
	if t.Kind() == reflect.Pointer {
		return s.name(t.Elem())
	}
	if name, known := s.names[t]; known {
		return name
	}
	info := schemaInfo{Meta: "builtin"}
	enum, isEnum := reflect.Zero(t).Interface().(Enum)
	switch k := t.Kind(); {
	case isEnum:
		info.Meta, info.Values = "enum", enum.Values()
		members := []schemaMember{}
		for _, v := range info.Values {
			members = append(members, schemaMember{Name: v})
		}
		info.Members = &members
	case k == reflect.String:
		info.Name, info.Builtin = "str", "string"
	case k == reflect.Bool:
		info.Name, info.Builtin = "bool", "boolean"
	case k == reflect.Interface:
		info.Name, info.Builtin = "any", "value"
	case k == reflect.Slice:
		info.Meta, info.Element = "array", s.name(t.Elem())
		info.Name = "[" + info.Element + "]"
	case k == reflect.Struct:
		info.Meta = "object"
	default:
		info.Name, info.Builtin = "int", "int"
	}
	if info.Name == "" {
		info.Name = fmt.Sprint(len(s.names))
	}
	s.names[t] = info.Name
	if k := t.Kind(); k == reflect.Struct {
		members := []schemaMember{}
		for _, f := range fields(t) {
			m := schemaMember{Name: f.name, Type: s.name(f.typ)}
			if f.optional {
				m.Default = new(any)
			}
			members = append(members, m)
		}
		info.Members = &members
	}
	if !slices.ContainsFunc(s.types, func(i schemaInfo) bool { return i.Name == info.Name }) { // int has many types
		s.types = append(s.types, info)
	}
	return info.Name
}
