package vmm

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The vCPUs of a guest that has come go first for a moment, and then as before.
func TestCatchUp(t *testing.T) {
	s := startScripted(t, "-smp", "2")
	nice := func() (list [2]int) {
		for i, c := range s.vcpus {
			raw, err := unix.Getpriority(unix.PRIO_PROCESS, int(c.tid.Load()))
			if err != nil {
				t.Fatal(err)
			}
			list[i] = 20 - raw
		}
		return list
	}
	if err := unix.Setpriority(unix.PRIO_PROCESS, int(s.vcpus[1].tid.Load()), 5); err != nil {
		t.Fatal(err)
	}
	s.do(func() {
		s.stop(StateFinishMigrate)
		if err := s.arrived(true, 0); err != nil {
			t.Error(err)
		}
		if got := nice(); got != [2]int{catchUpNice, catchUpNice} {
			t.Errorf("as it comes: %v", got)
		}
	})
	for end := time.Now().Add(patience); nice() != [2]int{0, 5}; time.Sleep(catchUpTime / 10) {
		if time.Now().After(end) {
			t.Fatalf("in the end: %v", nice())
		}
	}
}
