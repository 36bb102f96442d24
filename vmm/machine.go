package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"baton/boot"
	"baton/boot/acpi"
	"baton/devices"
	"baton/devices/chipset"
	"baton/devices/pci"
	"baton/kvm"
	"baton/kvm/guestmem"
	"baton/migrate"
)

// Machine is one virtual machine and all that it holds of the host.
type Machine struct {
	cfg    *Config
	log    *slog.Logger
	events *EventBus

	sys    *kvm.System
	kvm    *kvm.VM
	mem    *guestmem.Memory
	layout boot.Map
	ports  *devices.Bus // I/O ports
	mmio   *devices.Bus
	irq    *irqRouter
	ioapic *chipset.IOAPIC
	pm     *chipset.PM
	rtc    *chipset.RTC
	serial *chipset.Serial // COM1, may be nil
	pci    *pci.RootComplex
	vfio   *passthrough
	vcpus  []*vcpu
	ring   *kvmRing    // nil without -accel dirty-ring-size
	loaded *boot.Entry // the kernel is in RAM and has not run

	gate     *gate
	throttle throttle
	requests chan request
	control

	mu    sync.Mutex
	state State

	closers []func() error // what New acquired, in order
}

// New makes the machine, with everything it needs of the host opened and nothing running.
// The error names everything that is wrong at once. Ctx ends waits for a chardev's peer.
func New(ctx context.Context, cfg *Config, log *slog.Logger) (_ *Machine, err error) {
	m := &Machine{
		cfg: cfg, log: log, events: NewEventBus(), state: StatePrelaunch,
		ports: devices.NewBus(), mmio: devices.NewBus(),
		gate: newGate(cfg.SMP), requests: make(chan request, 1),
		control: control{
			calls: make(chan func()), ended: make(chan struct{}), posts: posts{wake: make(chan struct{}, 1)},
			migration: migration{params: migrate.DefaultParams(), capabilities: migrate.Capabilities{}},
		},
	}
	if cfg.Incoming != "" {
		m.state = StateInMigrate
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	sys, err := kvm.Open()
	if err != nil {
		return nil, err
	}
	m.sys = sys
	m.onClose(sys.Close) // a vCPU's state is read by the list that it has
	if err := m.checkKVM(sys); err != nil {
		return nil, err
	}
	if err := m.buildCore(sys); err != nil {
		return nil, err
	}
	// The kernel is loaded here, so that what is wrong with it is said with all the rest.
	if err := errors.Join(m.buildChipset(ctx), m.buildDevices(ctx), m.openMonitors(ctx), m.firstLoad()); err != nil {
		return nil, err
	}
	if err := m.buildVCPUs(sys); err != nil {
		return nil, err
	}
	m.migration.cpu = m.cpuFacts()
	return m, nil
}

// Events is where the machine says what happens to it.
func (m *Machine) Events() *EventBus { return m.events }

// checkKVM refuses a KVM that lacks what is needed, or cannot run the kernel.
func (m *Machine) checkKVM(sys *kvm.System) error {
	if err := sys.Check(); err != nil {
		return err
	}
	if sys.Kind() != kvm.PVM || m.cfg.Accel.Force {
		return nil
	}
	linux, err := boot.IsLinux(m.cfg.Kernel)
	if err != nil || !linux { // a kernel that cannot be read is reported when it is loaded
		return nil
	}
	return fmt.Errorf("run %s: this host's /dev/kvm is kvm_pvm, a software KVM that cannot run a stock Linux kernel\n"+
		"use a host with VMX or SVM, or the nested host (make nested); -accel kvm,force=on tries all the same", m.cfg.Kernel)
}

// buildCore makes the VM, its RAM and its interrupt routes.
func (m *Machine) buildCore(sys *kvm.System) (err error) {
	if m.layout, err = boot.Layout(m.cfg.Memory.Size, physBits(sys)); err != nil {
		return err
	}
	m.layout.ECAM.Size = uint64(m.buses()) * busWindow
	m.mem, err = guestmem.New(m.layout.RAM(), guestmem.Options{PageSize: m.cfg.Memory.HugePages, Prealloc: m.cfg.Memory.Prealloc})
	if err != nil {
		return err
	}
	m.onClose(m.mem.Close)
	if m.kvm, err = sys.CreateVM(); err != nil {
		return err
	}
	m.onClose(m.kvm.Close)
	if err := errors.Join(
		m.kvm.SetTSSAddr(boot.TSSAddr),
		m.kvm.SetIdentityMapAddr(boot.IdentityMap),
		m.kvm.EnableSplitIRQChip(ioapicPins),
	); err != nil {
		return err
	}
	if n := m.cfg.Accel.DirtyRing; n > 0 {
		if err := m.kvm.EnableDirtyRing(int(n) * kvm.DirtyRingEntry); err != nil {
			return err
		}
		m.ring = &kvmRing{vm: m.kvm, mem: m.mem}
	}
	for slot, r := range m.mem.Regions() {
		if err := m.kvm.SetMemory(uint32(slot), r.GPA, r.Host, 0); err != nil {
			return err
		}
	}
	m.irq = newIRQRouter(m.kvm)
	m.vfio = newPassthrough(m.kvm, m.mem)
	m.onClose(m.vfio.Close)
	return nil
}

// busWindow is a bus's part of the ECAM, in bytes: PCIe 7.2.2.
const busWindow = 1 << 20

// buses is how many PCI buses there are: the root bus and one behind each port. The guest is
// shown an ECAM of just those, because Linux looks for devices on every bus that it covers,
// 32 exits each.
func (m *Machine) buses() int {
	n := 1
	for i := range m.cfg.Devices {
		if m.cfg.Devices[i].Driver == "pcie-root-port" {
			n++
		}
	}
	return n
}

// physBits is the width of the vCPUs' physical addresses: CPUID 0x80000008, EAX[7:0].
func physBits(sys *kvm.System) int {
	const architecturalMinimum = 36
	cpuid, err := sys.SupportedCPUID()
	if err == nil {
		for _, e := range cpuid {
			if e.Function == 0x8000_0008 && e.Eax&0xff != 0 {
				return int(e.Eax & 0xff)
			}
		}
	}
	return architecturalMinimum
}

// buildChipset makes what lies outside PCI.
func (m *Machine) buildChipset(ctx context.Context) error {
	m.ioapic = chipset.NewIOAPIC(m.irq, ioapicPins)
	m.ioapic.OnRoute(m.irq.setPin)
	m.pm = chipset.NewPM(m.ioapic.Line(chipset.GEDPin), chipset.Power{
		Reset: func() { m.request(requestReset, "guest-reset") },
		Off:   func() { m.request(requestPowerOff, "guest-shutdown") },
	})
	m.rtc = chipset.NewRTC(time.Now)
	debug := chipset.NewDebugPort(&lineLogger{log: m.log})
	err := errors.Join(
		m.mmio.Insert(devices.Range{Base: boot.IOAPICAddr, Size: chipset.IOAPICSize}, "ioapic", m.ioapic),
		m.pm.Attach(m.ports),
		m.ports.Insert(devices.Range{Base: chipset.RTCPort, Size: chipset.RTCPorts}, "rtc", m.rtc),
		m.ports.Insert(devices.Range{Base: chipset.BochsDebugPort, Size: 1}, "debug port", debug),
		m.ports.Insert(devices.Range{Base: chipset.DebugPort, Size: 1}, "debug port", debug),
		m.ports.Insert(devices.Range{Base: chipset.PanicPort, Size: 1}, "pvpanic", chipset.NewPVPanic(m.panicked)),
	)
	if err != nil {
		return err
	}
	port, err := m.openSerial(ctx)
	if err != nil || port == nil {
		return err
	}
	m.serial = chipset.NewSerial(m.ioapic.Line(chipset.COM1Pin), port)
	m.onClose(m.serial.Close)
	return m.ports.Insert(devices.Range{Base: chipset.COM1Port, Size: chipset.SerialPorts}, "serial", m.serial)
}

// buildDevices makes the PCI tree. Every device is tried, so that all errors are seen.
func (m *Machine) buildDevices(ctx context.Context) error {
	l := pci.Layout{ECAM: m.layout.ECAM, MMIO32: m.layout.MMIO32, MMIO64: m.layout.MMIO64}
	m.pci = pci.NewRootComplex(m.mmio, l, m.log)
	m.onClose(m.nics.close)
	err := errors.Join(
		m.mmio.Insert(l.ECAM, "ecam", m.pci),
		m.ports.Insert(devices.Range{Base: chipset.SlotPort, Size: pci.SlotBlockSize}, "slots", m.pci.SlotBlock()))
	m.recoverBindings()
	b := builder{Machine: m, ctx: ctx}
	return errors.Join(err, b.build(), m.openNetdevs(ctx))
}

// buildVCPUs makes the processors, which have not run yet.
func (m *Machine) buildVCPUs(sys *kvm.System) error {
	for id := range m.cfg.SMP {
		k, err := m.kvm.CreateVCPU(id)
		if err != nil {
			return err
		}
		m.onClose(k.Close)
		cpuid, err := sys.GuestCPUID(id, m.cfg.SMP)
		if err != nil {
			return err
		}
		if err := k.SetCPUID(cpuid); err != nil {
			return err
		}
		c := &vcpu{VCPU: k, m: m}
		if c.power, err = k.SaveState(); err != nil {
			return fmt.Errorf("vcpu %d: %w", id, err)
		}
		m.vcpus = append(m.vcpus, c)
		if m.ring != nil {
			m.ring.vcpus = m.vcpus
		}
	}
	return nil
}

// resetDevices puts every device into its state after power-on.
func (m *Machine) resetDevices() error {
	m.ioapic.Reset()
	m.pm.Reset()
	if m.serial != nil {
		m.serial.Reset()
	}
	return m.pci.Reset()
}

// firstLoad does what loadKernel does, for the next one, too.
func (m *Machine) firstLoad() error {
	if m.State() == StateInMigrate {
		return nil // RAM comes as it is
	}
	entry, err := m.loadKernel()
	m.loaded = &entry
	return err
}

// kernelCache is where unpacked kernels are kept: $XDG_CACHE_HOME or ~/.cache, if there is one.
func kernelCache() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "baton", "kernels")
}

