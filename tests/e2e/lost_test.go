package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/orlop-csi/orlop/tests/e2e/cluster"
)

// machineOf gives the machine that is a node: what only the cluster of
// `make cluster-up` can tell.
func machineOf(t testing.TB, node string) *cluster.Node {
	t.Helper()
	c, err := cluster.Open(".")
	must(t, err)
	m := c.Node(node)
	if m == nil {
		t.Fatalf("the cluster of this machine has no %s", node)
	}
	return m
}

// orphans gives what `csi-driver orphans` prints.
func orphans(t testing.TB, flags ...string) string {
	t.Helper()
	pod := driverPods(t, "controller")[0].Name
	out, err := run(system, pod, container, append([]string{"csi-driver", "orphans"}, flags...)...)
	must(t, err)
	return out
}

// setGracePeriod changes how long the controllers wait until they call something
// an orphan, as an administrator does in the manifest of the Deployment.
func setGracePeriod(t testing.TB, period string) {
	t.Helper()
	ctx := context.Background()
	eventually(t, "the grace period is "+period, func() error {
		d, err := kube.AppsV1().Deployments(system).Get(ctx, controllers, getNow)
		if err != nil {
			return err
		}
		for i, c := range d.Spec.Template.Spec.Containers {
			for j, arg := range c.Args {
				if c.Name == container && strings.HasPrefix(arg, "--orphan-grace-period=") {
					d.Spec.Template.Spec.Containers[i].Args[j] = "--orphan-grace-period=" + period
				}
			}
		}
		_, err = kube.AppsV1().Deployments(system).Update(ctx, d, metav1.UpdateOptions{FieldManager: "e2e"})
		return err
	})
	restartPods(t, "controller")
}

// served waits until the driver serves a node: its pod is ready, and pods that
// use its volumes may be scheduled there.
func served(t testing.TB, node string) {
	t.Helper()
	await(t, resource(t, "csinodes.storage.k8s.io", ""), node, "registered", func(n *storagev1.CSINode) (bool, error) {
		if n == nil {
			return false, nil
		}
		for _, d := range n.Spec.Drivers {
			if d.Name == driverName {
				return true, nil
			}
		}
		return false, nil
	})
	await(t, resource(t, "nodes", ""), node, "without taints", func(n *corev1.Node) (bool, error) {
		return n != nil && len(n.Spec.Taints) == 0, nil
	})
	eventually(t, "the driver is ready on "+node, func() error {
		list, err := kube.CoreV1().Pods(system).List(context.Background(), metav1.ListOptions{
			LabelSelector: "app.kubernetes.io/name=orlop,app.kubernetes.io/component=node",
			FieldSelector: "spec.nodeName=" + node,
		})
		if err != nil {
			return err
		}
		for _, p := range list.Items {
			if ready, _ := isReady(&p); ready && p.DeletionTimestamp == nil {
				return nil
			}
		}
		return fmt.Errorf("none of %d pods is ready", len(list.Items))
	})
}

