package blk_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"baton/devices/virtio"
	"baton/devices/virtio/blk"
	"baton/tests/virtiotest"
)

const (
	reqIn          = 0
	reqOut         = 1
	reqFlush       = 4
	reqGetID       = 8
	reqDiscard     = 11
	reqWriteZeroes = 13

	featureReadOnly = 1 << 5
	featureFlush    = 1 << 9

	ok          = 0
	ioError     = 1
	unsupported = 2
)

const diskSize = 4 << 20

// content counts up, in 4-byte words.
var content = sync.OnceValue(func() []byte {
	b := make([]byte, diskSize)
	for i := 0; i < len(b); i += 4 {
		binary.LittleEndian.PutUint32(b[i:], uint32(i))
	}
	return b
})

// image makes a disk in dir.
func image(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, content(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// folders are a disk's file system that never blocks, where there is one, and an
// ordinary one.
func folders(t testing.TB) map[string]string {
	t.Helper()
	dirs := map[string]string{"file": t.TempDir()}
	if shm, err := os.MkdirTemp("/dev/shm", "blk"); err == nil {
		t.Cleanup(func() { _ = os.RemoveAll(shm) })
		dirs["tmpfs"] = shm
	}
	return dirs
}

func open(t testing.TB, path string, o blk.Options) *blk.Disk {
	t.Helper()
	d, err := blk.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// disk starts a device on a new image.
func disk(t testing.TB, dir string, o blk.Options, cfg blk.Config) (*virtiotest.Driver, string) {
	t.Helper()
	sub, err := os.MkdirTemp(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	path := image(t, sub)
	cfg.Disk = open(t, path, o)
	dev, err := blk.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return virtiotest.NewDriver(t, dev, dev.Features()), path
}

func header(typ uint32, sector uint64) []byte {
	b := binary.LittleEndian.AppendUint32(nil, typ)
	return binary.LittleEndian.AppendUint64(append(b, 0, 0, 0, 0), sector)
}

func segment(sector uint64, n, flags uint32) []byte {
	b := binary.LittleEndian.AppendUint64(nil, sector)
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(b, n), flags)
}

// status splits the status off what came back.
func status(t testing.TB, b []byte) (data []byte, st byte) {
	t.Helper()
	if len(b) == 0 {
		t.Fatal("no status")
	}
	return b[:len(b)-1], b[len(b)-1]
}

func TestContract(t *testing.T) {
	virtiotest.Run(t, func(t testing.TB) virtio.Device {
		dev, err := blk.New(blk.Config{Disk: open(t, image(t, t.TempDir()), blk.Options{}), Queues: 2})
		if err != nil {
			t.Fatal(err)
		}
		return dev
	})
}

func TestReadWrite(t *testing.T) {
	for name, dir := range folders(t) {
		t.Run(name, func(t *testing.T) {
			d, path := disk(t, dir, blk.Options{}, blk.Config{})
			want, _ := os.ReadFile(path)
			r := d.Rings[0]
			check := func(sector uint64, in ...int) {
				t.Helper()
				n := 0
				for _, k := range in {
					n += k
				}
				got, st := status(t, r.Do([][]byte{header(reqIn, sector)}, append(in, 1)...))
				if st != ok || !bytes.Equal(got, want[sector*512:][:n]) {
					t.Errorf("read of %v at sector %d: status %d, data equal %v", in, sector, st, bytes.Equal(got, want[sector*512:][:n]))
				}
			}
			check(0, 512)
			check(diskSize/512-1, 512)
			check(7, 4096, 512, 100, 412, 65536)
			check(0, 1<<20)
			// The status may share a buffer with data, the header may be in pieces: 2.7.4.
			h := header(reqIn, 3)
			got, st := status(t, r.Do([][]byte{h[:1], h[1:9], h[9:]}, 1000, 25))
			if st != ok || !bytes.Equal(got, want[3*512:][:1024]) {
				t.Errorf("read in odd pieces: status %d", st)
			}
			data := bytes.Repeat([]byte("0123456789abcdef"), 512)
			if _, st := status(t, r.Do([][]byte{header(reqOut, 100), data[:100], data[100:]}, 1)); st != ok {
				t.Errorf("write: status %d", st)
			}
			if _, st := status(t, r.Do([][]byte{append(header(reqOut, 200), data[:512]...)}, 1)); st != ok {
				t.Errorf("write with the header in the same buffer: status %d", st)
			}
			copy(want[100*512:], data)
			copy(want[200*512:], data[:512])
			if _, st := status(t, r.Do([][]byte{header(reqFlush, 0)}, 1)); st != ok {
				t.Errorf("flush: status %d", st)
			}
			check(98, 16<<10)
			check(199, 1024)
			if after, _ := os.ReadFile(path); !bytes.Equal(after, want) {
				t.Error("the file is not what was written")
			}
		})
	}
}

// TestManyInFlight keeps all queues full of reads, more than a queue has slots for
// those that wait.
func TestManyInFlight(t *testing.T) {
	for name, dir := range folders(t) {
		t.Run(name, func(t *testing.T) {
			const queues, depth, rounds = 3, 60, 8
			d, path := disk(t, dir, blk.Options{ReadOnly: true}, blk.Config{Queues: queues})
			want, _ := os.ReadFile(path)
			rnd := rand.New(rand.NewPCG(1, 2))
			for range rounds {
				sectors := map[[2]uint16]uint64{}
				for i := range queues {
					for range depth {
						s := rnd.Uint64N(diskSize/512 - 8)
						req := d.Rings[i].Add([][]byte{header(reqIn, s)}, 4096, 1)
						sectors[[2]uint16{uint16(i), req.Head}] = s
					}
					d.Rings[i].Kick()
				}
				for i := range queues {
					for range depth {
						req, n := d.Rings[i].Wait()
						s := sectors[[2]uint16{uint16(i), req.Head}]
						if got, st := status(t, req.Written(n)); st != ok || !bytes.Equal(got, want[s*512:][:4096]) {
							t.Fatalf("sector %d: status %d or wrong data", s, st)
						}
					}
				}
			}
		})
	}
}

func TestRequests(t *testing.T) {
	const sectors = diskSize / 512
	for _, tt := range []struct {
		name string
		o    blk.Options
		out  [][]byte
		in   []int
		want byte
		n    int // bytes before the status
	}{
		{name: "read past the end", out: [][]byte{header(reqIn, sectors-1)}, in: []int{1024, 1}, want: ioError, n: 1024},
		{name: "read far out", out: [][]byte{header(reqIn, 1<<63)}, in: []int{512, 1}, want: ioError, n: 512},
		{name: "sector wraps", out: [][]byte{header(reqIn, ^uint64(0))}, in: []int{1024, 1}, want: ioError, n: 1024},
		{name: "half a sector", out: [][]byte{header(reqIn, 0)}, in: []int{256, 1}, want: ioError, n: 256},
		{name: "read nothing", out: [][]byte{header(reqIn, 0)}, in: []int{1}},
		{name: "write past the end", out: [][]byte{header(reqOut, sectors), make([]byte, 512)}, in: []int{1}, want: ioError},
		{name: "write half a sector", out: [][]byte{header(reqOut, 0), make([]byte, 511)}, in: []int{1}, want: ioError},
		{name: "write read-only", o: blk.Options{ReadOnly: true}, out: [][]byte{header(reqOut, 0), make([]byte, 512)}, in: []int{1}, want: ioError},
		{name: "discard read-only", o: blk.Options{ReadOnly: true}, out: [][]byte{header(reqDiscard, 0), segment(0, 8, 0)}, in: []int{1}, want: ioError},
		{name: "flush read-only", o: blk.Options{ReadOnly: true}, out: [][]byte{header(reqFlush, 0)}, in: []int{1}},
		{name: "flush ignored", o: blk.Options{IgnoreFlush: true}, out: [][]byte{header(reqFlush, 0)}, in: []int{1}},
		{name: "serial", out: [][]byte{header(reqGetID, 0)}, in: []int{20, 1}, n: 20},
		{name: "serial in a long buffer", out: [][]byte{header(reqGetID, 0)}, in: []int{100, 1}, n: 20},
		{name: "unknown", out: [][]byte{header(77, 0)}, in: []int{512, 1}, want: unsupported},
		{name: "discard", out: [][]byte{header(reqDiscard, 0), segment(8, 8, 0), segment(64, 128, 0)}, in: []int{1}},
		{name: "discard nothing", out: [][]byte{header(reqDiscard, 0), segment(8, 0, 0)}, in: []int{1}},
		{name: "discard without a range", out: [][]byte{header(reqDiscard, 0)}, in: []int{1}, want: ioError},
		{name: "discard half a range", out: [][]byte{header(reqDiscard, 0), make([]byte, 24)}, in: []int{1}, want: ioError},
		{name: "discard many ranges", out: [][]byte{header(reqDiscard, 0), make([]byte, 17*16)}, in: []int{1}, want: ioError},
		{name: "discard with flags", out: [][]byte{header(reqDiscard, 0), segment(0, 8, 1)}, in: []int{1}, want: unsupported},
		{name: "discard past the end", out: [][]byte{header(reqDiscard, 0), segment(sectors-8, 9, 0)}, in: []int{1}, want: ioError},
		{name: "zeroes with unknown flags", out: [][]byte{header(reqWriteZeroes, 0), segment(0, 8, 2)}, in: []int{1}, want: unsupported},
		{name: "zeroes past the end", out: [][]byte{header(reqWriteZeroes, 0), segment(sectors, 1, 0)}, in: []int{1}, want: ioError},
		{name: "zeroes beyond the limit", out: [][]byte{header(reqWriteZeroes, 0), segment(0, 1<<31, 0)}, in: []int{1}, want: ioError},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, _ := disk(t, t.TempDir(), tt.o, blk.Config{Serial: "serial-0123456789abc"})
			r := d.Rings[0]
			r.Add(tt.out, tt.in...)
			r.Kick()
			req, n := r.Wait()
			if n != tt.n+1 {
				t.Errorf("%d bytes written, want %d", n, tt.n+1)
			}
			last := req.In[len(req.In)-1]
			if st := last[len(last)-1]; st != tt.want {
				t.Errorf("status %d, want %d", st, tt.want)
			}
			if strings.HasPrefix(tt.name, "serial") && string(req.In[0][:20]) != "serial-0123456789abc" {
				t.Errorf("serial %q", req.In[0][:20])
			}
			// The device works on.
			if _, st := status(t, r.Do([][]byte{header(reqIn, 0)}, 512, 1)); st != ok {
				t.Errorf("next read: status %d", st)
			}
		})
	}
}

func TestMalformedRequests(t *testing.T) {
	for name, f := range map[string]func(r *virtiotest.Ring){
		"no header":    func(r *virtiotest.Ring) { r.Add(nil, 512, 1) },
		"short header": func(r *virtiotest.Ring) { r.Add([][]byte{make([]byte, 15)}, 1) },
		"no status":    func(r *virtiotest.Ring) { r.Add([][]byte{header(reqOut, 0), make([]byte, 512)}) },
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := disk(t, t.TempDir(), blk.Options{}, blk.Config{})
			f(d.Rings[0])
			d.Rings[0].Kick()
			if err := d.WaitFailure(); !strings.Contains(err.Error(), "queue 0: request without header or status") {
				t.Error(err)
			}
			d.Dev.Reset()
			d.Activate(d.Dev.Features())
			if _, st := status(t, d.Rings[0].Do([][]byte{header(reqIn, 0)}, 512, 1)); st != ok {
				t.Errorf("after a reset: status %d", st)
			}
		})
	}
}

