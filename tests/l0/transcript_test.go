package l0

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// transcript is what is said to both servers. What they answer has to have the same shape;
// errors also the same class and text.
var transcript = strings.Split(`{"execute":"query-status"}
{"execute":"qmp_capabilities","arguments":{"foo":1}}
{'execute':'qmp_capabilities'}
{"execute":"qmp_capabilities"}
{"execute":"nope","id":7}
{"execute":"query-status","id":{"a":[1,null,1.5]}}
{"execute":"query-status","arguments":{"x":1}}
{"execute":"query-status","arguments":1}
{"execute":"query-status","foo":1}
{"execute":1}
{"foo":1}
{"id":3}
[1]
42
"x"
{"exec-oob":"query-status"}
{"execute":"query-status","exec-oob":"x"}
{"execute" "query-status"}
{"execute":"query-status",}
{"execute":}
{1:2}
{"a":1 "b":2}
{"execute":"a","execute":"b"}
{"execute":tru}
}
]
{"a":]}
[1 2]
[1,]
[-1,-,1]
[01]
[1.5e3,1.,2]
[+1]
[@@@ x, 5 ]
@
{"execute":@"query-kvm"} {"execute":"query-kvm"}
{"execute":"\q"}
{"execute":"\ud800"}
{"execute":"\u00e9\/\n"}
{"execute":"query-version"}
{"execute":"query-name"}{"execute":"query-kvm"}
{"execute":"query-cpus-fast"}
{"execute":"query-pci"}
{"execute":"query-block"}
{"execute":"query-memory-size-summary"}
{"execute":"query-chardev"}
{"execute":"query-migrate"}
{"execute":"query-commands"}
{"execute":"query-qmp-schema"}
{"execute":"query-rx-filter"}
{"execute":"query-rx-filter","arguments":{"name":"nosuch"}}
{"execute":"query-rx-filter","arguments":{"name":"d0"}}
{"execute":"query-rx-filter","arguments":{"name":5}}
{"execute":"qom-get","arguments":{"path":"/machine/peripheral/net1","property":"mac"}}
{"execute":"qom-get","arguments":{"path":"net1","property":"type"}}
{"execute":"qom-get","arguments":{"path":"/machine/peripheral/net1","property":"nosuch"}}
{"execute":"qom-get","arguments":{"path":"/machine/peripheral/nosuch","property":"mac"}}
{"execute":"qom-list","arguments":{"path":"/machine/peripheral"}}
{"execute":"qom-list","arguments":{"path":"/nosuch"}}
{"execute":"set_link"}
{"execute":"set_link","arguments":{"name":"net1"}}
{"execute":"set_link","arguments":{"name":1,"up":true}}
{"execute":"set_link","arguments":{"name":"net1","up":"on"}}
{"execute":"set_link","arguments":{"name":"net1","up":true,"z":1}}
{"execute":"set_link","arguments":{"name":"nosuch","up":true}}
{"execute":"set_link","arguments":{"name":"net1","up":false}}
{"execute":"announce-self","arguments":{"initial":50,"max":550,"rounds":1,"step":100,"interfaces":["net1"],"id":"x"}}
{"execute":"announce-self","arguments":{"initial":50,"max":550,"rounds":5}}
{"execute":"announce-self","arguments":{"initial":50,"max":550,"rounds":5,"step":100,"interfaces":["nosuch",3]}}
{"execute":"announce-self","arguments":{"initial":50,"max":550,"rounds":5,"step":100,"interfaces":"net1"}}
{"execute":"announce-self","arguments":{"initial":50.5,"max":550,"rounds":5,"step":100}}
{"execute":"netdev_add","arguments":{"type":"foo","id":"n2"}}
{"execute":"netdev_add","arguments":{"id":"n2"}}
{"execute":"netdev_add","arguments":{"type":"tap","id":"hostnet1","script":"no"}}
{"execute":"netdev_add","arguments":{"type":"tap","id":"n 2","script":"no"}}
{"execute":"netdev_add","arguments":{"type":"tap","id":"n2","script":"no","zz":1}}
{"execute":"netdev_add","arguments":{"type":"tap","id":"n2","vhost":"on"}}
{"execute":"netdev_add","arguments":{"type":"tap","id":"n2","fd":3}}
{"execute":"netdev_add","arguments":{"type":"tap","id":"n2","script":"no","downscript":"no"}}
{"execute":"netdev_del","arguments":{"id":"n2"}}
{"execute":"netdev_del","arguments":{"id":"n2"}}
{"execute":"netdev_del","arguments":{"id":"net1"}}
{"execute":"device_add"}
{"execute":"device_add","arguments":{"id":"r1"}}
{"execute":"device_add","arguments":{"driver":"nosuch","id":"r1"}}
{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"r1","bus":"nosuch"}}
{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"r1","bus":"pcie.0"}}
{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"r1","bus":"root1","zz":1}}
{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"r1","bus":"root1","multifunction":"on"}}
{"execute":"device_add","arguments":{"driver":"virtio-net-pci","id":"n3","bus":"root1","netdev":"nosuch"}}
{"execute":"device_add","arguments":{"driver":"virtio-net-pci","id":"n3","bus":"root1","netdev":"hostnet1"}}
{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"r1","bus":"root1"}}
{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"r1","bus":"root1"}}
{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"r2","bus":"root1"}}
{"execute":"query-pci"}
{"execute":"device_del"}
{"execute":"device_del","arguments":{"id":"nosuch"}}
{"execute":"device_del","arguments":{"id":"/machine/peripheral/nosuch"}}
{"execute":"migrate"}
{"execute":"migrate","arguments":{"uri":3}}
{"execute":"migrate","arguments":{"uri":"bogus:1"}}
{"execute":"migrate","arguments":{"uri":"unix:x","resume":true}}
{"execute":"migrate","arguments":{"uri":"unix:x","zz":true}}
{"execute":"migrate","arguments":{"uri":"unix:x","channels":[{"channel-type":"main","addr":{"transport":"socket","type":"inet","host":"127.0.0.1","port":"1"}}]}}
{"execute":"migrate","arguments":{"channels":[{"channel-type":"other","addr":{"transport":"socket","type":"unix","path":"x"}}]}}
{"execute":"migrate","arguments":{"channels":[{"channel-type":"main"}]}}
{"execute":"migrate-incoming","arguments":{"uri":"tcp:127.0.0.1:2"}}
{"execute":"migrate_cancel"}
{"execute":"migrate-continue","arguments":{"state":"pre-switchover"}}
{"execute":"migrate-continue","arguments":{"state":"bogus"}}
{"execute":"migrate-pause"}
{"execute":"migrate-recover","arguments":{"uri":"tcp:127.0.0.1:2"}}
{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"bogus","state":true}]}}
{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":1}]}}
{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true},{"capability":"multifd","state":true}]}}
{"execute":"query-migrate-capabilities"}
{"execute":"migrate-set-parameters","arguments":{"nope":1}}
{"execute":"migrate-set-parameters","arguments":{"multifd-compression":"bad"}}
{"execute":"migrate-set-parameters","arguments":{"cpu-throttle-tailslow":"bad"}}
{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":1073741824,"downtime-limit":100,"multifd-channels":4,"multifd-compression":"zstd"}}
{"execute":"migrate-set-parameters","arguments":{}}
{"execute":"getfd","arguments":{"fdname":"x"}}
{"execute":"closefd","arguments":{"fdname":"x"}}
{"execute":"query-migrate"}
{"execute":"stop"}
{"execute":"query-status"}
{"execute":"cont"}
{"execute":"cont"}
{"execute":"query-status"}
{"execute":"stop"}
{"execute":"stop"}
{"execute":"query-status"}
{"execute":"system_reset"}
{"execute":"query-status"}
{"execute":"cont"}
{"execute":"system_powerdown"}`, "\n")

