package blk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"

	"baton/devices/virtio"

	"golang.org/x/sys/unix"
)

// SectorSize is the unit of the protocol, whatever the disk's block size (5.2.4).
const SectorSize = 512

// Options say how a disk is opened.
type Options struct {
	// ReadOnly opens for reading only, and lets other readers in.
	ReadOnly bool
	// IgnoreFlush completes flushes at once: fast, and the image is lost when the host
	// crashes (QEMU's cache=unsafe).
	IgnoreFlush bool
	// Unlocked opens without the lock, which is another machine's until Lock. The disk is not to
	// be used before.
	Unlocked bool
}

// Disk is a raw image file or a host block device, locked against others while in use.
type Disk struct {
	path string
	fd   int
	size int64 // bytes
	o    Options
	// inMemory: the file system cannot block for long (tmpfs).
	inMemory bool
	// neverNoWait [read, write]: RWF_NOWAIT is not supported.
	neverNoWait [2]atomic.Bool
	blockSize   uint32 // bytes the file system likes best
}

// Open opens and locks a disk. Its errors name the path and, where there is something to
// do, say what.
func Open(path string, o Options) (*Disk, error) {
	mode := unix.O_RDWR
	if o.ReadOnly {
		mode = unix.O_RDONLY
	}
	// O_NONBLOCK at first, so that a FIFO given by mistake does not hang.
	fd, err := unix.Open(path, mode|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, openError(path, o, err)
	}
	d := &Disk{path: path, fd: fd, o: o}
	if err := errors.Join(unix.SetNonblock(fd, false), d.examine()); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	return d, nil
}

func openError(path string, o Options, err error) error {
	hint := ""
	switch {
	case err == unix.ENOENT:
		hint = "\ncreate an empty one with: truncate -s 10G " + path
	case err == unix.EISDIR:
		err = errNoDisk
	case o.ReadOnly:
	case err == unix.EACCES, err == unix.EROFS, err == unix.EPERM:
		hint = "\nmake it writable for this user, or add readonly=on"
	}
	return fmt.Errorf("disk %s: %w%s", path, err, hint)
}

var errNoDisk = errors.New("neither a file nor a block device")

// examine checks and locks what was opened.
func (d *Disk) examine() error {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return err
	}
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFBLK {
		return errNoDisk
	}
	if !d.o.Unlocked {
		if err := d.lock(st, 0, 0); err != nil {
			return err
		}
	}
	size, err := unix.Seek(d.fd, 0, io.SeekEnd) // works on block devices as well
	switch {
	case err != nil:
		return err
	case size == 0:
		return fmt.Errorf("is empty\ngive it a size with: truncate -s 10G %s", d.path)
	case size%SectorSize != 0:
		return fmt.Errorf("size of %d bytes is not a multiple of %d: not a raw image?\nround it up with: truncate -s %%%d %s",
			size, SectorSize, SectorSize, d.path)
	}
	var fs unix.Statfs_t
	d.inMemory = unix.Fstatfs(d.fd, &fs) == nil && fs.Type == unix.TMPFS_MAGIC && st.Mode&unix.S_IFMT == unix.S_IFREG
	d.size, d.blockSize = size, uint32(st.Blksize)
	return nil
}

// token is the number of bytes, the first of the file, whose lock says whose the disk is next. A
// machine has it together with the rest, but offers it to the one that its guest moves to.
const token = 1

// lock takes an OFD lock on n bytes, 0 for all that there can be, from start on. It ends with the
// descriptor. On the whole file it also keeps QEMU out, whose locks, on other bytes, are of the same kind.
func (d *Disk) lock(st unix.Stat_t, start, n int64) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: start, Len: n}
	if d.o.ReadOnly {
		l.Type = unix.F_RDLCK
	}
	err := unix.FcntlFlock(uintptr(d.fd), unix.F_OFD_SETLK, &l)
	switch {
	case err == nil, errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOLCK): // no locks on this file system
		return nil
	case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES):
		return fmt.Errorf("lock: %w", err)
	}
	switch pid := user(st, d.fd); {
	case pid == os.Getpid():
		return errors.New("is already in use by another device of this machine")
	case pid != 0:
		return fmt.Errorf("locked by another process (pid %d)", pid)
	}
	return errors.New("locked by another process")
}

// Flush has what was written survive a crash of the host, and reach another host that shares
// the storage, whatever IgnoreFlush says.
func (d *Disk) Flush() error {
	if err := unix.Fdatasync(d.fd); err != nil {
		return fmt.Errorf("disk %s: flush: %w", d.path, err)
	}
	return nil
}

