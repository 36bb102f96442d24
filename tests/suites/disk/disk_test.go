// Package disk shows virtio-blk with a stock Linux in front of it and files behind it: what
// is written arrives, what is given back is gone, and a disk belongs to one machine.
package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"baton/tests/harness"
	"baton/tests/tiny"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	bootLimit = 2 * time.Minute
	limit     = 2 * time.Minute
	mib       = 1 << 20
)

// setup is a guest with three disks.
type setup struct {
	*harness.Guest
	ext4, sealed, scratch string            // files of vda, vdb, vdc
	sums                  map[string]string // of the files on vda at the start
}

func TestDisks(t *testing.T) {
	dir := t.TempDir()
	s := &setup{ext4: filepath.Join(dir, "ext4"), sealed: filepath.Join(dir, "sealed"), scratch: filepath.Join(dir, "scratch")}
	s.sums = makeExt4(t, s.ext4)
	noise := make([]byte, 8*mib)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	write(t, s.sealed, noise)
	write(t, s.scratch, bytes.Repeat([]byte{0xaa}, 32*mib))
	s.Guest = harness.Start(t, harness.GuestConfig{Args: append(harness.Linux(t), "-m", "512M", "-smp", "4",
		"-drive", "file="+s.ext4+",format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,serial=the-first,num-queues=4",
		"-drive", "file="+s.sealed+",format=raw,readonly=on,serial=01234567890123456789",
		"-blockdev", "file,filename="+s.scratch+",node-name=f", "-blockdev", "raw,file=f,node-name=d2",
		"-device", "virtio-blk-pci,drive=d2,logical_block_size=4096")})
	s.Output(harness.Context(t, bootLimit), "true")

	run := func(name string, f func(*setup, *testing.T)) {
		t.Run(name, func(t *testing.T) {
			view := *s
			view.Guest = s.In(t)
			f(&view, t)
		})
	}
	run("identity", (*setup).identity)
	run("queues", (*setup).queues)
	run("file system", (*setup).fileSystem)
	run("read-only", (*setup).readOnly)
	run("discard", (*setup).discard)
	run("write zeroes", (*setup).writeZeroes)
	run("host error", (*setup).hostError)
	run("lock", (*setup).lock)
	run("kill", (*setup).kill)
}

// makeExt4 makes a file system with a few files and returns their sums.
func makeExt4(t *testing.T, image string) map[string]string {
	t.Helper()
	root := t.TempDir()
	sums := map[string]string{}
	r := rand.NewChaCha8([32]byte{2})
	for i, size := range []int{0, 1, 4095, 100_000, 9 * mib} {
		data := make([]byte, size)
		r.Read(data)
		name := fmt.Sprint("file", i)
		write(t, filepath.Join(root, name), data)
		sums[name] = sum(data)
	}
	write(t, image, nil)
	if err := os.Truncate(image, 64*mib); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", root, image)
	return sums
}

func (s *setup) identity(t *testing.T) {
	ctx := harness.Context(t, limit)
	for dev, want := range map[string]string{
		"vda": "the-first 131072 ro=0 512 mq=4",
		"vdb": "01234567890123456789 16384 ro=1 512 mq=1",
		"vdc": " 65536 ro=0 4096 mq=1",
	} {
		got := s.Sh(ctx, "cd /sys/block/"+dev+`; echo "$(cat serial) $(cat size) ro=$(cat ro) $(cat queue/logical_block_size) mq=$(ls mq | wc -l)"`)
		if got != want {
			t.Errorf("%s: %q, want %q", dev, got, want)
		}
	}
}

// Each queue serves the CPU that it belongs to.
func (s *setup) queues(t *testing.T) {
	ctx := harness.Context(t, limit)
	s.Sh(ctx, "for c in 0 1 2 3; do taskset -c $c dd if=/dev/vda of=/dev/null bs=64k count=16 skip=$((c * 100)) 2>/dev/null; done")
	dev := filepath.Base(s.Sh(ctx, "readlink -f /sys/block/vda/device"))
	text := s.Output(ctx, "@cat", "/proc/interrupts")
	for q := range 4 {
		m := regexp.MustCompile(fmt.Sprintf(`(?m)^ *\d+:([ \d]+) PCI-MSIX.* %s-req\.%d$`, dev, q)).FindStringSubmatch(text)
		if m == nil || strings.Trim(m[1], " 0") == "" {
			t.Errorf("no interrupt of queue %d in\n%s", q, text)
		}
	}
}

