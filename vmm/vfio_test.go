package vmm

import "testing"

// TestWait: what the main loop waits for may need the main loop.
func TestWait(t *testing.T) {
	m := &Machine{control: control{calls: make(chan func()), ended: make(chan struct{}), posts: posts{wake: make(chan struct{}, 1)}}}
	order := ""
	m.wait(func() {
		posted := make(chan struct{})
		m.post(func() { order += "post "; close(posted) })
		<-posted
		if err := m.call(func() { order += "call " }); err != nil {
			t.Error(err)
		}
	})
	if order += "end"; order != "post call end" {
		t.Error(order)
	}
}
