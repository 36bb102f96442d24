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

// emulator returns the QEMU that emulates a nested host: a copy whose VMRUN and #VMEXIT are right, or
// the one that is installed, where its code is not as expected.
//
// Those of QEMU 10.0's TCG (helper_vmrun and do_vmexit in target/i386/tcg/system/svm_helper.c) have
// three faults, by which guests of any VMM fall silent or triple-fault, and L1 too:
//
//   - do_vmexit clears HF2_NPT_MASK when it begins; now and then it is set again when it ends. The
//     host's own page walks then go by the guest's nested page table: it triple-faults. The copy
//     clears it with HF2_GIF_MASK and HF2_VGIF_MASK, at the end.
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
	if err := correctSVM(code); err != nil {
		say("nested host: note: guests may fall silent or triple-fault: %s is used as it is: %v", path, err)
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
	// and dword [base+disp32], ^0x101: hflags2 &= ^(HF2_GIF_MASK | HF2_VGIF_MASK)
	clearGIF = "81 a0/f8 ?? ?? ?? ?? fe fe ff ff"
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

// correctSVM corrects QEMU's code, or says what of it is not as expected, and leaves it alone.
func correctSVM(file []byte) error {
	f, err := elf.NewFile(bytes.NewReader(file))
	if err != nil {
		return err
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return err
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
	vmrun, vmexit, inject := code["helper_vmrun"], code["do_vmexit"], at["do_interrupt_x86_hardirq"]
	if vmrun == nil || vmexit == nil || inject == 0 {
		return errors.New("it exports no helper_vmrun or do_vmexit")
	}
	gif := find(vmexit, clearGIF)
	if len(gif) != 1 {
		return fmt.Errorf("do_vmexit clears HF2_GIF_MASK in %d places, not in one", len(gif))
	}
	virq := find(vmrun, setVIRQ)
	if len(virq) != 1 {
		return fmt.Errorf("helper_vmrun sets CPU_INTERRUPT_VIRQ in %d places, not in one", len(virq))
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
		return errors.New("helper_vmrun does not set exception_index before it injects an interrupt")
	}

	vmexit[gif[0]+6] &^= 0x40 // HF2_NPT_MASK
	or := vmrun[virq[0]:]
	disp := binary.LittleEndian.Uint32(or[2:])
	copy(or, []byte{0xf0, 0x80, or[1], 0, 0, 0, 0, 0x01, 0x66, 0x90}) // lock or byte [base+disp32+1], 1; nop
	binary.LittleEndian.PutUint32(or[3:], disp+1)
	copy(vmrun[index[0]:], []byte{0x66, 0x0f, 0x1f, 0x44, 0, 0}) // nop
	return nil
}
