//go:build integration

package integration

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlStartFails starts a driver that must not come up: it ends soon with code 1
// and tells why in one line on standard error that has all the words. The line
// is the result.
func ctlStartFails(t *testing.T, d *harness.Driver, words ...string) string {
	t.Helper()
	cmd := d.Command()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	ctlMust(t, cmd.Start())
	timer := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("a start that must fail: %v; want exit code 1\n%s", err, errOut.String())
	}
	if out.Len() > 0 {
		t.Errorf("a start that must fail says on standard output: %s", out.String())
	}
	line := strings.TrimSuffix(errOut.String(), "\n")
	if line == "" || strings.Contains(line, "\n") {
		t.Errorf("a start that must fail says more or less than one line:\n%s", errOut.String())
	}
	for _, word := range words {
		if !strings.Contains(line, word) {
			t.Errorf("a start that must fail says %q, without %q", line, word)
		}
	}
	return line
}
