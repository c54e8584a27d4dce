//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// nodeInline publishes an inline volume as the kubelet does.
func nodeInline(d *harness.Driver, id, target string, c *csi.VolumeCapability, attributes ...string) error {
	volumeContext := map[string]string{
		"csi.storage.k8s.io/ephemeral":           "true",
		"csi.storage.k8s.io/pod.name":            "pod",
		"csi.storage.k8s.io/pod.namespace":       "default",
		"csi.storage.k8s.io/pod.uid":             "b6cdb0c0-33e8-4f7a-9f6f-3ac8a3a5d1b9",
		"csi.storage.k8s.io/serviceAccount.name": "default",
	}
	for i := 0; i+1 < len(attributes); i += 2 {
		volumeContext[attributes[i]] = attributes[i+1]
	}
	_, err := d.NodePublishVolume(d.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: id, TargetPath: target, VolumeCapability: c, VolumeContext: volumeContext,
	})
	return err
}

// nodeInlineID is an ID of the form that the kubelet gives to inline volumes.
var nodeInlineID = "csi-" + strings.Repeat("0123456789abcdef", 4)

func TestNodeInlineVolumeLivesFromPublishToUnpublish(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds[:3] {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			target := d.Target(kind.name)
			publish := func() error {
				return nodeInline(d, nodeInlineID, target, harness.Mount(kind.name, csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER), "size", "512Mi")
			}
			dataMust(t, publish())
			dataMustSpan(t, kind, target, 512*dataMiB)
			sum := dataFill(t, kind.file(target), dataMiB)
			dataMust(t, publish())
			dataMustHold(t, kind.file(target), dataMiB, sum)

			list, err := d.ListVolumes(d.Context(), &csi.ListVolumesRequest{})
			if err != nil || len(list.GetEntries()) > 0 {
				t.Errorf("ListVolumes has it: %v (%v)", list, err)
			}
			stats, err := d.NodeGetVolumeStats(d.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: nodeInlineID, VolumePath: target})
			if err != nil || len(stats.GetUsage()) == 0 {
				t.Errorf("its statistics: %v (%v)", stats, err)
			}
			health, err := d.NodeGetVolumeHealth(d.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: nodeInlineID})
			if err != nil || len(health.GetVolumeHealth().GetHealthStatuses()) > 0 {
				t.Errorf("its health: %v (%v)", health, err)
			}
			dataCode(t, nodeInline(d, nodeInlineID, target+"-second", kind.capability, "size", "512Mi"), codes.FailedPrecondition, target)
			if _, err := os.Lstat(target + "-second"); !os.IsNotExist(err) {
				t.Errorf("a second target is left (%v)", err)
			}
			dataMustHold(t, kind.file(target), dataMiB, sum)

			for range 3 {
				_, err := d.NodeUnpublishVolume(d.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: nodeInlineID, TargetPath: target})
				dataMust(t, err)
				if _, err := os.Lstat(target); !os.IsNotExist(err) {
					t.Errorf("the target path is still there (%v)", err)
				}
				dataMustBeIdle(t, d, dataPool(d))
			}
			dataMustHoldNothing(t, dataPool(d))
		})
	}
}

// A read-only inline volume is an empty one that nobody can write to.
func TestNodeInlineVolumeCanBeReadOnly(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	target := d.Target("pod")
	_, err := d.NodePublishVolume(d.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: nodeInlineID, TargetPath: target, VolumeCapability: nodeExt4.capability, Readonly: true,
		VolumeContext: map[string]string{"csi.storage.k8s.io/ephemeral": "true", "size": "16Mi"},
	})
	dataMust(t, err)
	if err := os.Mkdir(filepath.Join(target, "x"), 0o700); err == nil {
		t.Error("it can be written")
	}
	dataUnpublish(t, d, "pod", nodeInlineID)
	dataMustHoldNothing(t, dataPool(d))
}

func TestNodeInlineVolumeOutlivesTheDriverAndEndsAfterIt(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	target := d.Target("pod")
	dataMust(t, nodeInline(d, nodeInlineID, target, nodeExt4.capability, "size", "64Mi"))
	w := dataWrite(t, filepath.Join(target, "file"), filepath.Join(target, "churn"), dataFsync)
	for range 3 {
		w.progress(t, 5)
		d.Kill()
		w.progress(t, 5)
		d.Start()
	}
	w.mustEnd(t)
	dataMust(t, nodeInline(d, nodeInlineID, target, nodeExt4.capability, "size", "64Mi"))
	dataUnpublish(t, d, "pod", nodeInlineID)
	dataMustBeIdle(t, d, dataPool(d))
	dataMustHoldNothing(t, dataPool(d))
}

