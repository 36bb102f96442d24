package kvm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// Stats reads the VM's counters by name: api.rst, KVM_GET_STATS_FD. Histograms are left out.
func (vm *VM) Stats() (map[string]uint64, error) { return stats(vm.fd) }

// Stats reads the vCPU's counters by name, such as exits, io_exits and mmio_exits.
func (v *VCPU) Stats() (map[string]uint64, error) { return stats(v.fd) }

func stats(fd int) (map[string]uint64, error) {
	statsFD, err := ioctlValue(fd, kvmGetStatsFD, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(statsFD), "kvm stats")
	defer f.Close()
	return readStats(f)
}

// readStats decodes the file: header, then at the offsets that it names descriptors (each with a
// name of fixed length) and data.
func readStats(r io.ReaderAt) (map[string]uint64, error) {
	var h statsHeader
	if err := readStruct(r, 0, &h); err != nil {
		return nil, err
	}
	if h.NameSize > 1<<10 || h.Descs > 1<<16 {
		return nil, fmt.Errorf("kvm stats: %d names of %d bytes", h.Descs, h.NameSize)
	}
	m := make(map[string]uint64, h.Descs)
	name := make([]byte, h.NameSize)
	for i := range int64(h.Descs) {
		var d statsDesc
		size := int64(binary.Size(d))
		at := int64(h.DescOffset) + i*(size+int64(h.NameSize))
		if err := readStruct(r, at, &d); err != nil {
			return nil, err
		}
		if d.Size != 1 {
			continue
		}
		if err := readStruct(r, at+size, name); err != nil {
			return nil, err
		}
		var value uint64
		if err := readStruct(r, int64(h.DataOffset)+int64(d.Offset), &value); err != nil {
			return nil, err
		}
		s, _, _ := bytes.Cut(name, []byte{0})
		m[string(s)] = value
	}
	return m, nil
}

func readStruct(r io.ReaderAt, off int64, data any) error {
	err := binary.Read(io.NewSectionReader(r, off, int64(binary.Size(data))), binary.LittleEndian, data)
	if err != nil {
		return fmt.Errorf("kvm stats at %d: %w", off, err)
	}
	return nil
}
