package client

import (
	"bytes"
	"strings"
	"testing"
)

func TestDevice(t *testing.T) {
	const tree = `{"return":[{"devices":[{"bus":0,"slot":1,"function":0,"class_info":{"desc":"PCI bridge","class":1540},"id":{"vendor":6966,"device":12},
		"qdev_id":"root1","pci_bridge":{"devices":[{"bus":1,"slot":0,"function":0,"class_info":{"class":255},"id":{"vendor":6900,"device":4164},"qdev_id":"r1"}]}}]}]}`
	const deleted = `{"event":"DEVICE_DELETED","data":{"device":"other"}}{"event":"DEVICE_DELETED","data":{"path":"/x"}}{"return":{}}{"event":"DEVICE_DELETED","data":{"device":"r1"}}`
	for _, tc := range []struct{ words, reply, asked, want, err string }{
		{"", strings.ReplaceAll(tree, "\n", ""), "query-pci", "00:01.0 PCI bridge 1b36:000c root1\n  01:00.0 class 00ff 1af4:1044 r1\n", ""},
		{"", `{"error":{"desc":"no"}}`, "", "", "query-pci: no"},
		{"add virtio-rng-pci,id=r1", `{"return":""}`, `"command-line":"device_add virtio-rng-pci,id=r1"`, "", ""},
		{"add nope", `{"return":"Error: no such\r\n"}`, "", "", "device_add: no such"},
		{"del r1", deleted, `{"arguments":{"id":"r1"},"execute":"device_del"}`, "", ""},
		{"del r1 surprise", deleted, `"mode":"surprise"`, "", ""},
		{"del r1", `{"return":{}}{"event":"DEVICE_UNPLUG_GUEST_ERROR","data":{"device":"r1","reason":"busy"}}`, "", "", "device_del r1: busy"},
		{"del r1", `{"error":{"desc":"no"}}`, "", "", "device_del: no"},
		{"del r1 now", "", "", "", "device: del r1 now\nusage: "},
		{"move", "", "", "", "device: move\nusage: "},
	} {
		var asked string
		path := serve(t, greeting, func(r string) string { asked = r; return tc.reply })
		var out bytes.Buffer
		err := Device(t.Context(), path, strings.Fields(tc.words), &out)
		if out.String() != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.HasPrefix(err.Error(), tc.err) || !strings.Contains(asked, tc.asked) {
			t.Errorf("%s: %q, %v; want %q, %q; asked %s", tc.words, &out, err, tc.want, tc.err, asked)
		}
	}
}

// The machine ends while someone waits.
func TestDeviceMachineEnds(t *testing.T) {
	n := 0
	path := serve(t, greeting, func(string) string {
		if n++; n > 1 {
			return ""
		}
		return `{"return":{}}`
	})
	if err := Device(t.Context(), path, []string{"del", "r1"}, &bytes.Buffer{}); err == nil {
		t.Error("no error")
	}
}