// Unlock lets another machine have the disk. The device is quiesced, the disk flushed, and
// neither is used until Lock.
func (d *Disk) Unlock() error { return d.unlock(0) }

// Offer lets another machine Reserve the disk, which stays this one's. Lock ends it.
func (d *Disk) Offer() error { return d.unlock(token) }

// Reserve makes sure that nobody gets the disk after its present user but who calls this. It fails if
// that one has not offered it, so that what is found out before it stops is that this is the same disk,
// that it can be locked here, and that nobody else waits for it. Unlock ends it.
func (d *Disk) Reserve() error { return d.take(0, token) }

// unlock gives up the first n bytes' lock, 0 for all.
func (d *Disk) unlock(n int64) error {
	l := unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart, Len: n}
	err := unix.FcntlFlock(uintptr(d.fd), unix.F_OFD_SETLK, &l)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOLCK) {
		return fmt.Errorf("disk %s: unlock: %w", d.path, err)
	}
	return nil
}

// Lock takes the disk after Unlock, or after it was opened Unlocked. What is cached of it is
// dropped, as far as it can be, for the other machine may have written.
func (d *Disk) Lock() error {
	if err := d.take(token, 0); err != nil {
		return err
	}
	_ = d.take(0, token) // a machine that has reserved it in vain has this one until it ends
	_ = unix.Fadvise(d.fd, 0, 0, unix.FADV_DONTNEED)
	return nil
}

func (d *Disk) take(start, n int64) error {
	var st unix.Stat_t
	err := unix.Fstat(d.fd, &st)
	if err == nil {
		err = d.lock(st, start, n)
	}
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.path, err)
	}
	return nil
}

// user finds a process that has the file open, other than by fd: the kernel does not
// tell who holds an OFD lock. Zero means that none can be seen.
func user(st unix.Stat_t, fd int) int {
	own := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*") // fails on bad patterns only
	for _, link := range links {
		var o unix.Stat_t
		if link != own && unix.Stat(link, &o) == nil && o.Dev == st.Dev && o.Ino == st.Ino {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(link))))
			return pid
		}
	}
	return 0
}

// Size is the size in bytes, a multiple of SectorSize.
func (d *Disk) Size() int64 { return d.size }

// Close closes the disk and ends its lock.
func (d *Disk) Close() error { return unix.Close(d.fd) }

// errWouldBlock says that the rest of a transfer has to wait for the host.
var errWouldBlock = errors.New("would block")

// transfer reads or writes all of bufs at off and drops from bufs what is done. With noWait
// it stops with errWouldBlock where the host would have to wait for its storage.
func (d *Disk) transfer(bufs *[][]byte, off *int64, write, noWait bool) error {
	flags, dir := 0, 0
	if write {
		dir = 1
	}
	if noWait && !d.inMemory {
		if d.neverNoWait[dir].Load() {
			return errWouldBlock
		}
		flags = unix.RWF_NOWAIT
	}
	for len(*bufs) > 0 {
		var n int
		var err error
		if write {
			n, err = unix.Pwritev2(d.fd, *bufs, *off, flags)
		} else {
			n, err = unix.Preadv2(d.fd, *bufs, *off, flags)
		}
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && noWait:
			return errWouldBlock
		case err == unix.EOPNOTSUPP && noWait:
			d.neverNoWait[dir].Store(true)
			return errWouldBlock
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF // someone has cut the file short
		}
		n = max(n, 0)
		*bufs = virtio.Skip(*bufs, n)
		*off += int64(n)
	}
	return nil
}

// flush makes what was written so far survive a crash of the host.
func (d *Disk) flush() error {
	if d.o.IgnoreFlush {
		return nil
	}
	return unix.Fdatasync(d.fd)
}

// discard gives the range back to the host, where the host can take it.
func (d *Disk) discard(off, n int64) error {
	err := unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err == unix.EOPNOTSUPP {
		return nil
	}
	return err
}

var zeroes [64 << 10]byte

// writeZeroes makes the range read as zeroes; unmap allows giving it back to the host.
func (d *Disk) writeZeroes(off, n int64, unmap bool) error {
	modes := []uint32{unix.FALLOC_FL_ZERO_RANGE}
	if unmap {
		modes = []uint32{unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE}
	}
	for _, mode := range modes {
		if err := unix.Fallocate(d.fd, mode|unix.FALLOC_FL_KEEP_SIZE, off, n); err != unix.EOPNOTSUPP {
			return err
		}
	}
	for end := off + n; off < end; {
		bufs := [][]byte{zeroes[:min(int64(len(zeroes)), end-off)]}
		if err := d.transfer(&bufs, &off, true, false); err != nil {
			return err
		}
	}
	return nil
}
