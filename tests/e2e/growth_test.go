package e2e

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

const growYAML = `{spec: {resources: {requests: {storage: %s}}}}`

// grow asks for a larger volume, and waits until the volume as such is: what
// remains is the filesystem in it, where there is one.
func (s *space) grow(claim, size string) {
	s.Helper()
	patch(s.T, s.in(claims), claim, fmt.Sprintf(growYAML, size))
	v := s.bound(claim)
	await(s.T, resource(s.T, volumes, ""), v.Name, "of "+size, func(v *corev1.PersistentVolume) (bool, error) {
		if v == nil {
			return false, errGone
		}
		now := v.Spec.Capacity[corev1.ResourceStorage]
		return now.String() == size, nil
	})
}

// grown waits until a claim says that its volume has the size.
func (s *space) grown(claim, size string) {
	s.Helper()
	await(s.T, s.in(claims), claim, "of "+size, func(c *corev1.PersistentVolumeClaim) (bool, error) {
		if c == nil {
			return false, errGone
		}
		now := c.Status.Capacity[corev1.ResourceStorage]
		return now.String() == size, nil
	})
}

// A filesystem grows while it is written to. Nothing that is written is lost,
// and the writer sees no error.
//
// To grow a mounted ext4, the kernel demands CAP_SYS_RESOURCE. On a machine
// where not even root has it, the volume grows at once, and its filesystem when
// it is mounted the next time; until then the pod goes on with the old size.
func TestGrowth(t *testing.T) {
	t.Parallel()
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			s.apply(join(claimYAML, writerYAML), "claim", "data", "class", s.classOf(fstype), "size", "512Mi", "pod", "app")
			s.runs("app")
			small := s.filesystemSize("app")
			if small > 512*mib {
				t.Fatalf("a filesystem of %d bytes is in a volume of 512 MiB", small)
			}
			want := s.sh("app", fill("/data/file", 16))
			s.goesOn("app", 5)
			s.grow("data", "1Gi")
			if fstype == "ext4" && !canGrowExt4(t) {
				s.growsLater("app", small)
			} else {
				s.grown("data", "1Gi")
			}
			s.goesOn("app", 5)
			last := s.written("app")
			if fstype == "ext4" && !canGrowExt4(t) {
				s.delete(pods, "app")
				s.apply(writerYAML, "claim", "data", "pod", "app")
				s.runs("app")
				s.grown("data", "1Gi")
			}
			if got := s.filesystemSize("app"); got < 900*mib {
				t.Errorf("the filesystem has %d bytes", got)
			}
			if got := s.sh("app", sum("/data/file")); got != want {
				t.Errorf("the file was %s, and is %s", want, got)
			}
			s.sh("app", "dd if=/dev/zero of=/data/more bs=1M count=600 conv=fsync 2>/dev/null")
			if now := s.goesOn("app", 5); now < last {
				t.Errorf("the log had %d records, and has %d", last, now)
			}
		})
	}
}

// growsLater waits until a user is told that the filesystem grows only when the
// pod is started again, and fails if it has grown anyway.
func (s *space) growsLater(pod string, small int64) {
	s.Helper()
	await(s.T, s.in(claims), "data", "described as one whose filesystem could not grow", func(c *corev1.PersistentVolumeClaim) (bool, error) {
		if c == nil {
			return false, errGone
		}
		return slices.ContainsFunc(c.Status.Conditions, func(c corev1.PersistentVolumeClaimCondition) bool {
			return c.Type == corev1.PersistentVolumeClaimNodeResizeError && strings.Contains(c.Message, "CAP_SYS_RESOURCE")
		}), nil
	})
	if got := s.filesystemSize(pod); got != small {
		s.Errorf("the filesystem had %d bytes, and has %d although it could not grow", small, got)
	}
}

// canGrowExt4 says whether root has CAP_SYS_RESOURCE on this machine, on which
// the nodes of the cluster run.
func canGrowExt4(t testing.TB) bool {
	t.Helper()
	const capSysResource = 24 // linux/capability.h
	status, err := os.ReadFile("/proc/self/status")
	must(t, err)
	for line := range strings.Lines(string(status)) {
		if mask, ok := strings.CutPrefix(line, "CapEff:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
			must(t, err)
			return n>>capSysResource&1 == 1
		}
	}
	t.Fatal("no CapEff in /proc/self/status")
	return false
}

// A raw block volume grows under the pod that has it open.
func TestGrowthOfBlock(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(join(blockClaimYAML, blockPodYAML), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "app")
	s.runs("app")
	want := s.sh("app", "dd if=/dev/urandom of=/dev/data bs=1M count=64 conv=fsync,notrunc 2>/dev/null; sha256sum </dev/data")
	s.sh("app", "sleep 1000000 </dev/data >/dev/null 2>&1 &")
	s.grow("data", "128Mi")
	s.grown("data", "128Mi")
	if size := s.number("app", "blockdev --getsize64 /dev/data"); size != 128*mib {
		t.Errorf("the device has %d bytes, want %d", size, 128*mib)
	}
	if got := s.sh("app", "head -c 67108864 /dev/data | sha256sum"); got != want {
		t.Errorf("the first half was %s, and is %s", want, got)
	}
	s.sh("app", "tail -c 67108864 /dev/data | cmp -n 67108864 - /dev/zero")
}
