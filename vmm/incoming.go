package vmm

import "context"

// beginIncoming has everything ready for a guest: devices as after their reset, vCPUs that
// have not run, and in RAM nothing.
func (m *Machine) beginIncoming(context.Context) error {
	m.setState(StateInMigrate)
	return m.resetDevices()
}
