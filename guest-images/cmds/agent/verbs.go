package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"baton/guest-images/guest"
	"baton/guest-images/proto"
	"baton/tests/nettool"
)

// verb is a command of the agent itself. It returns a string, or something for JSON.
type verb struct {
	usage string
	args  int // how many it needs
	run   func(a []string) (any, error)
	after func() // once answered
}

var verbs = map[string]verb{
	"@addr":        {"IFACE|MAC CIDR", 2, func(a []string) (any, error) { return addr(a[0], a[1]) }, nil},
	"@carrier":     {"IFACE|MAC", 1, func(a []string) (any, error) { name, err := guest.WaitCarrier(a[0]); return name + "\n", err }, nil},
	"@ping":        {"ADDR COUNT INTERVAL_MS", 3, ping, nil},
	"@lspci":       {"", 0, func([]string) (any, error) { return guest.PCITree("") }, nil},
	"@cat":         {"FILE", 1, func(a []string) (any, error) { b, err := os.ReadFile(a[0]); return string(b), err }, nil},
	"@blkread":     {"DEV BLOCKSIZE COUNT random|seq SECONDS", 5, blkRead, nil},
	"@fallocate":   {"FILE zero|punch OFFSET LENGTH", 4, fallocate, nil},
	"@tcp-serve":   {"ADDR", 1, tcpServe, nil},
	"@tcp-send":    {"ADDR STREAMS SECONDS", 3, tcpSend, nil},
	"@stamp":       {"SIZE_MIB RATE_MIB_S", 2, stampRAM, nil},
	"@blkstamp":    {"DEV RATE_MIB_S", 2, stampDisk, nil},
	"@tcp-stamp":   {"ADDR", 1, stampTCP, nil},
	"@stamp-check": {"", 0, checkStamps, nil},
	"@tcp-echo":    {"ADDR", 1, tcpEcho, nil},
	"@udp":         {"LOCAL ADDR RATE", 3, udpStart, nil},
	"@udp-check":   {"", 0, udpCheck, nil},
	"@clock":       {"", 0, clock, nil},
	"@modprobe":    {"NAME", 1, func(a []string) (any, error) { return "", guest.LoadModule(a[0]) }, nil},
	"@dmesg":       {"", 0, dmesg, nil},
	"@poweroff":    {"", 0, nothing, func() { report(reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)) }},
	"@reboot":      {"", 0, nothing, func() { report(reboot(unix.LINUX_REBOOT_CMD_RESTART)) }},
	"@panic":       {"", 0, nothing, func() { report(os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)) }},
}

func runVerb(name string, args []string) proto.Response {
	v, ok := verbs[name]
	if !ok {
		return proto.Response{Exit: -1, Error: "no verb " + name}
	}
	if len(args) != v.args {
		return proto.Response{Exit: -1, Error: fmt.Sprintf("usage: %s %s", name, v.usage)}
	}
	res, err := v.run(args)
	if err != nil {
		return proto.Response{Exit: 1, Error: fmt.Sprintf("%s: %v", name, err)}
	}
	out, isText := res.(string)
	if !isText {
		b, _ := json.Marshal(res) // plain numbers only
		out = string(b) + "\n"
	}
	return proto.Response{Stdout: out, After: v.after}
}

// listen has serve, which closes it, take each connection that comes; it says where it listens.
func listen(addr string, serve func(net.Conn)) (any, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				report(err)
				return
			}
			go serve(c)
		}
	}()
	return l.Addr().String() + "\n", nil
}

// tcpEcho sends back what comes by each connection.
func tcpEcho(a []string) (any, error) {
	return listen(a[0], func(c net.Conn) {
		defer c.Close()
		_, _ = io.Copy(c, c)
	})
}

// datagrams is the stream under way.
var datagrams *nettool.Datagrams

// udpStart begins a stream of numbered datagrams, RATE a second.
func udpStart(a []string) (any, error) {
	rate, err := strconv.ParseUint(a[2], 10, 16)
	if err != nil {
		return nil, err
	}
	if datagrams != nil {
		datagrams.Stop()
	}
	datagrams, err = nettool.StartDatagrams(a[0], a[1], int(rate))
	return "", err
}

// udpCheck says what has come of the other one's.
func udpCheck([]string) (any, error) {
	if datagrams == nil {
		return nil, errors.New("there is no stream")
	}
	return datagrams.Result(), nil
}

func nothing([]string) (any, error) { return "", nil }

func reboot(cmd int) error {
	unix.Sync()
	return unix.Reboot(cmd)
}

func addr(name, cidr string) (any, error) {
	name, err := guest.SetAddr(name, cidr)
	return name + "\n", err
}

func dmesg([]string) (any, error) {
	buf := make([]byte, 1<<20)
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buf)
	return string(buf[:max(n, 0)]), err
}

// pingResult has one round trip time per request, in microseconds, or -1 for no answer.
type pingResult struct {
	Sent     int     `json:"sent"`
	Received int     `json:"received"`
	RTT      []int64 `json:"rtt_us"`
}

