package kvm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// abi is what has to agree with the kernel's headers: a C expression and our value for it.
// When guard is set, headers that do not define it are too old to say.
var abi = []struct {
	expr  string
	value uintptr
	guard string
}{
	// System ioctls.
	{"KVM_GET_API_VERSION", kvmGetAPIVersion.nr, ""},
	{"KVM_CREATE_VM", kvmCreateVM.nr, ""},
	{"KVM_GET_MSR_INDEX_LIST", kvmGetMSRIndexList.nr, ""},
	{"KVM_CHECK_EXTENSION", kvmCheckExtension.nr, ""},
	{"KVM_GET_VCPU_MMAP_SIZE", kvmGetVCPUMmapSize.nr, ""},
	{"KVM_GET_SUPPORTED_CPUID", kvmGetSupportedCPUID.nr, ""},
	// VM ioctls.
	{"KVM_CREATE_VCPU", kvmCreateVCPU.nr, ""},
	{"KVM_GET_DIRTY_LOG", kvmGetDirtyLog.nr, ""},
	{"KVM_SET_USER_MEMORY_REGION", kvmSetUserMemoryRegion.nr, ""},
	{"KVM_SET_TSS_ADDR", kvmSetTSSAddr.nr, ""},
	{"KVM_SET_IDENTITY_MAP_ADDR", kvmSetIdentityMapAddr.nr, ""},
	{"KVM_SET_GSI_ROUTING", kvmSetGSIRouting.nr, ""},
	{"KVM_IRQFD", kvmIRQFD.nr, ""},
	{"KVM_IOEVENTFD", kvmIOEventFD.nr, ""},
	{"KVM_SET_CLOCK", kvmSetClock.nr, ""},
	{"KVM_GET_CLOCK", kvmGetClock.nr, ""},
	{"KVM_ENABLE_CAP", kvmEnableCap.nr, ""},
	{"KVM_SIGNAL_MSI", kvmSignalMSI.nr, ""},
	{"KVM_CLEAR_DIRTY_LOG", kvmClearDirtyLog.nr, ""},
	{"KVM_RESET_DIRTY_RINGS", kvmResetDirtyRings.nr, ""},
	{"KVM_GET_STATS_FD", kvmGetStatsFD.nr, ""},
	{"KVM_CREATE_DEVICE", kvmCreateDevice.nr, ""},
	{"KVM_SET_DEVICE_ATTR", kvmSetDeviceAttr.nr, ""},
	{"KVM_GET_DEVICE_ATTR", kvmGetDeviceAttr.nr, ""},
	// vCPU ioctls.
	{"KVM_RUN", kvmRun.nr, ""},
	{"KVM_GET_REGS", kvmGetRegs.nr, ""},
	{"KVM_SET_REGS", kvmSetRegs.nr, ""},
	{"KVM_TRANSLATE", kvmTranslate.nr, ""},
	{"KVM_GET_MSRS", kvmGetMSRs.nr, ""},
	{"KVM_SET_MSRS", kvmSetMSRs.nr, ""},
	{"KVM_GET_LAPIC", kvmGetLAPIC.nr, ""},
	{"KVM_SET_LAPIC", kvmSetLAPIC.nr, ""},
	{"KVM_SET_CPUID2", kvmSetCPUID2.nr, ""},
	{"KVM_GET_CPUID2", kvmGetCPUID2.nr, ""},
	{"KVM_GET_MP_STATE", kvmGetMPState.nr, ""},
	{"KVM_SET_MP_STATE", kvmSetMPState.nr, ""},
	{"KVM_GET_VCPU_EVENTS", kvmGetVCPUEvents.nr, ""},
	{"KVM_SET_VCPU_EVENTS", kvmSetVCPUEvents.nr, ""},
	{"KVM_GET_DEBUGREGS", kvmGetDebugRegs.nr, ""},
	{"KVM_SET_DEBUGREGS", kvmSetDebugRegs.nr, ""},
	{"KVM_SET_TSC_KHZ", kvmSetTSCKHz.nr, ""},
	{"KVM_GET_TSC_KHZ", kvmGetTSCKHz.nr, ""},
	{"KVM_GET_XSAVE", kvmGetXSave.nr, ""},
	{"KVM_SET_XSAVE", kvmSetXSave.nr, ""},
	{"KVM_GET_XCRS", kvmGetXCRs.nr, ""},
	{"KVM_SET_XCRS", kvmSetXCRs.nr, ""},
	{"KVM_KVMCLOCK_CTRL", kvmKVMClockCtrl.nr, ""},
	{"KVM_GET_SREGS2", kvmGetSregs2.nr, ""},
	{"KVM_SET_SREGS2", kvmSetSregs2.nr, ""},
	{"KVM_GET_XSAVE2", kvmGetXSave2.nr, ""},
	{"KVM_PRE_FAULT_MEMORY", kvmPreFault.nr, "KVM_PRE_FAULT_MEMORY"},

	// Sizes of structures whose ioctl number does not carry them, and of parts.
	{"sizeof(struct kvm_segment)", unsafe.Sizeof(Segment{}), ""},
	{"sizeof(struct kvm_dtable)", unsafe.Sizeof(Descriptor{}), ""},
	{"sizeof(struct kvm_cpuid_entry2)", unsafe.Sizeof(CPUIDEntry{}), ""},
	{"sizeof(struct kvm_msr_entry)", unsafe.Sizeof(MSR{}), ""},
	{"sizeof(struct kvm_irq_routing_entry)", unsafe.Sizeof(irqRoutingEntry{}), ""},
	{"sizeof(struct kvm_dirty_gfn)", unsafe.Sizeof(dirtyGFN{}), ""},
	{"sizeof(struct kvm_stats_header)", unsafe.Sizeof(statsHeader{}), ""},
	{"sizeof(struct kvm_stats_desc)", unsafe.Sizeof(statsDesc{}), ""},
	{"offsetof(struct kvm_cpuid2, entries)", unsafe.Offsetof(cpuidList{}.entries), ""},
	{"offsetof(struct kvm_msrs, entries)", unsafe.Offsetof(msrList{}.entries), ""},
	{"offsetof(struct kvm_msr_list, indices)", unsafe.Offsetof(msrIndexList{}.indices), ""},
	{"offsetof(struct kvm_irq_routing, entries)", unsafe.Offsetof(irqRouting{}.entries), ""},

	// Places of fields.
	{"offsetof(struct kvm_regs, rip)", unsafe.Offsetof(Regs{}.RIP), ""},
	{"offsetof(struct kvm_segment, unusable)", unsafe.Offsetof(Segment{}.Unusable), ""},
	{"offsetof(struct kvm_sregs2, gdt)", unsafe.Offsetof(Sregs{}.GDT), ""},
	{"offsetof(struct kvm_sregs2, efer)", unsafe.Offsetof(Sregs{}.EFER), ""},
	{"offsetof(struct kvm_sregs2, pdptrs)", unsafe.Offsetof(Sregs{}.PDptrs), ""},
	{"offsetof(struct kvm_vcpu_events, nmi)", unsafe.Offsetof(Events{}.N), ""},
	{"offsetof(struct kvm_vcpu_events, smi)", unsafe.Offsetof(Events{}.S), ""},
	{"offsetof(struct kvm_vcpu_events, triple_fault)", unsafe.Offsetof(Events{}.TripleFault), ""},
	{"offsetof(struct kvm_vcpu_events, exception_payload)", unsafe.Offsetof(Events{}.ExceptionPayload), ""},
	{"offsetof(struct kvm_debugregs, flags)", unsafe.Offsetof(DebugRegs{}.Flags), ""},
	{"offsetof(struct kvm_xcrs, xcrs)", unsafe.Offsetof(XCRs{}.Registers), ""},
	{"offsetof(struct kvm_clock_data, realtime)", unsafe.Offsetof(ClockData{}.Realtime), ""},
	{"offsetof(struct kvm_clock_data, host_tsc)", unsafe.Offsetof(ClockData{}.HostTSC), ""},
	{"offsetof(struct kvm_translation, valid)", unsafe.Offsetof(gokvm.Translation{}.Valid), ""},
	{"offsetof(struct kvm_irq_routing_entry, u.msi.data)", unsafe.Offsetof(irqRoutingEntry{}.data), ""},
	{"offsetof(struct kvm_irqfd, resamplefd)", unsafe.Offsetof(irqfd{}.resampleFD), ""},
	{"offsetof(struct kvm_ioeventfd, addr)", unsafe.Offsetof(ioeventfd{}.addr), ""},
	{"offsetof(struct kvm_ioeventfd, flags)", unsafe.Offsetof(ioeventfd{}.flags), ""},
	{"offsetof(struct kvm_msi, data)", unsafe.Offsetof(msi{}.data), ""},
	{"offsetof(struct kvm_userspace_memory_region, userspace_addr)", unsafe.Offsetof(userMemoryRegion{}.host), ""},
	{"offsetof(struct kvm_dirty_log, dirty_bitmap)", unsafe.Offsetof(dirtyLog{}.bitmap), ""},
	{"offsetof(struct kvm_clear_dirty_log, first_page)", unsafe.Offsetof(clearDirtyLog{}.first), ""},
	{"offsetof(struct kvm_clear_dirty_log, num_pages)", unsafe.Offsetof(clearDirtyLog{}.pages), ""},
	{"offsetof(struct kvm_clear_dirty_log, dirty_bitmap)", unsafe.Offsetof(clearDirtyLog{}.bitmap), ""},
	{"offsetof(struct kvm_dirty_gfn, offset)", unsafe.Offsetof(dirtyGFN{}.offset), ""},
	{"offsetof(struct kvm_enable_cap, args)", unsafe.Offsetof(enableCap{}.args), ""},
	{"offsetof(struct kvm_stats_header, data_offset)", unsafe.Offsetof(statsHeader{}.DataOffset), ""},
	{"offsetof(struct kvm_stats_desc, offset)", unsafe.Offsetof(statsDesc{}.Offset), ""},

	{"offsetof(struct kvm_create_device, fd)", unsafe.Offsetof(createDevice{}.fd), ""},
	{"offsetof(struct kvm_device_attr, attr)", unsafe.Offsetof(deviceAttr{}.attr), ""},
	{"offsetof(struct kvm_device_attr, addr)", unsafe.Offsetof(deviceAttr{}.addr), ""},

	// The run area.
	{"offsetof(struct kvm_run, immediate_exit) * 8", 8, ""}, // immediateExit is bit 8
	{"offsetof(struct kvm_run, exit_reason)", unsafe.Offsetof(runPage{}.exitReason), ""},
	{"offsetof(struct kvm_run, apic_base)", unsafe.Offsetof(runPage{}.apicBase), ""},
	{"offsetof(struct kvm_run, io)", unsafe.Offsetof(runPage{}.exit), ""},
	{"offsetof(struct kvm_run, kvm_valid_regs)", unsafe.Sizeof(runPage{}), ""},
	{"offsetof(struct kvm_run, io.port) - offsetof(struct kvm_run, io)", unsafe.Offsetof(exitIO{}.port), ""},
	{"offsetof(struct kvm_run, io.data_offset) - offsetof(struct kvm_run, io)", unsafe.Offsetof(exitIO{}.offset), ""},
	{"offsetof(struct kvm_run, mmio.data) - offsetof(struct kvm_run, mmio)", unsafe.Offsetof(exitMMIO{}.data), ""},
	{"offsetof(struct kvm_run, mmio.len) - offsetof(struct kvm_run, mmio)", unsafe.Offsetof(exitMMIO{}.size), ""},
	{"offsetof(struct kvm_run, mmio.is_write) - offsetof(struct kvm_run, mmio)", unsafe.Offsetof(exitMMIO{}.write), ""},
	{"offsetof(struct kvm_run, fail_entry.cpu) - offsetof(struct kvm_run, fail_entry)", unsafe.Offsetof(exitFailEntry{}.cpu), ""},
	{"offsetof(struct kvm_run, internal.data) - offsetof(struct kvm_run, internal)", unsafe.Offsetof(exitInternal{}.data), ""},
	{"offsetof(struct kvm_run, emulation_failure.insn_size) - offsetof(struct kvm_run, internal)", insnOffset, ""},

	// Constants.
	{"KVM_IRQ_ROUTING_MSI", irqRoutingMSI, ""},
	{"KVM_IRQFD_FLAG_DEASSIGN", irqfdDeassign, ""},
	{"KVM_IOEVENTFD_FLAG_DATAMATCH", ioeventfdMatch, ""},
	{"KVM_IOEVENTFD_FLAG_PIO", ioeventfdPIO, ""},
	{"KVM_IOEVENTFD_FLAG_DEASSIGN", ioeventfdDeassign, ""},
	{"KVM_MEM_LOG_DIRTY_PAGES", uintptr(MemLogDirty), ""},
	{"KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE", manualProtect, ""},
	{"KVM_DIRTY_LOG_INITIALLY_SET", initiallySet, ""},
	{"KVM_DIRTY_GFN_F_DIRTY", dirtyGFNDirty, ""},
	{"KVM_DIRTY_GFN_F_RESET", dirtyGFNReset, ""},
	{"KVM_DIRTY_LOG_PAGE_OFFSET", dirtyLogPageOffset, ""},
	{"KVM_CPUID_FLAG_SIGNIFCANT_INDEX", flagSignificantIndex, ""},
	{"KVM_CLOCK_REALTIME", ClockRealtime, ""},
	{"KVM_CLOCK_HOST_TSC", ClockHostTSC, ""},
	{"KVM_MP_STATE_RUNNABLE", uintptr(MPRunnable), ""},
	{"KVM_MP_STATE_UNINITIALIZED", uintptr(MPUninitialized), ""},
	{"KVM_MP_STATE_INIT_RECEIVED", uintptr(MPInitReceived), ""},
	{"KVM_MP_STATE_HALTED", uintptr(MPHalted), ""},
	{"KVM_MP_STATE_SIPI_RECEIVED", uintptr(MPSIPIReceived), ""},
	{"KVM_INTERNAL_ERROR_EMULATION", internalEmulation, ""},
	{"KVM_INTERNAL_ERROR_SIMUL_EX", internalSimulEx, ""},
	{"KVM_INTERNAL_ERROR_DELIVERY_EV", internalDelivery, ""},
	{"KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON", internalExitReason, ""},
	{"KVM_EXIT_UNKNOWN", uintptr(ExitUnknown), ""},
	{"KVM_EXIT_EXCEPTION", uintptr(ExitException), ""},
	{"KVM_EXIT_IO", uintptr(ExitIO), ""},
	{"KVM_EXIT_HYPERCALL", uintptr(ExitHypercall), ""},
	{"KVM_EXIT_DEBUG", uintptr(ExitDebug), ""},
	{"KVM_EXIT_HLT", uintptr(ExitHLT), ""},
	{"KVM_EXIT_MMIO", uintptr(ExitMMIO), ""},
	{"KVM_EXIT_IRQ_WINDOW_OPEN", uintptr(ExitIRQWindowOpen), ""},
	{"KVM_EXIT_SHUTDOWN", uintptr(ExitShutdown), ""},
	{"KVM_EXIT_FAIL_ENTRY", uintptr(ExitFailEntry), ""},
	{"KVM_EXIT_INTR", uintptr(ExitIntr), ""},
	{"KVM_EXIT_SET_TPR", uintptr(ExitSetTPR), ""},
	{"KVM_EXIT_TPR_ACCESS", uintptr(ExitTPRAccess), ""},
	{"KVM_EXIT_NMI", uintptr(ExitNMI), ""},
	{"KVM_EXIT_INTERNAL_ERROR", uintptr(ExitInternalError), ""},
	{"KVM_EXIT_SYSTEM_EVENT", uintptr(ExitSystemEvent), ""},
	{"KVM_EXIT_IOAPIC_EOI", uintptr(ExitIOAPICEOI), ""},
	{"KVM_EXIT_HYPERV", uintptr(ExitHyperV), ""},
	{"KVM_EXIT_X86_RDMSR", uintptr(ExitRDMSR), ""},
	{"KVM_EXIT_X86_WRMSR", uintptr(ExitWRMSR), ""},
	{"KVM_EXIT_DIRTY_RING_FULL", uintptr(ExitDirtyRingFull), ""},
	{"KVM_EXIT_X86_BUS_LOCK", uintptr(ExitBusLock), ""},
	{"KVM_EXIT_XEN", uintptr(ExitXen), ""},
	{"KVM_EXIT_NOTIFY", uintptr(ExitNotify), "KVM_EXIT_NOTIFY"},
	{"KVM_EXIT_MEMORY_FAULT", uintptr(ExitMemoryFault), "KVM_EXIT_MEMORY_FAULT"}, // Linux 6.8
	{"KVM_DEV_TYPE_VFIO", devTypeVFIO, ""},
	{"KVM_DEV_VFIO_GROUP", devVFIOFile, ""},
	{"KVM_DEV_VFIO_GROUP_ADD", devVFIOFileAdd, ""},
	{"KVM_DEV_VFIO_GROUP_DEL", devVFIOFileDel, ""},
}

