package vmm

import (
	"cmp"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"baton/devices/virtio/blk"
)

// What query-block shows: QEMU's qapi/block-core.json. Of what baton has not, such as
// throttling, there is the value that says so.
type (
	blockInfo struct {
		Device    string    `json:"device"`
		Qdev      string    `json:"qdev"`
		Type      string    `json:"type"`
		Removable bool      `json:"removable"`
		Locked    bool      `json:"locked"`
		IOStatus  string    `json:"io-status"`
		Inserted  blockNode `json:"inserted"`
	}
	blockNode struct {
		File           string     `json:"file"`
		Node           string     `json:"node-name"`
		Driver         string     `json:"drv"`
		ReadOnly       bool       `json:"ro"`
		Active         bool       `json:"active"`
		Encrypted      bool       `json:"encrypted"`
		Depth          int64      `json:"backing_file_depth"`
		DetectZeroes   string     `json:"detect_zeroes"`
		WriteThreshold int64      `json:"write_threshold"`
		BPS            int64      `json:"bps"`
		BPSRead        int64      `json:"bps_rd"`
		BPSWrite       int64      `json:"bps_wr"`
		IOPS           int64      `json:"iops"`
		IOPSRead       int64      `json:"iops_rd"`
		IOPSWrite      int64      `json:"iops_wr"`
		Image          blockImage `json:"image"`
		Cache          blockCache `json:"cache"`
	}
	blockImage struct {
		File    string `json:"filename"`
		Format  string `json:"format"`
		Virtual int64  `json:"virtual-size"` // bytes
		Actual  int64  `json:"actual-size"`
	}
	blockCache struct {
		WriteBack bool `json:"writeback"`
		Direct    bool `json:"direct"`
		NoFlush   bool `json:"no-flush"`
	}
	chardevInfo struct {
		Label    string `json:"label"`
		File     string `json:"filename"`
		Frontend bool   `json:"frontend-open"`
	}
)

// disks is query-block.
func (m *Machine) disks() (list []blockInfo) {
	for _, d := range m.devices {
		model, ok := d.model.(*blk.Device)
		if !ok {
			continue
		}
		spec := m.cfg.Blockdev(d.Text("drive"))
		image := blockImage{File: spec.File, Format: "raw", Virtual: model.Disk().Size()}
		var st unix.Stat_t
		if unix.Stat(spec.File, &st) == nil {
			image.Actual = st.Blocks * 512 // stat(2): the unit of st_blocks
		}
		list = append(list, blockInfo{
			Device: spec.ID, Qdev: peripheral + "/" + cmp.Or(d.ID, d.Driver+"."+d.Addr) + "/virtio-backend", Type: "unknown", IOStatus: "ok",
			Inserted: blockNode{
				File: spec.File, Node: spec.ID, Driver: "raw", ReadOnly: spec.ReadOnly, Active: true, DetectZeroes: "off",
				Image: image, Cache: blockCache{WriteBack: true, NoFlush: spec.NoFlush},
			},
		})
	}
	return list
}

// chardevInfos is query-chardev: the serial port, the monitors and what -chardev named.
func (m *Machine) chardevInfos() (list []chardevInfo) {
	add := func(label, spec string) {
		if !strings.HasPrefix(spec, "chardev:") {
			list = append(list, chardevInfo{label, spec, true})
		}
	}
	for i, spec := range m.cfg.Serials {
		add(fmt.Sprintf("serial%d", i), spec)
	}
	for i, mon := range m.cfg.Monitors {
		add(m.monitors[i].label, mon.Spec)
	}
	for _, c := range m.cfg.Chardevs {
		add(c.ID, c.Spec)
	}
	return list
}
