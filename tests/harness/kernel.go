package harness

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// QuietKernel fails the test if the host's kernel complains while it runs.
func QuietKernel(t testing.TB) {
	t.Helper()
	mark := fmt.Sprintf("%s starts at %d", t.Name(), time.Now().UnixNano())
	if err := os.WriteFile("/dev/kmsg", []byte(mark), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		buf := make([]byte, 4<<20)
		n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buf)
		_, text, found := strings.Cut(string(buf[:max(n, 0)]), mark)
		if err != nil || !found {
			t.Fatalf("read the kernel log: %v", err)
		}
		for _, line := range regexp.MustCompile(`.*(?:WARNING:|BUG:|Oops|Call Trace|DMAR:.*[Ff]ault|vfio.*(?i:fail|error|invalid|timed out)|irq \d+: nobody cared).*`).FindAllString(text, -1) {
			t.Errorf("the host's kernel: %s", line)
		}
		if t.Failed() {
			t.Logf("the host's kernel log:\n%s", text)
		}
	})
}