func TestDiscardAndZeroes(t *testing.T) {
	for name, dir := range folders(t) {
		for _, tt := range []struct {
			name  string
			typ   uint32
			flags uint32
		}{{"discard", reqDiscard, 0}, {"zeroes", reqWriteZeroes, 0}, {"zeroes, unmap", reqWriteZeroes, 1}} {
			t.Run(name+" "+tt.name, func(t *testing.T) {
				d, path := disk(t, dir, blk.Options{}, blk.Config{})
				want, _ := os.ReadFile(path)
				out := [][]byte{header(tt.typ, 0), segment(8, 16, tt.flags), segment(1001, 1000, tt.flags)}
				if _, st := status(t, d.Rings[0].Do(out, 1)); st != ok {
					t.Fatalf("status %d", st)
				}
				clear(want[8*512 : 24*512])
				clear(want[1001*512 : 2001*512])
				if got, _ := os.ReadFile(path); !bytes.Equal(got, want) {
					t.Error("wrong contents, or wrong size")
				}
			})
		}
	}
}

func TestWriteThroughWithoutFlush(t *testing.T) {
	path := image(t, t.TempDir())
	dev, err := blk.New(blk.Config{Disk: open(t, path, blk.Options{})})
	if err != nil {
		t.Fatal(err)
	}
	d := virtiotest.NewDriver(t, dev, virtio.CoreFeatures)
	if _, st := status(t, d.Rings[0].Do([][]byte{header(reqOut, 5), bytes.Repeat([]byte{7}, 512)}, 1)); st != ok {
		t.Errorf("status %d", st)
	}
	if got, _ := os.ReadFile(path); got[5*512] != 7 || len(got) != diskSize {
		t.Error("not written")
	}
}

