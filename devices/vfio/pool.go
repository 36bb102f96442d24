package vfio

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// VF is a virtual function of a PF, as the host has it.
type VF struct {
	BDF    string
	Index  int    // what its PF calls it: ip link set PF vf INDEX
	Driver string // "" if it has none
	Link   string // its interface, if the host's driver made one
	Up     bool   // somebody on the host uses that
}

// VFs lists the VFs of a PF, which is named by its interface or its address, or of several, with
// a plus sign between them. One that has none matters only if all have none.
func VFs(pfs string) ([]VF, error) { return realHost.pool(pfs) }

func (h host) pool(pfs string) (list []VF, err error) {
	var errs []error
	for pf := range strings.SplitSeq(pfs, "+") {
		vfs, err := h.vfs(pf)
		list, errs = append(list, vfs...), append(errs, err)
	}
	if list == nil {
		return nil, errors.Join(errs...)
	}
	return list, nil
}

func (h host) vfs(pf string) ([]VF, error) {
	dir := h.device(pf)
	if bdf, err := ParseHost(pf); err == nil {
		dir = h.device(bdf)
	} else if pf != "" && !strings.Contains(pf, "/") {
		dir = filepath.Join(h.sys, "class/net", pf, "device")
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("VFs of %s: there is no such interface or PCI function", pf)
	}
	var list []VF
	for i := 0; ; i++ {
		target, err := os.Readlink(filepath.Join(dir, fmt.Sprintf("virtfn%d", i)))
		if err != nil {
			break
		}
		vf := VF{BDF: filepath.Base(target), Index: i}
		vf.Driver = h.driver(vf.BDF)
		vf.Link = h.link(vf.BDF)
		vf.Up = vf.Link != "" && h.up(vf.Link)
		list = append(list, vf)
	}
	if list == nil {
		return nil, fmt.Errorf("VFs of %s: there are none\necho N > %s/sriov_numvfs makes them", pf, dir)
	}
	return list, nil
}

// Parent says which VF of which PF a function is: the interface of the PF, without which
// nobody can steer, and the index there. It fails for what is no VF.
func Parent(bdf string) (link string, index int, err error) { return realHost.parent(bdf) }

func (h host) parent(bdf string) (link string, index int, err error) {
	target, err := os.Readlink(h.device(bdf, "physfn"))
	if err != nil {
		return "", 0, fmt.Errorf("PF of %s: it is not a VF", bdf)
	}
	pf := filepath.Base(target)
	list, err := h.vfs(pf)
	if err != nil {
		return "", 0, err
	}
	for _, vf := range list {
		if vf.BDF != bdf {
			continue
		}
		if link = h.link(pf); link == "" {
			return "", 0, fmt.Errorf("PF of %s: %s has no interface; its driver is %q", bdf, pf, h.driver(pf))
		}
		return link, vf.Index, nil
	}
	return "", 0, fmt.Errorf("PF of %s: %s does not list it", bdf, pf)
}

// link is the interface of a function, "" if it has none.
func (h host) link(bdf string) string {
	entries, _ := os.ReadDir(h.device(bdf, "net"))
	if len(entries) == 0 {
		return ""
	}
	return entries[0].Name()
}

// up says whether an interface is set up: IFF_UP, netdevice(7).
func (h host) up(link string) bool {
	text, err := os.ReadFile(filepath.Join(h.sys, "class/net", link, "flags"))
	flags, perr := strconv.ParseUint(strings.TrimSpace(string(text)), 0, 32)
	return err == nil && perr == nil && flags&1 != 0
}
