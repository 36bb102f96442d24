package kvm

import (
	"fmt"
	"math/bits"
	"slices"
)

// CPUID leaves and bits that depend on the virtual machine: Intel SDM vol. 2A, CPUID; AMD
// APM vol. 3, appendix E.
const (
	leafFeatures    = 0x1
	leafCaches      = 0x4
	leafTopology    = 0xb
	leafTopologyV2  = 0x1f
	leafAMDFeatures = 0x80000001
	leafAMDSizes    = 0x80000008
	leafAMDCaches   = 0x8000001d
	leafAMDTopology = 0x8000001e
	leafAMDExtTopo  = 0x80000026

	ecxVMX         = 1 << 5  // leaf 1
	ecxX2APIC      = 1 << 21 // leaf 1
	ecxTSCDeadline = 1 << 24 // leaf 1
	ecxHypervisor  = 1 << 31 // leaf 1
	edxHTT         = 1 << 28 // leaf 1: the package has several logical processors
	ecxCmpLegacy   = 1 << 1  // leaf 0x80000001: and they are cores
	ecxSVM         = 1 << 2  // leaf 0x80000001

	flagSignificantIndex = 1 << 0 // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
)

// GuestCPUID is the host's CPU for vCPU id of count: all that KVM supports, on one package
// of count cores with one thread each, whose APIC IDs are their numbers. VMX and SVM are
// left out, because a State does not hold a nested guest.
func (s *System) GuestCPUID(id, count int) ([]CPUIDEntry, error) {
	entries, err := s.SupportedCPUID()
	if err != nil {
		return nil, err
	}
	return guestCPUID(entries, id, count, s.CheckExtension(CapTSCDeadlineTimer) > 0), nil
}

func guestCPUID(entries []CPUIDEntry, id, count int, tscDeadline bool) []CPUIDEntry {
	apicID, n := uint32(id), uint32(count)
	idBits := uint32(bits.Len32(n - 1)) // width of the core number in the APIC ID
	hasTopology := false
	entries = slices.DeleteFunc(slices.Clone(entries), func(e CPUIDEntry) bool {
		hasTopology = hasTopology || e.Function == leafTopology
		return e.Function == leafTopology || e.Function == leafTopologyV2 || e.Function == leafAMDExtTopo
	})
	for i := range entries {
		e := &entries[i]
		switch e.Function {
		case leafFeatures:
			e.Ebx = e.Ebx&0xffff | min(n, 255)<<16 | apicID<<24
			e.Ecx = e.Ecx&^(ecxVMX|ecxTSCDeadline) | ecxX2APIC | ecxHypervisor
			if tscDeadline {
				e.Ecx |= ecxTSCDeadline
			}
			e.Edx &^= edxHTT
			if n > 1 {
				e.Edx |= edxHTT
			}
		case leafCaches, leafAMDCaches: // by Index; EAX 4:0 type, 7:5 level
			if e.Eax&0x1f == 0 {
				break
			}
			e.Eax &^= 0xfff << 14 // 25:14 sharing threads - 1: L1 and L2 are a core's own
			if e.Eax>>5&7 >= 3 {
				e.Eax |= (uint32(1)<<idBits - 1) & 0xfff << 14
			}
			if e.Function == leafCaches {
				e.Eax = e.Eax&^(0x3f<<26) | min(uint32(1)<<idBits-1, 0x3f)<<26 // 31:26 core IDs - 1
			}
		case leafAMDFeatures:
			e.Ecx &^= ecxSVM | ecxCmpLegacy
			if n > 1 {
				e.Ecx |= ecxCmpLegacy & amdOnly(entries)
			}
		case leafAMDSizes:
			e.Ecx = e.Ecx&^0xf0ff | (n-1)&0xff | idBits<<12 // 7:0 cores - 1, 15:12 ID bits
			e.Ecx &= amdOnly(entries)
		case leafAMDTopology:
			e.Eax, e.Ebx, e.Ecx = apicID, apicID&0xff, 0 // one thread per core, one node
		}
	}
	if hasTopology {
		level := func(index, shift, count, kind uint32) CPUIDEntry {
			return CPUIDEntry{Function: leafTopology, Index: index, Flags: flagSignificantIndex,
				Eax: shift, Ebx: count, Ecx: kind<<8 | index, Edx: apicID}
		}
		const thread, core = 1, 2
		entries = append(entries, level(0, 0, 1, thread), level(1, idBits, n, core), level(2, 0, 0, 0))
	}
	return entries
}

// amdOnly is all ones for a CPU of AMD's kind (AuthenticAMD, HygonGenuine), else zero: Intel
// reserves these bits.
func amdOnly(entries []CPUIDEntry) uint32 {
	const auth, hygo = 0x68747541, 0x6f677948
	for _, e := range entries {
		if e.Function == 0 && (e.Ebx == auth || e.Ebx == hygo) {
			return ^uint32(0)
		}
	}
	return 0
}

// SetCPUID tells the vCPU what CPUID answers. It comes before the vCPU's first Run.
func (v *VCPU) SetCPUID(entries []CPUIDEntry) error {
	l := new(cpuidList)
	if len(entries) > maxCPUID {
		return fmt.Errorf("set CPUID of vcpu %d: %d entries, more than %d", v.id, len(entries), maxCPUID)
	}
	l.n = uint32(copy(l.entries[:], entries))
	_, err := ioctl(v.fd, kvmSetCPUID2, l)
	return err
}

// CPUID reads back what SetCPUID set.
func (v *VCPU) CPUID() ([]CPUIDEntry, error) { return getCPUID(v.fd, kvmGetCPUID2) }

func getCPUID(fd int, r request) ([]CPUIDEntry, error) {
	l := new(cpuidList)
	l.n = maxCPUID
	if _, err := ioctl(fd, r, l); err != nil {
		return nil, err
	}
	return slices.Clone(l.entries[:l.n]), nil
}
