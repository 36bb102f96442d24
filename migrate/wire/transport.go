package wire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options of a transport.
type Options struct {
	TLS *tls.Config // nil: none. For sockets only
	// Files hands over, for good, the file that fd:NAME names.
	Files func(name string) (*os.File, error)
}

// Stream is an open transport.
type Stream struct {
	io.ReadWriteCloser
	// OneWay says that there are no answers: a file or a pipe.
	OneWay bool
	// Finish waits, at the end of what was written, until it is where it should be: on the disk,
	// in the hands of a program that has ended well. It closes the stream.
	Finish func() error
}

// Again says whether a second connection can be made to the same address.
func (a Address) Again() bool { return a.Network == TCP || a.Network == Unix }

// netAddress is what package net calls it.
func (a Address) netAddress() string {
	if a.Network == TCP {
		return net.JoinHostPort(a.Host, a.Port)
	}
	return a.Path
}

// socket finishes the making of a connection: buffers, TLS.
func socket(ctx context.Context, c net.Conn, o Options, server bool) (*Stream, error) {
	if o.TLS != nil {
		t := tls.Client(c, o.TLS)
		if server {
			t = tls.Server(c, o.TLS)
		}
		if err := t.HandshakeContext(ctx); err != nil {
			if w, ok := c.(interface{ CloseWrite() error }); ok && server {
				// A client learns why only if nothing of what it has sent is left unread.
				_ = errors.Join(w.CloseWrite(), c.SetReadDeadline(time.Now().Add(time.Second)))
				_, _ = io.Copy(io.Discard, c)
			}
			return nil, errors.Join(fmt.Errorf("TLS: %w", err), c.Close())
		}
		c = t
	}
	return &Stream{ReadWriteCloser: c, Finish: c.Close}, nil
}

// Dial opens the address for the source.
func Dial(ctx context.Context, a Address, o Options) (*Stream, error) {
	if o.TLS != nil && (a.Network == File || a.Network == Exec) {
		return nil, fmt.Errorf("%s: TLS needs a socket", a)
	}
	switch a.Network {
	case TCP, Unix:
		var d net.Dialer
		c, err := d.DialContext(ctx, string(a.Network), a.netAddress())
		if err != nil {
			return nil, err
		}
		return socket(ctx, c, o, false)
	case FD:
		return openFD(ctx, a, o, false)
	case File:
		f, err := a.open(os.O_WRONLY | os.O_CREATE)
		if err != nil {
			return nil, err
		}
		if err := truncate(f, a.Offset); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return &Stream{f, true, func() error { return errors.Join(f.Sync(), f.Close()) }}, nil
	case Exec:
		cmd := exec.Command(a.Args[0], a.Args[1:]...)
		cmd.Stderr = os.Stderr
		in, err := cmd.StdinPipe()
		if err != nil {
			return nil, err
		}
		return startProgram(a, cmd, pipe{nil, in, in})
	}
	return nil, fmt.Errorf("address %s: not known", a)
}

// open opens a file:.
func (a Address) open(flags int) (*os.File, error) {
	if strings.HasPrefix(a.Path, "/dev/fdset/") {
		return nil, fmt.Errorf("%s: there are no sets of descriptors (add-fd) here\nhand the file over with getfd and use fd:NAME", a)
	}
	return os.OpenFile(a.Path, flags, 0o600)
}

// truncate makes an ordinary file end at the offset, where the stream begins.
func truncate(f *os.File, offset int64) error {
	if i, err := f.Stat(); err != nil || !i.Mode().IsRegular() {
		return err // a device is as long as it is
	}
	if err := f.Truncate(offset); err != nil {
		return err
	}
	_, err := f.Seek(offset, io.SeekStart)
	return err
}

// pipe is one direction of a program's.
type pipe struct {
	io.Reader
	io.Writer
	io.Closer
}

// startProgram runs the program behind exec:. Closing the stream before its end kills it.
func startProgram(a Address, cmd *exec.Cmd, p pipe) (*Stream, error) {
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", a, err), p.Close())
	}
	var once sync.Once
	var ended error
	wait := func() error {
		once.Do(func() {
			if ended = cmd.Wait(); ended != nil {
				ended = fmt.Errorf("%s: %w", a, ended)
			}
		})
		return ended
	}
	s := &Stream{OneWay: true}
	s.Finish = func() error { return errors.Join(ignoreClosed(p.Close()), wait()) }
	s.ReadWriteCloser = pipe{p.Reader, p.Writer, closer(func() error {
		_ = cmd.Process.Kill()
		_ = s.Finish()
		return nil
	})}
	return s, nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

type closer func() error

func (c closer) Close() error { return c() }

