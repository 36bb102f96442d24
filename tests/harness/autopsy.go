package harness

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// autopsyTime is how long a VMM that may hang has to answer and to die.
const autopsyTime = 5 * time.Second

// Autopsy ends a baton in whose test something went wrong, and leaves NAME.autopsy among the
// artifacts: where its vCPUs were at three moments, its pairs and slots, what its threads waited
// for. The stacks of its goroutines are in its stderr log. Qmp is the path of a monitor.
func (g *Guest) Autopsy(qmp string) {
	select {
	case <-g.ended:
		return
	default:
	}
	f, err := os.Create(filepath.Join(Artifacts(g.t), g.name+".autopsy"))
	if err != nil {
		return
	}
	defer f.Close()
	if conn, err := net.Dial("unix", qmp); err != nil {
		fmt.Fprintln(f, err)
	} else {
		_ = conn.SetDeadline(time.Now().Add(autopsyTime))
		fmt.Fprintln(conn, `{"execute":"qmp_capabilities"}`)
		for _, view := range []string{"status", "registers", "registers", "registers", "failover", "pci", "migrate"} {
			fmt.Fprintf(conn, `{"execute":"human-monitor-command","arguments":{"command-line":"info %s"}}`+"\n", view)
		}
		_ = conn.(*net.UnixConn).CloseWrite()
		answers, err := io.ReadAll(conn)
		fmt.Fprintln(f, strings.ReplaceAll(string(answers), `\r\n`, "\n"), err)
		conn.Close()
	}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", g.PID()))
	for _, task := range tasks {
		for _, name := range []string{"comm", "stat", "wchan", "syscall"} {
			b, _ := os.ReadFile(filepath.Join(task, name))
			fmt.Fprintf(f, "%s ", strings.TrimSpace(string(b)))
		}
		fmt.Fprintln(f)
	}
	_ = syscall.Kill(g.PID(), syscall.SIGQUIT)
	select {
	case <-g.ended:
	case <-time.After(autopsyTime):
	}
}
