package qmp

import (
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxFiles is how many descriptors a client may have sent that no command has taken yet; as
// in QEMU's chardev, one message brings no more.
const maxFiles = 16

// File, as the type of a field of a command's arguments, is the next open file that the
// client has sent along with its requests (SCM_RIGHTS, on a Unix socket). It is nil if there
// is none. The command owns it.
type File struct{ *os.File }

// fileReader reads from a Unix socket and keeps the descriptors that come along.
type fileReader struct {
	conn *net.UnixConn

	mu    sync.Mutex
	files []*os.File
}

func (r *fileReader) Read(p []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, _, _, err := r.conn.ReadMsgUnix(p, oob)
	if oobn > 0 {
		r.keep(oob[:oobn])
	}
	if err == nil && n == 0 && len(p) > 0 {
		err = io.EOF
	}
	return max(n, 0), err
}

// keep takes the descriptors out of control messages. The kernel marks them close-on-exec
// because the net package asks for it (MSG_CMSG_CLOEXEC).
func (r *fileReader) keep(oob []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			f := os.NewFile(uintptr(fd), "client's file")
			if len(r.files) == maxFiles {
				f.Close()
				continue
			}
			r.files = append(r.files, f)
		}
	}
}

// take returns the oldest file, nil if there is none.
func (r *fileReader) take() *os.File {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.files) == 0 {
		return nil
	}
	f := r.files[0]
	r.files = r.files[1:]
	return f
}

// close closes what nobody took.
func (r *fileReader) close() {
	for f := r.take(); f != nil; f = r.take() {
		f.Close()
	}
}