// loadKernel fills RAM with the kernel and what it wants to know.
func (m *Machine) loadKernel() (boot.Entry, error) {
	if entry := m.loaded; entry != nil {
		m.loaded = nil
		return *entry, nil
	}
	tables, _ := acpi.Tables(acpi.Config{
		Base:   boot.ACPIBase,
		CPUs:   m.cfg.SMP,
		IOAPIC: boot.IOAPICAddr,
		ECAM:   m.layout.ECAM,
		MMIO32: m.layout.MMIO32,
		MMIO64: m.layout.MMIO64,
		Power: acpi.Power{
			SleepControl: chipset.SleepControlPort,
			SleepStatus:  chipset.SleepStatusPort,
			SleepTypeS5:  chipset.SleepTypeS5,
			Reset:        chipset.ResetPort,
			ResetValue:   chipset.ResetValue,
			Event:        chipset.EventPort,
			EventGSI:     chipset.GEDPin,
			PowerButton:  chipset.EventPowerButton,
			SlotEvent:    chipset.EventSlot,
		},
		SlotBlock:     chipset.SlotPort,
		RootPorts:     m.acpiPorts(),
		Panic:         chipset.PanicPort,
		Serial:        m.serial != nil,
		NativeHotplug: m.cfg.Machine.NativeHotplug,
	})
	return boot.Load(m.mem, boot.Config{
		Map: m.layout, Kernel: m.cfg.Kernel, Initrd: m.cfg.Initrd, Cmdline: m.cfg.Append,
		ACPI: tables, Cache: kernelCache(),
	})
}

