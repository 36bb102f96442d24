package main

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
)

// file is one entry of an image. With a link it is a symbolic link.
type file struct {
	name string // absolute
	data []byte
	mode uint64 // permission bits
	link string
}

// archive packs the files, the directories above them and the two device nodes that the
// kernel needs before there is a /dev. The same files make the same bytes: names are
// sorted, times and owners are zero.
func archive(files []file) ([]byte, error) {
	recs := map[string]cpio.Record{
		"dev/console": cpio.CharDev("dev/console", 0o600, 5, 1),
		"dev/null":    cpio.CharDev("dev/null", 0o666, 1, 3),
	}
	for _, f := range files {
		name := strings.TrimPrefix(f.name, "/")
		if _, twice := recs[name]; twice {
			return nil, fmt.Errorf("image has %s twice", f.name)
		}
		if f.link != "" {
			recs[name] = cpio.Symlink(name, f.link)
		} else {
			recs[name] = cpio.StaticFile(name, string(f.data), f.mode)
		}
	}
	for name := range recs {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, ok := recs[dir]; !ok {
				recs[dir] = cpio.Directory(dir, 0o755)
			}
		}
	}
	var sorted []cpio.Record
	for _, r := range recs {
		sorted = append(sorted, r)
	}
	slices.SortFunc(sorted, func(a, b cpio.Record) int { return cmp.Compare(a.Name, b.Name) })
	var out bytes.Buffer
	w := cpio.Newc.Writer(&out)
	for i, r := range sorted {
		r.Ino, r.NLink = uint64(i+1), 1
		if err := w.WriteRecord(r); err != nil {
			return nil, fmt.Errorf("archive %s: %w", r.Name, err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// writeFile replaces name in one step, so that nobody ever sees half an image.
func writeFile(name string, data []byte) error {
	tmp := fmt.Sprintf("%s.%d", name, os.Getpid())
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return err
	}
	if err := os.Rename(tmp, name); err != nil {
		return fmt.Errorf("%w (and %v)", err, os.Remove(tmp))
	}
	return nil
}
