package wire

import (
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// rawSocket is what a connection reads and writes by itself, many buffers at a time and without
// telling Go's scheduler of each call: none of them waits, but a batch takes longer than the
// scheduler lets a call take before it has another thread go on in its place and watches all threads
// more closely, which costs more than the call itself where CPUs are emulated.
type rawSocket struct {
	syscall.RawConn
	reading, writing []unix.Iovec
}

// newSocket returns nil for a stream that is none, or more than that, as TLS is.
func newSocket(stream any) *rawSocket {
	if _, ok := stream.(net.Conn); !ok {
		return nil
	}
	c, ok := stream.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	return &rawSocket{RawConn: raw}
}

// read reads into the buffers, at least one byte, as io.Reader does.
func (s *rawSocket) read(bufs ...[]byte) (n int, err error) {
	s.reading, _ = appendVectors(s.reading[:0], bufs)
	if len(s.reading) == 0 {
		return 0, nil
	}
	var errno syscall.Errno
	err = s.RawConn.Read(func(fd uintptr) bool {
		n, errno = vector(unix.SYS_READV, fd, s.reading)
		return errno != unix.EAGAIN
	})
	clear(s.reading)
	acquired()
	switch {
	case err != nil || errno != 0:
		return 0, named("read", err, errno)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// appendVectors returns their length in bytes as well.
func appendVectors(v []unix.Iovec, bufs [][]byte) (_ []unix.Iovec, n int) {
	for _, b := range bufs {
		if len(b) > 0 {
			v = append(v, unix.Iovec{Base: &b[0], Len: uint64(len(b))})
			n += len(b)
		}
	}
	return v, n
}

// write writes all of the pieces, of which there are few enough for one call.
func (s *rawSocket) write(pieces ...[]byte) (n int, err error) {
	releasing()
	var total int
	s.writing, total = appendVectors(s.writing[:0], pieces)
	rest := s.writing
	var errno syscall.Errno
	err = s.RawConn.Write(func(fd uintptr) bool {
		for n < total {
			var k int
			if k, errno = vector(unix.SYS_WRITEV, fd, rest); errno != 0 {
				return errno != unix.EAGAIN
			}
			n += k
			rest = skip(rest, uint64(k))
		}
		return true
	})
	clear(s.writing)
	return n, named("write", err, errno)
}

// named is an error as package net has it.
func named(op string, err error, errno syscall.Errno) error {
	if e, ok := err.(*net.OpError); ok {
		e.Op = op
	}
	if err == nil && errno != 0 {
		err = os.NewSyscallError(op, errno)
	}
	return err
}
