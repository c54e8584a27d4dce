package e2e

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// A generic ephemeral volume lives and ends with its pod, and so does its claim.
func TestGenericEphemeralVolume(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	const pod = `
apiVersion: v1
kind: Pod
metadata: {name: app}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: ${image}
    command: [sh, -c, "trap exit TERM; sleep 1000000 & wait"]
    volumeMounts: [{name: scratch, mountPath: /data}]
  volumes:
  - name: scratch
    ephemeral:
      volumeClaimTemplate:
        spec:
          storageClassName: orlop
          accessModes: [ReadWriteOnce]
          resources: {requests: {storage: 64Mi}}
`
	s.apply(pod)
	s.runs("app")
	s.sh("app", "test ! -e /data/file; "+fill("/data/file", 8))
	v := s.bound("app-scratch")
	s.delete(pods, "app")
	await(t, s.in(claims), "app-scratch", "gone", func(c *corev1.PersistentVolumeClaim) (bool, error) { return c == nil, nil })
	await(t, resource(t, volumes, ""), v.Name, "gone", func(v *corev1.PersistentVolume) (bool, error) { return v == nil, nil })

	s.apply(pod)
	s.runs("app")
	s.sh("app", "test ! -e /data/file")
}

// An inline volume is made for its pod with the size that it says, begins
// empty, and is gone with the pod.
func TestInlineEphemeralVolume(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	const pod = `
apiVersion: v1
kind: Pod
metadata: {name: app}
spec:
  terminationGracePeriodSeconds: 5
  nodeSelector: {kubernetes.io/hostname: ${node}}
  containers:
  - name: main
    image: ${image}
    command: [sh, -c, "trap exit TERM; sleep 1000000 & wait"]
    volumeMounts: [{name: scratch, mountPath: /data}]
  volumes:
  - name: scratch
    csi:
      driver: csi.orlop.dev
      fsType: xfs
      volumeAttributes: {size: 320Mi}
`
	s.apply(pod, "node", nodes[0])
	s.runs("app")
	if fs := s.filesystemType("app"); fs != "xfs" {
		t.Errorf("the filesystem is %s, want xfs", fs)
	}
	s.sh("app", "test ! -e /data/file")
	want := s.sh("app", fill("/data/file", 8))
	if got := s.sh("app", sum("/data/file")); got != want {
		t.Errorf("the file is %s, want %s", got, want)
	}
	if out, err := s.try("app", "dd if=/dev/zero of=/data/more bs=1M count=400"); err == nil || !strings.Contains(err.Error(), "No space left") {
		t.Errorf("400 MiB fit into a volume of 320 MiB: %v %s", err, out)
	}
	s.delete(pods, "app")

	s.apply(pod, "node", nodes[0])
	s.runs("app")
	s.sh("app", "test ! -e /data/file")
}