func ping(a []string) (any, error) {
	count, err := strconv.ParseUint(a[1], 10, 16)
	if err != nil {
		return nil, err
	}
	interval, err := strconv.ParseUint(a[2], 10, 16)
	if err != nil {
		return nil, err
	}
	conn, err := net.Dial("ip4:icmp", a[0])
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	c := conn.(*net.IPConn) // whose ReadFrom, not Read, leaves out the IP header
	id := uint16(rand.Uint32())
	res := pingResult{RTT: make([]int64, count)}
	buf := make([]byte, 1500)
	sent := make([]time.Time, count)
	next := time.Now()
	for seq := range res.RTT {
		res.RTT[seq] = -1
		sent[seq] = time.Now()
		if _, err := c.Write(echoRequest(id, uint16(seq))); err == nil {
			res.Sent++
		}
		next = next.Add(time.Duration(interval) * time.Millisecond)
		if seq == len(res.RTT)-1 { // late answers to the last ones count too
			next = next.Add(time.Second)
		}
		_ = c.SetReadDeadline(next)
		for res.Received < int(count) {
			n, _, err := c.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			} else if err != nil {
				continue // such as host unreachable, which a later answer may follow
			}
			// RFC 792: type 0 is the echo reply, then code, checksum, identifier, sequence.
			if n < 8 || buf[0] != 0 || binary.BigEndian.Uint16(buf[4:]) != id {
				continue
			}
			if s := int(binary.BigEndian.Uint16(buf[6:])); s <= seq && res.RTT[s] < 0 {
				res.RTT[s] = time.Since(sent[s]).Microseconds()
				res.Received++
			}
		}
	}
	return res, nil
}

func echoRequest(id, seq uint16) []byte {
	p := make([]byte, 64)
	p[0] = 8
	binary.BigEndian.PutUint16(p[4:], id)
	binary.BigEndian.PutUint16(p[6:], seq)
	sum := uint32(0)
	for i := 0; i < len(p); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	binary.BigEndian.PutUint16(p[2:], ^uint16(sum+sum>>16))
	return p
}

// fallocate zeroes a range of a file or block device: it stays allocated, or becomes a hole.
func fallocate(a []string) (any, error) {
	mode, ok := map[string]uint32{"zero": unix.FALLOC_FL_ZERO_RANGE, "punch": unix.FALLOC_FL_PUNCH_HOLE}[a[1]]
	if !ok {
		return nil, fmt.Errorf("mode %q is neither zero nor punch", a[1])
	}
	off, err := strconv.ParseInt(a[2], 10, 64)
	if err != nil {
		return nil, err
	}
	n, err := strconv.ParseInt(a[3], 10, 64)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(a[0], os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return "", unix.Fallocate(int(f.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func tcpServe(a []string) (any, error) { return listen(a[0], nettool.Receive) }

func tcpSend(a []string) (any, error) {
	streams, err := strconv.Atoi(a[1])
	if err != nil {
		return nil, err
	}
	d, err := time.ParseDuration(a[2] + "s")
	if err != nil {
		return nil, err
	}
	return nettool.Send(a[0], streams, d)
}

// blkResult is what one reader got with one request in flight.
type blkResult struct {
	Ops     uint64  `json:"ops"`
	Bytes   uint64  `json:"bytes"`
	Seconds float64 `json:"seconds"`
	IOPS    float64 `json:"iops"`
	MiBPS   float64 `json:"mib_s"`
}

// blkRead reads COUNT blocks (0: no limit), past the page cache, for at most SECONDS.
func blkRead(a []string) (any, error) {
	bs, err := strconv.ParseUint(a[1], 10, 24)
	if err != nil || bs == 0 || bs%512 != 0 {
		return nil, fmt.Errorf("block size %q is not a multiple of 512 below 16 MiB", a[1])
	}
	count, err := strconv.ParseUint(a[2], 10, 64)
	if err != nil {
		return nil, err
	}
	if a[3] != "random" && a[3] != "seq" {
		return nil, fmt.Errorf("order %q is neither random nor seq", a[3])
	}
	limit, err := time.ParseDuration(a[4] + "s")
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(a[0], os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return nil, err
	}
	blocks := uint64(size) / bs
	if blocks == 0 {
		return nil, fmt.Errorf("%s has %d bytes, less than a block", a[0], size)
	}
	buf, err := unix.Mmap(-1, 0, int(bs), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil { // mapped, because O_DIRECT wants it aligned
		return nil, err
	}
	defer func() { _ = unix.Munmap(buf) }()
	var r blkResult
	start := time.Now()
	for ; (count == 0 || r.Ops < count) && time.Since(start) < limit; r.Ops++ {
		block := r.Ops % blocks
		if a[3] == "random" {
			block = rand.Uint64N(blocks)
		}
		if _, err := f.ReadAt(buf, int64(block*bs)); err != nil {
			return nil, err
		}
	}
	r.Seconds = time.Since(start).Seconds()
	r.Bytes = r.Ops * bs
	r.IOPS, r.MiBPS = float64(r.Ops)/r.Seconds, float64(r.Bytes)/r.Seconds/(1<<20)
	return r, nil
}
