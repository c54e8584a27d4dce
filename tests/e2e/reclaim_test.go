package e2e

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// With the reclaim policy Retain, a volume outlives its claim, and an
// administrator can give it to another one with all that is in it.
func TestRetain(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	class := s.class("WaitForFirstConsumer", "Retain", "ext4")
	s.apply(join(claimYAML, podYAML), "claim", "data", "class", class, "size", "64Mi", "pod", "app")
	s.runs("app")
	want := s.sh("app", fill("/data/file", 8))
	v := s.bound("data")
	all := resource(t, volumes, "")
	t.Cleanup(func() { patch(t, all, v.Name, `{spec: {persistentVolumeReclaimPolicy: Delete}}`) })
	s.delete(pods, "app")
	s.delete(claims, "data")
	await(t, all, v.Name, "released", func(v *corev1.PersistentVolume) (bool, error) {
		if v == nil {
			return false, errGone
		}
		return v.Status.Phase == corev1.VolumeReleased, nil
	})

	patch(t, all, v.Name, `{spec: {claimRef: null}}`)
	s.apply(join(claimYAML+fmt.Sprintf("  volumeName: %s\n", v.Name), podYAML), "claim", "again", "class", class, "size", "64Mi", "pod", "reader")
	s.runs("reader")
	if got := s.sh("reader", sum("/data/file")); got != want {
		t.Errorf("the file was %s, and is %s", want, got)
	}
}
