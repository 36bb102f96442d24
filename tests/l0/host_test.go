package l0

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"baton/kvm"
	"baton/tests/harness"
	"baton/tests/tiny"
	"baton/vmm"
)

// As much as there may be of a machine.
func TestLimits(t *testing.T) {
	kernel := tiny.Kernel(t, tiny.PowerOff, tiny.Halt)
	for _, args := range [][]string{
		{"-m", "64M", "-smp", "1"},
		{"-m", "64G", "-smp", "64"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) { ends(t, start(t, kernel, args...), "guest-shutdown") })
	}
}

// baton check says what the host can do, and fails where no stock guest runs.
func TestCheck(t *testing.T) {
	cmd := exec.Command(harness.Baton(t), "check", "-json")
	out, err := cmd.Output()
	if code, isPVM := cmd.ProcessState.ExitCode(), kind(t) == kvm.PVM; code == 1 != isPVM || code > 1 {
		t.Errorf("exit code %d (%v) where the KVM is %s", code, err, kind(t))
	}
	var list []vmm.Finding
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatal(err)
	}
	found := map[string]vmm.Finding{}
	for _, f := range list {
		found[f.Name] = f
		if f.Status != vmm.StatusOK && f.Hint == "" {
			t.Errorf("%+v does not say what to do", f)
		}
	}
	want := []string{"kvm", "kvm features", "KVM_CAP_DIRTY_LOG_RING", "vhost-net", "tun", "vfio", "hugepages of 2048kB", "locked memory"}
	if harness.Nested() {
		for name, value := range map[string]string{"kvm": "svm", "vhost-net": "/dev/vhost-net", "tun": "/dev/net/tun", "vfio": "/dev/vfio/vfio"} {
			if f := found[name]; f.Status != vmm.StatusOK || f.Value != value {
				t.Errorf("%+v, want %s", f, value)
			}
		}
		want = append(want, "iommu group 0")
		if f := found["KVM_CAP_DIRTY_LOG_RING"]; f.Status != vmm.StatusOK {
			t.Errorf("%+v", f)
		}
	}
	for _, name := range want {
		if _, ok := found[name]; !ok {
			t.Errorf("nothing is said about %q: %s", name, out)
		}
	}
}
