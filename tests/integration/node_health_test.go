//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/tests/harness"
)

// nodeRemedy is the words that tell what to do.
var nodeRemedy = regexp.MustCompile(`restore|restart|start it again|mend|delete|avoids`)

// nodeHealth is what every call says of one volume's health, as "status reason".
// They must agree.
func nodeHealth(t *testing.T, d *harness.Driver, id string) string {
	t.Helper()
	text := func(health *csi.VolumeHealth) string {
		if health.GetVolumeId() != id {
			t.Errorf("asked for %s, got %s", id, health.GetVolumeId())
		}
		var all []string
		for _, entry := range health.GetHealthStatuses() {
			all = append(all, entry.GetStatus().String()+" "+entry.GetReason())
			// What is wrong and what to do about it, in what CSI has room for.
			if m := entry.GetMessage(); !nodeRemedy.MatchString(m) || len(m) > 128 {
				t.Errorf("the message of %s has %d bytes or no remedy: %s", entry.GetReason(), len(m), m)
			}
		}
		return strings.Join(all, ", ")
	}
	controller, err := d.ControllerGetVolumeHealth(d.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
	dataMust(t, err)
	node, err := d.NodeGetVolumeHealth(d.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: id})
	dataMust(t, err)
	list, err := d.ControllerListVolumeHealth(d.Context(), &csi.ControllerListVolumeHealthRequest{})
	dataMust(t, err)
	got := text(controller.GetVolumeHealth())
	if other := text(node.GetVolumeHealth()); other != got {
		t.Errorf("the controller says %q, the node %q", got, other)
	}
	i := slices.IndexFunc(list.GetEntries(), func(h *csi.VolumeHealth) bool { return h.GetVolumeId() == id })
	switch {
	case (i >= 0) != (got != ""):
		t.Errorf("%s has %q, and the list has it: %v", id, got, i >= 0)
	case i >= 0 && text(list.GetEntries()[i]) != got:
		t.Errorf("the controller says %q, the list %q", got, text(list.GetEntries()[i]))
	}
	return got
}

// What is lost under the driver is reported, of that volume and of no other,
// for as long as it is so.
func TestNodeHealthTellsOfLostData(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	sound := d.Create("sound", 64*dataMiB, nodeExt4.capability).GetVolumeId()
	d.Use("sound", sound, nodeExt4.capability)
	for _, inUse := range []bool{false, true} {
		id := d.Create("volume", 64*dataMiB, nodeBlock.capability).GetVolumeId()
		image := dataImage(dataPool(d), id)
		if inUse {
			d.Use("volume", id, nodeBlock.capability)
		}
		for _, c := range []struct {
			harm, mend func() error
			want       string
		}{
			{func() error { return nil }, func() error { return nil }, ""},
			{func() error { return os.Truncate(image, 32*dataMiB) }, func() error { return os.Truncate(image, 64*dataMiB) }, "DATA_LOSS ImageTruncated"},
			{func() error { return os.Rename(image, image+".gone") }, func() error { return os.Rename(image+".gone", image) }, "DATA_LOSS ImageMissing"},
			{func() error {
				return errors.Join(os.Rename(image, image+".gone"), os.Symlink(image+".gone", image))
			}, func() error { return os.Rename(image+".gone", image) }, "DATA_LOSS ImageReplaced"},
		} {
			dataMust(t, c.harm())
			if got := nodeHealth(t, d, id); got != c.want {
				t.Errorf("in use %v: the health is %q, want %q", inUse, got, c.want)
			}
			if got := nodeHealth(t, d, sound); got != "" {
				t.Errorf("the other volume's health is %q", got)
			}
			dataMust(t, c.mend())
			if got := nodeHealth(t, d, id); got != "" {
				t.Errorf("once mended, the health is %q", got)
			}
		}
		if inUse {
			d.Release("volume", id)
		}
		d.Delete(id)
	}
	d.Release("sound", sound)
}

// Whose image is gone can still be left: what is mounted is taken down, and what
// is attached is detached, as of any other volume.
func TestNodeVolumeWhoseImageWasRemovedCanBeLeft(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	for _, kind := range []dataKind{nodeExt4, nodeBlock} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, driver restarted %v", kind.name, restart), func(t *testing.T) {
				v := nodeCreate(d.In(t), fmt.Sprintf("%s-%v", kind.name, restart), kind)
				dataMust(t, v.stage())
				dataMust(t, v.publish())
				dataFill(t, kind.file(d.Target(v.name)), dataMiB)
				dataMust(t, os.Remove(dataImage(dataPool(d), v.id)))
				if restart {
					d.Restart()
					v.Driver = d.In(t)
				}
				if got := nodeHealth(t, v.Driver, v.id); got != "DATA_LOSS ImageMissing" {
					t.Errorf("the health is %q", got)
				}
				dataFill(t, kind.file(d.Target(v.name)), dataMiB) // the kernel has it still
				dataCode(t, v.remove(), codes.FailedPrecondition, "in use")
				dataMust(t, v.unpublish(d.Target(v.name)))
				dataMust(t, v.unstage())
				dataMustBeIdle(t, d, dataPool(d))
				dataCode(t, v.stage(), codes.DataLoss, "missing")
				dataMust(t, v.remove())
				dataMustHoldNothing(t, dataPool(d))
			})
		}
	}
}

