package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestObstacle(t *testing.T) {
	ok := []finding{{"ok", "kvm", "kvm_amd"}, {"ok", "vhost-net", ""}, {"ok", "tun", ""}, {"--", "vfio", "is missing"}}
	for _, tt := range []struct {
		name string
		list []finding
		want string
		kvm  bool
	}{
		{"a host that can", ok, "", false},
		{"software KVM", append([]finding{{"!!", "kvm", "kvm_pvm"}}, ok[1:]...), "kvm: kvm_pvm", true},
		{"no vhost-net", append([]finding{{"--", "vhost-net", "is missing"}}, ok[2:]...), "vhost-net: is missing", false},
	} {
		if got, kvm := obstacleOf(tt.list); got != tt.want || kvm != tt.kvm {
			t.Errorf("%s: %q, %v, want %q, %v", tt.name, got, kvm, tt.want, tt.kvm)
		}
	}
}

func TestMedianPing(t *testing.T) {
	const host = "64 bytes from a: icmp_seq=1 ttl=64 time=31.5 ms\n64 bytes from a: icmp_seq=2 ttl=64 time=5 ms\n64 bytes from a: icmp_seq=3 ttl=64 time=2.60 ms\n"
	const guest = "64 bytes from b: icmp_seq=1 time=1.25ms\n64 bytes from b: icmp_seq=2 time=900.5µs\n64 bytes from b: icmp_seq=3 time=3s\n"
	for _, tt := range []struct {
		out  string
		want float64
	}{{host, 5}, {guest, 1.25}} {
		if got, err := medianPing(tt.out, 3); err != nil || got != tt.want {
			t.Errorf("%v, %v, want %v", got, err, tt.want)
		}
	}
	if _, err := medianPing(host, 5); err == nil {
		t.Error("lost answers are not noticed")
	}
}

func TestCheckTree(t *testing.T) {
	const port, nic, disk = "0000:00:01.0 class 060400 id 1b36:000c pcieport\n", "  0000:01:00.0 class 020000 id 1af4:1041 virtio-pci\n", "  0000:02:00.0 class 010000 id 1af4:1042 virtio-pci\n"
	for tree, good := range map[string]bool{
		port + nic + port + disk: true,
		port + port + nic + disk: false,
		port + nic + port:        false,
		nic + disk:               false,
		port + nic + port + "  0000:02:00.0 class 010000 id 1af4:1042 -\n": false,
	} {
		if err := checkTree(tree); (err == nil) != good {
			t.Errorf("%v for\n%s", err, tree)
		}
	}
}

func TestOwnMemory(t *testing.T) {
	smaps := func(rss, private string) string {
		return "7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \nSize:  9999 kB\nRss:  " + rss + " kB\nPss:  1 kB\nShared_Clean: 7 kB\n" +
			"Shared_Dirty: 0 kB\nPrivate_Clean: 4 kB\nPrivate_Dirty: " + private + " kB\nReferenced: 1 kB\nVmFlags: rd wr\n"
	}
	got, err := ownMemory(smaps("20", "12") + smaps("4000", "3000") + smaps("8", "0"))
	if want := int64((4+12)+(4+0)) << 10; err != nil || got != want {
		t.Errorf("%d, %v, want %d", got, err, want)
	}
	if _, err := ownMemory(""); err == nil {
		t.Error("a process without memory is not noticed")
	}
	self, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ownMemory(string(self)); err != nil || got < 256<<10 || got > 1<<30 {
		t.Errorf("this process: %d bytes, %v", got, err)
	}
}

func TestDisk(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk")
	if err := makeDisk(name); err != nil {
		t.Fatal(err)
	}
	if err := compareDisk(name); err == nil {
		t.Error("a guest that copies nothing is not noticed")
	}
	image, err := os.ReadFile(name)
	if err != nil || len(image) != diskSize {
		t.Fatalf("%d bytes, %v, want %d", len(image), err, diskSize)
	}
	copy(image[copyAt:], image[:copySize])
	if err := os.WriteFile(name, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := compareDisk(name); err != nil {
		t.Error(err)
	}
}

func TestTerminal(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		pieces     []string
	}{
		{"lines", "  guest │ a\n  guest │ \n  guest │ b\n", []string{"a\r\n\r", "\nb\n"}},
		{"pieces of a line", "  guest │ abc\n", []string{"a", "b", "c\n"}},
		{"a prompt waits", "  guest │ a\n", []string{"a\n$", " "}},
		{"until one types", "  guest │ a\n  guest │ $ ls\n", []string{"a\n$ ", "l", "s\n"}},
		{"money", "  guest │ $5\n", []string{"$", "5\n"}},
	} {
		var b strings.Builder
		term := terminal{w: &b}
		for _, p := range tt.pieces {
			term.Write([]byte(p))
		}
		if b.String() != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, b.String(), tt.want)
		}
	}
	var b strings.Builder
	term := terminal{w: &b, name: "host"}
	term.Write([]byte("a\n$ "))
	term.forget()
	term.Write([]byte("b"))
	term.newline()
	term.newline()
	if got, want := b.String(), "  host  │ a\n  host  │ b\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