// openFD takes over the file that fd: names: a socket has two ways, all else one.
func openFD(ctx context.Context, a Address, o Options, server bool) (*Stream, error) {
	if o.Files == nil {
		return nil, fmt.Errorf("%s: no file has been handed over", a)
	}
	f, err := o.Files(a.Name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a, err)
	}
	c, err := net.FileConn(f)
	if err == nil {
		_ = f.Close() // c is a copy
		return socket(ctx, c, o, server)
	}
	if o.TLS != nil {
		return nil, errors.Join(fmt.Errorf("%s: TLS needs a socket", a), f.Close())
	}
	// Let the runtime wait for a pipe, so that Close ends the wait.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("%s: %w", a, err)
	}
	_ = unix.SetNonblock(fd, true)
	f = os.NewFile(uintptr(fd), a.String())
	return &Stream{f, true, func() error {
		err := f.Sync()
		if errors.Is(err, unix.EINVAL) { // a pipe
			err = nil
		}
		return errors.Join(err, f.Close())
	}}, nil
}

// Listener is where the target waits.
type Listener struct {
	a     Address
	o     Options
	l     net.Listener // tcp, unix
	once  chan struct{}
	ended chan struct{}
	close sync.Once
}

// Listen takes the address; what connects from now on waits for Accept.
func Listen(a Address, o Options) (*Listener, error) {
	if o.TLS != nil && (a.Network == File || a.Network == Exec) {
		return nil, fmt.Errorf("%s: TLS needs a socket", a)
	}
	l := &Listener{a: a, o: o, once: make(chan struct{}, 1), ended: make(chan struct{})}
	l.once <- struct{}{}
	if !a.Again() {
		return l, nil
	}
	if a.Network == Unix { // one that nobody listens on is a leftover
		if c, err := net.Dial("unix", a.Path); errors.Is(err, unix.ECONNREFUSED) {
			_ = os.Remove(a.Path)
		} else if err == nil {
			_ = c.Close()
		}
	}
	var err error
	l.l, err = net.Listen(string(a.Network), a.netAddress())
	return l, err
}

// Addr is the address with the port that the system chose for port 0.
func (l *Listener) Addr() Address {
	a := l.a
	if l.l != nil && a.Network == TCP {
		a.Host, a.Port, _ = net.SplitHostPort(l.l.Addr().String())
	}
	return a
}

// Accept waits for the next connection and returns what finishes it, such as TLS's
// handshake, which is for a goroutine of its own. Where there can be only one, the second
// call waits for Close. After Close the error is net.ErrClosed.
func (l *Listener) Accept() (func(context.Context) (*Stream, error), error) {
	if l.l != nil {
		c, err := l.l.Accept()
		return func(ctx context.Context) (*Stream, error) { return socket(ctx, c, l.o, true) }, err
	}
	select {
	case <-l.once:
		return l.open, nil
	case <-l.ended:
		return nil, net.ErrClosed
	}
}

func (l *Listener) open(ctx context.Context) (*Stream, error) {
	switch a := l.a; a.Network {
	case FD:
		return openFD(ctx, a, l.o, true)
	case File:
		f, err := a.open(os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		if _, err := f.Seek(a.Offset, io.SeekStart); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return &Stream{f, true, f.Close}, nil
	case Exec:
		cmd := exec.Command(a.Args[0], a.Args[1:]...)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			return nil, err
		}
		return startProgram(a, cmd, pipe{out, nil, out})
	}
	return nil, fmt.Errorf("address %s: not known", l.a)
}

// Close gives the address up. Connections stay.
func (l *Listener) Close() error {
	err := error(nil)
	l.close.Do(func() {
		close(l.ended)
		if l.l != nil {
			err = l.l.Close()
		}
	})
	return err
}

// LoadTLS reads the certificates of a directory as QEMU's tls-creds-x509 names them:
// ca-cert.pem, and server-cert.pem with server-key.pem, or client-. Both sides show theirs
// and check the other's. Name is what the client wants the server's to be for.
func LoadTLS(dir string, server bool, name string) (*tls.Config, error) {
	side := "client"
	if server {
		side = "server"
	}
	fail := func(err error) (*tls.Config, error) {
		return nil, fmt.Errorf("TLS credentials: %w\nthe directory needs ca-cert.pem, %s-cert.pem and %[2]s-key.pem", err, side)
	}
	pem, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		return fail(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return fail(fmt.Errorf("%s: no certificate in it", filepath.Join(dir, "ca-cert.pem")))
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, side+"-cert.pem"), filepath.Join(dir, side+"-key.pem"))
	if err != nil {
		return fail(err)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, ServerName: name,
		RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}, nil
}
