package devices

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// EventFD is a Linux eventfd: a doorbell between the guest, the kernel's backends and the
// VMM. Wait blocks a whole thread, which wakes faster than the runtime's poller; Close of
// the owner must therefore be preceded by a Signal that its waiter understands as the end.
type EventFD struct{ fd int }

// NewEventFD returns a new eventfd with the count zero.
func NewEventFD() (*EventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	return &EventFD{fd}, nil
}

// FD is the descriptor; the EventFD owns it.
func (e *EventFD) FD() int { return e.fd }

// Signal adds one to the count and wakes the waiter.
func (e *EventFD) Signal() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(e.fd, one[:]) // blocks or fails only at a count of 2^64-2
}

// Wait blocks until the count is not zero, and resets it.
func (e *EventFD) Wait() error {
	var count [8]byte
	for {
		_, err := unix.Read(e.fd, count[:])
		if err != unix.EINTR {
			return err
		}
	}
}

// Pending says whether the count is not zero, without resetting it.
func (e *EventFD) Pending() bool {
	p := []unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1
}

// Close closes the descriptor.
func (e *EventFD) Close() error { return unix.Close(e.fd) }
