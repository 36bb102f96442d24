package migrate

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"baton/migrate/wire"
)

// snapshot writes a guest to an address that has one way, with what the test changes.
func snapshot(t testing.TB, m *machine, uri string, change func(*Options)) error {
	t.Helper()
	o := options(t, uri)
	if change != nil {
		change(&o)
	}
	s, err := NewSource(m, o)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Run()
	if (err == nil) != (m.stop == nil) || (err == nil) != (s.Stats().Status == StatusCompleted) {
		t.Errorf("%s: %v, the guest runs: %v", uri, err, m.stop != nil)
	}
	return err
}

func options(t testing.TB, uri string) Options {
	a, err := wire.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	p := DefaultParams()
	p.MaxBandwidth = 0
	return Options{Params: p, Address: a}
}

// restore starts a guest from it, on a machine with nobody else.
func restore(t testing.TB, m *machine, uri string, change func(*Options)) error {
	t.Helper()
	o := options(t, uri)
	if change != nil {
		change(&o)
	}
	d, err := NewTarget(m, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Listen(); err != nil {
		t.Fatal(err)
	}
	err = d.Run()
	if (err == nil) != (m.stop != nil) || (err == nil) != (d.Stats().Status == StatusCompleted) {
		t.Errorf("%s: %v, the guest runs: %v", uri, err, m.stop != nil)
	}
	return err
}

// TestOneWay goes to a file, a program, a pipe, and comes from there.
func TestOneWay(t *testing.T) {
	for _, compression := range []string{"none", "s2"} {
		for _, kind := range []string{"file", "offset", "exec", "fd", "socket"} {
			t.Run(kind+" "+compression, func(t *testing.T) {
				w := &world{t: t}
				from, to := newMachine(t, w, "the source").boot(), newMachine(t, w, "the target")
				file := filepath.Join(t.TempDir(), "stream")
				out, in := "file:"+file, "file:"+file
				change := func(o *Options) { o.Params.MultifdCompression = compression }
				both := change
				pipe := func(fds [2]int) func(*Options) {
					return func(o *Options) {
						change(o)
						o.Files = func(name string) (*os.File, error) {
							i := strings.Index("rw", name)
							return os.NewFile(uintptr(fds[i]), name), nil
						}
					}
				}
				var fds [2]int
				switch kind {
				case "offset":
					if err := os.WriteFile(file, bytes.Repeat([]byte("x"), 5000), 0o600); err != nil {
						t.Fatal(err)
					}
					out, in = out+",offset=4096", in+",offset=0x1000"
				case "exec":
					out, in = "exec:cat > "+file, "exec:cat "+file
				case "fd":
					if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
						t.Fatal(err)
					}
					out, in, both = "fd:w", "fd:r", pipe(fds)
				case "socket": // has two ways: a migration as any other, without asking
					var err error
					if fds, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
						t.Fatal(err)
					}
					out, in, both = "fd:w", "fd:r", pipe(fds)
				}
				sent := make(chan error, 1)
				if kind == "fd" || kind == "socket" {
					go func() { sent <- snapshot(t, from, out, both) }()
				} else {
					sent <- snapshot(t, from, out, both)
				}
				if err := restore(t, to, in, both); err != nil {
					t.Fatal(err)
				}
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
				(&trip{t: t, source: &Source{}, target: &Target{}}).check(to)
			})
		}
	}
}

// TestEveryFrame breaks a snapshot in each frame's header and in each frame's payload, and cuts
// it there: none of that is taken for a guest. With sums of pages, a wrong one is found when all has come.
func TestEveryFrame(t *testing.T) {
	t.Run("CRC", func(t *testing.T) { everyFrame(t, false) })
	t.Run("sums", func(t *testing.T) { everyFrame(t, true) })
}

