package vmm

import (
	"fmt"
	"strings"
)

// Registers of a CPUID leaf.
const (
	eax = iota
	ebx
	ecx
	edx
)

var registerNames = [4]string{"eax", "ebx", "ecx", "edx"}

// cpuWord is a register of CPUID whose bits are features of their own.
type cpuWord struct {
	leaf, index uint32
	register    int
	names       string // bit 0 first, as in Linux's /proc/cpuinfo; "-" has none
	// volatile are bits that follow what the guest does, such as OSXSAVE CR4.
	volatile uint32
}

// cpuWords are the registers of feature bits: Intel SDM vol. 2A, CPUID; AMD APM vol. 3,
// appendix E; Linux's Documentation/virt/kvm/x86/cpuid.rst.
var cpuWords = []cpuWord{
	{leaf: 0x1, register: ecx, volatile: 1<<3 | 1<<27, names: "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca " +
		"sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"},
	{leaf: 0x1, register: edx, volatile: 1 << 9, names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"},
	{leaf: 0x6, register: eax, names: "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req"},
	{leaf: 0x7, register: ebx, names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap " +
		"avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"},
	{leaf: 0x7, register: ecx, volatile: 1 << 4, names: "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 " +
		"- - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks"},
	{leaf: 0x7, register: edx, names: "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - " +
		"amx_bf16 avx512_fp16 amx_tile amx_int8 ibrs stibp flush_l1d arch_capabilities core_capabilities ssbd"},
	{leaf: 0x7, index: 1, register: eax, names: "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd archperfmonext - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - amx_fp16 hreset avx_ifma - - lam"},
	{leaf: 0x7, index: 1, register: edx, names: "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchi - - - cet_sss avx10"},
	{leaf: 0x7, index: 2, register: edx, names: "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"},
	{leaf: 0xd, register: eax, names: "x87 sse avx mpx_bndregs mpx_bndcsr avx512_opmask avx512_zmm_hi256 avx512_hi16_zmm - pkru - - - - - - - amx_tilecfg amx_tiledata"},
	{leaf: 0xd, index: 1, register: eax, names: "xsaveopt xsavec xgetbv1 xsaves xfd"},
	{leaf: 0x4000_0001, register: eax, names: "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi " +
		"kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clocksource_stable"},
	{leaf: 0x8000_0001, register: ecx, names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx"},
	{leaf: 0x8000_0001, register: edx, volatile: 1 << 9, names: "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"},
	{leaf: 0x8000_0007, register: edx, names: "ts fid vid ttp hwp_tm stc - hw_pstate constant_tsc cpb eff_freq_ro proc_feedback acc_power"},
	{leaf: 0x8000_0008, register: ebx, names: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp ibrs_always_on stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret"},
	{leaf: 0x8000_0021, register: eax, names: "no_nested_data_bp - lfence_rdtsc - - verw_clear null_sel_clr_base - autoibrs no_smm_ctl_msr fsrs fsrc - prefetchctl_msr - - - - - - - - - - - - - sbpb ibpb_brtype srso_no"},
}

// fact is the word's name among the facts.
func (w *cpuWord) fact() string {
	return fmt.Sprintf("%#x.%d/%s", w.leaf, w.index, registerNames[w.register])
}

// missing names the features that are gone.
func (w *cpuWord) missing(gone uint32) (list []string) {
	names := strings.Fields(w.names)
	for n := range 32 {
		if gone>>n&1 == 0 {
			continue
		}
		name := "without a name"
		if n < len(names) && names[n] != "-" {
			name = names[n]
		}
		list = append(list, fmt.Sprintf("CPU feature %s (CPUID %s bit %d): not at the target", name, w.fact(), n))
	}
	return list
}

// msrNames are the registers that one meets in practice: Linux's msr-index.h and kvm_para.h.
var msrNames = map[uint32]string{
	0x10: "TSC", 0x1b: "APIC_BASE", 0x3b: "TSC_ADJUST", 0x48: "SPEC_CTRL", 0x10a: "ARCH_CAPABILITIES", 0x122: "TSX_CTRL", 0x140: "MISC_FEATURES_ENABLES",
	0x174: "SYSENTER_CS", 0x175: "SYSENTER_ESP", 0x176: "SYSENTER_EIP", 0x1a0: "MISC_ENABLE", 0x1c4: "XFD", 0x1c5: "XFD_ERR", 0x277: "PAT",
	0x345: "PERF_CAPABILITIES", 0x38f: "PERF_GLOBAL_CTRL", 0x6a0: "U_CET", 0x6a2: "S_CET", 0x6e0: "TSC_DEADLINE", 0xda0: "XSS",
	0xc000_0080: "EFER", 0xc000_0081: "STAR", 0xc000_0082: "LSTAR", 0xc000_0083: "CSTAR", 0xc000_0084: "SYSCALL_MASK", 0xc000_0102: "KERNEL_GS_BASE", 0xc000_0103: "TSC_AUX",
	0xc000_0104: "AMD64_TSC_RATIO", 0xc001_001f: "NB_CFG", 0xc001_011f: "VIRT_SPEC_CTRL",
	0x4b56_4d00: "KVM_WALL_CLOCK_NEW", 0x4b56_4d01: "KVM_SYSTEM_TIME_NEW", 0x4b56_4d02: "KVM_ASYNC_PF_EN", 0x4b56_4d03: "KVM_STEAL_TIME", 0x4b56_4d04: "KVM_PV_EOI_EN",
	0x4b56_4d05: "KVM_POLL_CONTROL", 0x4b56_4d06: "KVM_ASYNC_PF_INT", 0x4b56_4d07: "KVM_ASYNC_PF_ACK", 0x4b56_4d08: "KVM_MIGRATION_CONTROL",
}

func msrName(index uint32) string {
	if name := msrNames[index]; name != "" {
		return fmt.Sprintf("%s (%#x)", name, index)
	}
	return fmt.Sprintf("%#x", index)
}