func TestShrunkenFile(t *testing.T) {
	d, path := disk(t, t.TempDir(), blk.Options{}, blk.Config{})
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if _, st := status(t, d.Rings[0].Do([][]byte{header(reqIn, 1000)}, 512, 1)); st != ioError {
		t.Errorf("status %d", st)
	}
}

func TestConfigSpace(t *testing.T) {
	read := func(dev *blk.Device, off uint64, n int) uint64 {
		var b [8]byte
		dev.ReadConfig(off, b[:n])
		return binary.LittleEndian.Uint64(b[:])
	}
	path := image(t, t.TempDir())
	for _, tt := range []struct {
		cfg      blk.Config
		readOnly bool
	}{{blk.Config{}, false}, {blk.Config{Queues: 4, BlockSize: 4096}, true}} {
		tt.cfg.Disk = open(t, path, blk.Options{ReadOnly: tt.readOnly})
		dev, err := blk.New(tt.cfg)
		if err != nil {
			t.Fatal(err)
		}
		blockSize, queues := uint64(max(tt.cfg.BlockSize, 512)), uint64(max(tt.cfg.Queues, 1))
		if ro := dev.Features()&featureReadOnly != 0; ro != tt.readOnly {
			t.Errorf("VIRTIO_BLK_F_RO %v", ro)
		}
		if dev.Features()&featureFlush == 0 || uint64(len(dev.QueueSizes())) != queues {
			t.Errorf("features %#x, queues %v", dev.Features(), dev.QueueSizes())
		}
		if c, b, q := read(dev, 0, 8), read(dev, 20, 4), read(dev, 34, 2); c != diskSize/512 || b != blockSize || q != queues {
			t.Errorf("capacity %d, block size %d, %d queues", c, b, q)
		}
		if exp := read(dev, 24, 1); blockSize<<exp != 4096 && blockSize<<exp != uint64(os.Getpagesize()) {
			t.Errorf("physical block exponent %d", exp)
		}
		if d, s := read(dev, 36, 4), read(dev, 40, 4); d == 0 || s == 0 {
			t.Errorf("discard limits %d, %d", d, s)
		}
		if read(dev, 12, 4)+2 > uint64(dev.QueueSizes()[0]) {
			t.Error("seg_max does not fit the queue")
		}
		_ = dev.Close()
	}
	for _, cfg := range []blk.Config{{Queues: -1}, {Queues: 257}, {Serial: strings.Repeat("x", 21)}, {BlockSize: 256}, {BlockSize: 1536}, {BlockSize: 64 << 10}} {
		cfg.Disk = open(t, path, blk.Options{})
		if dev, err := blk.New(cfg); err == nil || dev != nil || !strings.HasPrefix(err.Error(), "disk "+path+": ") {
			t.Errorf("%+v: %v", cfg, err)
		}
		_ = cfg.Disk.Close()
	}
}

