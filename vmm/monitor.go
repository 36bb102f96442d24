package vmm

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"

	"baton/devices/char"
	"baton/vmm/hmp"
	"baton/vmm/qmp"
)

const monitorQMP = "control" // Monitor.Mode of a QMP server, as -mon has it

// monitor is an open Monitor: a server, or a connection, or both for a server that waited.
type monitor struct {
	label    string
	mode     string // Monitor.Mode
	telnet   bool
	listener net.Listener
	conn     io.ReadWriteCloser
}

// openMonitors opens what the clients connect to. They are served once the machine runs.
func (m *Machine) openMonitors(ctx context.Context) error {
	for i, c := range m.cfg.Monitors {
		mon, err := m.openMonitor(ctx, c)
		if err != nil {
			return fmt.Errorf("monitor %s: %w", c.Spec, err)
		}
		mon.mode, mon.label = c.Mode, fmt.Sprintf("compat_monitor%d", i)
		if id, ok := strings.CutPrefix(c.Spec, "chardev:"); ok {
			mon.label = id
		}
		m.monitors = append(m.monitors, mon)
		m.onClose(func() error { // the server has closed what it served
			if mon.listener != nil {
				mon.listener.Close()
			}
			if mon.conn != nil {
				mon.conn.Close()
			}
			return nil
		})
	}
	return nil
}

func (m *Machine) openMonitor(ctx context.Context, c Monitor) (mon monitor, err error) {
	text := m.cfg.charSpec(c.Spec)
	spec, err := char.Parse(text)
	mon.telnet = spec.Telnet
	switch {
	case err != nil:
	case spec.Kind != char.Unix && spec.Kind != char.TCP:
		mon.conn, err = m.openChar(ctx, "monitor", text)
	case !spec.Server:
		mon.conn, err = char.Dial(ctx, spec)
	default:
		if mon.listener, err = char.Listen(ctx, spec); err == nil && spec.Wait {
			m.log.Info("waiting for a client of the monitor at " + mon.listener.Addr().String())
			mon.conn, err = char.AcceptFirst(ctx, mon.listener)
		}
	}
	return mon, err
}

// serveMonitors starts to serve the clients. Ctx is Run's.
func (m *Machine) serveMonitors(ctx context.Context) {
	var human *hmp.Monitor
	s := qmp.NewServer(qmp.Config{
		Version: qmpVersion(), Commands: append(m.commands(ctx), humanCommand(&human)),
		EventTypes: eventTypes, Events: m.events, Do: m.call,
	})
	human = m.newHuman(s)
	m.onClose(s.Close)
	open, cancel := context.WithCancel(context.Background()) // as long as the machine, which outlives ctx
	m.onClose(func() error { cancel(); return nil })
	for _, mon := range m.monitors {
		switch {
		case mon.mode == monitorHMP:
			m.serveHuman(open, human, mon)
			continue
		case mon.listener != nil:
			go s.Serve(mon.listener)
		}
		if mon.conn != nil {
			go s.ServeConn(mon.conn)
		}
	}
	if m.shared != nil {
		m.serveHuman(open, human, monitor{conn: m.shared})
	}
}