// play says the transcript and returns the messages that follow each line of it; those of the
// end follow the last. After each line comes a command of which the answer is recognised.
func play(t *testing.T, path string) (answers [][]map[string]any) {
	t.Helper()
	conn := connect(t, path)
	deadline, _ := harness.Context(t, limit).Deadline()
	conn.SetDeadline(deadline)
	in := json.NewDecoder(conn)
	next := func() (m map[string]any, err error) { err = in.Decode(&m); return m, err }
	greeting, err := next()
	if err != nil || greeting["QMP"] == nil {
		t.Fatalf("greeting %v, %v", greeting, err)
	}
	for i, line := range transcript {
		mark := fmt.Sprint("mark ", i)
		if _, err := fmt.Fprintf(conn, "%s\n{\"execute\":\"query-name\",\"id\":%q}", line, mark); err != nil {
			t.Fatal(err)
		}
		var got []map[string]any
		for {
			m, err := next()
			if err != nil {
				t.Fatalf("after %s: %v", line, err)
			}
			if m["id"] == mark {
				break
			}
			if data, ok := m["data"].(map[string]any); !ok || data["guest"] != true { // QEMU's firmware does as it likes
				got = append(got, m)
			}
		}
		answers = append(answers, got)
	}
	fmt.Fprint(conn, `{"execute":"quit"}`)
	var end []map[string]any
	for m, err := next(); err == nil; m, err = next() {
		end = append(end, m)
	}
	return append(answers, end)
}

// allowed are the differences that there are, and why.
var allowed = map[string]string{
	".return[].devices[].pci_bridge.x-slot: QEMU has no such member":  "the state of the slot, an addition",
	".return[].devices[].pci_bridge.devices: QEMU has no such member": "its firmware, which numbers the buses, has not run",
	".return[].inserted.image.dirty-flag: is missing":                 "optional",
	".return[].inserted.image.format-specific: is missing":            "optional",
	".return[].failover: QEMU has no such member":                     "an addition: the failover pairs, hidden primaries too",
}

