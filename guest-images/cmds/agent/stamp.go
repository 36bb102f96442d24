package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// What a guest does while it moves to another host, such that whatever is lost on the way shows:
// every page of RAM, block of the disk and chunk of a TCP stream carries a stamp, of which the
// guest knows what it has to be.
//
//	@stamp SIZE_MIB RATE_MIB_S   CPU writes to RAM         @stamp-check
//	@blkstamp DEV RATE_MIB_S     virtio-blk both ways      @stamp-check
//	@tcp-stamp ADDR              vhost's receive           @stamp-check
//	@clock                       real and monotonic time

const (
	pageSize   = 4096
	stampWords = pageSize / 8
	chunkSize  = 16 << 10 // of the TCP stream
)

// stamps is the work under way.
var stamps struct {
	sync.Mutex
	ram  *stamper
	disk *stamper
	tcp  tcpStamps
}

// stamper writes stamps to random pages at a rate, and knows what each page has.
type stamper struct {
	mu      sync.Mutex
	shadow  []uint64 // by page: its generation, 0: never written
	write   func(page int, generation uint64) error
	check   func(page int, generation uint64) error
	kept    func() error // checks what is in RAM besides; may be nil
	writes  uint64
	checked uint64 // while it works
	err     error
}

// work writes, and now and then checks, until the guest ends; rate is in pages per second.
func (s *stamper) work(rate float64) {
	start, done := time.Now(), 0.0
	for {
		s.mu.Lock()
		page := rand.IntN(len(s.shadow))
		generation := s.shadow[page] + 1
		err := s.write(page, generation)
		if err == nil {
			s.shadow[page] = generation
			s.writes++
			if other := rand.IntN(len(s.shadow)); s.writes%8 == 0 {
				err = s.check(other, s.shadow[other])
				s.checked++
			}
		}
		if err != nil && s.err == nil {
			s.err = err
		}
		s.mu.Unlock()
		if done++; rate > 0 {
			if ahead := time.Duration(done/rate*float64(time.Second)) - time.Since(start); ahead > time.Millisecond {
				time.Sleep(ahead)
			} else if ahead < -time.Second { // it stood still: it does not catch up
				start, done = time.Now(), 0
			}
		}
	}
}

// verify checks every page.
func (s *stamper) verify() (pages, writes uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.writes, s.err
	}
	for page, generation := range s.shadow {
		if err := s.check(page, generation); err != nil {
			return uint64(page), s.writes, err
		}
	}
	if s.kept != nil {
		if err := s.kept(); err != nil {
			return 0, s.writes, err
		}
	}
	return uint64(len(s.shadow)), s.writes, nil
}

// fill is the stamp of a page: in each word the page's number, the generation and the word's own.
func fill(p []byte, page int, generation uint64) {
	for i := range len(p) / 8 {
		binary.LittleEndian.PutUint64(p[i*8:], uint64(page)<<40|(generation&0xffffffff)<<8|uint64(i&0xff))
	}
}

func compare(p []byte, page int, generation uint64) error {
	for i := range len(p) / 8 {
		want := uint64(page)<<40 | (generation&0xffffffff)<<8 | uint64(i&0xff)
		if got := binary.LittleEndian.Uint64(p[i*8:]); got != want {
			return fmt.Errorf("page %d, word %d: %#x (page %d, generation %d), want generation %d", page, i, got, got>>40, got>>8&0xffffffff, generation)
		}
	}
	return nil
}

func stampRAM(a []string) (any, error) {
	size, rate, err := sizeAndRate(a[0], a[1])
	if err != nil {
		return nil, err
	}
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	at := func(page int) []byte { return memory[page*pageSize:][:pageSize] }
	s := &stamper{
		shadow: make([]uint64, size/pageSize),
		write:  func(page int, generation uint64) error { fill(at(page), page, generation); return nil },
		check:  func(page int, generation uint64) error { return compare(at(page), page, generation) },
	}
	for page := range s.shadow {
		s.shadow[page] = 1
		fill(at(page), page, 1)
	}
	stamps.Lock()
	defer stamps.Unlock()
	if stamps.ram != nil {
		return nil, errors.New("RAM is being stamped already")
	}
	stamps.ram = s
	if rate > 0 {
		go s.work(rate)
	}
	return "", nil
}

func sizeAndRate(size, rate string) (bytes int, pagesPerSecond float64, err error) {
	n, err := strconv.Atoi(size)
	if err != nil || n < 1 {
		return 0, 0, fmt.Errorf("%q is no number of MiB", size)
	}
	r, err := strconv.ParseFloat(rate, 64)
	return n << 20, r * (1 << 20) / pageSize, err
}

