package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const groupSnapshots = "volumegroupsnapshots.groupsnapshot.storage.k8s.io"

// A class for group snapshots; there is none where nobody asks for one.
const groupClassYAML = `
apiVersion: groupsnapshot.storage.k8s.io/v1
kind: VolumeGroupSnapshotClass
metadata: {name: ${class}}
driver: csi.orlop.dev
deletionPolicy: Delete
`

const groupYAML = `
apiVersion: groupsnapshot.storage.k8s.io/v1
kind: VolumeGroupSnapshot
metadata: {name: ${group}}
spec:
  volumeGroupSnapshotClassName: ${class}
  source: {selector: {matchLabels: {group: ${label}}}}
`

// A pod that counts: each number is brought to stable storage on a filesystem,
// then on a raw block volume, before the next.
const counterYAML = `
apiVersion: v1
kind: Pod
metadata: {name: ${pod}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: ${image}
    command:
    - sh
    - -ec
    - |
      trap 'exit 0' TERM
      n=0
      while true; do
        n=$((n+1))
        printf '%016d' $n | dd of=/data/number conv=notrunc,fsync 2>/tmp/error || { cat /tmp/error; exit 1; }
        printf '%016d' $n | dd of=/dev/data conv=notrunc,fsync 2>/tmp/error || { cat /tmp/error; exit 1; }
        echo $n >/tmp/next; mv /tmp/next /tmp/number # read meanwhile
      done
    volumeMounts: [{name: data, mountPath: /data}]
    volumeDevices: [{name: raw, devicePath: /dev/data}]
  volumes:
  - {name: data, persistentVolumeClaim: {claimName: ${claim}}}
  - {name: raw, persistentVolumeClaim: {claimName: ${raw}}}
`

// notOnNode is appended to the manifest of a pod that must not run on one node.
const notOnNode = `
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
        - matchExpressions: [{key: kubernetes.io/hostname, operator: NotIn, values: ["${node}"]}]
`

// A groupSnapshot is what tests read of a VolumeGroupSnapshot.
type groupSnapshot struct {
	metav1.ObjectMeta `json:"metadata"`
	Status            struct {
		ReadyToUse bool `json:"readyToUse"`
		Error      struct {
			Message string `json:"message"`
		} `json:"error"`
	} `json:"status"`
}

// labelled puts a claim into a group.
func labelled(claim string) string {
	return strings.Replace(claim, "metadata: {name: ${claim}}", "metadata: {name: ${claim}, labels: {group: ${label}}}", 1)
}

// A group snapshot of volumes on two nodes, filesystem and block, has of a pod
// that writes to two of them no number without the one before, and is restored
// volume by volume.
func TestGroupSnapshot(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(groupClassYAML, "class", s.name)
	s.apply(join(labelled(claimYAML), podYAML), "label", s.name, "claim", "apart", "class", "orlop-xfs", "size", "320Mi", "pod", "apart")
	elsewhere := s.runs("apart").Spec.NodeName
	want := s.sh("apart", fill("/data/file", 8))
	s.apply(join(labelled(claimYAML), strings.ReplaceAll(labelled(blockClaimYAML), "${claim}", "${raw}"), counterYAML+notOnNode), "label", s.name,
		"claim", "data", "class", "orlop", "size", "64Mi", "raw", "raw", "pod", "app", "node", elsewhere)
	node := s.runs("app").Spec.NodeName
	if node == elsewhere {
		t.Fatalf("both pods are on %s", node)
	}
	counted := func() int { return int(s.number("app", "cat /tmp/number")) }
	for round := range 3 {
		eventually(t, "the counter goes on", func() error {
			if n := counted(); n < 10*(round+1) {
				return fmt.Errorf("it is at %d", n)
			}
			return nil
		})
		least := counted()
		members := s.cutGroup(fmt.Sprintf("group-%d", round), s.name, 3)
		most := counted() + 1
		restored := func(claim string) string { return fmt.Sprintf("%s-%d", claim, round) }
		s.apply(join(restoreYAML, podYAML+onNode), "node", node, "restored", restored("data"), "class", "orlop", "size", "64Mi", "snapshot", members["data"], "claim", restored("data"), "pod", restored("data"))
		s.apply(join(strings.TrimSuffix(restoreYAML, "\n")+"\n  volumeMode: Block\n", blockPodYAML+onNode), "node", node, "restored", restored("raw"), "class", "orlop", "size", "64Mi", "snapshot", members["raw"], "claim", restored("raw"), "pod", restored("raw"))
		s.apply(join(restoreYAML, podYAML+onNode), "node", elsewhere, "restored", restored("apart"), "class", "orlop-xfs", "size", "320Mi", "snapshot", members["apart"], "claim", restored("apart"), "pod", restored("apart"))
		s.runs(restored("data"), restored("raw"), restored("apart"))
		file, device := s.counted(restored("data"), "/data/number"), s.counted(restored("raw"), "/dev/data")
		if file != device && file != device+1 {
			t.Errorf("round %d: the filesystem has %d, the device %d", round, file, device)
		}
		if file < least || file > most {
			t.Errorf("round %d: it has %d; there were %d before it, and %d after it", round, file, least, most)
		}
		if got := s.sh(restored("apart"), sum("/data/file")); got != want {
			t.Errorf("round %d: on the other node is %s, want %s", round, got, want)
		}
		s.delete(groupSnapshots, fmt.Sprintf("group-%d", round))
		for _, claim := range []string{"data", "raw", "apart"} {
			s.delete(pods, restored(claim))
			s.delete(claims, restored(claim))
		}
	}
	after := counted()
	eventually(t, "the counter goes on", func() error {
		if n := counted(); n <= after {
			return fmt.Errorf("it is at %d", n)
		}
		return nil
	})
}

// cutGroup cuts a group of all claims of the space that are labelled, of which
// there are so many, and gives its snapshots by their claims.
func (s *space) cutGroup(name, class string, claims int) map[string]string {
	s.Helper()
	s.apply(groupYAML, "group", name, "class", class, "label", s.name)
	await(s.T, s.in(groupSnapshots), name, "ready to use", func(o *groupSnapshot) (bool, error) {
		return o != nil && o.Status.ReadyToUse, nil
	})
	members := map[string]string{}
	// A snapshot is told a little after the group that it belongs to it.
	eventually(s.T, fmt.Sprintf("group %s has snapshots of %d claims", name, claims), func() error {
		all, err := s.in(snapshots).List(context.Background(), metav1.ListOptions{})
		must(s.T, err)
		for _, o := range all.Items {
			m := as[member](s.T, &o)
			if m.Status.VolumeGroupSnapshotName == name {
				members[m.Spec.Source.PersistentVolumeClaimName] = m.Name
			}
		}
		if len(members) != claims {
			return fmt.Errorf("it has %v", members)
		}
		return nil
	})
	return members
}

// A member is what tests read of a VolumeSnapshot that is in a group.
type member struct {
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Source struct {
			PersistentVolumeClaimName string `json:"persistentVolumeClaimName"`
		} `json:"source"`
	} `json:"spec"`
	Status struct {
		VolumeGroupSnapshotName string `json:"volumeGroupSnapshotName"`
	} `json:"status"`
}

// counted reads what a counter has written.
func (s *space) counted(pod, file string) int {
	s.Helper()
	n, err := strconv.Atoi(strings.TrimLeft(s.sh(pod, "dd if="+file+" bs=16 count=1 2>/dev/null"), "0"))
	must(s.T, err)
	return n
}
