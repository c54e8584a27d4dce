package e2e

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// Two pods on the node of a volume use it at the same time, and see each
// other's data; when one ends, the other goes on.
func TestSharedByTwoPods(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(join(claimYAML, podYAML), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "one")
	node := s.runs("one").Spec.NodeName
	s.apply(writerYAML, "claim", "data", "pod", "two")
	if p := s.runs("two"); p.Spec.NodeName != node {
		t.Errorf("the volume is on %s, and its second pod on %s", node, p.Spec.NodeName)
	}
	want := s.sh("one", fill("/data/file", 8))
	if got := s.sh("two", sum("/data/file")); got != want {
		t.Errorf("the second pod sees %s, want %s", got, want)
	}
	if n := s.goesOn("two", 3); s.written("one") < n {
		t.Errorf("the first pod does not see the %d records of the second", n)
	}
	s.delete(pods, "one")
	s.goesOn("two", 10)
	if got := s.sh("two", sum("/data/file")); got != want {
		t.Errorf("when the first pod is gone, the second sees %s, want %s", got, want)
	}
}

// A claim that is ReadWriteOncePod serves one pod: a second waits until the
// first is gone, and then finds its data.
func TestReadWriteOncePod(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(join(strings.ReplaceAll(claimYAML, "ReadWriteOnce", "ReadWriteOncePod"), podYAML), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "one")
	s.runs("one")
	want := s.sh("one", fill("/data/file", 8))
	s.apply(podYAML, "claim", "data", "pod", "two")
	await(t, s.in(pods), "two", "refused by the scheduler", func(p *corev1.Pod) (bool, error) {
		if p == nil {
			return false, errGone
		}
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
				return strings.Contains(c.Message, "ReadWriteOncePod"), nil
			}
		}
		return false, nil
	})
	if got := s.sh("one", sum("/data/file")); got != want {
		t.Errorf("the first pod sees %s, want %s", got, want)
	}
	s.delete(pods, "one")
	s.runs("two")
	if got := s.sh("two", sum("/data/file")); got != want {
		t.Errorf("the second pod sees %s, want %s", got, want)
	}
}
