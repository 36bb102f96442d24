package vmm

import (
	"bytes"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// niceOf is a thread's.
func niceOf(t *testing.T, tid int) int32 {
	t.Helper()
	a, err := unix.SchedGetAttr(tid, 0)
	if err != nil {
		t.Fatal(err)
	}
	return a.Nice
}

// The vCPUs of a guest that has come go first for a moment, where they may, and then as before.
func TestGoFirst(t *testing.T) {
	refused := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with this
		refused <- unix.Setpriority(unix.PRIO_PROCESS, 0, catchUpNice)
	}()
	s := startScripted(t, "-smp", "2")
	if err := unix.Setpriority(unix.PRIO_PROCESS, int(s.vcpus[1].tid.Load()), 19); err != nil {
		t.Fatal(err)
	}
	nice := func() [2]int32 {
		return [2]int32{niceOf(t, int(s.vcpus[0].tid.Load())), niceOf(t, int(s.vcpus[1].tid.Load()))}
	}
	usual := nice()
	first := [2]int32{catchUpNice, catchUpNice}
	if <-refused != nil {
		first = usual
	}
	undo := s.goFirst()
	if got := nice(); got != first {
		t.Errorf("first: %v, want %v", got, first)
	}
	if undo(); nice() != usual {
		t.Errorf("then: %v, want %v", nice(), usual)
	}
	s.do(func() {
		s.stop(StateFinishMigrate)
		begin := time.Now()
		if err := s.arrived(true, 0); err != nil {
			t.Error(err)
		}
		if got := nice(); got != first && time.Since(begin) < catchUpTime {
			t.Errorf("as it comes: %v, want %v", got, first)
		}
	})
}

// What has been sent to a guest that is still to come is there once when it comes, however often it has been waited for.
func TestRehearseKeepsInput(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	s := startScripted(t, "-incoming", "defer", "-serial", "unix:"+socket+",server,nowait")
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("abc")); err != nil {
		t.Fatal(err)
	}
	saved := func() (data []byte) {
		s.do(func() {
			var err error
			if data, err = s.serial.SaveState(); err != nil {
				t.Error(err)
			}
		})
		return data
	}
	before := saved()
	for end := time.Now().Add(patience); !bytes.Contains(before, []byte("abc")); before = saved() {
		if time.Now().After(end) {
			t.Fatal("the input does not come")
		}
	}
	s.do(func() {
		for range 2 {
			if err := s.rehearse(); err != nil {
				t.Error(err)
			}
		}
	})
	if after := saved(); !bytes.Equal(before, after) {
		t.Errorf("%x, not %x", after, before)
	}
}