// A filesystem that has given up after an error is not usable, though its mount
// says otherwise. To stage the volume again mends it.
func TestNodeHealthTellsOfAFilesystemThatHasGivenUp(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	for _, c := range []struct {
		kind   dataKind
		flag   string
		harm   func(t *testing.T, target, device string) error
		fails  error
		reason string
	}{
		{dataKinds[0], "errors=remount-ro", func(_ *testing.T, _, device string) error {
			return os.WriteFile(filepath.Join("/sys/fs/ext4", device, "trigger_fs_error"), []byte("a test"), 0)
		}, unix.EROFS, "FilesystemReadOnly"},
		{dataKinds[1], "rw", nodeShutDown, unix.EIO, "FilesystemFailed"},
	} {
		t.Run(c.kind.name, func(t *testing.T) {
			d := d.In(t)
			capability := harness.Mount(c.kind.name, harness.Writer, c.flag)
			id := d.Create(c.kind.name, c.kind.size, capability).GetVolumeId()
			target := d.Use(c.kind.name, id, capability)
			file := filepath.Join(target, "file")
			sum := dataFill(t, file, dataMiB)
			if got := nodeHealth(t, d, id); got != "" {
				t.Fatalf("a sound volume has %q", got)
			}
			device := dataLoops(t, dataPool(d))
			if len(device) != 1 {
				t.Fatalf("loop devices: %v", device)
			}
			dataMust(t, c.harm(t, target, device[0]))
			if err := os.Mkdir(filepath.Join(target, "x"), 0o700); !errors.Is(err, c.fails) {
				t.Fatalf("the filesystem goes on: %v", err)
			}
			if got := nodeHealth(t, d, id); got != "INACCESSIBLE "+c.reason {
				t.Errorf("the health is %q", got)
			}
			d.Release(c.kind.name, id)
			d.Use(c.kind.name, id, capability)
			if got := nodeHealth(t, d, id); got != "" {
				t.Errorf("after it was staged again: %q", got)
			}
			dataMustHold(t, file, dataMiB, sum)
			dataMust(t, os.Mkdir(filepath.Join(target, "x"), 0o700))
			d.Release(c.kind.name, id)
			dataMustBeClean(t, c.kind.name, dataImage(dataPool(d), id))
		})
	}
}

// nodeShutDown makes a filesystem do what it does when its disk fails, once its
// log is on the disk: XFS_IOC_GOINGDOWN with XFS_FSOP_GOING_FLAGS_LOGFLUSH, of
// fs/xfs/libxfs/xfs_fs.h.
func nodeShutDown(t *testing.T, target, _ string) error {
	t.Helper()
	f, err := os.Open(target)
	dataMust(t, err)
	defer f.Close()
	return unix.IoctlSetPointerInt(int(f.Fd()), 0x8004587d, 1)
}

