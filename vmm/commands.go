package vmm

import (
	"context"
	"fmt"
	"slices"

	"baton/vmm/qmp"
)

// qmpVersion is what clients see: the QEMU whose QMP this is, and who answers.
func qmpVersion() (v qmp.Version) {
	v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro = 10, 0, 2
	v.Package = Version()
	return v
}

var eventTypes = []qmp.EventType{
	{Name: "DEVICE_DELETED", Data: deviceEvent{}},
	{Name: "DEVICE_UNPLUG_GUEST_ERROR", Data: unplugError{}},
	{Name: "FAILOVER_NEGOTIATED", Data: failoverEvent{}},
	{Name: "FAILOVER_STATE", Data: failoverState{}},
	{Name: "FAILOVER_SWITCHED", Data: switched{}},
	{Name: "GUEST_CRASHED", Data: crashData{}},
	{Name: "GUEST_PANICKED", Data: panicData{}},
	{Name: "MIGRATION", Data: migrationData{}},
	{Name: "MIGRATION_PASS", Data: passData{}},
	{Name: "NIC_RX_FILTER_CHANGED", Data: filterEvent{}},
	{Name: "POWERDOWN"},
	{Name: "RESET", Data: shutdownData{}},
	{Name: "RESUME"},
	{Name: "SHUTDOWN", Data: shutdownData{}},
	{Name: "STOP"},
}

// do makes a command of a function that has nothing to say.
func do(name string, f func()) qmp.Command {
	return qmp.Query(name, func() qmp.None { f(); return qmp.None{} })
}

// commands are all commands of QMP that the machine has. They run in the main loop, so that
// each sees and leaves a machine that does not change meanwhile. Ctx ends what takes long.
func (m *Machine) commands(ctx context.Context) []qmp.Command {
	return slices.Concat(m.queries(), m.pciCommands(), m.netCommands(ctx), m.failoverCommands(), m.fileCommands(), m.slotCommands(), m.migrationCommands(), []qmp.Command{
		do("quit", func() { m.end("host-qmp-quit") }),
		do("stop", func() {
			switch m.State() {
			case StateRunning:
				m.stop(StatePaused)
			case StateInMigrate: // once it is there
				m.cfg.Paused = true
			}
		}),
		qmp.Act("cont", func(qmp.None) error { return m.cont() }),
		do("system_reset", func() { m.reset("host-qmp-system-reset") }),
		do("system_powerdown", m.PowerButton),
	})
}

// cont is QMP's command of this name.
func (m *Machine) cont() error {
	switch m.State() {
	case StateRunning:
	case StateInMigrate:
		m.cfg.Paused = false // once the guest is there
	case StateFinishMigrate:
		return qmp.Errorf("Migration is not finalized yet")
	case StateInternalError, StateShutdown:
		return qmp.Errorf("Resetting the Virtual Machine is required")
	default:
		if err := m.takeBack(); err != nil {
			return err
		}
		m.resume()
	}
	return nil
}

// Results of the queries: QEMU's qapi/*.json.
type (
	statusInfo struct {
		Status  State `json:"status"`
		Running bool  `json:"running"`
	}
	nameInfo struct {
		Name string `json:"name,omitempty"`
	}
	kvmInfo struct {
		Enabled bool `json:"enabled"`
		Present bool `json:"present"`
	}
	memoryInfo struct {
		Base    int64 `json:"base-memory"`
		Plugged int64 `json:"plugged-memory"`
	}
	cpuInfo struct {
		Index  int64  `json:"cpu-index"`
		Path   string `json:"qom-path"`
		Thread int64  `json:"thread-id"`
		Target string `json:"target"`
		Props  struct {
			Socket int64 `json:"socket-id"`
			Core   int64 `json:"core-id"`
			Thread int64 `json:"thread-id"`
		} `json:"props"`
	}
)

// queries are the commands that change nothing.
func (m *Machine) queries() []qmp.Command {
	return []qmp.Command{
		qmp.Query("query-status", func() statusInfo { return statusInfo{m.State(), m.State() == StateRunning} }),
		qmp.Query("query-name", func() nameInfo { return nameInfo{m.cfg.Name} }),
		qmp.Query("query-kvm", func() kvmInfo { return kvmInfo{true, true} }),
		qmp.Query("query-memory-size-summary", func() memoryInfo { return memoryInfo{Base: int64(m.cfg.Memory.Size)} }),
		qmp.Query("query-cpus-fast", m.cpus),
		qmp.Query("query-block", m.disks),
		qmp.Query("query-chardev", m.chardevInfos),
	}
}

func (m *Machine) cpus() (list []cpuInfo) {
	for i, c := range m.vcpus {
		info := cpuInfo{Index: int64(i), Path: fmt.Sprintf("/machine/unattached/device[%d]", i), Thread: int64(c.tid.Load()), Target: "x86_64"}
		info.Props.Core = int64(i)
		list = append(list, info)
	}
	return list
}
