package vfio

import (
	"errors"
	"fmt"
	"sync/atomic"

	"baton/devices"
	"baton/devices/pci"
)

// Line is a wired interrupt whose level is only sampled: the guest's end of the interrupt
// lowers it, and then calls what it was made with.
type Line interface {
	devices.Line
	Close()
}

// intx is the function's interrupt pin (PCIe 6.1.2). The kernel masks it when it fires:
//
//	device ──> host masks, eventfd ──> wait ──> Line ──> guest ── EOI ──> ended ──> host unmasks,
//	                                                      and fires again if it is still asserted
//
// It is on while the guest has turned the function on but neither kind of MSI.
type intx struct {
	f       *Function
	pin     int // 1: INTA#
	on      bool
	event   *devices.EventFD
	line    Line
	ending  atomic.Bool
	stopped chan struct{}
}

// updateINTx follows what the guest's registers say. The caller holds f.mu.
func (f *Function) updateINTx() error {
	x := f.intx
	if x == nil {
		return nil
	}
	command := f.c.Uint16(pci.RegCommand)
	slot, there := f.c.RootSlot()
	want := there && command&(pci.CommandMemory|pci.CommandMaster) != 0 && command&commandINTxOff == 0 &&
		!f.enabled[irqMSI] && !f.enabled[irqMSIX]
	switch {
	case want && !x.on:
		return x.start(slot)
	case !want && x.on:
		return x.stop()
	}
	return nil
}

func (x *intx) start(slot int) (err error) {
	if x.event, err = devices.NewEventFD(); err != nil {
		return err
	}
	x.on, x.stopped = true, make(chan struct{})
	x.ending.Store(false)
	x.line = x.f.o.INTx(slot, x.pin, func() { _ = x.f.hw.unmask(irqINTX) }) // fails when it is off
	go x.wait(x.event, x.line, x.stopped)
	if err := x.f.hw.setIRQs(irqINTX, []int32{int32(x.event.FD())}); err != nil {
		return errors.Join(fmt.Errorf("turn INTx on: %w", err), x.end())
	}
	return nil
}

// wait raises the line whenever the device's interrupt fires.
func (x *intx) wait(event *devices.EventFD, line Line, stopped chan struct{}) {
	defer close(stopped)
	for event.Wait() == nil && !x.ending.Load() {
		line.SetLevel(true)
	}
}

func (x *intx) stop() error {
	return errors.Join(x.f.hw.setIRQs(irqINTX, nil), x.end())
}

// end undoes start on this side.
func (x *intx) end() error {
	x.ending.Store(true)
	x.event.Signal()
	<-x.stopped
	x.line.Close()
	x.on = false
	return x.event.Close()
}

var _ pci.Function = (*Function)(nil)