// The health of a pool is that of its filesystem.
func TestNodeStorageHealthTellsOfThePool(t *testing.T) {
	disk := harness.Filesystem(t, "xfs", dataGiB)
	poolDir := filepath.Join(disk, "pool")
	dataMust(t, os.Mkdir(poolDir, 0o700))
	d := harness.Start(t, harness.DirectoryPool(poolDir))
	id := d.Create("volume", 64*dataMiB, nodeExt4.capability).GetVolumeId()
	fill := filepath.Join(disk, "fill")
	for _, c := range []struct {
		harm, mend func()
		status     csi.StorageHealthErrorType
		reason     string
	}{
		{func() {}, func() {}, 0, ""},
		{
			func() { dataRun(t, "mount", "-o", "remount,ro", disk) },
			func() { dataRun(t, "mount", "-o", "remount,rw", disk) },
			csi.StorageHealthErrorType_STORAGE_UNREACHABLE, "PoolReadOnly",
		},
		{
			func() { dataRun(t, "fallocate", "-l", fmt.Sprint(dataFree(t, disk)-16*dataMiB), fill) },
			func() { dataMust(t, os.Remove(fill)) },
			csi.StorageHealthErrorType_STORAGE_DEGRADED, "PoolNearlyFull",
		},
		{
			func() {
				dataMust(t, os.Rename(filepath.Join(poolDir, "volumes", "volume"), filepath.Join(disk, "aside")))
			},
			func() {
				dataMust(t, os.Rename(filepath.Join(disk, "aside"), filepath.Join(poolDir, "volumes", "volume")))
			}, 0, "", // that is the volume's
		},
	} {
		dataEventually(t, func() error { // XFS gives space back in the background
			if health := nodeStorageHealth(t, d); len(health) > 0 {
				return fmt.Errorf("a sound pool has %v", health)
			}
			return nil
		})
		c.harm()
		entries := nodeStorageHealth(t, d)
		switch {
		case c.reason == "" && len(entries) > 0:
			t.Errorf("a sound pool has %v", entries)
		case c.reason != "" && (len(entries) != 1 || entries[0].GetStatus() != c.status || entries[0].GetReason() != c.reason || !strings.Contains(entries[0].GetMessage(), "default")):
			t.Errorf("got %v, want %s %s, and the pool's name", entries, c.status, c.reason)
		}
		c.mend()
	}
	d.Delete(id)
}

func nodeStorageHealth(t *testing.T, d *harness.Driver) []*csi.NodeGetStorageHealthResponse_StorageBackendHealth {
	t.Helper()
	health, err := d.NodeGetStorageHealth(d.Context(), &csi.NodeGetStorageHealthRequest{})
	dataMust(t, err)
	return health.GetBackendHealth()
}

// When a pool's filesystem fails, its volumes' users can leave, and the volumes
// of other pools are not concerned.
func TestNodeAFailedPoolCanBeLeftAndLeavesOthersAlone(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi")+"- name: other\n  source:\n    file: {path: \"$DIR/other.img\", size: 1Gi, sparse: true}\n")
	c := harness.Mount("ext4", harness.Writer)
	lost := d.Create("lost", 64<<20, c)
	d.Use("lost", lost.GetVolumeId(), c)
	well := d.Create("well", 64<<20, c, harness.Parameters("pool", "other"))
	target := d.Use("well", well.GetVolumeId(), c)

	pool, err := os.Open(filepath.Join(d.Dir, "state", "mounts", "default"))
	if err != nil {
		t.Fatal(err)
	}
	const goingDown = 0x8004587d // XFS_IOC_GOINGDOWN, xfs_fs.h
	noLogFlush := uint32(2)      // XFS_FSOP_GOING_FLAGS_NOLOGFLUSH
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, pool.Fd(), goingDown, uintptr(unsafe.Pointer(&noLogFlush))); errno != 0 {
		t.Fatal(errno)
	}
	pool.Close()

	health, err := d.NodeGetStorageHealth(d.Context(), &csi.NodeGetStorageHealthRequest{})
	if err != nil || len(health.GetBackendHealth()) != 1 || health.GetBackendHealth()[0].GetReason() != "PoolFailed" {
		t.Errorf("storage health: %v, %v; want PoolFailed", health, err)
	}
	if err := os.WriteFile(filepath.Join(target, "file"), []byte("written"), 0o600); err != nil {
		t.Errorf("the volume of the other pool: %v", err)
	}
	snapshot := d.Snapshot("snapshot", well.GetVolumeId())
	d.Create("restored", 0, c, harness.FromSnapshot(snapshot.GetSnapshotId()))
	d.Release("well", well.GetVolumeId())
	d.Delete(well.GetVolumeId())

	if _, err := d.NodeUnpublishVolume(d.Context(), &csi.NodeUnpublishVolumeRequest{
		VolumeId: lost.GetVolumeId(), TargetPath: d.Target("lost"),
	}); err != nil {
		t.Errorf("its user cannot leave: %v", err)
	}
	if _, err := os.Lstat(d.Target("lost")); err == nil {
		t.Error("the target path is still there")
	}
}

