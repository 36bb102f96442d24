// Package proto is what the nested host (L1) and its starter (L0) say to each other: one
// JSON value per line over a virtio-serial port, one command at a time.
//
//	L1                                   L0
//	Ready                            ──>        the root is up, commands are welcome
//	                                 <── Command
//	Output, Output, ...              ──>
//	Exit                             ──>        and so on with the next Command
//
// L1 powers off when L0 closes the port.
package proto

// Port is the name of the virtio-serial port in the guest.
const Port = "baton.nested"

// Mount tags of the two 9p shares: L0's root, read only, and the folder for what L1 leaves behind.
const (
	RootTag = "host"
	OutTag  = "out"
)

// OutDir is where L1 mounts the share OutTag.
const OutDir = "/run/nested"

// ModulesFile is the list in the initramfs of the modules to load, one path a line, in order.
const ModulesFile = "/modules.list"

// Command asks L1 to run one program.
type Command struct {
	Argv []string
	Dir  string
	Env  []string
	// TTY runs the program on L1's serial console, of the given size, instead of sending
	// its output over the port.
	TTY        bool   `json:",omitempty"`
	Rows, Cols uint16 `json:",omitempty"`
	// LimitSeconds is when L1 kills the program and all that it started; 0 is never.
	LimitSeconds float64 `json:",omitempty"`
}

// Message is what L1 sends; exactly one field is set.
type Message struct {
	Ready  *Ready  `json:",omitempty"`
	Output *Output `json:",omitempty"`
	Exit   *Exit   `json:",omitempty"`
}

// Ready says that L1 takes commands.
type Ready struct {
	Notes []string // what could not be set up, and why
}

// Output is a piece of what the program printed.
type Output struct {
	Stderr bool `json:",omitempty"`
	Data   []byte
}

// Exit is the end of a program.
type Exit struct {
	Code    int
	Error   string   `json:",omitempty"` // could not be started, or was killed
	Killed  bool     `json:",omitempty"` // by the limit
	Running []string `json:",omitempty"` // processes it left behind, killed by L1 since
}
