package virtio

import "baton/kvm/guestmem"

// Chain is one request: the guest's buffers, in order. The windows are guest memory, which
// the guest may change at any time: copy first, then check the copy. Read and Write take
// from the front of Out and In; a device may also slice and shorten both itself.
type Chain struct {
	Head uint16
	Out  [][]byte // what the device reads
	In   [][]byte // what the device writes

	out, in  [][]byte         // Out and In as they were, for reuse
	segments []guestmem.Range // guest-physical addresses of In
}

func (c *Chain) reset() {
	c.Out, c.In, c.segments = c.out[:0], c.in[:0], c.segments[:0]
}

// Read copies from Out until p is full or Out is empty, and returns how much it was.
func (c *Chain) Read(p []byte) (n int) {
	for n < len(p) && len(c.Out) > 0 {
		k := copy(p[n:], c.Out[0])
		c.Out = Skip(c.Out, k)
		n += k
	}
	return n
}

// Write copies p to In until p or In is exhausted, and returns how much it was.
func (c *Chain) Write(p []byte) (n int) {
	for n < len(p) && len(c.In) > 0 {
		k := copy(c.In[0], p[n:])
		c.In = Skip(c.In, k)
		n += k
	}
	return n
}

// OutLen is the number of bytes left in Out.
func (c *Chain) OutLen() uint32 { return length(c.Out) }

// InLen is the number of bytes left in In.
func (c *Chain) InLen() uint32 { return length(c.In) }

func length(bufs [][]byte) (n uint32) {
	for _, b := range bufs {
		n += uint32(len(b)) // Pop keeps the sum below 4 GiB
	}
	return n
}

// Skip drops the first n bytes of bufs, and buffers that are used up. It changes bufs.
func Skip(bufs [][]byte, n int) [][]byte {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	if n > 0 && len(bufs) > 0 {
		bufs[0] = bufs[0][n:]
	}
	return bufs
}
