package e2e

import (
	"context"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// writers starts a pod on each node that writes and syncs, and gives their
// names.
func (s *space) writers(class string) (names []string) {
	s.Helper()
	for _, node := range nodes {
		name := "writer-" + node
		s.apply(join(claimYAML, writerYAML+onNode), "claim", name, "class", class, "size", "400Mi", "pod", name, "node", node)
		names = append(names, name)
	}
	s.runs(names...)
	for _, name := range names {
		s.goesOn(name, 5)
	}
	return names
}

// useNode shows that volumes can be made, used, and deleted on a node.
func (s *space) useNode(node string) {
	s.Helper()
	name := "late-" + node + "-" + stamp()
	s.apply(join(claimYAML, podYAML+onNode), "claim", name, "class", "orlop", "size", "64Mi", "pod", name, "node", node)
	s.runs(name)
	want := s.sh(name, fill("/data/file", 4))
	if got := s.sh(name, sum("/data/file")); got != want {
		s.Errorf("the file of %s is %s, want %s", name, got, want)
	}
	v := s.bound(name)
	s.delete(pods, name)
	s.delete(claims, name)
	await(s.T, resource(s.T, volumes, ""), v.Name, "gone", func(v *corev1.PersistentVolume) (bool, error) { return v == nil, nil })
}

// The driver is upgraded on every node while pods write: they see no error, and
// the new driver goes on with the volumes of the old one.
func TestUpgradeOfNodes(t *testing.T) {
	s := newSpace(t)
	names := s.writers("orlop-xfs")
	restartPods(t, "node")
	for i, name := range names {
		s.goesOn(name, 20)
		s.grow(name, "800Mi")
		s.grown(name, "800Mi")
		s.useNode(nodes[i])
	}
	for _, name := range names {
		last := s.goesOn(name, 5)
		s.delete(pods, name)
		s.apply(writerYAML, "claim", name, "pod", name)
		s.runs(name)
		if n := s.goesOn(name, 1); n <= last {
			t.Errorf("%s had %d records, and has %d", name, last, n)
		}
	}
}

// The controller is upgraded while pods write, and while volumes are asked for:
// the pods see no error, and every claim gets its volume.
func TestUpgradeOfController(t *testing.T) {
	s := newSpace(t)
	names := s.writers("orlop")
	const n = 6
	for i := range n {
		name := fmt.Sprintf("data-%d", i)
		s.apply(join(claimYAML, podYAML), "claim", name, "class", "orlop", "size", "64Mi", "pod", name)
	}
	s.apply(snapshotYAML, "snapshot", "cut", "claim", names[0])
	restartPods(t, "controller")
	for i := range n {
		name := fmt.Sprintf("data-%d", i)
		s.runs(name)
		s.sh(name, fill("/data/file", 1))
	}
	s.cut("cut")
	for i, name := range names {
		s.goesOn(name, 20)
		s.useNode(nodes[i])
	}
}

// Both controllers die without a word while volumes are made: each claim ends
// up with one volume, and nothing is made twice.
func TestCrashOfController(t *testing.T) {
	s := newSpace(t)
	before := count(t, "orlop_pool_volumes")
	const n = 12
	for i := range n {
		name := fmt.Sprintf("data-%d", i)
		s.apply(join(claimYAML, podYAML), "claim", name, "class", "orlop", "size", "64Mi", "pod", name)
		if i%4 == 1 {
			for _, p := range driverPods(t, "controller") {
				err := kube.CoreV1().Pods(system).Delete(context.Background(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
				must(t, err)
			}
		}
	}
	for i := range n {
		name := fmt.Sprintf("data-%d", i)
		s.runs(name)
		want := s.sh(name, fill("/data/file", 1))
		if got := s.sh(name, sum("/data/file")); got != want {
			t.Errorf("the file of %s is %s, want %s", name, got, want)
		}
	}
	if got := count(t, "orlop_pool_volumes") - before; got != n {
		t.Errorf("%d claims have made %d volumes", n, got)
	}
	restartPods(t, "controller") // and so it is whole again for the next test
}

// The kubelet of a node ends and starts again while a pod writes: the pod sees no
// error, the driver registers anew, and volumes can be made and deleted.
func TestRestartOfKubelet(t *testing.T) {
	s := newSpace(t)
	names := s.writers("orlop")
	node := nodes[1]
	machine := machineOf(t, node)
	must(t, machine.RestartKubelet(context.Background()))
	served(t, node)
	for i, name := range names {
		s.goesOn(name, 20)
		s.useNode(nodes[i])
	}

	// What changes while there is no kubelet is done when it is back.
	must(t, machine.StopKubelet(context.Background()))
	remove(t, s.in(pods), names[1])
	s.apply(join(claimYAML, podYAML+onNode), "claim", "meanwhile", "class", "orlop", "size", "64Mi", "pod", "meanwhile", "node", node)
	s.goesOn(names[0], 5)
	must(t, machine.StartKubelet(context.Background()))
	s.delete(pods, names[1])
	s.runs("meanwhile")
	s.sh("meanwhile", fill("/data/file", 1))
	s.apply(writerYAML, "claim", names[1], "pod", "again")
	s.runs("again")
	s.goesOn("again", 5)
}
