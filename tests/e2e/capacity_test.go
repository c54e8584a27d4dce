package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// room gives the largest volume in bytes that the scheduler believes a node to
// have room for.
func room(node, class string) (int64, error) {
	list, err := kube.StorageV1().CSIStorageCapacities("").List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return 0, err
	}
	of := func(c storagev1.CSIStorageCapacity) bool {
		return c.StorageClassName == class && c.NodeTopology != nil && c.NodeTopology.MatchLabels[topologyKey] == node
	}
	i := slices.IndexFunc(list.Items, of)
	switch {
	case i < 0:
		return 0, fmt.Errorf("no CSIStorageCapacity for class %s on %s", class, node)
	case list.Items[i].MaximumVolumeSize != nil:
		return list.Items[i].MaximumVolumeSize.Value(), nil
	case list.Items[i].Capacity != nil:
		return list.Items[i].Capacity.Value(), nil
	default:
		return 0, nil
	}
}

// roomIs waits until a condition holds for what the scheduler believes a node
// to have room for.
func (s *space) roomIs(node, class, what string, condition func(int64) bool) (now int64) {
	s.Helper()
	eventually(s.T, fmt.Sprintf("the room on %s is %s", node, what), func() (err error) {
		now, err = room(node, class)
		if err == nil && !condition(now) {
			err = fmt.Errorf("it is %d", now)
		}
		return err
	})
	return now
}

// refusals counts the events that tell of a claim's volume that a node had no
// room for.
func (s *space) refusals(claim string) (n int) {
	s.Helper()
	for _, e := range s.eventsAbout("PersistentVolumeClaim", claim) {
		if strings.Contains(e, "ResourceExhausted") {
			n++
		}
	}
	return n
}

// The scheduler knows which nodes are full: it does not even try one, however
// much a pod would like to run there, until there is room again.
func TestSchedulerAvoidsFullNode(t *testing.T) {
	s := newSpace(t)
	full := nodes[0]
	free := s.roomIs(full, "orlop", "more than 2 GiB", func(n int64) bool { return n > 2*gib })
	s.apply(join(claimYAML, podYAML+onNode), "claim", "filler", "class", "orlop", "size", quantity(free-gib/2), "pod", "filler", "node", full)
	s.runs("filler")
	s.roomIs(full, "orlop", "less than 1 GiB", func(n int64) bool { return n < gib })

	for i := range 3 {
		s.apply(join(claimYAML, podYAML+rather), "claim", fmt.Sprintf("data-%d", i), "class", "orlop", "size", "1Gi", "pod", fmt.Sprintf("app-%d", i), "node", full)
	}
	for i := range 3 {
		pod, claim := fmt.Sprintf("app-%d", i), fmt.Sprintf("data-%d", i)
		if node := s.runs(pod).Spec.NodeName; node == full {
			t.Errorf("%s runs on %s, which is full", pod, node)
		}
		if n := s.refusals(claim); n != 0 {
			t.Errorf("a node without room was tried %d times for %s", n, claim)
		}
		want := s.sh(pod, fill("/data/file", 4))
		if got := s.sh(pod, sum("/data/file")); got != want {
			t.Errorf("the file of %s is %s, want %s", pod, got, want)
		}
	}

	s.delete(pods, "filler")
	s.delete(claims, "filler")
	s.roomIs(full, "orlop", "as it was", func(n int64) bool { return n >= free-gib/4 })
	s.apply(join(claimYAML, podYAML+rather), "claim", "late", "class", "orlop", "size", "1Gi", "pod", "late", "node", full)
	if node := s.runs("late").Spec.NodeName; node != full {
		t.Errorf("late runs on %s; there is room again on %s", node, full)
	}
}

