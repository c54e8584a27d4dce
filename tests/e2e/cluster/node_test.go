package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/tests/e2e/build"
)

// These need a cluster, with or without Orlop, and stop a node of it.

// plainPod runs a pod without volumes on a node, and waits until it is running.
func plainPod(t *testing.T, c *Cluster, node string) (name string) {
	t.Helper()
	name = strings.ToLower(strings.ReplaceAll(t.Name(), "_", "-"))
	pod := strings.NewReplacer("$NAME", name, "$NODE", node, "$IMAGE", build.ToolsImage).Replace(`
apiVersion: v1
kind: Pod
metadata: {name: $NAME}
spec:
  nodeName: $NODE
  terminationGracePeriodSeconds: 0
  restartPolicy: Always
  containers:
  - {name: main, image: $IMAGE, command: [sleep, infinity]}
`)
	t.Cleanup(func() {
		if _, err := c.Kubectl(context.Background(), "delete", "pod", name, "--ignore-not-found", "--grace-period=0", "--force"); err != nil {
			t.Error(err)
		}
	})
	if _, err := c.KubectlInput(t.Context(), pod, "apply", "--filename", "-"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Kubectl(t.Context(), "wait", "pod", name, "--for=condition=Ready", "--timeout=3m"); err != nil {
		t.Fatal(err)
	}
	return name
}

func lastNode(t *testing.T) (*Cluster, *Node) {
	t.Helper()
	c, err := Open(".")
	if err != nil {
		t.Fatal(err)
	}
	n := c.Nodes()[Nodes-1]
	t.Cleanup(func() { // whatever the test did
		if err := repair(context.Background(), n); err != nil {
			t.Error(err)
		}
	})
	return c, n
}

// repair starts what does not run.
func repair(ctx context.Context, n *Node) error {
	if running, err := n.Running(); err != nil || !running {
		return errors.Join(err, n.Start(ctx))
	}
	if pids, err := n.machine.daemons("kubelet"); err != nil || len(pids) == 0 {
		return errors.Join(err, n.StartKubelet(ctx))
	}
	return nil
}

func TestPodsGoOnWhileTheirKubeletIsRestarted(t *testing.T) {
	c, n := lastNode(t)
	pod := plainPod(t, c, n.Name)
	started := func() (when string) {
		if err := poll(t.Context(), 2*time.Minute, "the kubelet to know the pod", func(ctx context.Context) (err error) {
			when, err = c.Kubectl(ctx, "exec", pod, "--", "stat", "--format", "%Z", "/proc/1")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return when
	}
	before := started()
	kubelets, err := n.machine.daemons("kubelet")
	if err != nil || len(kubelets) != 1 {
		t.Fatalf("kubelets %v (%v)", kubelets, err)
	}
	if err := n.RestartKubelet(t.Context()); err != nil {
		t.Fatal(err)
	}
	after, err := n.machine.daemons("kubelet")
	if err != nil || len(after) != 1 || after[0] == kubelets[0] {
		t.Errorf("kubelets %v (%v), and was %v", after, err, kubelets)
	}
	if now := started(); now != before {
		t.Errorf("the pod's process was started at %s, and is now one of %s", before, now)
	}
}

func TestAKilledNodeComesBackWithItsFiles(t *testing.T) {
	c, n := lastNode(t)
	pod := plainPod(t, c, n.Name)
	const file = "/var/lib/of-this-node"
	if _, err := n.Exec(t.Context(), "touch", file); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(n.Path(file)) })
	if _, err := os.Stat(file); err == nil {
		t.Errorf("%s of the node is this machine's", file)
	}
	if err := n.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if running, err := n.Running(); err != nil || running {
		t.Errorf("running is %v (%v) after it was killed", running, err)
	}
	if _, err := n.Exec(t.Context(), "true"); err == nil {
		t.Error("a command runs on a node that was killed")
	}
	if pids, err := processes(func(pid int) bool { return inCgroup(pid, filepath.Join("/", clusterName, n.Name)) }); err != nil || len(pids) > 0 {
		t.Errorf("processes %v of its pods are left (%v)", pids, err)
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Exec(t.Context(), "stat", file); err != nil {
		t.Error(err)
	}
	// The kubelet starts the pod's container again.
	if err := poll(t.Context(), 3*time.Minute, "the pod to run again", func(ctx context.Context) error {
		restarts, err := c.Kubectl(ctx, "get", "pod", pod, "--output", "jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}")
		if err == nil && (strings.HasPrefix(restarts, "0") || !strings.HasSuffix(restarts, "true")) {
			err = errors.New(restarts)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

func TestARemovedNodeComesBackAsANewOne(t *testing.T) {
	c, n := lastNode(t)
	uid := func() string {
		out, err := c.Kubectl(t.Context(), "get", "node", n.Name, "--ignore-not-found", "--output", "jsonpath={.metadata.uid}")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	const file = "/var/lib/of-this-node"
	if _, err := n.Exec(t.Context(), "touch", file); err != nil {
		t.Fatal(err)
	}
	before := uid()
	if err := n.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now := uid(); now != "" {
		t.Errorf("the node's object is still there: %s", now)
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now := uid(); now == "" || now == before {
		t.Errorf("the node's object is %q, and was %q before", now, before)
	}
	if _, err := n.Exec(t.Context(), "stat", file); err == nil {
		t.Errorf("%s has survived the removal of the node's disk", file)
	}
	plainPod(t, c, n.Name)
}

func inCgroup(pid int, path string) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return err == nil && strings.Contains(string(data), ":"+path+"/")
}
