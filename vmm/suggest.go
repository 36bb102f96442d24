package vmm

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// unknown is the error for a name that is not in known: it names the nearest ones.
func unknown(what, word string, known []string) error {
	return fmt.Errorf("unknown %s %q%s", what, word, suggest(word, known))
}

// Errors lists the single errors of one that errors.Join may have made, nested or not.
func Errors(err error) (list []error) {
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	for _, e := range joined.Unwrap() {
		list = append(list, Errors(e)...)
	}
	return list
}

// inObject says of each error of err which object it is about.
func inObject(object string, err error) error {
	list := Errors(err)
	for i, e := range list {
		list[i] = fmt.Errorf("%s: %w", object, e)
	}
	return errors.Join(list...)
}

// suggest is the hint line for a misspelt word: the nearest of known, or all of a short
// list if none is near.
func suggest(word string, known []string) string {
	best, near := min(max(1, (len(word)+1)/3), 5)+1, ""
	for _, k := range known {
		d := distance(strings.ToLower(word), strings.ToLower(k))
		if len(word) > 2 && strings.HasPrefix(k, word) {
			d = 1
		}
		if d < best || d == best && near != "" && k < near {
			best, near = d, k
		}
	}
	switch {
	case near != "":
		return fmt.Sprintf("\ndid you mean %q?", near)
	case len(known) == 0:
		return "\nthere is none"
	case len(known) <= 12:
		return "\nthere is " + strings.Join(slices.Sorted(slices.Values(known)), ", ")
	}
	return ""
}

// distance is Levenshtein's: how many letters to insert, drop or replace to turn a into b.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64 // no name is that long: do not spend time on it
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

// notHere has the words of QEMU's that baton knows but does not do, each group with what
// baton has in its place.
var notHere = map[string]string{
	"-bios -pflash -L -boot -option-rom":                       "there is no firmware: baton enters the kernel itself, -kernel FILE",
	"-cdrom -hda -hdb -hdc -hdd -fda -fdb -sd -mtdblock":       "baton's disk is virtio: -drive file=FILE,format=raw",
	"-vnc -spice -sdl -curses -full-screen -usbdevice -usb -g": "there is no display and no USB: use -serial or a virtconsole",
	"-audio -audiodev -soundhw":                                "there is no sound",
	"-tpmdev -fw_cfg -acpitable -smbios -uuid -dtb":            "baton writes its own ACPI tables; tell the guest by -append",
	"-rtc -icount -no-hpet -no-acpi -no-fd-bootchk":            "the clocks are kvm-clock and a UTC RTC, ACPI is always there",
	"-numa -mem-path":                                                        "RAM is anonymous memory, in reserved huge pages by -object memory-backend-memfd,hugetlb=on",
	"-snapshot -loadvm":                                                      "copy the image, or give it readonly=on",
	"-virtfs -fsdev -iscsi":                                                  "baton shares no files: use -drive or the network",
	"-parallel -debugcon -virtioconsole":                                     "use -serial, or virtconsole on a virtio-serial-pci",
	"-gdb -s -trace -d -plugin -singlestep":                                  "baton tells what happens by -D and -event-log",
	"-action -watchdog -watchdog-action":                                     "baton ends when the guest powers off, with -no-reboot also when it resets",
	"-global -set -readconfig -writeconfig":                                  "give properties to -device, whole machines to -config",
	"-sandbox -runas -run-with -chroot -overcommit -add-fd -msg":             "leave it to who starts baton (systemd, ulimit, setpriv)",
	"-qtest -preconfig -tb-size -semihosting -xen-domid":                     "baton runs on KVM only",
	"e1000 e1000e igb rtl8139 vmxnet3 i82559er ne2k_pci":                     "baton's network card is virtio-net-pci",
	"virtio-scsi-pci virtio-scsi scsi-hd nvme ide-hd ahci usb-storage":       "baton's disk is virtio-blk-pci",
	"isa-serial pci-serial usb-serial":                                       "use -serial, or virtconsole on a virtio-serial-pci",
	"ioh3420 pci-bridge pcie-pci-bridge x3130-upstream xio3130-downstream":   "baton's bridge is pcie-root-port",
	"VGA virtio-vga virtio-gpu-pci virtio-gpu qxl qxl-vga bochs-display":     "there is no display; use -serial or virtconsole",
	"qemu-xhci nec-usb-xhci usb-ehci usb-tablet usb-kbd virtio-keyboard-pci": "there is no USB, and no input device",
	"intel-iommu virtio-iommu-pci amd-iommu":                                 "the guest gets no IOMMU",
	"user bridge l2tpv3 vde stream dgram vhost-user vhost-vdpa hubport":      "baton's network is -netdev tap",
	"qcow2 vmdk vdi vpc vhdx":                                                "convert it: qemu-img convert -O raw OLD NEW",
	"memory-backend-ram memory-backend-file":                                 "baton's is memory-backend-memfd",
}

// insteadOf returns what baton has in place of that word of QEMU's.
func insteadOf(word string) string {
	for words, hint := range notHere {
		if slices.Contains(strings.Fields(words), word) {
			return hint
		}
	}
	return ""
}

// findSchema looks a kind of object up by its name or an alias.
func findSchema(kinds []schema, what, name string) (*schema, error) {
	var names []string
	for i, s := range kinds {
		if s.name == name || slices.Contains(s.aliases, name) {
			return &kinds[i], nil
		}
		names = append(append(names, s.name), s.aliases...)
	}
	if hint := insteadOf(name); hint != "" {
		return nil, fmt.Errorf("there is no %s %s\n%s", what, name, hint)
	}
	return nil, unknown(what, name, names)
}