// What the host put there is what the guest reads, and the other way round.
func (s *setup) fileSystem(t *testing.T) {
	ctx := harness.Context(t, limit)
	s.Output(ctx, "@modprobe", "crc32c_generic")
	s.Output(ctx, "@modprobe", "ext4")
	s.Sh(ctx, "mkdir /mnt; mount -t ext4 /dev/vda /mnt")
	for name, want := range s.sums {
		if got := s.Sh(ctx, "sha256sum </mnt/"+name+" | cut -d' ' -f1"); got != want {
			t.Errorf("%s: the guest reads %s, want %s", name, got, want)
		}
	}
	want := s.Sh(ctx, `cd /mnt
		head -c 12582912 /dev/urandom >big
		for i in $(seq 200); do echo $i >small$i; done
		rm file4
		sha256sum <big | cut -d' ' -f1
		cd /; umount /mnt`)
	check(t, s.ext4, "big", want)
	check(t, s.ext4, "small123", sum([]byte("123\n")))
	check(t, s.ext4, "file3", s.sums["file3"])
}

// check checks that an ext4 image is clean and has a file of that sum.
func check(t *testing.T, image, file, want string) {
	t.Helper()
	copied := filepath.Join(t.TempDir(), "image")
	run(t, "cp", "--sparse=always", image, copied)
	run(t, "fsck.ext4", "-fn", copied)
	out := filepath.Join(t.TempDir(), "file")
	run(t, "debugfs", "-R", "dump "+file+" "+out, copied)
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if got := sum(data); got != want {
		t.Errorf("%s: the host reads %s (%d bytes), want %s", file, got, len(data), want)
	}
}

func (s *setup) readOnly(t *testing.T) {
	ctx := harness.Context(t, limit)
	data, err := os.ReadFile(s.sealed)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := s.Sh(ctx, "sha256sum </dev/vdb | cut -d' ' -f1"), sum(data); got != want {
		t.Errorf("the guest reads %s, want %s", got, want)
	}
	if r, err := s.Run(ctx, "dd", "if=/dev/zero", "of=/dev/vdb", "bs=4096", "count=1"); err != nil || r.Exit == 0 {
		t.Errorf("a write: exit code %d, %v", r.Exit, err)
	}
	// Linux does not ask a disk that says it is read-only; one that is told otherwise does.
	s.Sh(ctx, "blockdev --setrw /dev/vdb || true; dd if=/dev/zero of=/dev/vdb bs=4096 count=1 conv=fsync 2>&1 || true")
	if now, err := os.ReadFile(s.sealed); err != nil || !bytes.Equal(now, data) {
		t.Errorf("the file has changed (%v)", err)
	}
}

// allocated is how many bytes of storage a file takes.
func allocated(t *testing.T, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// pattern checks that the scratch disk is 0xaa but for zeroes from MiB from to MiB to, for
// the host and for the guest.
func (s *setup) pattern(t *testing.T, ctx context.Context, from, to int) {
	t.Helper()
	want := bytes.Repeat([]byte{0xaa}, 32*mib)
	clear(want[from*mib : to*mib])
	got, err := os.ReadFile(s.scratch)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the host does not find zeroes from %d to %d MiB, and 0xaa elsewhere", from, to)
	}
	if got := s.Sh(ctx, "echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/vdc | cut -d' ' -f1"); got != sum(want) {
		t.Errorf("the guest does not find zeroes from %d to %d MiB, and 0xaa elsewhere", from, to)
	}
}

func (s *setup) discard(t *testing.T) {
	ctx := harness.Context(t, limit)
	before := allocated(t, s.scratch)
	s.Sh(ctx, "blkdiscard -o 8388608 -l 8388608 /dev/vdc")
	s.pattern(t, ctx, 8, 16)
	if freed := before - allocated(t, s.scratch); freed != 8*mib {
		t.Errorf("a discard of 8 MiB gave %d bytes back", freed)
	}
}