func (m *Machine) onClose(f func() error) { m.closers = append(m.closers, f) }

// Close gives back all that the machine holds. It must not be running.
func (m *Machine) Close() error {
	var errs []error
	for _, f := range slices.Backward(m.closers) {
		errs = append(errs, f())
	}
	m.closers = nil
	m.events.Close()
	return errors.Join(errs...)
}

// Serve makes the machine that cfg describes and runs it until it ends: see Run.
func Serve(ctx context.Context, cfg *Config) (err error) {
	log, closeLog, err := openLog(cfg.LogFile)
	if err != nil {
		return err
	}
	defer closeLog()
	m, err := New(ctx, cfg, log)
	if err != nil && ctx.Err() != nil {
		return nil // told to end while it waited for somebody
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if cfg.EventLog != "" {
		f, err := os.Create(cfg.EventLog)
		if err != nil {
			return fmt.Errorf("create event log: %w", err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := errors.Join(m.events.LogTo(f), f.Close()); err != nil {
				log.Warn("event log: " + err.Error())
			}
		}()
		defer func() { m.events.Close(); <-done }()
	}
	if cfg.PIDFile != "" {
		if err := os.WriteFile(cfg.PIDFile, fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
			return fmt.Errorf("write pid file: %w", err)
		}
		defer os.Remove(cfg.PIDFile)
	}
	return m.Run(ctx)
}
