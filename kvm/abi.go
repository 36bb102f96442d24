package kvm

import (
	"reflect"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// The vCPU's registers, as the kernel's structures of (almost) the same name.
type (
	Regs       = gokvm.Regs        // kvm_regs
	Sregs      = gokvm.SRegs2      // kvm_sregs2
	Segment    = gokvm.Segment     // kvm_segment
	Descriptor = gokvm.Descriptor  // kvm_dtable
	DebugRegs  = gokvm.DebugRegs   // kvm_debugregs
	XCRs       = gokvm.XCRS        // kvm_xcrs
	Events     = gokvm.VCPUEvents  // kvm_vcpu_events
	LAPIC      = gokvm.LAPICState  // kvm_lapic_state
	CPUIDEntry = gokvm.CPUIDEntry2 // kvm_cpuid_entry2
	MSR        = gokvm.MSREntry    // kvm_msr_entry
	ClockData  = gokvm.ClockData   // kvm_clock_data, times in ns
)

// request is an ioctl's number and its name for errors.
type request struct {
	nr   uintptr
	name string
}

// The direction bits of an ioctl number, as the kernel sees it: asm-generic/ioctl.h.
const (
	iocWrite = 1 << 30 // _IOW
	iocRead  = 2 << 30 // _IOR
	kvmIO    = 0xae    // KVMIO
)

func ioc(nr uintptr, name string) request { return request{kvmIO<<8 | nr, name} }

// iocOf encodes the size of the argument as well, which is T or starts with T.
func iocOf[T any](dir, nr uintptr, name string) request {
	return request{dir | reflect.TypeFor[T]().Size()<<16 | kvmIO<<8 | nr, name}
}

// System ioctls.
var (
	kvmGetAPIVersion     = ioc(0x00, "KVM_GET_API_VERSION")
	kvmCreateVM          = ioc(0x01, "KVM_CREATE_VM")
	kvmGetMSRIndexList   = iocOf[uint32](iocRead|iocWrite, 0x02, "KVM_GET_MSR_INDEX_LIST")
	kvmCheckExtension    = ioc(0x03, "KVM_CHECK_EXTENSION")
	kvmGetVCPUMmapSize   = ioc(0x04, "KVM_GET_VCPU_MMAP_SIZE")
	kvmGetSupportedCPUID = iocOf[listHeader](iocRead|iocWrite, 0x05, "KVM_GET_SUPPORTED_CPUID")
)

// VM ioctls.
var (
	kvmCreateVCPU          = ioc(0x41, "KVM_CREATE_VCPU")
	kvmGetDirtyLog         = iocOf[dirtyLog](iocWrite, 0x42, "KVM_GET_DIRTY_LOG")
	kvmSetUserMemoryRegion = iocOf[userMemoryRegion](iocWrite, 0x46, "KVM_SET_USER_MEMORY_REGION")
	kvmSetTSSAddr          = ioc(0x47, "KVM_SET_TSS_ADDR")
	kvmSetIdentityMapAddr  = iocOf[uint64](iocWrite, 0x48, "KVM_SET_IDENTITY_MAP_ADDR")
	kvmSetGSIRouting       = iocOf[listHeader](iocWrite, 0x6a, "KVM_SET_GSI_ROUTING")
	kvmIRQFD               = iocOf[irqfd](iocWrite, 0x76, "KVM_IRQFD")
	kvmIOEventFD           = iocOf[ioeventfd](iocWrite, 0x79, "KVM_IOEVENTFD")
	kvmSetClock            = iocOf[ClockData](iocWrite, 0x7b, "KVM_SET_CLOCK")
	kvmGetClock            = iocOf[ClockData](iocRead, 0x7c, "KVM_GET_CLOCK")
	kvmEnableCap           = iocOf[enableCap](iocWrite, 0xa3, "KVM_ENABLE_CAP")
	kvmSignalMSI           = iocOf[msi](iocWrite, 0xa5, "KVM_SIGNAL_MSI")
	kvmClearDirtyLog       = iocOf[clearDirtyLog](iocRead|iocWrite, 0xc0, "KVM_CLEAR_DIRTY_LOG")
	kvmResetDirtyRings     = ioc(0xc7, "KVM_RESET_DIRTY_RINGS")
	kvmGetStatsFD          = ioc(0xce, "KVM_GET_STATS_FD") // of vCPUs as well
	kvmCreateDevice        = iocOf[createDevice](iocRead|iocWrite, 0xe0, "KVM_CREATE_DEVICE")
	kvmSetDeviceAttr       = iocOf[deviceAttr](iocWrite, 0xe1, "KVM_SET_DEVICE_ATTR") // of vCPUs and what CREATE_DEVICE returned
	kvmGetDeviceAttr       = iocOf[deviceAttr](iocWrite, 0xe2, "KVM_GET_DEVICE_ATTR")
)

// vCPU ioctls.
var (
	kvmRun           = ioc(0x80, "KVM_RUN")
	kvmGetRegs       = iocOf[Regs](iocRead, 0x81, "KVM_GET_REGS")
	kvmSetRegs       = iocOf[Regs](iocWrite, 0x82, "KVM_SET_REGS")
	kvmTranslate     = iocOf[gokvm.Translation](iocRead|iocWrite, 0x85, "KVM_TRANSLATE")
	kvmGetMSRs       = iocOf[listHeader](iocRead|iocWrite, 0x88, "KVM_GET_MSRS")
	kvmSetMSRs       = iocOf[listHeader](iocWrite, 0x89, "KVM_SET_MSRS")
	kvmGetLAPIC      = iocOf[LAPIC](iocRead, 0x8e, "KVM_GET_LAPIC")
	kvmSetLAPIC      = iocOf[LAPIC](iocWrite, 0x8f, "KVM_SET_LAPIC")
	kvmSetCPUID2     = iocOf[listHeader](iocWrite, 0x90, "KVM_SET_CPUID2")
	kvmGetCPUID2     = iocOf[listHeader](iocRead|iocWrite, 0x91, "KVM_GET_CPUID2")
	kvmGetMPState    = iocOf[MPState](iocRead, 0x98, "KVM_GET_MP_STATE")
	kvmSetMPState    = iocOf[MPState](iocWrite, 0x99, "KVM_SET_MP_STATE")
	kvmGetVCPUEvents = iocOf[Events](iocRead, 0x9f, "KVM_GET_VCPU_EVENTS")
	kvmSetVCPUEvents = iocOf[Events](iocWrite, 0xa0, "KVM_SET_VCPU_EVENTS")
	kvmGetDebugRegs  = iocOf[DebugRegs](iocRead, 0xa1, "KVM_GET_DEBUGREGS")
	kvmSetDebugRegs  = iocOf[DebugRegs](iocWrite, 0xa2, "KVM_SET_DEBUGREGS")
	kvmSetTSCKHz     = ioc(0xa2, "KVM_SET_TSC_KHZ")
	kvmGetTSCKHz     = ioc(0xa3, "KVM_GET_TSC_KHZ")
	kvmGetXSave      = iocOf[xsave](iocRead, 0xa4, "KVM_GET_XSAVE")
	kvmSetXSave      = iocOf[xsave](iocWrite, 0xa5, "KVM_SET_XSAVE")
	kvmGetXCRs       = iocOf[XCRs](iocRead, 0xa6, "KVM_GET_XCRS")
	kvmSetXCRs       = iocOf[XCRs](iocWrite, 0xa7, "KVM_SET_XCRS")
	kvmKVMClockCtrl  = ioc(0xad, "KVM_KVMCLOCK_CTRL")
	kvmGetSregs2     = iocOf[Sregs](iocRead, 0xcc, "KVM_GET_SREGS2")
	kvmSetSregs2     = iocOf[Sregs](iocWrite, 0xcd, "KVM_SET_SREGS2")
	kvmGetXSave2     = iocOf[xsave](iocRead, 0xcf, "KVM_GET_XSAVE2")
	kvmPreFault      = iocOf[preFault](iocRead|iocWrite, 0xd5, "KVM_PRE_FAULT_MEMORY")
)

// Cap is a KVM_CAP_* number.
type Cap uint32

// Capabilities that this package or its users ask for.
const (
	CapUserMemory             Cap = 3
	CapExtCPUID               Cap = 7
	CapMPState                Cap = 14
	CapIRQFD                  Cap = 32
	CapIOEventFD              Cap = 36
	CapAdjustClock            Cap = 39 // bits of ClockData.Flags
	CapVCPUEvents             Cap = 41
	CapDebugRegs              Cap = 50
	CapXCRs                   Cap = 56
	CapTSCControl             Cap = 60
	CapTSCDeadlineTimer       Cap = 72
	CapSignalMSI              Cap = 77
	CapSplitIRQChip           Cap = 121
	CapIOEventFDAnyLength     Cap = 122
	CapImmediateExit          Cap = 136
	CapManualDirtyLogProtect2 Cap = 168 // bits for EnableManualDirtyLog
	CapDirtyLogRing           Cap = 192 // largest ring in bytes
	CapSregs2                 Cap = 200
	CapBinaryStatsFD          Cap = 203
	CapXSave2                 Cap = 208 // size of the XSAVE area in bytes
	CapPreFaultMemory         Cap = 236
)

// listHeader is what kvm_cpuid2, kvm_msrs and kvm_irq_routing start with; for the last
// pad is flags.
type listHeader struct{ n, _ uint32 }

// Room in the lists that go to and come from the kernel; its own limits are
// KVM_MAX_CPUID_ENTRIES, less than MAX_IO_MSRS, and KVM_MAX_IRQ_ROUTES.
const (
	maxCPUID  = 256
	maxMSRs   = 255
	maxRoutes = 4096
)

type cpuidList struct { // kvm_cpuid2
	listHeader
	entries [maxCPUID]CPUIDEntry
}

type msrList struct { // kvm_msrs
	listHeader
	entries [maxMSRs]MSR
}

type msrIndexList struct { // kvm_msr_list
	n       uint32
	indices [1024]uint32
}

type preFault struct { // kvm_pre_fault_memory
	gpa, size uint64
	_         [6]uint64 // flags, of which there are none, and padding
}

type irqRouting struct { // kvm_irq_routing
	listHeader
	entries [maxRoutes]irqRoutingEntry
}

type irqRoutingEntry struct { // kvm_irq_routing_entry with the union's kvm_irq_routing_msi
	gsi, kind, _, _         uint32
	addrLo, addrHi, data, _ uint32
	_                       [4]uint32
}

const irqRoutingMSI = 2 // KVM_IRQ_ROUTING_MSI

type irqfd struct { // kvm_irqfd
	fd, gsi, flags, resampleFD uint32
	_                          [16]uint8
}

const irqfdDeassign = 1 << 0 // KVM_IRQFD_FLAG_DEASSIGN

type ioeventfd struct { // kvm_ioeventfd
	match, addr uint64
	length      uint32
	fd          int32
	flags       uint32
	_           [36]uint8
}

const (
	ioeventfdMatch    = 1 << 0 // KVM_IOEVENTFD_FLAG_DATAMATCH
	ioeventfdPIO      = 1 << 1 // KVM_IOEVENTFD_FLAG_PIO
	ioeventfdDeassign = 1 << 2 // KVM_IOEVENTFD_FLAG_DEASSIGN
)

type msi struct { // kvm_msi
	addrLo, addrHi, data, _, _ uint32
	_                          [12]uint8
}

type userMemoryRegion struct { // kvm_userspace_memory_region
	slot, flags     uint32
	gpa, size, host uint64
}

type dirtyLog struct { // kvm_dirty_log
	slot, _ uint32
	bitmap  *uint64
}

type clearDirtyLog struct { // kvm_clear_dirty_log
	slot, pages uint32
	first       uint64
	bitmap      *uint64
}

type dirtyGFN struct { // kvm_dirty_gfn
	flags, slot uint32
	offset      uint64
}

// Bits of CapManualDirtyLogProtect2, KVM_DIRTY_LOG_*.
const (
	manualProtect = 1 << 0 // KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
	initiallySet  = 1 << 1 // KVM_DIRTY_LOG_INITIALLY_SET
)

const (
	dirtyGFNDirty      = 1 << 0 // KVM_DIRTY_GFN_F_DIRTY
	dirtyGFNReset      = 1 << 1 // KVM_DIRTY_GFN_F_RESET
	dirtyLogPageOffset = 64     // KVM_DIRTY_LOG_PAGE_OFFSET
)

type enableCap struct { // kvm_enable_cap
	cap  Cap
	_    uint32
	args [4]uint64
	_    [64]uint8
}

type createDevice struct { // kvm_create_device
	kind, fd, _ uint32
}

type deviceAttr struct { // kvm_device_attr
	_, group uint32
	attr     uint64
	addr     *uint64
}

// The TSC of a vCPU: virt/kvm/devices/vcpu.rst, 4.
const (
	vcpuTSCControl = 0 // KVM_VCPU_TSC_CTRL
	vcpuTSCOffset  = 0 // KVM_VCPU_TSC_OFFSET
)

// The VFIO device. Before Linux 6.6 its KVM_DEV_VFIO_FILE was named GROUP, with the same numbers.
const (
	devTypeVFIO    = 4 // KVM_DEV_TYPE_VFIO
	devVFIOFile    = 1 // KVM_DEV_VFIO_FILE
	devVFIOFileAdd = 1 // KVM_DEV_VFIO_FILE_ADD
	devVFIOFileDel = 2 // KVM_DEV_VFIO_FILE_DEL
)

type xsave [4096]byte // kvm_xsave; its real size comes from CapXSave2

type statsHeader struct { // kvm_stats_header
	Flags, NameSize, Descs, IDOffset, DescOffset, DataOffset uint32
}

type statsDesc struct { // kvm_stats_desc; the name follows
	Flags      uint32
	Exponent   int16
	Size       uint16
	Offset     uint32
	BucketSize uint32
}

// runPage is the head of kvm_run.
type runPage struct {
	control                   uint32 // request_interrupt_window, immediate_exit, padding
	_                         uint32
	exitReason                uint32
	readyForInjection, ifFlag uint8
	_                         uint16
	cr8, apicBase             uint64
	exit                      [256]byte // one of the exit structures, by exitReason
}

const immediateExit = 1 << 8 // kvm_run.immediate_exit within control

type exitFailEntry struct {
	reason uint64
	cpu    uint32
}

type exitIO struct {
	out, size uint8
	port      uint16
	count     uint32
	offset    uint64
}

type exitMMIO struct {
	addr  uint64
	data  [8]byte
	size  uint32
	write uint8
}

type exitInternal struct {
	suberror, n uint32
	data        [16]uint64
}

// Suberrors, KVM_INTERNAL_ERROR_*.
const (
	internalEmulation  = 1
	internalSimulEx    = 2
	internalDelivery   = 3
	internalExitReason = 4
)

// insnOffset is emulation_failure.insn_size, which insn_bytes[15] follow. The structure
// overlays exitInternal; bit 0 of its flags, data[0], says that it is there.
const insnOffset = 16
