package devices

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestEventFD(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	if e.Pending() {
		t.Error("new, yet pending")
	}
	e.Signal()
	e.Signal()
	for range 2 {
		if !e.Pending() {
			t.Error("signalled, but not pending, or looking took the signal")
		}
	}
	if err := e.Wait(); err != nil {
		t.Fatal(err)
	}
	if e.Pending() {
		t.Error("two signals were not taken by one wait")
	}
	if flags, err := unix.FcntlInt(uintptr(e.FD()), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("children would inherit it: flags %#x, %v", flags, err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestEventFDWakesWaiter(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	woken := make(chan error)
	go func() { woken <- e.Wait() }()
	select {
	case err := <-woken:
		t.Fatalf("woken without a signal: %v", err)
	default:
	}
	e.Signal()
	select {
	case err := <-woken:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("not woken")
	}
}

func TestEventFDWaitFails(t *testing.T) {
	e := EventFD{fd: -1}
	if err := e.Wait(); !errors.Is(err, unix.EBADF) {
		t.Errorf("wait on nothing: %v", err)
	}
	if e.Pending() {
		t.Error("nothing is pending")
	}
}
