package vmm

import (
	"errors"
	"fmt"
	"sync"

	"baton/devices/vhost"
	"baton/devices/virtio/net"
	"baton/kvm"
	"baton/kvm/guestmem"
)

// ownWrites are what this process writes to guest memory.
type ownWrites struct{ mem *guestmem.Memory }

// Start implements migrate.DirtySource.
func (w ownWrites) Start() error { w.mem.StartDirtyLog(); return nil }

// Sync implements migrate.DirtySource.
func (w ownWrites) Sync(b *guestmem.Bitmap) error { w.mem.SyncDirtyLog(b); return nil }

// Stop implements migrate.DirtySource.
func (w ownWrites) Stop() error { w.mem.StopDirtyLog(); return nil }

// kvmLog is what the guest writes, by KVM's log of each region. In the kernel's manual mode
// a page is protected again only when it is cleared.
type kvmLog struct {
	vm    *kvm.VM
	mem   *guestmem.Memory
	words [][]uint64 // by region: pages that have been reported, and are not protected again
}

func newKVMLog(vm *kvm.VM, mem *guestmem.Memory) *kvmLog {
	l := &kvmLog{vm: vm, mem: mem}
	for _, r := range mem.Regions() {
		l.words = append(l.words, make([]uint64, (r.Size/guestmem.PageSize+63)/64))
	}
	return l
}

// setMemory has all regions logged, or none.
func (l *kvmLog) setMemory(flags kvm.MemFlags) (err error) {
	for slot, r := range l.mem.Regions() {
		err = errors.Join(err, l.vm.SetMemory(uint32(slot), r.GPA, r.Host, flags))
	}
	return err
}

// Start implements migrate.DirtySource. The kernel begins with every page in the log and none protected.
func (l *kvmLog) Start() error {
	if err := l.vm.EnableManualDirtyLog(); err != nil {
		return err
	}
	if err := l.setMemory(kvm.MemLogDirty); err != nil {
		return errors.Join(err, l.setMemory(0))
	}
	for _, words := range l.words {
		for i := range words {
			words[i] = ^uint64(0)
		}
	}
	return nil
}

// Sync implements migrate.DirtySource.
func (l *kvmLog) Sync(b *guestmem.Bitmap) error {
	for slot, words := range l.words {
		if err := l.vm.GetDirtyLog(uint32(slot), words); err != nil {
			return err
		}
		b.OrWords(slot, words)
	}
	return nil
}

// Protect implements migrate.Protector. KVM holds the lock of the VM's page tables meanwhile, for which every page
// fault of the guest waits.
func (l *kvmLog) Protect(gpa, size uint64) error {
	for slot, r := range l.mem.Regions() {
		if gpa-r.GPA >= r.Size {
			continue
		}
		first, end := (gpa-r.GPA)/guestmem.PageSize/64, (gpa-r.GPA+size+guestmem.PageSize*64-1)/guestmem.PageSize/64
		words := l.words[slot][first:end]
		if empty(words) {
			return nil
		}
		n := min(end*64, r.Size/guestmem.PageSize) - first*64
		if err := l.vm.ClearDirtyLog(uint32(slot), first*64, uint32(n), words); err != nil {
			return err
		}
		clear(words)
	}
	return nil
}

func empty(words []uint64) bool {
	for _, w := range words {
		if w != 0 {
			return false
		}
	}
	return true
}

// Stop implements migrate.DirtySource.
func (l *kvmLog) Stop() error { return l.setMemory(0) }

// kvmRing is what the guest writes, by a list for each vCPU, whose length is the number of pages
// written rather than the size of RAM. A list that is full stops its vCPU until it is emptied.
type kvmRing struct {
	vm    *kvm.VM
	mem   *guestmem.Memory
	vcpus []*vcpu

	mu    sync.Mutex
	found *guestmem.Bitmap // nil: nobody asks
}

// Start implements migrate.DirtySource. What the lists have by then does not matter.
func (r *kvmRing) Start() error {
	log := kvmLog{vm: r.vm, mem: r.mem}
	if err := log.setMemory(kvm.MemLogDirty); err != nil {
		return errors.Join(err, log.setMemory(0))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.found = guestmem.NewBitmap(r.mem)
	return nil
}

// Sync implements migrate.DirtySource.
func (r *kvmRing) Sync(b *guestmem.Bitmap) error {
	if err := r.collect(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	b.Or(r.found)
	r.found.Clear()
	return nil
}

// Stop implements migrate.DirtySource.
func (r *kvmRing) Stop() error {
	log := kvmLog{vm: r.vm, mem: r.mem}
	err := errors.Join(log.setMemory(0), r.collect())
	r.mu.Lock()
	defer r.mu.Unlock()
	r.found = nil
	return err
}

// collect empties the lists of all vCPUs; so does a vCPU whose own one is full.
func (r *kvmRing) collect() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	regions := r.mem.Regions()
	for _, c := range r.vcpus {
		c.DirtyRing().Collect(func(slot uint32, page uint64) {
			if slot &= 0xffff; r.found != nil && int(slot) < len(regions) { // the upper half is the address space
				r.found.Set(regions[slot].GPA+page*guestmem.PageSize, guestmem.PageSize)
			}
		})
	}
	_, err := r.vm.ResetDirtyRings()
	return err
}

// vhostLog is what vhost-net writes.
type vhostLog struct {
	mem  *guestmem.Memory
	nets []*net.Net
	log  *vhost.Log
}

// Start implements migrate.DirtySource.
func (v *vhostLog) Start() (err error) {
	if v.log, err = vhost.NewLog(v.mem); err != nil {
		return err
	}
	for _, n := range v.nets {
		if err := n.SetLog(v.log); err != nil {
			return errors.Join(err, v.Stop())
		}
	}
	return nil
}

// Sync implements migrate.DirtySource.
func (v *vhostLog) Sync(b *guestmem.Bitmap) error { v.log.Sync(b); return nil }

// Stop implements migrate.DirtySource. The log of a device that may still write to it stays.
func (v *vhostLog) Stop() (err error) {
	for _, n := range v.nets {
		err = errors.Join(err, n.SetLog(nil))
	}
	if err != nil {
		return fmt.Errorf("stop the log of vhost-net: %w", err)
	}
	return v.log.Close()
}
