package vmm

import (
	"errors"
	"time"

	"baton/devices"
	"baton/devices/virtio/blk"
	"baton/kvm/guestmem"
	"baton/migrate"
)

// mover is the machine as the engine of migrations sees it: migrate.SourceMachine and
// migrate.TargetMachine. Its methods are called from the engine's goroutines and do their work
// in the main loop.
type mover struct{ *Machine }

// do runs f in the main loop.
func (v mover) do(f func() error) (err error) {
	if e := v.call(func() { err = f() }); e != nil {
		return e
	}
	return err
}

// Memory implements migrate.Machine.
func (v mover) Memory() *guestmem.Memory { return v.mem }

// Facts implements migrate.Machine.
func (v mover) Facts() (list []migrate.Fact) {
	_ = v.call(func() { list = v.facts() })
	return list
}

// Check implements migrate.TargetMachine.
func (v mover) Check(source []migrate.Fact) (list []string) {
	if err := v.call(func() { list = v.check(source) }); err != nil {
		list = []string{err.Error()}
	}
	return list
}

// Sections implements migrate.Machine.
func (v mover) Sections() (list []migrate.Section) {
	_ = v.call(func() {
		for _, s := range v.staters() {
			list = append(list, section{v.Machine, s})
		}
	})
	return list
}

// section is a device's state.
type section struct {
	m *Machine
	s devices.Stater
}

// Info implements migrate.Section.
func (s section) Info() migrate.SectionInfo { return migrate.SectionInfo(s.s.StateInfo()) }

// Save implements migrate.Section.
func (s section) Save() (data []byte, err error) {
	err = mover{s.m}.do(func() error { data, err = s.s.SaveState(); return err })
	return data, err
}

// Load implements migrate.Section.
func (s section) Load(version uint16, data []byte) error {
	return mover{s.m}.do(func() error {
		s.m.guestComes()
		return s.s.LoadState(version, data)
	})
}

// DirtySources implements migrate.SourceMachine.
func (v mover) DirtySources() (list []migrate.DirtySource) {
	_ = v.call(func() {
		list = v.dirtySources()
		v.migration.watched = list
	})
	return list
}

// Pause implements migrate.SourceMachine.
func (v mover) Pause() (running bool, err error) {
	err = v.do(func() error { running, err = v.pauseGuest(); return err })
	return running, err
}

// Resume implements migrate.SourceMachine.
func (v mover) Resume(running bool) error {
	return v.do(func() error { return v.resumeGuest(running) })
}

// Throttle implements migrate.SourceMachine.
func (v mover) Throttle(percent int) { _ = v.call(func() { v.throttleVCPUs(percent) }) }

// Map implements migrate.TargetMachine. An older kernel, and one without second-level page tables, cannot.
func (v mover) Map(gpa, n uint64) { _ = v.vcpus[0].PreFault(gpa, n) }

// Flush implements migrate.SourceMachine. It takes as long as the disks do, so it is not done
// in the main loop.
func (v mover) Flush() error { return v.eachDisk((*blk.Disk).Flush) }

// ReleaseLocks implements migrate.SourceMachine.
func (v mover) ReleaseLocks() error { return v.eachDisk((*blk.Disk).Unlock) }

// OfferLocks implements migrate.SourceMachine.
func (v mover) OfferLocks() error { return v.eachDisk((*blk.Disk).Offer) }

// ReserveLocks implements migrate.TargetMachine.
func (v mover) ReserveLocks() error { return v.eachDisk((*blk.Disk).Reserve) }

// TakeLocks implements migrate.Machine.
func (v mover) TakeLocks() error { return v.eachDisk((*blk.Disk).Lock) }

func (v mover) eachDisk(f func(*blk.Disk) error) (err error) {
	var disks []*blk.Disk
	if err := v.call(func() { disks = v.lockables() }); err != nil {
		return err
	}
	for _, d := range disks {
		err = errors.Join(err, f(d))
	}
	return err
}

// Start implements migrate.TargetMachine.
func (v mover) Start(running bool, stopped time.Duration) error {
	return v.do(func() error { return v.arrived(running, stopped) })
}

// TakeLate implements migrate.SourceMachine.
func (v mover) TakeLate() (list []migrate.Late) {
	_ = v.call(func() { list = v.takeLate() })
	return list
}

// GiveLate implements migrate.TargetMachine.
func (v mover) GiveLate(list []migrate.Late) { _ = v.call(func() { v.giveLate(list) }) }