// Zeroes may be a hole or not, as the guest says.
func (s *setup) writeZeroes(t *testing.T) {
	ctx := harness.Context(t, limit)
	before := allocated(t, s.scratch)
	s.Output(ctx, "@fallocate", "/dev/vdc", "zero", "16777216", "1048576")
	s.pattern(t, ctx, 8, 17)
	if now := allocated(t, s.scratch); now != before {
		t.Errorf("zeroes that are to stay allocated: %d bytes, were %d", now, before)
	}
	s.Output(ctx, "@fallocate", "/dev/vdc", "punch", "17825792", "1048576")
	s.pattern(t, ctx, 8, 18)
	if freed := before - allocated(t, s.scratch); freed != mib {
		t.Errorf("zeroes that may be a hole, 1 MiB: %d bytes were given back", freed)
	}
}

// The host's trouble with its file is an I/O error for the guest, and no more.
func (s *setup) hostError(t *testing.T) {
	ctx := harness.Context(t, limit)
	if err := os.Truncate(s.scratch, 16*mib); err != nil {
		t.Fatal(err)
	}
	script := "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vdc of=/dev/null bs=1M count=1 skip="
	if r, err := s.Run(ctx, "sh", "-c", script+"20"); err != nil || r.Exit == 0 || !strings.Contains(r.Stderr, "Input/output error") {
		t.Errorf("a read beyond the end of the file: exit code %d, %v: %s", r.Exit, err, r.Stderr)
	}
	s.Sh(ctx, script+"4")
	if err := os.Truncate(s.scratch, 32*mib); err != nil {
		t.Fatal(err)
	}
	s.Sh(ctx, script+"20")
}

// second starts another machine with the disk; it ends at once if it can have it.
func second(t *testing.T, file, options string) *harness.Guest {
	t.Helper()
	return harness.Start(t, harness.GuestConfig{Name: "second", NoAgent: true, Args: []string{
		"-kernel", tiny.Kernel(t, tiny.PowerOff, tiny.Halt), "-drive", "file=" + file + ",format=raw" + options}})
}

func (s *setup) lock(t *testing.T) {
	for _, tc := range []struct {
		file, options string
		code          int
	}{
		{s.ext4, "", 1},
		{s.ext4, ",readonly=on", 1},
		{s.sealed, "", 1},
		{s.sealed, ",readonly=on", 0},
	} {
		g := second(t, tc.file, tc.options)
		if code := g.Wait(harness.Context(t, limit)); code != tc.code {
			t.Errorf("%s%s: exit code %d, want %d: %s", tc.file, tc.options, code, tc.code, g.Stderr)
		}
		want := fmt.Sprintf("disk %s: locked by another process (pid %d)", tc.file, s.PID())
		if tc.code != 0 && !strings.Contains(g.Stderr.String(), want) {
			t.Errorf("%s%s: no %q in the error: %s", tc.file, tc.options, want, g.Stderr)
		}
	}
}

// What the guest was told is on disk is there when baton is killed; so is no lock.
func (s *setup) kill(t *testing.T) {
	ctx := harness.Context(t, limit)
	want := s.Sh(ctx, "mount -t ext4 /dev/vda /mnt; head -c 3145728 /dev/urandom >/mnt/last; sync /mnt/last; sha256sum </mnt/last | cut -d' ' -f1")
	s.Signal(syscall.SIGKILL)
	s.Wait(ctx)
	g := second(t, s.ext4, "")
	if code := g.Wait(harness.Context(t, limit)); code != 0 {
		t.Errorf("the lock has outlived its owner: exit code %d: %s", code, g.Stderr)
	}
	// Only the journal is replayed.
	if out, err := exec.Command("fsck.ext4", "-p", s.ext4).CombinedOutput(); err != nil && err.(*exec.ExitError).ExitCode() > 1 {
		t.Errorf("fsck.ext4 -p: %v\n%s", err, out)
	}
	check(t, s.ext4, "last", want)
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func sum(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }

func run(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
}
