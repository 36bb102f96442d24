package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

const qemu = "qemu-system-x86_64"

// emulator returns the QEMU that emulates a nested host: a copy with three faults less, or the one that
// is installed, where its code is not as expected.
//
// In the TCG of QEMU 10.0 (target/i386/tcg), with more than one CPU:
//
//   - cpu_clear_ignne, which every FXRSTOR and XRSTOR of any CPU calls, clears a bit of the *first* CPU's
//     env->hflags2, without a lock. What that CPU changes there just then is undone: HF2_NPT_MASK, HF2_GIF_MASK and
//     HF2_VGIF_MASK at a VMRUN or a #VMEXIT. A guest then walks its page tables as if they were the host's, or the host as if
//     they were a guest's, or takes interrupts with the guest's GS: either triple-faults, within
//     minutes. The copy returns at once. IGNNE# is for a guest that clears CR0.NE; none does.
//   - helper_vmrun sets CPU_INTERRUPT_VIRQ in cs->interrupt_request without the lock that others set
//     their bits under. One that another thread sets just then is lost, and with it an interrupt.
//     The copy does it by a locked instruction.
//   - After the injection of an interrupt it leaves the vector in cs->exception_index. When the loop
//     of the CPU is then left for anything but an interrupt, the guest gets that vector for a second
//     time, whatever its RFLAGS.IF. The copy does not store it; nobody else reads it.
func (e env) emulator() (path string, err error) {
	if path, err = exec.LookPath(qemu); err != nil {
		return "", err
	}
	code, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	corrected, err := correctTCG(code)
	if err != nil {
		say("nested host: note: guests may fall silent or triple-fault: faults of %s that stay: %v", path, err)
	}
	if !corrected {
		return path, nil
	}
	path = filepath.Join(e.cache, "bin", qemu)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, code) {
		return path, nil
	}
	// Another run may use the old one.
	if err := os.WriteFile(path+".new", code, 0o755); err != nil {
		return "", err
	}
	return path, os.Rename(path+".new", path)
}

// x86 instructions, with any displacements and registers that need no prefix.
const (
	// or dword [base+disp32], 0x100: CPU_INTERRUPT_VIRQ
	setVIRQ = "81 88/f8 ?? ?? ?? ?? 00 01 00 00"
	// mov dword [base+disp32], reg; ..., 0; mov qword ..., -1:
	// exception_index = vector, exception_is_int = 0, exception_next_eip = -1
	setIndex = "89 80/c0 ?? ?? ?? ?? c7 80/f8 ?? ?? ?? ?? 00 00 00 00 48 c7 80/f8 ?? ?? ?? ?? ff ff ff ff"
)

// find returns where the instructions are: hexadecimal bytes, value/mask, or ?? for any. It leaves
// out what may have a prefix.
func find(code []byte, pattern string) (at []int) {
	words := strings.Fields(pattern)
	for i := 1; i+len(words) <= len(code); i++ {
		same := code[i-1]&0xf0 != 0x40 // REX
		for j, w := range words {
			value, mask := 0, 0
			if w != "??" {
				if mask = 0xff; len(w) > 2 {
					fmt.Sscanf(w, "%x/%x", &value, &mask)
				} else {
					fmt.Sscanf(w, "%x", &value)
				}
			}
			if same = same && int(code[i+j])&mask == value&mask; !same {
				break
			}
		}
		if same {
			at = append(at, i)
		}
	}
	return at
}

// correctTCG corrects QEMU's code, and says whether it did: the first fault, or all three. The error is
// what of it is not as expected.
func correctTCG(file []byte) (corrected bool, err error) {
	f, err := elf.NewFile(bytes.NewReader(file))
	if err != nil {
		return false, err
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return false, err
	}
	code := map[string][]byte{}
	at := map[string]uint64{}
	for _, s := range symbols {
		at[s.Name] = s.Value
		for _, p := range f.Progs {
			if off := s.Value - p.Vaddr; p.Type == elf.PT_LOAD && s.Value >= p.Vaddr && off+s.Size <= p.Filesz {
				code[s.Name] = file[p.Off+off:][:s.Size]
			}
		}
	}
	vmrun, ignne, inject := code["helper_vmrun"], code["cpu_clear_ignne"], at["do_interrupt_x86_hardirq"]
	const ret = 0xc3
	if len(ignne) == 0 || ignne[0] == ret {
		return false, errors.New("it exports no cpu_clear_ignne, or one that has been corrected")
	}
	ignne[0] = ret
	virq := find(vmrun, setVIRQ)
	if len(virq) != 1 {
		return true, fmt.Errorf("helper_vmrun sets CPU_INTERRUPT_VIRQ in %d places, not in one", len(virq))
	}
	// The one injection that goes on from here, instead of by the loop of the CPU.
	call := -1
	for i := range len(vmrun) - 4 {
		if vmrun[i] == 0xe8 && at["helper_vmrun"]+uint64(i)+5+uint64(int64(int32(binary.LittleEndian.Uint32(vmrun[i+1:])))) == inject {
			call = i
		}
	}
	index := slices.DeleteFunc(find(vmrun, setIndex), func(i int) bool { return i > call || call-i > 64 })
	if len(index) != 1 {
		return true, errors.New("helper_vmrun does not set exception_index before it injects an interrupt")
	}

	or := vmrun[virq[0]:]
	disp := binary.LittleEndian.Uint32(or[2:])
	copy(or, []byte{0xf0, 0x80, or[1], 0, 0, 0, 0, 0x01, 0x66, 0x90}) // lock or byte [base+disp32+1], 1; nop
	binary.LittleEndian.PutUint32(or[3:], disp+1)
	copy(vmrun[index[0]:], []byte{0x66, 0x0f, 0x1f, 0x44, 0, 0}) // nop
	return true, nil
}
