package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// Device shows the PCI devices of the machine at socket, if there are no words, or plugs one
// in by "add DRIVER[,KEY=VALUE...]", or takes one out by "del ID [surprise]" and waits until
// it is gone: for a cooperative unplug, up to the guest.
func Device(ctx context.Context, socket string, words []string, out io.Writer) error {
	ends := make(chan unplugEnd, 16)
	c, err := Dial(ctx, socket, func(event json.RawMessage) {
		var e unplugEnd
		if json.Unmarshal(event, &e) == nil && (e.Event == "DEVICE_DELETED" || e.Event == "DEVICE_UNPLUG_GUEST_ERROR") {
			select {
			case ends <- e:
			default: // more than anyone waits for
			}
		}
	})
	if err != nil {
		return err
	}
	defer c.conn.Close()
	switch verb := strings.Join(words[:min(1, len(words))], ""); {
	case verb == "":
		var buses []struct{ Devices []pciDevice }
		if err := c.execute("query-pci", nil, &buses); err != nil {
			return err
		}
		for _, b := range buses {
			for _, d := range b.Devices {
				d.list(out, "")
			}
		}
		return nil
	case verb == "add" && len(words) == 2:
		text, err := c.human("device_add " + words[1])
		if err != nil {
			return fmt.Errorf("device_add: %s", strings.TrimPrefix(strings.TrimSpace(text), "Error: "))
		}
		return nil
	case verb == "del" && (len(words) == 2 || len(words) == 3 && words[2] == "surprise"):
		return c.unplug(ctx, words[1], len(words) == 3, ends)
	}
	return fmt.Errorf("device: %s\nusage: baton device SOCKET [add DRIVER,KEY=VALUE... | del ID [surprise]]", strings.Join(words, " "))
}

// unplugEnd is either of the events that say how an unplug went.
type unplugEnd struct {
	Event string
	Data  struct{ Device, Reason string }
}

func (c *Conn) unplug(ctx context.Context, id string, surprise bool, ends <-chan unplugEnd) error {
	args := map[string]any{"id": id}
	if surprise {
		args["mode"] = "surprise"
	}
	if err := c.execute("device_del", args, nil); err != nil {
		return err
	}
	for {
		select {
		case e := <-ends:
			switch {
			case e.Data.Device != id:
			case e.Event == "DEVICE_DELETED":
				return nil
			default:
				return fmt.Errorf("device_del %s: %s", id, e.Data.Reason)
			}
		case <-c.replies:
			if ctx.Err() != nil {
				return fmt.Errorf("device_del %s: nobody waits for it any more, but it goes on", id)
			}
			return fmt.Errorf("device_del %s: the machine has ended", id)
		}
	}
}

// pciDevice is what is shown of query-pci.
type pciDevice struct {
	Bus, Slot, Function int
	Class               struct {
		Desc  string
		Class int
	} `json:"class_info"`
	ID     struct{ Vendor, Device int }
	Name   string                         `json:"qdev_id"`
	Bridge *struct{ Devices []pciDevice } `json:"pci_bridge"`
}

func (d pciDevice) list(out io.Writer, indent string) {
	class := d.Class.Desc
	if class == "" {
		class = fmt.Sprintf("class %04x", d.Class.Class)
	}
	fmt.Fprintf(out, "%s%02x:%02x.%x %s %04x:%04x %s\n", indent, d.Bus, d.Slot, d.Function, class, d.ID.Vendor, d.ID.Device, d.Name)
	if d.Bridge != nil {
		for _, behind := range d.Bridge.Devices {
			behind.list(out, indent+"  ")
		}
	}
}