// stampDisk uses the last eighth of a disk, past the page cache.
func stampDisk(a []string) (any, error) {
	f, err := os.OpenFile(a[0], os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	_, rate, err := sizeAndRate("1", a[1])
	if err != nil {
		return nil, err
	}
	pages := int(size / 8 / pageSize)
	first := size/pageSize - int64(pages)
	// Reads go to one page after the other of RAM, which the device dirties and nobody else
	// touches: what it has put there is looked at again before the page's next turn, and at the end.
	buf, err := unix.Mmap(-1, 0, 4<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	out, err := unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	type read struct {
		page       int
		generation uint64 // 0: nothing was read
	}
	reads, next := make([]read, len(buf)/pageSize), 0
	keeps := func(i int) error {
		if reads[i].generation == 0 {
			return nil
		}
		if err := compare(buf[i*pageSize:][:pageSize], reads[i].page, reads[i].generation); err != nil {
			return fmt.Errorf("read earlier: %w", err)
		}
		return nil
	}
	s := &stamper{
		shadow: make([]uint64, pages),
		write: func(page int, generation uint64) error {
			fill(out, page, generation)
			_, err := f.WriteAt(out, (first+int64(page))*pageSize)
			return err
		},
		check: func(page int, generation uint64) error {
			if generation == 0 {
				return nil
			}
			next = (next + 1) % len(reads)
			if err := keeps(next); err != nil {
				return err
			}
			b := buf[next*pageSize:][:pageSize]
			if _, err := f.ReadAt(b, (first+int64(page))*pageSize); err != nil {
				return err
			}
			reads[next] = read{page, generation}
			return compare(b, page, generation)
		},
		kept: func() error {
			for i := range reads {
				if err := keeps(i); err != nil {
					return err
				}
			}
			return nil
		},
	}
	stamps.Lock()
	defer stamps.Unlock()
	if stamps.disk != nil {
		return nil, errors.New("a disk is being stamped already")
	}
	stamps.disk = s
	go s.work(rate)
	return "", nil
}

// tcpStamps are the streams that came in: chunks, each with its number, random bytes and their
// checksum, which no offload computes.
type tcpStamps struct {
	bytes, connections atomic.Uint64
	mu                 sync.Mutex
	err                error
}

func stampTCP(a []string) (any, error) { return listen(a[0], stamps.tcp.receive) }

func (s *tcpStamps) receive(c net.Conn) {
	defer c.Close()
	s.connections.Add(1)
	// Each chunk is kept for a while: what is written to its pages after they were
	// copied would show.
	kept := make([][]byte, 64)
	for i := uint32(0); ; i++ {
		if old := kept[i%64]; old != nil {
			s.complain(checkChunk(old, i-64))
		}
		chunk := make([]byte, chunkSize)
		if t, ok := c.(*net.TCPConn); ok && i%16 == 0 {
			dwell(t)
		}
		if _, err := io.ReadFull(c, chunk); err != nil {
			return
		}
		s.complain(checkChunk(chunk, i))
		kept[i%64] = chunk
		s.bytes.Add(chunkSize)
	}
}

// dwell leaves what comes where the device put it, until there is much of it or a while has
// passed: pages of the kernel that the guest's CPU has not written.
func dwell(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	for range 10 {
		queued := 0
		if err := raw.Control(func(fd uintptr) { queued, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); err != nil || queued >= 16*chunkSize {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (s *tcpStamps) complain(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
}

// checkChunk wants number, contents, CRC-32 (IEEE), both numbers big endian.
func checkChunk(b []byte, number uint32) error {
	if got := binary.BigEndian.Uint32(b); got != number {
		return fmt.Errorf("TCP: chunk %d where %d should be", got, number)
	}
	if got, want := binary.BigEndian.Uint32(b[len(b)-4:]), crc32.ChecksumIEEE(b[:len(b)-4]); got != want {
		return fmt.Errorf("TCP: chunk %d: checksum %#x, want %#x", number, got, want)
	}
	return nil
}

// stampCheck is what @stamp-check says.
type stampCheck struct {
	Pages     uint64 `json:"pages"` // of RAM
	Writes    uint64 `json:"writes"`
	Blocks    uint64 `json:"blocks"`
	DiskIO    uint64 `json:"disk_writes"`
	TCPBytes  uint64 `json:"tcp_bytes"`
	TCPStream uint64 `json:"tcp_streams"`
}

func checkStamps([]string) (any, error) {
	stamps.Lock()
	ram, disk := stamps.ram, stamps.disk
	stamps.Unlock()
	var c stampCheck
	var err error
	if ram != nil {
		if c.Pages, c.Writes, err = ram.verify(); err != nil {
			return nil, fmt.Errorf("RAM: %w", err)
		}
	}
	if disk != nil {
		if c.Blocks, c.DiskIO, err = disk.verify(); err != nil {
			return nil, fmt.Errorf("disk: %w", err)
		}
	}
	c.TCPBytes, c.TCPStream = stamps.tcp.bytes.Load(), stamps.tcp.connections.Load()
	stamps.tcp.mu.Lock()
	defer stamps.tcp.mu.Unlock()
	return c, stamps.tcp.err
}

// clock reads the guest's clocks, in nanoseconds.
func clock([]string) (any, error) {
	var real, mono unix.Timespec
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_REALTIME, &real), unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono)); err != nil {
		return nil, err
	}
	return map[string]int64{"real": real.Nano(), "monotonic": mono.Nano()}, nil
}
