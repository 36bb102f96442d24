package vmm

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"baton/devices"
	"baton/kvm"
)

// ioapicPins is the number of pins of the userspace IOAPIC; KVM reserves as many GSIs.
const ioapicPins = 24

// maxGSI is KVM_MAX_IRQ_ROUTES, the number of routes that one VM may have.
const maxGSI = 4096

// irqRouter owns the VM's table of GSI routes. GSIs below ioapicPins mirror the IOAPIC's
// redirection table, for KVM must know which vectors' EOIs to report; the ones above are
// handed out as message-signalled vectors.
//
//	IOAPIC pin  ── SignalMSI ─────────────────────> LAPIC   (route n: EOI exits only)
//	eventfd     ── irqfd ──> route ioapicPins+n ──> LAPIC
type irqRouter struct {
	vm *kvm.VM

	mu     sync.Mutex
	routes map[uint32]devices.MSI
	used   map[uint32]bool
	// held: changes wait for Unquiesce, for each costs the kernel a grace period, and a guest
	// that arrives brings many.
	held bool
}

// Quiesce implements [devices.Quiescer]: no interrupt is raised until Unquiesce.
func (r *irqRouter) Quiesce() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held = true
	return nil
}

// Unquiesce implements [devices.Quiescer]. It comes before that of all who raise interrupts.
func (r *irqRouter) Unquiesce() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.held {
		return nil
	}
	r.held = false
	return r.flush()
}

func newIRQRouter(vm *kvm.VM) *irqRouter {
	return &irqRouter{vm: vm, routes: make(map[uint32]devices.MSI), used: make(map[uint32]bool)}
}

// SignalMSI implements devices.MSISink.
func (r *irqRouter) SignalMSI(m devices.MSI) error { return r.vm.SignalMSI(m.Addr, m.Data) }

// setPin follows a change of the IOAPIC's redirection table. Only level-triggered interrupts end
// with an EOI that the IOAPIC has to know of, and it may come while the pin is masked: Linux
// does so when a thread is to handle the interrupt.
func (r *irqRouter) setPin(pin int, m devices.MSI, _ bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m.Data&msiLevel == 0 {
		_ = r.drop(uint32(pin))
	} else {
		_ = r.set(uint32(pin), m) // fails only for a message that KVM cannot send either
	}
}

// msiLevel is the trigger mode of a message: Intel SDM vol. 3, 11.11.2.
const msiLevel = 1 << 15

// set installs one route; the table goes to the kernel only when it changes, which costs
// the kernel a grace period.
func (r *irqRouter) set(gsi uint32, m devices.MSI) error {
	if old, ok := r.routes[gsi]; ok && old == m {
		return nil
	}
	old, had := r.routes[gsi]
	r.routes[gsi] = m
	err := r.flush()
	if err != nil {
		if had {
			r.routes[gsi] = old
		} else {
			delete(r.routes, gsi)
		}
	}
	return err
}

func (r *irqRouter) drop(gsi uint32) error {
	if _, ok := r.routes[gsi]; !ok {
		return nil
	}
	delete(r.routes, gsi)
	return r.flush()
}

func (r *irqRouter) flush() error {
	if r.held {
		return nil
	}
	table := make([]kvm.Route, 0, len(r.routes))
	for gsi, m := range r.routes {
		table = append(table, kvm.Route{GSI: gsi, Addr: m.Addr, Data: m.Data})
	}
	return r.vm.SetRoutes(table)
}

// text is info irq: every GSI that is in use, with its route if it has one.
func (r *irqRouter) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for gsi := range uint32(maxGSI) {
		if m, routed := r.routes[gsi]; routed {
			fmt.Fprintf(&b, "gsi %d: address %#x, data %#x\n", gsi, m.Addr, m.Data)
		} else if r.used[gsi] {
			fmt.Fprintf(&b, "gsi %d: no route\n", gsi)
		}
	}
	return b.String()
}

// NewVector implements devices.VectorSource.
func (r *irqRouter) NewVector() (devices.Vector, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for gsi := uint32(ioapicPins); gsi < maxGSI; gsi++ {
		if r.used[gsi] {
			continue
		}
		e, err := devices.NewEventFD()
		if err != nil {
			return nil, err
		}
		r.used[gsi] = true
		return &vector{event: e, router: r, gsi: gsi}, nil
	}
	return nil, fmt.Errorf("allocate interrupt vector: all %d GSIs are in use", maxGSI-ioapicPins)
}

// vector is one GSI with its eventfd. While it is masked no irqfd is bound, so signals
// stay in the eventfd; KVM looks at the eventfd when the irqfd is bound again.
type vector struct {
	event  *devices.EventFD
	router *irqRouter
	gsi    uint32
	bound  bool // an irqfd is bound; guarded by router.mu
}

// Set implements devices.Vector.
func (v *vector) Set(m devices.MSI, masked bool) error {
	r := v.router
	r.mu.Lock()
	defer r.mu.Unlock()
	if masked {
		return v.unbind()
	}
	if err := r.set(v.gsi, m); err != nil {
		return err
	}
	if v.bound {
		return nil
	}
	if err := r.vm.IRQFD(v.event.FD(), v.gsi); err != nil {
		return err
	}
	v.bound = true
	return nil
}

func (v *vector) unbind() error {
	if !v.bound {
		return nil
	}
	v.bound = false
	return v.router.vm.RemoveIRQFD(v.event.FD(), v.gsi)
}

// Pending implements devices.Vector.
func (v *vector) Pending() bool {
	v.router.mu.Lock()
	defer v.router.mu.Unlock()
	return !v.bound && v.event.Pending()
}

// EventFD implements devices.Vector.
func (v *vector) EventFD() int { return v.event.FD() }

// Signal implements devices.Vector.
func (v *vector) Signal() { v.event.Signal() }

// Close gives the GSI back.
func (v *vector) Close() error {
	r := v.router
	r.mu.Lock()
	defer r.mu.Unlock()
	err := errors.Join(v.unbind(), r.drop(v.gsi), v.event.Close())
	delete(r.used, v.gsi)
	return err
}

// doorbells implements devices.Doorbells with ioeventfds on memory addresses.
type doorbells struct{ vm *kvm.VM }

func (d doorbells) AddDoorbell(addr uint64, size, fd int) error {
	return d.vm.IOEventFD(kvm.IOEvent{Addr: addr, Len: size, FD: fd})
}

func (d doorbells) RemoveDoorbell(addr uint64, size, fd int) error {
	return d.vm.RemoveIOEventFD(kvm.IOEvent{Addr: addr, Len: size, FD: fd})
}
