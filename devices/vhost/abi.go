package vhost

// ioctl numbers of <linux/vhost.h>. The arguments are pointers; a uint64 where none is named.
const (
	getFeatures   = 0x8008af00
	setFeatures   = 0x4008af00
	setOwner      = 0x0000af01 // no argument
	setMemTable   = 0x4008af03 // memTable
	setLogBase    = 0x4008af04
	setVringNum   = 0x4008af10 // vringState
	setVringAddr  = 0x4028af11 // vringAddr
	setVringBase  = 0x4008af12 // vringState
	getVringBase  = 0xc008af12 // vringState
	setVringKick  = 0x4008af20 // vringFile
	setVringCall  = 0x4008af21 // vringFile
	setVringErr   = 0x4008af22 // vringFile
	netSetBackend = 0x4008af30 // vringFile
)

// Dirty log: featureLogAll is VHOST_F_LOG_ALL, vringLog is VHOST_VRING_F_LOG of vringAddr.flags.
const (
	featureLogAll = 1 << 26
	vringLog      = 1 << 0
)

// maxRegions is the kernel's default limit, the parameter max_mem_regions of the module vhost.
const maxRegions = 64

// vringState mirrors struct vhost_vring_state.
type vringState struct{ index, num uint32 }

// vringFile mirrors struct vhost_vring_file; fd -1 unbinds.
type vringFile struct {
	index uint32
	fd    int32
}

// vringAddr mirrors struct vhost_vring_addr; the addresses are the VMM's, not the guest's.
type vringAddr struct {
	index, flags      uint32
	desc, used, avail uint64
	log               uint64
}

// memRegion mirrors struct vhost_memory_region.
type memRegion struct{ gpa, size, host, _ uint64 }

// memTable mirrors struct vhost_memory, whose array is as long as n says.
type memTable struct {
	n       uint32
	_       uint32
	regions [maxRegions]memRegion
}