// A node that dies and is removed from the cluster takes its volumes with it, and
// nothing else: its claims, volumes and snapshots can be deleted, and nothing is
// stuck. If it comes back after all, what it still holds is reported, and removed
// only when somebody says so.
func TestLostNode(t *testing.T) {
	s := newSpace(t)
	lost, other := nodes[len(nodes)-1], nodes[0]
	machine := machineOf(t, lost)
	for _, node := range []string{lost, other} {
		s.apply(join(claimYAML, writerYAML+onNode), "claim", "data-"+node, "class", "orlop", "size", "64Mi", "pod", "app-"+node, "node", node)
	}
	s.runs("app-"+lost, "app-"+other)
	for _, node := range []string{lost, other} {
		s.goesOn("app-"+node, 5)
		s.apply(snapshotYAML, "snapshot", "cut-"+node, "claim", "data-"+node)
	}
	cut := s.cut("cut-" + lost)
	s.cut("cut-" + other)
	object, err := resource(t, contents, "").Get(t.Context(), cut.Status.BoundVolumeSnapshotContentName, getNow)
	must(t, err)
	content := as[snapshotContent](t, object)
	volume := s.bound("data-" + lost)
	handles := []string{volume.Spec.CSI.VolumeHandle, content.Status.SnapshotHandle}
	if out := orphans(t); strings.Contains(out, handles[0]) || strings.Contains(out, handles[1]) {
		t.Errorf("a volume or snapshot in use is called an orphan: %s", out)
	}

	ctx := context.Background()
	back := false
	comeBack := func() {
		if !back {
			back = true
			must(t, machine.Start(ctx))
			served(t, lost)
		}
	}
	t.Cleanup(comeBack)
	must(t, machine.Kill(ctx))

	// While the node may come back, its volumes are not given up.
	must(t, s.in(snapshots).Delete(ctx, "cut-"+lost, metav1.DeleteOptions{}))
	s.goesOn("app-"+other, 20)
	s.apply(snapshotYAML, "snapshot", "second-"+other, "claim", "data-"+other)
	s.cut("second-" + other) // others do not wait for it
	if _, err := resource(t, contents, "").Get(ctx, content.Name, getNow); err != nil {
		t.Errorf("the snapshot of a node that may come back: %v", err)
	}

	// The administrator says that it does not.
	must(t, kube.CoreV1().Nodes().Delete(ctx, lost, metav1.DeleteOptions{}))
	if err := kube.CoreV1().Pods(s.name).Delete(ctx, "app-"+lost, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	s.delete(claims, "data-"+lost)
	await(t, resource(t, volumes, ""), volume.Name, "gone", func(v *corev1.PersistentVolume) (bool, error) { return v == nil, nil })
	await(t, s.in(snapshots), "cut-"+lost, "gone", func(o *snapshot) (bool, error) { return o == nil, nil })
	await(t, resource(t, contents, ""), content.Name, "gone", func(o *snapshotContent) (bool, error) { return o == nil, nil })
	s.goesOn("app-"+other, 5)

	// It comes back, with its disk.
	comeBack()
	eventually(t, "what the node holds is reported", func() error {
		out := orphans(t)
		for _, handle := range handles {
			if !strings.Contains(out, handle) {
				return fmt.Errorf("%s is not in: %s", handle, out)
			}
		}
		return nil
	})
	if out := orphans(t); strings.Contains(out, s.bound("data-"+other).Spec.CSI.VolumeHandle) {
		t.Errorf("a volume in use is called an orphan: %s", out)
	}
	// Nobody removes by mistake what was unclaimed only for a moment.
	named := []string{"csi-driver", "orphans", "--remove", "volume/" + handles[0], "snapshot/" + handles[1]}
	if out, err := run(system, driverPods(t, "controller")[0].Name, container, named...); err == nil || !strings.Contains(err.Error(), "grace period") {
		t.Errorf("what is in its grace period could be removed: %v %s", err, out)
	}
	setGracePeriod(t, "1s")
	t.Cleanup(func() { setGracePeriod(t, "1h") })
	pod := driverPods(t, "controller")[0].Name
	eventually(t, "the orphans are removed", func() error {
		_, err := run(system, pod, container, named...)
		return err
	})
	if out := orphans(t); strings.Contains(out, handles[0]) || strings.Contains(out, handles[1]) {
		t.Errorf("orphans are left when they were removed: %s", out)
	}
	s.useNode(lost)
	s.goesOn("app-"+other, 5)
}

// A node that loses its power and comes back has its volumes with all that was on
// stable storage; the pods that use them go on by themselves.
func TestPowerFailureOfNode(t *testing.T) {
	s := newSpace(t)
	node := nodes[len(nodes)-1]
	machine := machineOf(t, node)
	s.apply(join(claimYAML, strings.Replace(writerYAML, "restartPolicy: Never", "restartPolicy: Always", 1)+onNode),
		"claim", "data", "class", "orlop", "size", "64Mi", "pod", "app", "node", node)
	s.runs("app")
	want := s.sh("app", fill("/data/file", 8))
	last := s.goesOn("app", 20)
	ctx := context.Background()
	must(t, machine.Kill(ctx))
	must(t, machine.Start(ctx))
	served(t, node)
	eventually(t, "the pod goes on", func() error {
		out, err := s.try("app", "tail -n 1 /data/log")
		if err != nil {
			return err
		}
		var n int
		if _, err := fmt.Sscan(out, &n); err != nil || n <= last {
			return fmt.Errorf("it is at record %q, and was at %d: %w", out, last, err)
		}
		return nil
	})
	s.written("app")
	if got := s.sh("app", sum("/data/file")); got != want {
		t.Errorf("the file was %s, and is %s", want, got)
	}
	s.useNode(node)
}
