package pci

import (
	"fmt"
	"strings"
	"testing"
)

// A driver's life as seen from configuration space.
func TestUse(t *testing.T) {
	c := NewConfig(Header{})
	m, err := AddMSIX(c, 0, 0, 0x800, 2, &fakeSource{})
	if err != nil {
		t.Fatal(err)
	}
	var log []string
	c.OnUse(func(u Use) { log = append(log, fmt.Sprint(u.Master, u.Enabled, u.Unmasked)) })
	expect := func(what, want string) {
		t.Helper()
		if got := strings.Join(log, ", "); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
		log = nil
	}
	control := uint64(m.off + msixControl)
	unmask := func(i int, masked byte) { m.Write(uint64(i*msixEntry+12), []byte{masked, 0, 0, 0}) }
	c.Write(RegCommand, []byte{CommandMemory, 0})
	expect("memory only", "")
	c.Write(RegCommand, []byte{CommandMemory | CommandMaster, 0})
	expect("bus master", "true false false")
	c.Write(control, []byte{0, msixEnable >> 8})
	expect("MSI-X on", "true true false")
	unmask(0, 0)
	unmask(1, 0)
	expect("vectors unmasked", "true true true")
	unmask(0, 1)
	expect("one masked", "")
	unmask(1, 1)
	expect("all masked", "true true false")
	c.Write(control, []byte{0, 0})
	expect("MSI-X off", "true false false")
	c.Write(control, []byte{0, msixEnable >> 8})
	unmask(1, 0)
	log = nil
	c.Reset()
	if n := len(log); n == 0 || log[n-1] != "false false false" {
		t.Errorf("reset: %q", log)
	}
}