// TestABI lets a C compiler compute the table from the kernel's headers.
func TestABI(t *testing.T) {
	table := abi
	for _, f := range features {
		guard := ""
		if f.Cap == CapPreFaultMemory { // Linux 6.11
			guard = f.Name
		}
		table = append(table, struct {
			expr  string
			value uintptr
			guard string
		}{f.Name, uintptr(f.Cap), guard})
	}
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("needs gcc:", err)
	}
	if _, err := os.Stat("/usr/include/linux/kvm.h"); err != nil {
		t.Skip("needs the kernel's headers:", err)
	}
	var c strings.Builder
	c.WriteString("#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n")
	for i, e := range table {
		if e.guard != "" {
			fmt.Fprintf(&c, "#ifdef %s\n", e.guard)
		}
		fmt.Fprintf(&c, "\tprintf(\"%d %%lu\\n\", (unsigned long)(%s));\n", i, e.expr)
		if e.guard != "" {
			c.WriteString("#endif\n")
		}
	}
	c.WriteString("\treturn 0;\n}\n")
	src, bin := filepath.Join(t.TempDir(), "abi.c"), filepath.Join(t.TempDir(), "abi")
	must(t, os.WriteFile(src, []byte(c.String()), 0o600))
	if out, err := exec.Command(gcc, "-o", bin, src).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	out, err := exec.Command(bin).Output()
	must(t, err)
	compared := 0
	for line := range strings.Lines(string(out)) {
		var i int
		var want uintptr
		if _, err := fmt.Sscan(line, &i, &want); err != nil {
			t.Fatal(line, err)
		}
		if table[i].value != want {
			t.Errorf("%s is %#x in the kernel, %#x here", table[i].expr, want, table[i].value)
		}
		compared++
	}
	old := 0 // those that old headers do not have
	for _, e := range table {
		if e.guard != "" {
			old++
		}
	}
	if compared < len(table)-old {
		t.Errorf("%d of %d values compared", compared, len(table))
	}
}

// TestABIComplete wants every ioctl in TestABI, under the name that errors call it.
func TestABIComplete(t *testing.T) {
	src, err := os.ReadFile("abi.go")
	must(t, err)
	listed := map[string]bool{}
	for _, e := range abi {
		listed[e.expr] = true
	}
	names := regexp.MustCompile(`ioc(?:Of\[.*\])?\(.*"(KVM_\w+)"\)`).FindAllSubmatch(src, -1)
	if len(names) < 40 {
		t.Fatalf("found %d ioctls in abi.go", len(names))
	}
	for _, n := range names {
		if !listed[string(n[1])] {
			t.Errorf("%s is not compared with the kernel's headers", n[1])
		}
	}
}
