package vmm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"baton/devices"
	"baton/devices/virtio/blk"
	"baton/kvm"
	"baton/kvm/guestmem"
	"baton/migrate"
	"baton/tests/tiny"
)

// Where the stamper writes: a double word in each page, and the TSC.
const (
	stampBase = 0x400000
	stampEnd  = 0x800000
	stampTSC  = 0x300000
)

// stamper writes a number into every page from stampBase to stampEnd, in order, then the next
// number, for ever. After each round it says a letter, the number modulo 16 from 'a' on, or
// '!' when the TSC is below what it was a round ago.
var stamper = tiny.Code{
	0xbb, 0x01, 0x00, 0x00, 0x00, //              mov $1, %ebx
	0xbf, 0x00, 0x00, 0x40, 0x00, //       outer: mov $stampBase, %edi
	0x89, 0x1f, //                         inner: mov %ebx, (%edi)
	0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, //        add $0x1000, %edi
	0x81, 0xff, 0x00, 0x00, 0x80, 0x00, //        cmp $stampEnd, %edi
	0x72, 0xf0, //                                jb inner
	0x0f, 0x31, //                                rdtsc
	0x2b, 0x05, 0x00, 0x00, 0x30, 0x00, //        sub stampTSC, %eax
	0x1b, 0x15, 0x04, 0x00, 0x30, 0x00, //        sbb stampTSC+4, %edx
	0x72, 0x1f, //                                jb back
	0x03, 0x05, 0x00, 0x00, 0x30, 0x00, //        add stampTSC, %eax
	0x13, 0x15, 0x04, 0x00, 0x30, 0x00, //        adc stampTSC+4, %edx
	0xa3, 0x00, 0x00, 0x30, 0x00, //              mov %eax, stampTSC
	0x89, 0x15, 0x04, 0x00, 0x30, 0x00, //        mov %edx, stampTSC+4
	0x89, 0xd8, //                                mov %ebx, %eax
	0x24, 0x0f, //                                and $15, %al
	0x04, 0x61, //                                add $'a', %al
	0xeb, 0x02, //                                jmp say
	0xb0, 0x21, //                          back: mov $'!', %al
	0x66, 0xba, 0xf8, 0x03, //               say: mov $0x3f8, %dx
	0xee,       //                                out %al, (%dx)
	0x43,       //                                inc %ebx
	0xeb, 0xb2, //                                jmp outer
}

// whole is a machine in this process whose COM1 is a socket.
type whole struct {
	*Machine
	t      testing.TB
	conn   net.Conn
	serial *bufio.Reader
}

// startWhole runs a machine; a host without /dev/kvm skips the test.
func startWhole(t testing.TB, args ...string) *whole {
	t.Helper()
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		t.Skip(err)
	} else {
		f.Close()
	}
	dir, err := os.MkdirTemp("", "whole")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "com1")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	inv, err := ParseArgs(append([]string{"-m", "64", "-nodefaults", "-monitor", "none", "-serial", "unix:" + socket}, args...))
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(context.Background(), inv.Config, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-ended, m.Close(), conn.Close(), l.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return &whole{m, t, conn, bufio.NewReader(conn)}
}

// in runs f in the machine's main loop.
func (w *whole) in(f func() error) {
	w.t.Helper()
	var err error
	if e := w.call(func() { err = f() }); e != nil || err != nil {
		w.t.Fatal(e, err)
	}
}

// pause stops the machine and its devices.
func (w *whole) pause() {
	w.t.Helper()
	w.in(func() error {
		w.stop(StatePaused)
		for _, q := range slices.Backward(w.quiescers()) {
			if err := q.Quiesce(); err != nil {
				return err
			}
		}
		return nil
	})
}

// goOn undoes pause.
func (w *whole) goOn() {
	w.t.Helper()
	w.in(func() error {
		for _, q := range w.quiescers() {
			if err := q.Unquiesce(); err != nil {
				return err
			}
		}
		w.resume()
		return nil
	})
}

// save is the state of a machine that is paused.
func (w *whole) save() map[devices.StateInfo][]byte {
	w.t.Helper()
	sections := make(map[devices.StateInfo][]byte)
	w.in(func() error {
		for _, s := range w.staters() {
			data, err := s.SaveState()
			if err != nil {
				return err
			}
			sections[s.StateInfo()] = data
		}
		return nil
	})
	return sections
}

