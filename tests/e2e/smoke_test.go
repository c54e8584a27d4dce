package e2e

import "testing"

// A claim and a pod are all that it takes, on every node; the data is there
// when the pod is replaced by another.
func TestSmokeFilesystem(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	for _, node := range nodes {
		s.apply(join(claimYAML, podYAML+onNode), "claim", "data-"+node, "class", "orlop", "size", "64Mi", "pod", "first-"+node, "node", node)
	}
	sums := map[string]string{}
	for _, node := range nodes {
		if p := s.runs("first-" + node); p.Spec.NodeName != node {
			t.Errorf("%s runs on %s", p.Name, p.Spec.NodeName)
		}
		if fs := s.filesystemType("first-" + node); fs != "ext4" {
			t.Errorf("the filesystem on %s is %s, want ext4", node, fs)
		}
		sums[node] = s.sh("first-"+node, fill("/data/file", 8))
		remove(t, s.in(pods), "first-"+node)
	}
	for _, node := range nodes {
		s.delete(pods, "first-"+node)
		s.apply(podYAML, "claim", "data-"+node, "pod", "second-"+node)
	}
	for _, node := range nodes {
		if p := s.runs("second-" + node); p.Spec.NodeName != node {
			t.Errorf("the volume is on %s, its pod on %s", node, p.Spec.NodeName)
		}
		if got := s.sh("second-"+node, sum("/data/file")); got != sums[node] {
			t.Errorf("the file on %s was %s, and is %s", node, sums[node], got)
		}
	}
}

// A raw block volume is the pod's own device: of the size that was asked for,
// zero at first, and with the pod's data afterwards.
func TestSmokeBlock(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(join(blockClaimYAML, blockPodYAML), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "first")
	s.runs("first")
	if size := s.number("first", "blockdev --getsize64 /dev/data"); size != 64*mib {
		t.Errorf("the device has %d bytes, want %d", size, 64*mib)
	}
	s.sh("first", "cmp -n 67108864 /dev/data /dev/zero")
	want := s.sh("first", "dd if=/dev/urandom of=/dev/data bs=1M count=64 conv=fsync,notrunc 2>/dev/null; sha256sum </dev/data")
	s.delete(pods, "first")

	s.apply(blockPodYAML, "claim", "data", "pod", "second")
	s.runs("second")
	if got := s.sh("second", sum("/dev/data")); got != want {
		t.Errorf("the device was %s, and is %s", want, got)
	}
}

const snapshotYAML = `
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: ${snapshot}}
spec:
  volumeSnapshotClassName: orlop
  source: {persistentVolumeClaimName: ${claim}}
`

const restoreYAML = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: ${restored}}
spec:
  storageClassName: ${class}
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: ${size}}}
  dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: ${snapshot}}
`

// A snapshot is what the volume was when it was cut, whatever is written to it
// later; and it outlives the volume.
func TestSmokeSnapshot(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(join(claimYAML, podYAML), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "app")
	node := s.runs("app").Spec.NodeName
	before := s.sh("app", fill("/data/file", 8))
	s.apply(snapshotYAML, "snapshot", "cut", "claim", "data")
	s.cut("cut")
	after := s.sh("app", fill("/data/file", 8)+" >/tmp/sum; touch /data/later; cat /tmp/sum")
	if before == after {
		t.Fatal("the test wrote the same twice")
	}

	s.apply(join(restoreYAML, podYAML+onNode), "node", node, "restored", "old", "class", "orlop", "size", "64Mi", "snapshot", "cut", "pod", "reader", "claim", "old")
	s.runs("reader")
	if got := s.sh("reader", sum("/data/file")); got != before {
		t.Errorf("restored: %s, want %s", got, before)
	}
	s.sh("reader", "test ! -e /data/later")
	if got := s.sh("app", sum("/data/file")); got != after {
		t.Errorf("the volume itself is %s, want %s", got, after)
	}

	s.delete(pods, "app")
	s.delete(pods, "reader")
	s.delete(claims, "data")
	s.delete(claims, "old")
	s.apply(join(restoreYAML, podYAML+onNode), "node", node, "restored", "again", "class", "orlop", "size", "64Mi", "snapshot", "cut", "pod", "again", "claim", "again")
	s.runs("again")
	if got := s.sh("again", sum("/data/file")); got != before {
		t.Errorf("restored when the volume was gone: %s, want %s", got, before)
	}
}