// When a node fills up after the scheduler has looked, the pod is scheduled
// again, to another node, by itself.
func TestRescheduledWhenNodeFillsUp(t *testing.T) {
	s := newSpace(t)
	full := nodes[0]
	const inline = `
apiVersion: v1
kind: Pod
metadata: {name: ${pod}}
spec:
  nodeSelector: {kubernetes.io/hostname: ${node}}
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: ${image}
    command: [sh, -c, "trap exit TERM; sleep 1000000 & wait"]
    volumeMounts: [{name: scratch, mountPath: /data}]
  volumes:
  - name: scratch
    csi: {driver: csi.orlop.dev, volumeAttributes: {size: "${size}"}}
`
	// The scheduler hears of inline volumes only at the provisioner's next look,
	// once a minute. If that comes too soon, the scheduler avoids the node, which
	// is another test; then once more.
	for try := range 5 {
		free := s.roomIs(full, "orlop", "more than 2 GiB", func(n int64) bool { return n > 2*gib })
		filler, pod, claim := fmt.Sprintf("filler-%d", try), fmt.Sprintf("app-%d", try), fmt.Sprintf("data-%d", try)
		s.apply(inline, "pod", filler, "node", full, "size", quantity(free-gib/2))
		s.runs(filler)
		s.apply(join(claimYAML, podYAML+rather), "claim", claim, "class", "orlop", "size", "1Gi", "pod", pod, "node", full)
		if node := s.runs(pod).Spec.NodeName; node == full {
			t.Fatalf("%s runs on %s, which is full", pod, node)
		}
		want := s.sh(pod, fill("/data/file", 4))
		if got := s.sh(pod, sum("/data/file")); got != want {
			t.Errorf("the file of %s is %s, want %s", pod, got, want)
		}
		s.delete(pods, filler)
		if s.refusals(claim) > 0 {
			return
		}
		s.roomIs(full, "orlop", "as it was", func(n int64) bool { return n >= free-gib/4 })
	}
	t.Error("in no try did the scheduler choose the full node, although it could not know")
}

// Without WaitForFirstConsumer, a volume is made before there is a pod, on a
// node of the driver's choice; the pod then runs there.
func TestImmediateBinding(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	class := s.class("Immediate", "Delete", "ext4")
	for i := range 3 {
		s.apply(claimYAML, "claim", fmt.Sprintf("data-%d", i), "class", class, "size", "64Mi")
	}
	for i := range 3 {
		pod, claim := fmt.Sprintf("app-%d", i), fmt.Sprintf("data-%d", i)
		v := s.bound(claim)
		where := nodeOf(t, v)
		s.apply(podYAML, "pod", pod, "claim", claim)
		if node := s.runs(pod).Spec.NodeName; node != where {
			t.Errorf("%s runs on %s, and its volume is on %s", pod, node, where)
		}
		want := s.sh(pod, fill("/data/file", 4))
		if got := s.sh(pod, sum("/data/file")); got != want {
			t.Errorf("the file of %s is %s, want %s", pod, got, want)
		}
	}
}

// nodeOf gives the node of a volume, which its topology names.
func nodeOf(t testing.TB, v *corev1.PersistentVolume) string {
	t.Helper()
	if v.Spec.NodeAffinity == nil || v.Spec.NodeAffinity.Required == nil {
		t.Fatalf("%s may be used on any node", v.Name)
	}
	for _, term := range v.Spec.NodeAffinity.Required.NodeSelectorTerms {
		for _, e := range term.MatchExpressions {
			if e.Key == topologyKey && len(e.Values) == 1 {
				return e.Values[0]
			}
		}
	}
	t.Fatalf("%s has no %s: %+v", v.Name, topologyKey, v.Spec.NodeAffinity)
	return ""
}

// What the scheduler is told about each node is what the node says itself.
func TestCapacityIsPublished(t *testing.T) {
	for _, node := range nodes {
		eventually(t, "the room on "+node+" is published", func() error {
			published, err := room(node, "orlop")
			if err != nil {
				return err
			}
			page, err := metrics(nodePod(t, node), nodeMetrics)
			if err != nil {
				return err
			}
			available, err := sample(page, `orlop_pool_available_bytes{pool="default"}`)
			if err != nil {
				return err
			}
			if diff := published - int64(available); diff < -mib || diff > mib {
				return fmt.Errorf("published are %d bytes, and available %d", published, int64(available))
			}
			return nil
		})
	}
}