// A publication that fails was never seen by anybody; nothing of it stays.
func TestNodeInlineVolumeThatFailsLeavesNothing(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	ext4 := nodeExt4.capability
	for _, c := range []struct {
		rule       string
		capability *csi.VolumeCapability
		attributes []string
		code       codes.Code
		words      []string
	}{
		{"an unknown mount flag", harness.Mount("ext4", harness.Writer, "nosuchflag"), []string{"size", "64Mi"}, codes.InvalidArgument, []string{"nosuchflag"}},
		{"a failing mkfs", ext4, []string{"size", "64Mi", "mkfsOptions", "-I 300"}, codes.Internal, []string{"invalid inode size"}},
		{"an option of mkfs that is not for users", ext4, []string{"size", "64Mi", "mkfsOptions", "-d /etc"}, codes.InvalidArgument, []string{"mkfsOptions"}},
		{"block access", nodeBlock.capability, []string{"size", "64Mi"}, codes.InvalidArgument, []string{"filesystem"}},
		{"an unknown attribute", ext4, []string{"colour", "red"}, codes.InvalidArgument, []string{"colour", "size", "pool"}},
		{"no size at all", ext4, []string{"size", "much"}, codes.InvalidArgument, []string{"size", "much"}},
		{"a negative size", ext4, []string{"size", "-1Gi"}, codes.InvalidArgument, []string{"size"}},
		{"more than there is", ext4, []string{"size", "1Ti"}, codes.ResourceExhausted, []string{"room"}},
		{"an unknown pool", ext4, []string{"pool", "gold"}, codes.ResourceExhausted, []string{"gold", "default"}},
	} {
		t.Run(c.rule, func(t *testing.T) {
			d := d.In(t)
			for range 2 {
				dataCode(t, nodeInline(d, nodeInlineID, d.Target("pod"), c.capability, c.attributes...), c.code, c.words...)
				if _, err := os.Lstat(d.Target("pod")); !os.IsNotExist(err) {
					t.Errorf("the target is left (%v)", err)
				}
				dataMustBeIdle(t, d, dataPool(d))
				dataMustHoldNothing(t, dataPool(d))
			}
		})
	}
}

// The orchestrator makes the IDs of inline volumes. Whatever is in them, they
// are names and not paths.
func TestNodeInlineVolumeWithAHostileIDTouchesNothingElse(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	for i, id := range []string{
		"../../x", "..", ".", "/", "/etc/passwd", "a/b/c", "../volumes", "default/../..", strings.Repeat("x", 128),
		strings.Repeat("../", 40), "UPPER", "with blank", "line\nbreak", "nul\x00byte", "Ω≈ç√", "-rf", "*", "$(reboot)", "csi-",
	} {
		t.Run(fmt.Sprintf("%.20q", id), func(t *testing.T) {
			d := d.In(t)
			before := nodeTree(t, d)
			name := fmt.Sprintf("pod-%d", i)
			dataMust(t, nodeInline(d, id, d.Target(name), nodeExt4.capability, "size", "16Mi"))
			volumes, err := os.ReadDir(filepath.Join(dataPool(d), "volumes"))
			if err != nil || len(volumes) != 1 {
				t.Errorf("the pool has %v (%v), it should have one volume", volumes, err)
			}
			sum := dataFill(t, filepath.Join(d.Target(name), "file"), 4096)
			dataMust(t, nodeInline(d, id, d.Target(name), nodeExt4.capability, "size", "16Mi"))
			dataMustHold(t, filepath.Join(d.Target(name), "file"), 4096, sum)
			dataUnpublish(t, d, name, id)
			dataMustHoldNothing(t, dataPool(d))
			if after := nodeTree(t, d); after != before {
				t.Errorf("the files are\n%s\nand were\n%s", after, before)
			}
		})
	}
}

// nodeTree lists all that a driver has on disk.
func nodeTree(t *testing.T, d *harness.Driver) string {
	t.Helper()
	var list []string
	dataMust(t, filepath.WalkDir(d.Dir, func(path string, entry os.DirEntry, err error) error {
		if err == nil {
			list = append(list, entry.Type().String()+" "+path)
		}
		return err
	}))
	return strings.Join(list, "\n")
}

// An inline volume and a persistent one do not meet, whatever they are called:
// the end of the one is never the end of the other.
func TestNodeInlineVolumeIsNeverAPersistentOne(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	id := d.Create("persistent", 64*dataMiB, nodeExt4.capability).GetVolumeId()
	file := filepath.Join(d.Use("persistent", id, nodeExt4.capability), "file")
	sum := dataFill(t, file, dataMiB)
	for _, taken := range []string{id, "persistent"} {
		if err := nodeInline(d, taken, d.Target("pod"), nodeExt4.capability, "size", "64Mi"); err == nil {
			t.Errorf("an inline volume with the ID %s of a persistent one is published", taken)
		}
		_, err := d.NodeUnpublishVolume(d.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: taken, TargetPath: d.Target("pod")})
		dataMust(t, err)
	}
	dataMustHold(t, file, dataMiB, sum)
	d.Release("persistent", id)
	d.Delete(id)

	dataMust(t, nodeInline(d, "inline", d.Target("pod"), nodeExt4.capability, "size", "64Mi"))
	_, err := d.CreateVolume(d.Context(), &csi.CreateVolumeRequest{
		Name: "inline", VolumeCapabilities: []*csi.VolumeCapability{nodeExt4.capability},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 64 * dataMiB},
	})
	dataCode(t, err, codes.AlreadyExists)
	_, err = d.DeleteVolume(d.Context(), &csi.DeleteVolumeRequest{VolumeId: "inline"})
	dataCode(t, err, codes.FailedPrecondition)
	dataUnpublish(t, d, "pod", "inline")
	dataMustHoldNothing(t, dataPool(d))
}