// A device that somebody else takes away from under a block volume's pod is told
// of, by every call. The pod can leave, and has a device again when it comes
// back.
func TestNodeHealthTellsOfALostDevice(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	pod := harness.PodWithoutCgroup(t)
	for _, reused := range []bool{false, true} {
		name := fmt.Sprintf("pvc-%v", reused)
		v := limVolume{name: name, kind: nodeBlock, node: d}
		v.id = d.Create(name, 64*dataMiB, v.kind.capability).GetVolumeId()
		v.stage(t)
		target, err := v.publish(pod)
		dataMust(t, err)
		sum := dataFill(t, target, dataMiB)
		if got := nodeHealth(t, d, v.id); got != "" {
			t.Fatalf("a sound volume has %q", got)
		}
		image, err := os.Open(dataImage(dataPool(d), v.id))
		dataMust(t, err)
		devices, err := loop.Find(image)
		dataMust(t, err)
		dataMust(t, image.Close())
		dataMust(t, devices[0].Detach(d.Context()))
		if got := nodeHealth(t, d, v.id); got != "INACCESSIBLE DeviceLost" {
			t.Errorf("the health is %q", got)
		}
		if reused { // the volume by itself is well: it is its pod that has nothing
			v.stage(t)
			if got := nodeHealth(t, d, v.id); got != "" && got != "INACCESSIBLE DeviceLost" {
				t.Errorf("staged again, the health is %q", got)
			}
		}
		v.unpublish(t, pod)
		if got := nodeHealth(t, d, v.id); got != "" {
			t.Errorf("once its pod has left, the health is %q", got)
		}
		v.stage(t)
		target, err = v.publish(pod)
		dataMust(t, err)
		dataMustHold(t, target, dataMiB, sum)
		v.unpublish(t, pod)
		_, err = d.NodeUnstageVolume(d.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: d.Staging(name)})
		dataMust(t, err)
		d.Delete(v.id)
	}
}

// Whose image somebody has replaced while it was in use writes to a file that is
// not there any more. It is told so, can leave, and finds the new image next.
func TestNodeHealthTellsOfAnImageThatWasReplacedInUse(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	for _, kind := range []dataKind{nodeExt4, nodeBlock} {
		t.Run(kind.name, func(t *testing.T) {
			v := nodeCreate(d.In(t), "v-"+kind.name, kind)
			dataMust(t, v.stage())
			dataMust(t, v.publish())
			sum := dataFill(t, kind.file(d.Target(v.name)), dataMiB)
			snapshot := d.In(t).Snapshot("s-"+kind.name, v.id)
			dataFill(t, kind.file(d.Target(v.name)), dataMiB)
			image := dataImage(dataPool(d), v.id)
			backup := filepath.Join(dataPool(d), "snapshots", filepath.Base(snapshot.GetSnapshotId()), "data")
			dataRun(t, "cp", "--reflink=always", backup, image+".new")
			dataMust(t, os.Rename(image+".new", image))
			if got := nodeHealth(t, v.Driver, v.id); got != "DATA_LOSS ImageReplaced" {
				t.Errorf("the health is %q", got)
			}
			if _, err := v.DeleteVolume(v.Context(), &csi.DeleteVolumeRequest{VolumeId: v.id}); err == nil {
				t.Error("a volume in use was deleted")
			}
			v.Release(v.name, v.id)
			if got := nodeHealth(t, v.Driver, v.id); got != "" {
				t.Errorf("once its user has left, the health is %q", got)
			}
			dataMust(t, v.stage())
			dataMust(t, v.publish())
			dataMustHold(t, kind.file(d.Target(v.name)), dataMiB, sum)
			v.Release(v.name, v.id)
			v.Delete(v.id)
		})
	}
}

// Where a pool has failed, its volumes have; those of others have not.
func TestNodeHealthTellsOfVolumesWhosePoolHasFailed(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi")+"- name: other\n  source:\n    file: {path: \"$DIR/other.img\", size: 1Gi, sparse: true}\n")
	lost := d.Create("lost", 64*dataMiB, nodeBlock.capability).GetVolumeId()
	well := d.Create("well", 64*dataMiB, nodeBlock.capability, harness.Parameters("pool", "other")).GetVolumeId()
	pool := filepath.Join(d.Dir, "state", "mounts", "default")
	dataRun(t, "mount", "-o", "remount,ro", pool)
	if got := nodeHealth(t, d, lost); got != "INACCESSIBLE PoolReadOnly" {
		t.Errorf("the health is %q", got)
	}
	dataRun(t, "mount", "-o", "remount,rw", pool)
	if got := nodeHealth(t, d, lost); got != "" {
		t.Errorf("once mended, the health is %q", got)
	}
	dataMust(t, nodeShutDown(t, pool, ""))
	if got := nodeHealth(t, d, lost); got != "INACCESSIBLE PoolFailed" {
		t.Errorf("the health is %q", got)
	}
	if got := nodeHealth(t, d, well); got != "" {
		t.Errorf("the health of another pool's volume is %q", got)
	}
	d.Restart() // which mounts the filesystem again: its disk was well
	for _, id := range []string{lost, well} {
		if got := nodeHealth(t, d, id); got != "" {
			t.Errorf("after a restart, the health is %q", got)
		}
	}
}
