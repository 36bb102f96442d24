package hmp

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// migration are the commands for a guest that moves.
func migration() []command {
	return []command{
		{name: "migrate", params: "[-d] URI", help: "move the guest to where -incoming URI waits, or to a file; it goes on in the background", qmp: "migrate",
			run: func(m *Monitor, args []string) (string, error) {
				uri := args[len(args)-1]
				if len(args) == 2 && args[0] != "-d" || strings.HasPrefix(uri, "-") {
					return "", fmt.Errorf("what is %s?", args[0])
				}
				return m.do("migrate", map[string]any{"uri": uri})
			}},
		just("migrate_cancel", "", "call it off"),
		{name: "migrate_continue", params: "STATE", help: "go on after pre-switchover", qmp: "migrate-continue", run: pass("migrate-continue", "state")},
		{name: "migrate_incoming", params: "URI", help: "wait for a guest there, after -incoming defer", qmp: "migrate-incoming", run: pass("migrate-incoming", "uri")},
		{name: "migrate_recover", params: "URI", help: "ask the target there whether the guest runs, if it does not answer", qmp: "migrate-recover", run: pass("migrate-recover", "uri")},
		{name: "migrate_set_capability", params: "NAME on|off", help: "turn a capability on or off", qmp: "migrate-set-capabilities", run: (*Monitor).setCapability},
		{name: "migrate_set_parameter", params: "NAME VALUE", help: "set a parameter; sizes may have a suffix: 1G", qmp: "migrate-set-parameters", run: (*Monitor).setParameter},
	}
}

var migrationInfos = []command{
	{name: "migrate", help: "how far the guest's move is", qmp: "query-migrate", run: infoMigrate},
	{name: "migrate_capabilities", help: "the capabilities for it", qmp: "query-migrate-capabilities", run: infoCapabilities},
	{name: "migrate_parameters", help: "the parameters of it", qmp: "query-migrate-parameters", run: infoParameters},
}

// pass runs a command of QMP with the one argument.
func pass(command, name string) func(*Monitor, []string) (string, error) {
	return func(m *Monitor, args []string) (string, error) { return m.do(command, map[string]any{name: args[0]}) }
}

func (m *Monitor) setCapability(args []string) (string, error) {
	on, err := onOff(args[1])
	if err != nil {
		return "", err
	}
	c := map[string]any{"capability": args[0], "state": on}
	return m.do("migrate-set-capabilities", map[string]any{"capabilities": []any{c}})
}

// setParameter gives the value the type that the parameter has.
func (m *Monitor) setParameter(args []string) (string, error) {
	now, err := ask[map[string]any](m, "query-migrate-parameters")
	if err != nil {
		return "", err
	}
	var value any = args[1]
	switch now[args[0]].(type) {
	case float64:
		n, err := parseSize(args[1])
		if err != nil {
			return "", err
		}
		value = json.Number(fmt.Sprint(n))
	case bool:
		if value, err = onOff(args[1]); err != nil {
			return "", err
		}
	}
	return m.do("migrate-set-parameters", map[string]any{args[0]: value})
}

// parseSize reads a number that may end in K, M, G or T.
func parseSize(text string) (int64, error) {
	digits := strings.TrimRight(text, "KMGT")
	n, err := strconv.ParseInt(digits, 10, 64)
	if shift := 10 * (1 + strings.Index("KMGT", text[len(digits):])); err == nil && len(text) == len(digits)+1 && n < 1<<(62-shift) {
		return n << shift, nil
	}
	if err != nil || len(text) != len(digits) {
		return 0, fmt.Errorf("%s is no number", text)
	}
	return n, nil
}

// infoMigrate is worded as QEMU's hmp_info_migrate.
func infoMigrate(m *Monitor, _ []string) (string, error) {
	info, err := ask[struct {
		Status   *string
		Error    *string  `json:"error-desc"`
		Blocked  []string `json:"blocked-reasons"`
		Total    *int64   `json:"total-time"`
		Expected *int64   `json:"expected-downtime"`
		Downtime *int64
		Setup    *int64 `json:"setup-time"`
		Throttle *int64 `json:"cpu-throttle-percentage"`
		RAM      *struct {
			Transferred, Remaining, Total, Duplicate, Normal int64
			Mbps                                             float64
			NormalBytes                                      int64 `json:"normal-bytes"`
			DirtySyncs                                       int64 `json:"dirty-sync-count"`
			DirtyRate                                        int64 `json:"dirty-pages-rate"`
			PageSize                                         int64 `json:"page-size"`
			MultifdBytes                                     int64 `json:"multifd-bytes"`
			PagesPerSecond                                   int64 `json:"pages-per-second"`
		}
	}](m, "query-migrate")
	var b strings.Builder
	line := func(name string, v *int64, unit string) {
		if v != nil {
			fmt.Fprintf(&b, "%s: %d%s\n", name, *v, unit)
		}
	}
	if info.Blocked != nil {
		fmt.Fprintf(&b, "Outgoing migration blocked:\n  %s\n", strings.Join(info.Blocked, "\n  "))
	}
	if info.Status == nil {
		return b.String(), err
	}
	fmt.Fprintf(&b, "Migration status: %s", *info.Status)
	if info.Error != nil {
		fmt.Fprintf(&b, " (%s)", *info.Error)
	}
	b.WriteString("\n")
	line("total time", info.Total, " ms")
	line("expected downtime", info.Expected, " ms")
	line("downtime", info.Downtime, " ms")
	line("setup", info.Setup, " ms")
	if r := info.RAM; r != nil {
		kib := func(n int64) *int64 { return new(n >> 10) }
		line("transferred ram", kib(r.Transferred), " kbytes")
		fmt.Fprintf(&b, "throughput: %.2f mbps\n", r.Mbps)
		line("remaining ram", kib(r.Remaining), " kbytes")
		line("total ram", kib(r.Total), " kbytes")
		line("duplicate", &r.Duplicate, " pages")
		line("normal", &r.Normal, " pages")
		line("normal bytes", kib(r.NormalBytes), " kbytes")
		line("dirty sync count", &r.DirtySyncs, "")
		line("page size", kib(r.PageSize), " kbytes")
		line("multifd bytes", kib(r.MultifdBytes), " kbytes")
		line("pages-per-second", &r.PagesPerSecond, "")
		line("dirty pages rate", &r.DirtyRate, " pages")
	}
	line("cpu throttle percentage", info.Throttle, "")
	return b.String(), err
}

func infoCapabilities(m *Monitor, _ []string) (string, error) {
	list, err := ask[[]struct {
		Capability string
		State      bool
	}](m, "query-migrate-capabilities")
	var b strings.Builder
	for _, c := range list {
		fmt.Fprintf(&b, "%s: %s\n", c.Capability, map[bool]string{true: "on", false: "off"}[c.State])
	}
	return b.String(), err
}

func infoParameters(m *Monitor, _ []string) (string, error) {
	result, err := m.cfg.Execute("query-migrate-parameters", nil)
	if err != nil {
		return "", err
	}
	text, err := json.MarshalIndent(result, "", "")
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for line := range strings.Lines(string(text)) { // "name": value,
		if name, value, ok := strings.Cut(strings.TrimRight(line, ",\n"), ": "); ok {
			fmt.Fprintf(&b, "%s: %s\n", strings.Trim(name, `"`), strings.Trim(value, `"`))
		}
	}
	return b.String(), nil
}