// load loads sections into a machine that has never run, RAM left aside.
func (w *whole) load(sections map[devices.StateInfo][]byte) {
	w.t.Helper()
	w.in(func() error {
		for _, q := range w.quiescers() {
			if err := q.Quiesce(); err != nil {
				return err
			}
		}
		list := w.staters()
		if len(list) != len(sections) {
			return fmt.Errorf("%d sections for %d parts", len(sections), len(list))
		}
		for _, s := range list {
			info := s.StateInfo()
			if err := s.LoadState(info.Version, sections[info]); err != nil {
				return err
			}
		}
		return nil
	})
}

// letters reads n letters and checks that they go on from the last one.
func (w *whole) letters(last byte, n int) byte {
	w.t.Helper()
	_ = w.conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	for range n {
		b, err := w.serial.ReadByte()
		if err != nil {
			w.t.Fatal(err)
		}
		if want := (last-'a'+1)%16 + 'a'; last != 0 && b != want {
			w.t.Fatalf("the guest says %q after %q", b, last)
		}
		last = b
	}
	return last
}

// checkStamps checks that no page of a stamper that stands still is older than it can be.
func checkStamps(t *testing.T, mem *guestmem.Memory) {
	t.Helper()
	first, _ := mem.Load32(stampBase)
	for gpa, steps := uint64(stampBase), 0; gpa < stampEnd; gpa += guestmem.PageSize {
		v, _ := mem.Load32(gpa)
		if v == first-1 && steps == 0 {
			first, steps = v, 1
		}
		if v != first {
			t.Fatalf("page %#x has stamp %d, the one before it %d", gpa, v, first)
		}
	}
}

var wholeArgs = []string{
	"-smp", "2", "-device", "pcie-root-port,id=rp0,chassis=1",
	"-device", "virtio-rng-pci,bus=rp0", "-device", "virtio-serial-pci",
}

// A whole machine goes to another one and on from there, over and over: RAM by the dirty
// sources while it runs, then all its sections. Its memory, its output and its time go on.
func TestWholeMachine(t *testing.T) {
	for name, args := range map[string][]string{"log": nil, "ring": {"-accel", "kvm,dirty-ring-size=4096"}} {
		t.Run(name, func(t *testing.T) {
			if sys, err := kvm.Open(); err == nil && name == "ring" {
				defer sys.Close()
				if sys.Kind() == kvm.PVM {
					t.Skip("kvm_pvm does not stop at a full ring")
				}
			}
			args := append(slices.Clone(wholeArgs), args...)
			w := startWhole(t, append(args, "-kernel", tiny.Kernel(t, stamper))...)
			last := w.letters(0, 3)
			for range 3 {
				next := startWhole(t, append(args, "-incoming", "defer")...)
				last = moveWhole(t, w, next, last)
				w = next
				last = w.letters(last, 20)
			}
			w.pause()
			checkStamps(t, w.mem)
		})
	}
}