func everyFrame(t *testing.T, sums bool) {
	slowCRC(t, sums)
	w := &world{t: t}
	from := newMachine(t, w, "the source").boot()
	file := filepath.Join(t.TempDir(), "stream")
	if err := snapshot(t, from, "file:"+file, nil); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	frames, late := 0, 0
	for at := 12; at < len(good); frames++ {
		length := 16 + int(uint32(good[at+4])|uint32(good[at+5])<<8|uint32(good[at+6])<<16|uint32(good[at+7])<<24)
		for name, pos := range map[string]int{"header": at + 2, "length": at + 5, "payload": at + 16 + (length-16)/2, "end": at + length - 1} {
			if pos >= at+length {
				continue
			}
			bad := bytes.Clone(good)
			bad[pos] ^= 4
			if err := os.WriteFile(file, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			to := newMachine(t, w, "the target")
			err := restore(t, to, "file:"+file, nil)
			switch {
			case errors.Is(err, wire.ErrCorrupt):
				if strings.Contains(err.Error(), "not what has been sent") {
					late++
				}
			case err == nil && sums && wire.Type(good[at]) == wire.TypePages: // it came again
				_, _ = to.Pause()
				to.check()
			default:
				t.Errorf("frame %d (type %d), %s: %v", frames, good[at], name, err)
			}
		}
		if err := os.WriteFile(file, good[:at+length/2], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := restore(t, newMachine(t, w, "the target"), "file:"+file, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut in frame %d (type %d): %v", frames, good[at], err)
		}
		at += length
	}
	if frames < 7 || sums != (late > 0) {
		t.Errorf("%d frames, %d wrong pages found when all had come", frames, late)
	}
}

var update = flag.Bool("update", false, "write the golden stream anew")

// TestGolden loads a stream of format 1 that was written once and is loaded for ever, and writes the
// same today.
func TestGolden(t *testing.T) {
	const golden = "testdata/stream-v1"
	slowCRC(t, false)
	w := &world{t: t}
	make := func() *machine {
		from := newMachine(t, w, "the source")
		w.lock = from
		for range testPages / 2 {
			from.step()
		}
		return from
	}
	file := filepath.Join(t.TempDir(), "stream")
	o := options(t, "file:"+file)
	o.Params.MultifdCompression = "zstd"
	s, err := NewSource(make(), o)
	if err != nil {
		t.Fatal(err)
	}
	s.session = wire.Session{1, 2, 3}
	if err := s.Run(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	to := newMachine(t, w, "the target")
	if err := restoreStopped(to, options(t, "file:"+golden)); err != nil {
		t.Fatal(err)
	}
	to.check()
	if to.count != testPages/2 || string(to.disk) != "disk" {
		t.Errorf("count %d, disk %q", to.count, to.disk)
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the stream that is written has changed: if older versions still load it, add a golden file; go test -update writes it")
	}
}

// saved is the stream of a guest, and the file that it is in.
func saved(t testing.TB) (stream []byte, file string) {
	t.Helper()
	w := &world{t: t}
	from := newMachine(t, w, "the source")
	w.lock = from
	from.step()
	file = filepath.Join(t.TempDir(), "stream")
	if err := snapshot(t, from, "file:"+file, nil); err != nil {
		t.Fatal(err)
	}
	stream, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return stream, file
}

// slowCRC has the CPU be one where the instruction for it is slow, or not.
func slowCRC(t *testing.T, slow bool) {
	Prepare() // which looks at it as well
	before := wire.SlowCRC
	wire.SlowCRC = func() bool { return slow }
	t.Cleanup(func() { wire.SlowCRC = before })
}

// TestDigest: where CRCs are slow a file says that pages have sums of their own, and is loaded on any CPU.
func TestDigest(t *testing.T) {
	slowCRC(t, true)
	stream, file := saved(t)
	slowCRC(t, false)
	if !bytes.Contains(stream, []byte(wire.FeatureSums)) {
		t.Errorf("%d bytes, without %q", len(stream), wire.FeatureSums)
	}
	to := newMachine(t, &world{t: t}, "the target")
	if err := restoreStopped(to, options(t, "file:"+file)); err != nil {
		t.Fatal(err)
	}
	to.check()
}

func restoreStopped(m *machine, o Options) error {
	d, err := NewTarget(m, o)
	if err != nil {
		return err
	}
	if err := d.Listen(); err != nil {
		return err
	}
	return d.Run()
}

// credentials makes the directories of two sides that trust each other, and one that nobody
// trusts.
func credentials(t testing.TB) (source, target, stranger string) {
	t.Helper()
	type authority struct {
		cert *x509.Certificate
		key  *ecdsa.PrivateKey
		der  []byte
	}
	serial := int64(0)
	issue := func(name string, by *authority) authority {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		serial++
		c := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
			IsCA: by == nil, BasicConstraintsValid: true}
		parent, signer := c, key
		if by != nil {
			parent, signer = by.cert, by.key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		if c, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		return authority{c, key, der}
	}
	dir := func(side string, ca authority, who authority) string {
		d := t.TempDir()
		key, err := x509.MarshalECPrivateKey(who.key)
		if err != nil {
			t.Fatal(err)
		}
		for name, block := range map[string]*pem.Block{
			"ca-cert.pem":      {Type: "CERTIFICATE", Bytes: ca.der},
			side + "-cert.pem": {Type: "CERTIFICATE", Bytes: who.der},
			side + "-key.pem":  {Type: "EC PRIVATE KEY", Bytes: key},
		} {
			if err := os.WriteFile(filepath.Join(d, name), pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return d
	}
	ca, other := issue("ca", nil), issue("another ca", nil)
	return dir("client", ca, issue("source.example", &ca)), dir("server", ca, issue("target.example", &ca)), dir("client", other, issue("source.example", &other))
}

func TestTLS(t *testing.T) {
	source, target, stranger := credentials(t)
	load := func(dir string, server bool, name string) *tls.Config {
		c, err := wire.LoadTLS(dir, server, name)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	attempt := func(t *testing.T, s, d *tls.Config, channels uint64) *trip {
		tr := pair(t)
		tr.opt.Capabilities = Capabilities{CapMultifd: channels > 0}
		tr.opt.Params.MultifdChannels = max(channels, 1)
		tr.tweak = func(so, do *Options) { so.TLS, do.TLS = s, d }
		tr.start()
		return tr
	}
	for _, channels := range []uint64{0, 3} {
		tr := attempt(t, load(source, false, "target.example"), load(target, true, ""), channels)
		tr.succeeds()
		if !tr.source.Stats().TLS || !tr.target.Stats().TLS {
			t.Error("no TLS in the statistics")
		}
	}
	for name, tt := range map[string]struct {
		s    *tls.Config
		want string
	}{
		"another authority":    {load(stranger, false, "target.example"), "certificate signed by unknown authority"},
		"another name":         {load(source, false, "elsewhere.example"), "certificate is valid for target.example, not elsewhere.example"},
		"no TLS":               {nil, "the target"},
		"no certificate":       {&tls.Config{InsecureSkipVerify: true}, "certificate required"},
		"a stranger's, unseen": {&tls.Config{InsecureSkipVerify: true, Certificates: load(stranger, false, "").Certificates}, "tls: "},
		"TLS 1.2":              {&tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, "protocol version not supported"},
	} {
		t.Run(name, func(t *testing.T) {
			tr := attempt(t, tt.s, load(target, true, ""), 0)
			if err := wait(tr, tr.sourceEnd, "source"); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("source: %v", err)
			}
			tr.check(tr.from)
			// The target says so, and waits for a better one.
			good := load(source, false, "target.example")
			s, err := NewSource(tr.from, Options{Params: tr.opt.Params, Address: tr.net.address(), TLS: good})
			if err != nil {
				t.Fatal(err)
			}
			tr.source = s
			if err := s.Run(); err != nil {
				t.Fatal(err)
			}
			if err := wait(tr, tr.targetEnd, "target"); err != nil {
				t.Fatal(err)
			}
			tr.check(tr.to)
			said := false
			for _, e := range tr.seen {
				said = said || !e.State.Source() && strings.HasPrefix(e.Log, "a connection was turned away: ")
			}
			if !said {
				t.Error("the target has not said why it turned the first one away")
			}
		})
	}
	if _, err := wire.LoadTLS(source, true, ""); err == nil || !strings.HasSuffix(err.Error(), "\nthe directory needs ca-cert.pem, server-cert.pem and server-key.pem") {
		t.Error(err)
	}
	o := options(t, "file:/x")
	o.TLS = load(source, false, "")
	w := &world{t: t}
	if s, err := NewSource(newMachine(t, w, "the source").boot(), o); err != nil || s.Run() == nil {
		t.Errorf("TLS into a file: %v", err)
	}
}

// stranger is a connection by hand.
func stranger(t testing.TB, d *Target, bytes []byte) *wire.Conn {
	t.Helper()
	a := d.Addr()
	c, err := net.Dial("tcp", net.JoinHostPort(a.Host, a.Port))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(bytes); err != nil {
		t.Fatal(err)
	}
	conn := wire.NewConn(c)
	conn.SetStall(30*time.Second, 30*time.Second)
	return conn
}

// TestStrangers are connections that are no migrations, and one of a version that does not exist
// yet: the target says so, and goes on waiting.
func TestStrangers(t *testing.T) {
	tr := pair(t)
	tr.opt.Params.StallTimeout = 1000
	d := tr.opt
	d.Events = tr.event
	d.Address = wire.Address{Network: wire.TCP, Host: "127.0.0.1", Port: "0"}
	target, err := NewTarget(tr.to, d)
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Listen(); err != nil {
		t.Fatal(err)
	}
	go func() { tr.targetEnd <- target.Run() }()
	for name, b := range map[string][]byte{
		"HTTP":    []byte("GET / HTTP/1.1\r\n\r\n"),
		"a frame": append([]byte("batonmig\x01\x00\x01\x00"), bytes.Repeat([]byte{9}, 16)...),
		"silence": {},
	} {
		c := stranger(t, target, b)
		if err := c.ReadPreamble(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if h, err := c.ReadHeader(); err == nil {
			t.Errorf("%s: answered with %v", name, h)
		}
		_ = c.Close()
	}
	c := stranger(t, target, []byte("batonmig\x07\x00\x09\x00"))
	var r wire.Reason
	if err := c.ReadPreamble(); err != nil {
		t.Error(err)
	}
	h, err := c.ReadHeader()
	if err != nil || h.Type != wire.TypeRefuse || c.ReadMessage(h, &r) != nil {
		t.Fatal(h, err)
	}
	if got := r.Err().Error(); got != "protocol version: the other side speaks 7 to 9, this one 1 to 1" {
		t.Error(got)
	}
	_ = c.Close()
	c = stranger(t, target, nil)
	if err := c.Begin(wire.TypeAsk, wire.Ask{Session: wire.Session{1}}); err != nil {
		t.Fatal(err)
	}
	_ = c.ReadPreamble()
	if h, err = c.ReadHeader(); err != nil || h.Type != wire.TypeRefuse {
		t.Errorf("asked for what nobody knows: %v, %v", h, err)
	}
	_ = c.Close()
	tr.target = target
	s, err := NewSource(tr.from, Options{Params: tr.opt.Params, Address: target.Addr()})
	if err != nil {
		t.Fatal(err)
	}
	tr.source = s
	if err := s.Run(); err != nil {
		t.Fatal(err)
	}
	if err := wait(tr, tr.targetEnd, "target"); err != nil {
		t.Fatal(err)
	}
	tr.check(tr.to)
}

// TestOldTarget is a target that speaks another version: the source says so.
func TestOldTarget(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.WriteString(c, "batonmig\x07\x00\x09\x00")
			_, _ = io.Copy(io.Discard, c)
		}
	}()
	m := newMachine(t, &world{t: t}, "the source").boot()
	if err := snapshot(t, m, "tcp:"+l.Addr().String(), nil); !errors.Is(err, wire.ErrVersion) || !strings.Contains(err.Error(), "the other side speaks 7 to 9, this one 1 to 1") {
		t.Error(err)
	}
}

// FuzzTarget gives a target a stream with frames that are whole, in any order and with any content.
func FuzzTarget(f *testing.F) {
	good, _ := saved(f)
	f.Add(good)
	f.Add(good[:len(good)-30])
	golden, err := os.ReadFile("testdata/stream-v1")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(golden)
	f.Fuzz(func(t *testing.T, stream []byte) {
		w := &world{t: t}
		m := newMachine(t, w, "the target")
		fd, err := unix.MemfdCreate("stream", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		b := os.NewFile(uintptr(fd), "stream")
		defer b.Close()
		if _, err := b.Write(fixed(stream)); err != nil {
			t.Fatal(err)
		}
		_ = restoreStopped(m, options(t, fmt.Sprintf("file:/proc/self/fd/%d", fd)))
	})
}

// fixed makes the checksums right, so that what is behind them is reached.
func fixed(stream []byte) []byte {
	b := bytes.Clone(stream)
	for at := 12; at+16 <= len(b); {
		h := b[at : at+16]
		n := int(uint32(h[4]) | uint32(h[5])<<8 | uint32(h[6])<<16 | uint32(h[7])<<24)
		if n > len(b)-at-16 {
			n = len(b) - at - 16
			h[4], h[5], h[6], h[7] = byte(n), byte(n>>8), byte(n>>16), byte(n>>24)
		}
		castagnoli := crc32.MakeTable(crc32.Castagnoli)
		binary.LittleEndian.PutUint32(h[8:], crc32.Checksum(b[at+16:at+16+n], castagnoli))
		binary.LittleEndian.PutUint32(h[12:], crc32.Checksum(h[:12], castagnoli))
		at += 16 + n
	}
	return b
}
