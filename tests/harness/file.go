package harness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// WaitFile returns when there is a file of that name, in a folder that exists; if there is
// none before ctx ends, the test ends.
func WaitFile(t testing.TB, ctx context.Context, name string) {
	t.Helper()
	must(t, "wait for "+name, waitFile(ctx, name))
}

func waitFile(ctx context.Context, name string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return err
	}
	changes := os.NewFile(uintptr(fd), "inotify")
	defer changes.Close()
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(name), unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		return fmt.Errorf("watch its folder: %w", err)
	}
	defer context.AfterFunc(ctx, func() { changes.SetReadDeadline(time.Unix(1, 0)) })()
	for {
		if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		// Whatever has changed, the answer is above.
		if _, err := changes.Read(make([]byte, 4096)); err != nil {
			return errors.Join(context.Cause(ctx), err)
		}
	}
}
