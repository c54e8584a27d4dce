package cluster

import (
	"context"
	"fmt"
	"strings"
)

// Status tells what of the cluster runs, for people.
func Status(ctx context.Context) (string, error) {
	var text strings.Builder
	for _, m := range machines() {
		pid, err := m.pid()
		if err != nil {
			return "", err
		}
		state := "is not running"
		if pid != 0 {
			state = fmt.Sprintf("process %d, logs in %s", pid, m.logs())
		}
		fmt.Fprintf(&text, "%-14s %s\n", m.name, state)
	}
	if pid, err := control.pid(); err != nil || pid == 0 {
		return text.String(), err
	}
	for _, args := range [][]string{{"get", "nodes"}, {"get", "pods", "--namespace", namespace, "--output", "wide"}} {
		out, err := (&Cluster{}).Kubectl(ctx, args...)
		if err != nil {
			return text.String(), err
		}
		fmt.Fprintf(&text, "\n%s", out)
	}
	return text.String(), nil
}
