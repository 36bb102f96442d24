package vmm

import (
	"errors"
	"os"

	"baton/vmm/qmp"
)

type (
	getfdArgs struct {
		Name string `json:"fdname"`
		File qmp.File
	}
	closefdArgs struct {
		Name string `json:"fdname"`
	}
)

// fileCommands keep files that clients send, by name, for a later command to use.
func (m *Machine) fileCommands() []qmp.Command {
	m.onClose(func() (err error) {
		for _, f := range m.files {
			err = errors.Join(err, f.Close())
		}
		return err
	})
	return []qmp.Command{
		qmp.Act("getfd", m.getfd),
		qmp.Act("closefd", func(a closefdArgs) error {
			f := m.takeFile(a.Name)
			if f == nil {
				return qmp.Errorf("File descriptor named '%s' not found", a.Name)
			}
			return f.Close()
		}),
	}
}

// getfd keeps a file, in the place of another one of that name if there is one.
func (m *Machine) getfd(a getfdArgs) error {
	switch {
	case a.File.File == nil:
		return qmp.Errorf("No file descriptor supplied via SCM_RIGHTS")
	case a.Name != "" && a.Name[0] >= '0' && a.Name[0] <= '9': // it could not be told from a number
		a.File.Close()
		return qmp.Errorf("Parameter 'fdname' expects a name not starting with a digit")
	}
	if old := m.takeFile(a.Name); old != nil {
		old.Close()
	}
	if m.files == nil {
		m.files = map[string]*os.File{}
	}
	m.files[a.Name] = a.File.File
	return nil
}

// takeFile returns the file of that name, which then is the caller's, or nil.
func (m *Machine) takeFile(name string) *os.File {
	f := m.files[name]
	delete(m.files, name)
	return f
}