// differ says where the shape of got, samples of one place in the answers, is not that of
// want: values of another type, members that none of want has, or that all of them have and
// one of got has not.
func differ(at string, got, want []any) (list []string) {
	var objects, elements []any
	count, members, types := map[string]int{}, map[string][]any{}, map[reflect.Type]bool{}
	for _, w := range want {
		types[reflect.TypeOf(w)] = true
		switch w := w.(type) {
		case map[string]any:
			objects = append(objects, w)
			for k, v := range w {
				count[k]++
				members[k] = append(members[k], v)
			}
		case []any:
			elements = append(elements, w...)
		}
	}
	for _, g := range got {
		if !types[reflect.TypeOf(g)] {
			list = append(list, fmt.Sprintf("%s: %v (%[2]T), want one of %v", at, g, types))
		}
		switch g := g.(type) {
		case map[string]any:
			for k, n := range count {
				if _, has := g[k]; n == len(objects) && !has {
					list = append(list, at+"."+k+": is missing")
				}
			}
			for k, v := range g {
				if count[k] == 0 {
					list = append(list, at+"."+k+": QEMU has no such member")
				} else {
					list = append(list, differ(at+"."+k, []any{v}, members[k])...)
				}
			}
		case []any:
			if len(elements) > 0 {
				list = append(list, differ(at+"[]", g, elements)...)
			}
		}
	}
	slices.Sort(list)
	return slices.DeleteFunc(slices.Compact(list), func(d string) bool { return allowed[d] != "" })
}

// said are values that clients compare with, and have to be the same.
var said = map[string]bool{"error": true, "event": true, "status": true, "running": true, "data": true, "id": true}

// ownWords are parts of lines to which baton's error has the same class and words of its own, which
// say what to do; no client is known to look at them.
var ownWords = []string{`"id":"n3"`, `"id":"r2"`}

func reworded(line string) bool {
	return slices.ContainsFunc(ownWords, func(w string) bool { return strings.Contains(line, w) })
}

func TestTranscript(t *testing.T) {
	qemu, err := exec.LookPath(harness.QEMU)
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs qemu-system-x86_64, and root for TAPs")
	}
	dir := shortDir(t)
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	command := func(socket string) []string {
		return strings.Fields("-machine q35 -nodefaults -S -m 64 -smp 2 -name vm1 -serial null -display none" +
			" -device pcie-root-port,id=root1,chassis=1 -device pcie-root-port,id=root2,chassis=2" +
			" -netdev tap,id=hostnet1,script=no,downscript=no -device virtio-net-pci,netdev=hostnet1,id=net1,mac=52:54:00:6f:55:cc,bus=root2,failover=on" +
			" -blockdev file,node-name=d,filename=" + disk + " -device virtio-blk-pci,drive=d,id=d0" +
			" -qmp unix:" + socket + ",server=on,wait=off")
	}
	run := func(vmm, socket string, args ...string) [][]map[string]any {
		g := harness.Start(t, harness.GuestConfig{Name: filepath.Base(socket), VMM: vmm, NoAgent: true, Args: append(command(socket), args...)})
		answers := play(t, socket)
		if code := g.Wait(harness.Context(t, limit)); code != 0 {
			t.Errorf("%s: exit code %d: %s", vmm, code, g.Stderr)
		}
		return answers
	}
	want := run(qemu, filepath.Join(dir, "qemu"), "-accel", "tcg")
	got := run("", filepath.Join(dir, "baton"), "-kernel", tiny.Kernel(t, tiny.Halt))
	for i, line := range append(slices.Clone(transcript), "quit") {
		if len(got[i]) != len(want[i]) {
			t.Errorf("%s: %v, want %v", line, got[i], want[i])
			continue
		}
		for n := range got[i] {
			list := differ("", []any{got[i][n]}, []any{want[i][n]})
			if reworded(line) {
				for _, answer := range []map[string]any{got[i][n], want[i][n]} {
					delete(answer["error"].(map[string]any), "desc")
				}
			}
			for k := range maps.Keys(said) {
				if !reflect.DeepEqual(got[i][n][k], want[i][n][k]) {
					list = append(list, fmt.Sprintf("%s: %v, want %v", k, got[i][n][k], want[i][n][k]))
				}
			}
			if strings.Contains(line, "query-status") && !reflect.DeepEqual(got[i][n]["return"], want[i][n]["return"]) {
				list = append(list, fmt.Sprintf("%v, want %v", got[i][n]["return"], want[i][n]["return"]))
			}
			for _, d := range list {
				t.Errorf("%s: %s", line, d)
			}
		}
	}
}
