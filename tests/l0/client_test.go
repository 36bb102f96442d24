package l0

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// client runs one of baton's clients and returns its exit code and output.
func client(t *testing.T, stdin string, args ...string) (code int, output string) {
	t.Helper()
	cmd := exec.CommandContext(harness.Context(t, limit), harness.Baton(t), args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, _ := cmd.CombinedOutput()
	return cmd.ProcessState.ExitCode(), string(out)
}

func TestClients(t *testing.T) {
	dir := shortDir(t)
	path, log := filepath.Join(dir, "qmp"), filepath.Join(dir, "events")
	cmd := exec.Command(harness.Baton(t), "-kernel", tiny.Kernel(t, tiny.Say("up\n"), tiny.Halt), "-serial", "null",
		"-qmp", "unix:"+path+",server,nowait", "-event-log", log)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	status(t, harness.DialQMP(t, harness.Context(t, limit), path), "running")

	follow := func(args ...string) (*exec.Cmd, *harness.Log) {
		out := harness.NewLog()
		c := exec.Command(harness.Baton(t), append([]string{"events"}, args...)...)
		c.Stdout = out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Process.Kill() })
		return c, out
	}
	fromFile, fileLines := follow("-json", log)
	if _, err := fileLines.Wait(harness.Context(t, limit), 0, `^{"timestamp":{.*},"event":"RESUME","seq":1}$`); err != nil {
		t.Fatal(err)
	}
	fromSocket, socketLines := follow(path)

	for _, tc := range []struct {
		code        int
		stdin, want string
		args        []string
	}{
		{0, "", `^VM status: running\n$`, []string{"info", "status"}},
		{0, "", `^$`, []string{"stop"}},
		{0, "", `^{"return":{"status":"paused","running":false}}\n$`, []string{`{"execute":"query-status"}`}},
		{1, "", `^Error: Device 'x' not found\n$`, []string{"set_link x on"}},
		{1, "", `^{"error":{"class":"CommandNotFound",.*}}\n$`, []string{`{"execute":"nope"}`}},
		{0, "cont\ninfo status\n", `^VM status: running\n$`, nil},
		{1, "nope\ninfo status\n", `^unknown command: 'nope'\nVM status: running\n$`, nil},
	} {
		if code, out := client(t, tc.stdin, append([]string{"monitor", path}, tc.args...)...); code != tc.code || !regexp.MustCompile(tc.want).MatchString(out) {
			t.Errorf("%q: exit code %d: %q, want %d: %s", tc.args, code, out, tc.code, tc.want)
		}
	}

	c := openTerminalOf(t, harness.Baton(t), "monitor", path)
	if _, err := c.Wait(harness.Context(t, limit), 0, `\(baton\) $`); err != nil {
		t.Fatal(err)
	}
	c.typeAndSee(t, "info stat\t\r", `VM status: running\r*\n`)
	from := socketLines.Len()
	c.typeAndSee(t, "stop\r", `\d\d:\d\d:\d\d\.\d{6} STOP\n`)
	if _, err := socketLines.Wait(harness.Context(t, limit), from, `^\d\d:\d\d:\d\d\.\d{6} STOP$`); err != nil {
		t.Error(err)
	}
	c.typeAndSee(t, `{"execute":"cont"}`+"\r", `^{"return":{}}`)
	c.typeAndSee(t, "\x1b[A\x1b[A\x1b[A\r", `VM status: running`)
	c.master.WriteString("\x04")
	waitFor(t, c.cmd)
	if after := termios(t, c.slave); after != c.before {
		t.Errorf("the terminal is left as %+v, it was %+v", after, c.before)
	}

	if code, out := client(t, "", "monitor", path, "quit"); code != 0 || out != "" {
		t.Errorf("quit: exit code %d: %s", code, out)
	}
	waitFor(t, cmd)
	waitFor(t, fromSocket) // it ends with the machine
	shutdown := `SHUTDOWN {"guest":false,"reason":"host-qmp-quit"}`
	if !strings.HasSuffix(socketLines.String(), shutdown+"\n") {
		t.Errorf("events: %s", socketLines)
	}
	if _, err := fileLines.Wait(harness.Context(t, limit), 0, `"event":"SHUTDOWN"`); err != nil {
		t.Error(err)
	}
	fromFile.Process.Signal(syscall.SIGINT)
	waitFor(t, fromFile)
	if text := fileLines.String(); bytes.Count([]byte(text), []byte("\n")) != 6 { // RESUME STOP RESUME STOP RESUME SHUTDOWN
		t.Errorf("event log: %s", text)
	}
}