// moveWhole moves the guest. The letters that it says until it stops are read here.
func moveWhole(t *testing.T, from, to *whole, last byte) byte {
	t.Helper()
	sources := from.dirtySources()
	for _, s := range sources {
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
	}
	dirty := guestmem.NewBitmap(from.mem)
	send := func() (n uint64) {
		for _, s := range sources {
			if p, ok := s.(migrate.Protector); ok {
				for _, r := range from.mem.Regions() {
					if err := p.Protect(r.GPA, r.Size); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		for gpa, size := range dirty.Runs() {
			b, _ := from.mem.Bytes(gpa, size)
			if _, err := to.mem.WriteAt(b, int64(gpa)); err != nil {
				t.Fatal(err)
			}
			n += size
		}
		return n
	}
	for _, r := range from.mem.Regions() {
		dirty.Set(r.GPA, r.Size)
	}
	send()
	sync := func() {
		t.Helper()
		dirty.Clear()
		for _, s := range sources {
			if err := s.Sync(dirty); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 3 {
		v, _ := from.mem.Load32(stampBase)
		for now := v; now < v+2; now, _ = from.mem.Load32(stampBase) { // the guest writes all the time
			last = from.letters(last, 1)
		}
		sync()
		if n := send(); n < stampEnd-stampBase || n > 3*(stampEnd-stampBase) {
			t.Errorf("a round of %d bytes; the guest writes to %d", n, stampEnd-stampBase)
		}
	}
	from.pause()
	sync()
	send()
	checkStamps(t, from.mem)
	sections := from.save()
	to.load(sections)
	for i, r := range from.mem.Regions() {
		for off := uint64(0); off < r.Size; off += guestmem.PageSize {
			if string(r.Host[off:][:guestmem.PageSize]) != string(to.mem.Regions()[i].Host[off:][:guestmem.PageSize]) {
				t.Fatalf("page %#x differs", r.GPA+off)
			}
		}
	}
	for _, s := range sources {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	}
	return from.follow(to, last)
}

// follow lets the guest go on in another machine: the first letter there follows on what it
// said here before it stopped.
func (w *whole) follow(to *whole, last byte) byte {
	w.t.Helper()
	to.goOn()
	first := to.letters(0, 1)
	if first == '!' {
		w.t.Fatal("the guest has met something wrong")
	}
	for (last-'a'+1)%16+'a' != first {
		last = w.letters(last, 1)
	}
	return first
}

// What is loaded is what was saved, section by section.
func TestWholeSections(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	args := append(slices.Clone(wholeArgs), "-drive", "file="+disk)
	w := startWhole(t, append(args, "-kernel", tiny.Kernel(t, tiny.Halt))...)
	w.pause()
	sections := w.save()
	next := startWhole(t, append(args, "-incoming", "defer")...)
	next.load(sections)
	var ids []string
	for info, data := range next.save() {
		ids = append(ids, info.ID)
		if old := sections[info]; string(old) != string(data) && info.ID != "clock" && !strings.HasPrefix(info.ID, "vcpu/") {
			t.Errorf("%s: saved again it is another one", info)
		}
	}
	slices.Sort(ids)
	want := []string{"clock", "ioapic", "pci/0000:00:00.0", "pci/0000:00:01.0", "pci/0000:00:01.0/00.0", "pci/0000:00:02.0", "pci/0000:00:03.0",
		"pm", "rtc", "serial/com1", "vcpu/0", "vcpu/1"}
	if !slices.Equal(ids, want) {
		t.Errorf("sections %q, want %q", ids, want)
	}
	if got := next.blockers(); len(got) > 0 {
		t.Errorf("cannot move: %q", got)
	}
	disks := func(w *whole, f func(d *blk.Disk) error) {
		t.Helper()
		w.in(func() (err error) {
			for _, d := range w.lockables() {
				err = errors.Join(err, f(d))
			}
			return err
		})
	}
	disks(w, (*blk.Disk).Flush)
	disks(w, (*blk.Disk).Unlock)
	disks(next, (*blk.Disk).Lock)
	disks(next, (*blk.Disk).Unlock)
	disks(w, (*blk.Disk).Lock)
	w.goOn() // a source that goes on has lost nothing
}

// Bad sections of the vCPUs and the clock are refused by name; the others have tests of their own.
func TestWholeBadSections(t *testing.T) {
	w := startWhole(t, append(wholeArgs, "-kernel", tiny.Kernel(t, tiny.Halt))...)
	w.pause()
	sections := w.save()
	next := startWhole(t, append(wholeArgs, "-incoming", "defer")...)
	next.in(func() error {
		for _, s := range next.staters() {
			info := s.StateInfo()
			data := sections[info]
			if info.ID != "clock" && info.ID != "vcpu/1" {
				continue
			}
			for n := 0; n < len(data); n += 1 + n/16 {
				if err := s.LoadState(1, data[:n]); err == nil || !strings.Contains(err.Error(), "load "+info.ID+" (") {
					t.Errorf("%s, %d bytes of %d: %v", info, n, len(data), err)
				}
				bad := slices.Clone(data)
				bad[n] ^= 0x55
				var e *devices.StateError
				if err := s.LoadState(1, bad); err != nil && !errors.As(err, &e) {
					t.Errorf("%s, byte %d: %v", info, n, err)
				}
			}
			if err := s.LoadState(2, data); err == nil {
				t.Errorf("%s: format 2 was loaded", info)
			}
		}
		return nil
	})
}