func BenchmarkRead4K(b *testing.B) {
	for name, dir := range folders(b) {
		for _, depth := range []int{1, 32} {
			b.Run(fmt.Sprintf("%s/depth %d", name, depth), func(b *testing.B) {
				d, _ := disk(b, dir, blk.Options{ReadOnly: true}, blk.Config{})
				r := d.Rings[0]
				h := header(reqIn, 0)
				for range depth - 1 {
					r.Add([][]byte{h}, 4096, 1)
				}
				b.SetBytes(4096)
				for b.Loop() {
					binary.LittleEndian.PutUint64(h[8:], rand.Uint64N(diskSize/512-8))
					r.Add([][]byte{h}, 4096, 1)
					r.Kick()
					r.Wait()
				}
			})
		}
	}
}

func FuzzRequest(f *testing.F) {
	f.Add(header(reqIn, 0), uint16(512), uint16(1))
	f.Add(append(header(reqOut, 3), make([]byte, 512)...), uint16(1), uint16(0))
	f.Add(append(header(reqDiscard, 0), segment(0, 8, 0)...), uint16(1), uint16(0))
	f.Add(append(header(reqWriteZeroes, 0), segment(0, 8, 1)...), uint16(1), uint16(0))
	path := image(f, f.TempDir())
	f.Fuzz(func(t *testing.T, out []byte, in, more uint16) {
		dev, err := blk.New(blk.Config{Disk: open(t, path, blk.Options{})})
		if err != nil {
			t.Fatal(err)
		}
		d := virtiotest.NewDriver(t, dev, dev.Features())
		var sizes []int
		for _, n := range []uint16{in, more} {
			if n != 0 {
				sizes = append(sizes, int(n))
			}
		}
		if len(out)+len(sizes) == 0 {
			return
		}
		var bufs [][]byte
		for len(out) > 0 {
			n := min(len(out), 16)
			bufs, out = append(bufs, out[:n]), out[n:]
			if len(bufs) > 100 {
				return
			}
		}
		d.Rings[0].Add(bufs, sizes...)
		d.Rings[0].Kick()
		dev.Reset() // waits for it, if it was seen
		if st, err := os.Stat(path); err != nil || st.Size() != diskSize {
			t.Fatalf("size of the image: %v, %v", st, err)
		}
	})
}
