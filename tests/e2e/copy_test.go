package e2e

import (
	"fmt"
	"strings"
	"testing"
)

const cloneYAML = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: ${clone}}
spec:
  storageClassName: ${class}
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: ${size}}}
  dataSource: {kind: PersistentVolumeClaim, name: ${source}}
`

// A clone of a volume in use has what was in it, may be larger, and is apart
// from it from then on; both can be in use on the same node.
func TestClone(t *testing.T) {
	t.Parallel()
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			class := s.classOf(fstype)
			s.apply(join(claimYAML, podYAML), "claim", "data", "class", class, "size", "320Mi", "pod", "app")
			node := s.runs("app").Spec.NodeName
			want := s.sh("app", fill("/data/file", 16))
			s.apply(join(cloneYAML, podYAML+onNode), "node", node, "clone", "twin", "class", class, "size", "640Mi", "source", "data", "claim", "twin", "pod", "reader")
			s.runs("reader")
			if got := s.sh("reader", sum("/data/file")); got != want {
				t.Errorf("the clone has %s, want %s", got, want)
			}
			if got := s.filesystemSize("reader"); got < 500*mib {
				t.Errorf("the clone's filesystem has %d bytes, and should fill 640 MiB", got)
			}
			changed := s.sh("reader", fill("/data/file", 16))
			if got := s.sh("app", "sync; "+sum("/data/file")); got != want {
				t.Errorf("after a change to the clone the source has %s, want %s", got, want)
			}
			s.sh("app", "rm /data/file; sync")
			s.delete(pods, "app")
			s.delete(claims, "data")
			if got := s.sh("reader", sum("/data/file")); got != changed {
				t.Errorf("when its source is gone, the clone has %s, want %s", got, changed)
			}
		})
	}
}

// A snapshot under load is a point in time: it has all that was on stable
// storage before it was asked for, an unbroken beginning of what came then, and
// the writer sees no error.
func TestSnapshotUnderLoad(t *testing.T) {
	t.Parallel()
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			class := s.classOf(fstype)
			s.apply(join(claimYAML, writerYAML), "claim", "data", "class", class, "size", "320Mi", "pod", "app")
			node := s.runs("app").Spec.NodeName
			var least, most []int
			for i := range 3 {
				least = append(least, s.goesOn("app", 20))
				name := fmt.Sprintf("cut-%d", i)
				s.apply(snapshotYAML, "snapshot", name, "claim", "data")
				s.cut(name)
				most = append(most, s.written("app"))
			}
			s.goesOn("app", 5)
			for i := range 3 {
				name := fmt.Sprintf("cut-%d", i)
				s.apply(join(restoreYAML, podYAML+onNode), "node", node, "restored", name, "class", class, "size", "320Mi", "snapshot", name, "claim", name, "pod", name)
			}
			for i := range 3 {
				name := fmt.Sprintf("cut-%d", i)
				s.runs(name)
				if n := s.written(name); n < least[i] || n > most[i] {
					t.Errorf("%s has %d records: there were %d before it, and %d after it", name, n, least[i], most[i])
				}
			}
			s.unharmed("app")
		})
	}
}

// A block volume can be cut, restored, and cloned, with every byte.
func TestBlockCopies(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(join(blockClaimYAML, blockPodYAML), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "app")
	node := s.runs("app").Spec.NodeName
	want := s.sh("app", "dd if=/dev/urandom of=/dev/data bs=1M count=64 conv=fsync,notrunc 2>/dev/null; sha256sum </dev/data")
	s.apply(snapshotYAML, "snapshot", "cut", "claim", "data")
	s.cut("cut")
	block := func(text string) string { return strings.TrimSuffix(text, "\n") + "\n  volumeMode: Block\n" }
	s.apply(join(block(restoreYAML), blockPodYAML+onNode), "node", node, "restored", "old", "class", "orlop", "size", "64Mi", "snapshot", "cut", "claim", "old", "pod", "restored")
	s.apply(join(block(cloneYAML), blockPodYAML+onNode), "node", node, "clone", "twin", "class", "orlop", "size", "64Mi", "source", "data", "claim", "twin", "pod", "cloned")
	for _, pod := range []string{"restored", "cloned"} {
		s.runs(pod)
		if got := s.sh(pod, sum("/dev/data")); got != want {
			t.Errorf("the %s volume has %s, want %s", pod, got, want)
		}
		s.sh(pod, "dd if=/dev/zero of=/dev/data bs=1M count=64 conv=fsync,notrunc 2>/dev/null")
	}
	if got := s.sh("app", sum("/dev/data")); got != want {
		t.Errorf("after changes to its copies the volume is %s, want %s", got, want)
	}
}
