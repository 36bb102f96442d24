package console

import (
	"bytes"

	"baton/devices"
)

type state struct {
	Messages [][]byte    `cbor:"1,keyasint,omitempty"` // control messages that the guest has not taken
	Ports    []portState `cbor:"2,keyasint"`
}

type portState struct {
	Number uint8  `cbor:"1,keyasint"`
	Open   bool   `cbor:"2,keyasint"`           // by the guest
	Input  []byte `cbor:"3,keyasint,omitempty"` // from the host, that the guest has not taken
	Sent   uint32 `cbor:"4,keyasint,omitempty"` // bytes of the chain that transmitq is at, which the host has
}

// Bounds of what waits, in messages and bytes.
const (
	maxMessages = queueSize + MaxPorts
	maxMessage  = 4096
	maxInput    = 16 * chunk // what came on each host until the guest took it
)

// SaveState implements [virtio.Device].
func (d *Device) SaveState() ([]byte, error) {
	s := state{Messages: d.control.messages}
	for n, p := range d.ports {
		if p == nil {
			continue
		}
		if len(p.rest) <= maxInput-chunk {
			select { // the piece that readBackend holds
			case b := <-p.input:
				p.rest = append(p.rest, b...)
			default:
			}
		}
		s.Ports = append(s.Ports, portState{uint8(n), p.gate.isOpen(), p.rest, uint32(p.sent)})
	}
	return devices.EncodeState(s)
}

// LoadState implements [virtio.Device].
func (d *Device) LoadState(info devices.StateInfo, version uint16, data []byte) error {
	var s state
	if err := devices.DecodeState(info, version, data, &s, nil); err != nil {
		return err
	}
	if len(s.Messages) > maxMessages {
		return info.BadField("Messages", "%d wait, more than %d", len(s.Messages), maxMessages)
	}
	for _, m := range s.Messages {
		if len(m) < messageSize || len(m) > maxMessage {
			return info.BadField("Messages", "one of %d bytes", len(m))
		}
	}
	have := 0
	for _, p := range d.ports {
		if p != nil {
			have++
		}
	}
	if len(s.Ports) != have {
		return info.BadField("Ports", "%d; here there are %d", len(s.Ports), have)
	}
	for i, v := range s.Ports {
		switch {
		case int(v.Number) >= len(d.ports) || d.ports[v.Number] == nil:
			return info.BadField("Ports", "there is no port %d", v.Number)
		case i > 0 && v.Number <= s.Ports[i-1].Number:
			return info.BadField("Ports", "port %d comes twice or out of order", v.Number)
		case len(v.Input) > maxInput:
			return info.BadField("Ports", "port %d: Input: %d bytes, more than %d", v.Number, len(v.Input), maxInput)
		}
	}
	for _, v := range s.Ports {
		p := d.ports[v.Number]
		p.gate.set(v.Open)
		p.rest = append(bytes.Clone(v.Input), p.rest...)
		p.sent = int(v.Sent)
	}
	d.control.update(func([][]byte) [][]byte { return s.Messages })
	return nil
}
