package vhost

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"
)

// TestABI compares the numbers, sizes and offsets here with the kernel's header.
func TestABI(t *testing.T) {
	cc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc: ", err)
	}
	values := []struct {
		c    string
		want uintptr
	}{
		{"VHOST_GET_FEATURES", getFeatures},
		{"VHOST_SET_FEATURES", setFeatures},
		{"VHOST_SET_OWNER", setOwner},
		{"VHOST_SET_MEM_TABLE", setMemTable},
		{"VHOST_SET_LOG_BASE", setLogBase},
		{"1ul << VHOST_F_LOG_ALL", featureLogAll},
		{"1ul << VHOST_VRING_F_LOG", vringLog},
		{"VHOST_SET_VRING_NUM", setVringNum},
		{"VHOST_SET_VRING_ADDR", setVringAddr},
		{"VHOST_SET_VRING_BASE", setVringBase},
		{"VHOST_GET_VRING_BASE", getVringBase},
		{"VHOST_SET_VRING_KICK", setVringKick},
		{"VHOST_SET_VRING_CALL", setVringCall},
		{"VHOST_SET_VRING_ERR", setVringErr},
		{"VHOST_NET_SET_BACKEND", netSetBackend},
		{"sizeof(struct vhost_vring_state)", unsafe.Sizeof(vringState{})},
		{"offsetof(struct vhost_vring_state, num)", unsafe.Offsetof(vringState{}.num)},
		{"sizeof(struct vhost_vring_file)", unsafe.Sizeof(vringFile{})},
		{"offsetof(struct vhost_vring_file, fd)", unsafe.Offsetof(vringFile{}.fd)},
		{"sizeof(struct vhost_vring_addr)", unsafe.Sizeof(vringAddr{})},
		{"offsetof(struct vhost_vring_addr, flags)", unsafe.Offsetof(vringAddr{}.flags)},
		{"offsetof(struct vhost_vring_addr, desc_user_addr)", unsafe.Offsetof(vringAddr{}.desc)},
		{"offsetof(struct vhost_vring_addr, used_user_addr)", unsafe.Offsetof(vringAddr{}.used)},
		{"offsetof(struct vhost_vring_addr, avail_user_addr)", unsafe.Offsetof(vringAddr{}.avail)},
		{"offsetof(struct vhost_vring_addr, log_guest_addr)", unsafe.Offsetof(vringAddr{}.log)},
		{"sizeof(struct vhost_memory_region)", unsafe.Sizeof(memRegion{})},
		{"offsetof(struct vhost_memory_region, guest_phys_addr)", unsafe.Offsetof(memRegion{}.gpa)},
		{"offsetof(struct vhost_memory_region, memory_size)", unsafe.Offsetof(memRegion{}.size)},
		{"offsetof(struct vhost_memory_region, userspace_addr)", unsafe.Offsetof(memRegion{}.host)},
		{fmt.Sprintf("sizeof(struct vhost_memory) + %d * sizeof(struct vhost_memory_region)", maxRegions), unsafe.Sizeof(memTable{})},
		{"offsetof(struct vhost_memory, nregions)", unsafe.Offsetof(memTable{}.n)},
		{"offsetof(struct vhost_memory, regions)", unsafe.Offsetof(memTable{}.regions)},
	}
	src := "#include <stddef.h>\n#include <stdio.h>\n#include <linux/vhost.h>\nint main(void) {\n"
	for _, v := range values {
		src += fmt.Sprintf("printf(\"%%#lx\\n\", (unsigned long)(%s));\n", v.c)
	}
	file := filepath.Join(t.TempDir(), "abi.c")
	if err := os.WriteFile(file, []byte(src+"}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(cc, "-o", file+".out", file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err := exec.Command(file + ".out").Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(out))
	if len(lines) != len(values) {
		t.Fatalf("%d values of %d", len(lines), len(values))
	}
	for i, v := range values {
		if want := fmt.Sprintf("%#x", v.want); lines[i] != want && v.want != 0 || v.want == 0 && lines[i] != "0" {
			t.Errorf("%s is %s, here %s", v.c, lines[i], want)
		}
	}
}
