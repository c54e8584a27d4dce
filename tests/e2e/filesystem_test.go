package e2e

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// Classes that an administrator makes beside those of the installation.
const classYAML = `
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: ${class}}
provisioner: csi.orlop.dev
volumeBindingMode: ${binding}
reclaimPolicy: ${reclaim}
allowVolumeExpansion: true
parameters: {csi.storage.k8s.io/fstype: ${fstype}}
`

// class makes a StorageClass for the test and gives its name.
func (s *space) class(binding, reclaim, fstype string) string {
	s.Helper()
	name := s.name + "-" + fstype
	s.apply(classYAML, "class", name, "binding", binding, "reclaim", reclaim, "fstype", fstype)
	return name
}

// classOf gives the name of a class that makes volumes with that filesystem.
func (s *space) classOf(fstype string) string {
	s.Helper()
	switch fstype {
	case "ext4":
		return "orlop"
	case "xfs":
		return "orlop-xfs"
	default:
		return s.class("WaitForFirstConsumer", "Delete", fstype)
	}
}

// Every filesystem holds what it is given, across pods, and ends at the size
// that was asked for: what a pod writes beyond it fails for that pod alone.
func TestFilesystems(t *testing.T) {
	t.Parallel()
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			s.apply(join(claimYAML, podYAML), "claim", "data", "class", s.classOf(fstype), "size", "320Mi", "pod", "first")
			s.runs("first")
			if got := s.filesystemType("first"); got != fstype {
				t.Errorf("the filesystem is %s", got)
			}
			want := s.sh("first", fill("/data/file", 32))
			if out, err := s.try("first", "dd if=/dev/zero of=/data/more bs=1M count=400"); err == nil || !strings.Contains(err.Error(), "No space left") {
				t.Errorf("400 MiB fit into a volume of 320 MiB: %v %s", err, out)
			}
			s.sh("first", "rm /data/more")
			s.delete(pods, "first")

			s.apply(podYAML, "claim", "data", "pod", "second")
			s.runs("second")
			if got := s.sh("second", sum("/data/file")); got != want {
				t.Errorf("the file was %s, and is %s", want, got)
			}
		})
	}
}

// A pod that is not root, and has an fsGroup, can write to its volume, and what
// it makes belongs to that group.
func TestFSGroup(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	const user = `
  securityContext: {runAsUser: 1000, runAsGroup: 3000, fsGroup: ${group}}
`
	s.apply(join(claimYAML, podYAML+user), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "first", "group", "2000")
	s.runs("first")
	want := s.sh("first", fill("/data/file", 1))
	if got := s.sh("first", "stat -c '%u %g' /data/file"); got != "1000 2000" {
		t.Errorf("the file's owner is %s, want 1000 2000", got)
	}
	s.delete(pods, "first")

	// Another group gets what is there already.
	s.apply(podYAML+user, "claim", "data", "pod", "second", "group", "2001")
	s.runs("second")
	if got := s.sh("second", "stat -c '%u %g' /data/file"); got != "1000 2001" {
		t.Errorf("the file's owner is %s, want 1000 2001", got)
	}
	if got := s.sh("second", sum("/data/file")); got != want {
		t.Errorf("the file was %s, and is %s", want, got)
	}
}

// A volume that is mounted read-only cannot be written to, by any pod that
// says so; one that does not say so can write to it on the same node.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(join(claimYAML, podYAML), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "writer")
	s.runs("writer")
	want := s.sh("writer", fill("/data/file", 4))
	s.apply(`
apiVersion: v1
kind: Pod
metadata: {name: reader}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: ${image}
    command: [sh, -c, "trap exit TERM; sleep 1000000 & wait"]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data, readOnly: true}}]
`)
	s.runs("reader")
	if got := s.sh("reader", sum("/data/file")); got != want {
		t.Errorf("the reader sees %s, want %s", got, want)
	}
	if _, err := s.try("reader", "echo x >/data/file"); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
		t.Errorf("the reader could write: %v", err)
	}
	if got := s.sh("writer", "echo x >>/data/other; "+sum("/data/file")); got != want {
		t.Errorf("the writer sees %s, want %s", got, want)
	}
}

// The kubelet tells how full a volume is, from what the driver says.
func TestVolumeStats(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(join(claimYAML, podYAML), "claim", "data", "class", "orlop", "size", "128Mi", "pod", "app")
	node := s.runs("app").Spec.NodeName
	s.sh("app", fill("/data/file", 40))
	size := s.filesystemSize("app")
	label := fmt.Sprintf(`{namespace="%s",persistentvolumeclaim="data"}`, s.name)
	eventually(t, "the kubelet tells of the volume", func() error {
		page, err := kube.CoreV1().RESTClient().Get().Resource("nodes").Name(node).SubResource("proxy").Suffix("metrics").DoRaw(context.Background())
		if err != nil {
			return err
		}
		capacity, err := sample(string(page), "kubelet_volume_stats_capacity_bytes"+label)
		if err != nil {
			return err
		}
		used, err := sample(string(page), "kubelet_volume_stats_used_bytes"+label)
		if err != nil {
			return err
		}
		if int64(capacity) != size || int64(used) < 40*mib {
			return fmt.Errorf("%g of %g bytes are used, want at least %d of %d", used, capacity, 40*mib, size)
		}
		return nil
	})
}

// sample reads the value of one series from a page of metrics.
func sample(page, series string) (value float64, err error) {
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)`).FindStringSubmatch(page)
	if m == nil {
		return 0, fmt.Errorf("there is no %s", series)
	}
	_, err = fmt.Sscan(m[1], &value)
	return value, err
}
