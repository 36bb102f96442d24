package kvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSystem(t *testing.T) {
	s := openKVM(t)
	if s.Kind() == Unknown {
		t.Error("KVM of unknown kind")
	}
	must(t, s.Check())
	for _, f := range s.Features() {
		if f.Name != f.Cap.String() || f.MinKernel == "" || f.Hint == "" {
			t.Errorf("feature %+v is incomplete", f)
		}
		if f.Supported && f.Value <= 0 {
			t.Errorf("feature %+v is supported without a value", f)
		}
	}
	if s.CheckExtension(1<<20) != 0 {
		t.Error("a capability that nobody has is supported")
	}
	if got := Cap(1 << 20).String(); got != "KVM_CAP 1048576" {
		t.Errorf("String of an unknown capability = %q", got)
	}
}

// TestCheckNamesAll wants one error per missing feature; a VM handle of no VM lacks all.
func TestCheckNamesAll(t *testing.T) {
	err := (&System{fd: -1}).Check()
	for _, f := range features {
		if named := strings.Contains(err.Error(), f.Name+" "); named != f.Needed {
			t.Errorf("%s named: %v, needed: %v", f.Name, named, f.Needed)
		}
	}
	if !strings.Contains(err.Error(), "\nLinux 4.4 or later has it") {
		t.Errorf("no hint in %q", err)
	}
}

func TestAddresses(t *testing.T) {
	s := openKVM(t)
	vm, err := s.CreateVM()
	must(t, err)
	defer vm.Close()
	must(t, vm.SetIdentityMapAddr(0xfffbc000))
	must(t, vm.SetTSSAddr(0xfffbd000))
	must(t, vm.EnableSplitIRQChip(24))
	if err := vm.EnableSplitIRQChip(24); err == nil || !strings.Contains(err.Error(), "KVM_CAP_SPLIT_IRQCHIP") {
		t.Errorf("second irqchip: %v", err)
	}
	if _, err := vm.CreateVCPU(1 << 20); err == nil || !strings.Contains(err.Error(), "vcpu 1048576: ioctl KVM_CREATE_VCPU") {
		t.Errorf("vCPU with an ID beyond all limits: %v", err)
	}
}

func TestOpError(t *testing.T) {
	for _, errno := range []unix.Errno{unix.ENOENT, unix.EACCES, unix.ENODEV} {
		err := error(&OpError{Op: "open /dev/kvm", Err: errno, Hint: openHint(errno)})
		first, hint, _ := strings.Cut(err.Error(), "\n")
		if want := "open /dev/kvm: " + errno.Error(); first != want || hint == "" {
			t.Errorf("%q, %q, want %q and a hint", first, hint, want)
		}
		if !errors.Is(err, errno) {
			t.Errorf("%v is not %v", err, errno)
		}
	}
	if !errors.Is(&OpError{Err: unix.ENOENT}, os.ErrNotExist) {
		t.Error("ENOENT is not os.ErrNotExist")
	}
	_, err := ioctlValue(-1, kvmCreateVM, 0)
	if err == nil || err.Error() != "ioctl KVM_CREATE_VM: bad file descriptor" {
		t.Errorf("ioctl on no file: %v", err)
	}
}

// TestExitDetails decodes exits that a test guest cannot cause, from a run area made here.
func TestExitDetails(t *testing.T) {
	page := make([]byte, 4096)
	v := &VCPU{page: page, run: asRunPage(page)}
	const exit = 32 // of the union in kvm_run
	put := func(words ...any) {
		clear(page)
		b := page[exit:exit]
		for _, w := range words {
			var err error
			b, err = binary.Append(b, binary.LittleEndian, w)
			must(t, err)
		}
	}

	put(uint64(0x80000021), uint32(3))
	if r, c := v.FailEntry(); r != 0x80000021 || c != 3 {
		t.Errorf("FailEntry = %#x, %d", r, c)
	}
	put(uint8(0x31))
	if got := v.EOIVector(); got != 0x31 {
		t.Errorf("EOIVector = %#x", got)
	}
	put(uint64(0xfee00000), [8]byte{1, 2}, uint32(200), uint8(1))
	if m := v.MMIO(); len(m.Data) != 8 {
		t.Errorf("MMIO of 200 bytes gives %d", len(m.Data))
	}

	insn := append([]byte{2}, "\x0f\x0b"...)
	for _, tt := range []struct {
		words []any
		want  string
	}{
		{[]any{uint32(1), uint32(3), uint64(1), insn}, "kvm cannot emulate an instruction of the guest, bytes 0f 0b"},
		{[]any{uint32(1), uint32(3), uint64(1), uint8(255)}, "kvm cannot emulate an instruction of the guest, bytes" + strings.Repeat(" 00", 15)},
		{[]any{uint32(1), uint32(0)}, "kvm cannot emulate an instruction of the guest"},
		{[]any{uint32(2), uint32(1), uint64(16)}, "kvm met exceptions that cannot occur together, data [0x10]"},
		{[]any{uint32(3), uint32(99)}, "kvm met an exit while it delivered an event, data [" + strings.TrimSpace(strings.Repeat("0x0 ", 16)) + "]"},
		{[]any{uint32(4), uint32(0)}, "kvm met an exit reason that it does not know"},
		{[]any{uint32(77), uint32(0)}, "kvm internal error 77"},
	} {
		put(tt.words...)
		if got := v.InternalError().Error(); got != tt.want {
			t.Errorf("InternalError = %q, want %q", got, tt.want)
		}
	}
	if got := ExitReason(4711).String() + ", " + ExitMMIO.String(); got != "exit 4711, mmio" {
		t.Errorf("String of exit reasons = %q", got)
	}
}

// statsFile builds a statistics file as the kernel does: header, id, descriptors, data.
func statsFile() []byte {
	const nameSize, descOff = 16, 24 + 16
	h := statsHeader{NameSize: nameSize, Descs: 3, IDOffset: 24, DescOffset: descOff, DataOffset: descOff + 3*(16+nameSize)}
	b, _ := binary.Append(nil, binary.LittleEndian, h)
	b = append(b, "kvm-1-vcpu-0\x00\x00\x00\x00"...)
	for _, d := range []struct {
		statsDesc
		name string
	}{
		{statsDesc{Size: 1, Offset: 0}, "exits"},
		{statsDesc{Size: 4, Offset: 8}, "histogram"},
		{statsDesc{Size: 1, Offset: 40}, "halt_exits"},
	} {
		b, _ = binary.Append(b, binary.LittleEndian, d.statsDesc)
		b = append(b, d.name+strings.Repeat("\x00", nameSize-len(d.name))...)
	}
	b, _ = binary.Append(b, binary.LittleEndian, []uint64{42, 1, 2, 3, 4, 7})
	return b
}

func TestReadStats(t *testing.T) {
	good := statsFile()
	m, err := readStats(bytes.NewReader(good))
	must(t, err)
	if len(m) != 2 || m["exits"] != 42 || m["halt_exits"] != 7 {
		t.Errorf("readStats = %v", m)
	}
	for n := range len(good) {
		if _, err := readStats(bytes.NewReader(good[:n])); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes: %v", n, len(good), err)
		}
	}
}

func FuzzReadStats(f *testing.F) {
	f.Add(statsFile())
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = readStats(bytes.NewReader(b)) })
}
