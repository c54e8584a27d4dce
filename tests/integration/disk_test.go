//go:build integration

package integration

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/tests/harness"
)

// A pool whose filesystem takes nothing any more has no room: the scheduler goes
// elsewhere. Every call says why, and makes nothing by halves; other pools are
// not concerned. Once the cause is gone all is as before.
func TestAPoolThatCannotBeWrittenHasNoRoom(t *testing.T) {
	for name, c := range map[string]struct {
		harm, mend func(t *testing.T, d *harness.Driver)
		reason     string
		words      string
	}{
		"read-only": {
			func(t *testing.T, d *harness.Driver) { dataRun(t, "mount", "-o", "remount,ro", dataPool(d)) },
			func(t *testing.T, d *harness.Driver) { dataRun(t, "mount", "-o", "remount,rw", dataPool(d)) },
			"PoolReadOnly", "read-only",
		},
		"failed": {
			func(t *testing.T, d *harness.Driver) { dataMust(t, nodeShutDown(t, dataPool(d), "")) },
			func(_ *testing.T, d *harness.Driver) { d.Restart() },
			"PoolFailed", "input/output error",
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := harness.Start(t, ctlTwoPools)
			block := harness.Block(harness.Writer)
			v := d.Create("v", 16*ctlMiB, block).GetVolumeId()
			s := d.Snapshot("s", v).GetSnapshotId()
			before := ctlState(t, d, "default")
			c.harm(t, d)
			if room := ctlRoom(t, d, "default"); room != 0 {
				t.Errorf("it has room for %d bytes", room)
			}
			if health := nodeStorageHealth(t, d); len(health) != 1 || health[0].GetReason() != c.reason {
				t.Errorf("its health is %v, want %s", health, c.reason)
			}
			for _, call := range []ctlCall{
				ctlCreates(d, "new"), ctlCreates(d, "clone", ctlRequired(0), harness.FromVolume(v)),
				ctlCreates(d, "restored", ctlRequired(0), harness.FromSnapshot(s)), ctlSnaps(d, "of-v", v), ctlExpands(d, v, 32*ctlMiB),
			} {
				_, err := call.call()
				ctlWant(t, call.name, err, codes.ResourceExhausted, "pool default", c.words)
			}
			for _, call := range []ctlCall{ctlStages(d, v), ctlDeletes(d, v), ctlDeletesSnapshot(d, s)} {
				_, err := call.call()
				ctlWant(t, call.name, err, codes.Internal, c.words)
			}
			other := d.Create("other", 16*ctlMiB, block, harness.Parameters("pool", "other")).GetVolumeId()
			f := ctlUse(t, d, "other", other)
			ctlFill(t, f, 16*ctlMiB, ctlMiB, 1)
			ctlMust(t, f.Close())
			d.Release("other", other)
			d.Delete(other)

			c.mend(t, d)
			if health := nodeStorageHealth(t, d); len(health) != 0 {
				t.Errorf("once mended, its health is %v", health)
			}
			ctlSame(t, "once mended", before, ctlState(t, d, "default"))
			ctlMust(t, ctlUse(t, d, "v", v).Close())
			d.Release("v", v)
			d.Delete(d.Create("restored", 0, block, harness.FromSnapshot(s)).GetVolumeId())
		})
	}
}

// Who overcommits a pool may fill it with what its volumes write. Their users are
// told by their own writes; nothing that is there is lost, room can always be
// made by deleting, and no volume of another pool is concerned.
func TestAnOvercommittedPoolThatItsVolumesFillRecovers(t *testing.T) {
	d := harness.Start(t, "pools:\n- name: default\n  overcommit: 8\n  source:\n    file: {path: $DIR/default.img, size: 512Mi, sparse: true}\n"+
		"- name: other\n  source:\n    file: {path: $DIR/other.img, size: 512Mi, sparse: true}\n")
	block := harness.Block(harness.Writer)
	room := ctlRoom(t, d, "default")
	keep := d.Create("keep", 64*ctlMiB, block).GetVolumeId()
	f := ctlUse(t, d, "keep", keep)
	ctlFill(t, f, 32*ctlMiB, ctlMiB, 1)
	defer f.Close()
	greedy := d.Create("greedy", ctlGiB, block).GetVolumeId()
	mounted := d.Create("mounted", 256*ctlMiB, nodeExt4.capability).GetVolumeId()
	target := d.Use("mounted", mounted, nodeExt4.capability)
	sum := dataFill(t, filepath.Join(target, "file"), 8*dataMiB)
	well := d.Create("well", 64*ctlMiB, block, harness.Parameters("pool", "other")).GetVolumeId()
	g := ctlUse(t, d, "greedy", greedy)
	if err := dataFillUp(g); !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) {
		t.Fatalf("to write more than there is gave %v", err)
	}
	ctlMust(t, g.Close())

	if health := nodeStorageHealth(t, d); len(health) != 1 || health[0].GetReason() != "PoolNearlyFull" {
		t.Errorf("the health of the full pool is %v", health)
	}
	// What cannot be had is refused, and nothing of it stays.
	before := ctlState(t, d)
	for _, call := range []ctlCall{
		ctlCreates(d, "thick", ctlRequired(64*ctlMiB), harness.Parameters("provisioning", "thick")),
		ctlCreates(d, "thick-copy", ctlRequired(0), harness.FromVolume(keep), harness.Parameters("provisioning", "thick")),
	} {
		_, err := call.call()
		ctlWant(t, call.name, err, codes.ResourceExhausted)
	}
	ctlSame(t, "after what was refused", before, ctlState(t, d))
	w := ctlUse(t, d, "well", well)
	ctlFill(t, w, 64*ctlMiB, ctlMiB, 2)
	ctlMust(t, w.Close())
	d.Release("well", well)
	// Also after a crash, with not a block to spare.
	d.Kill()
	d.Start()
	ctlSame(t, "after a crash", before, ctlState(t, d))

	d.Release("greedy", greedy)
	d.Delete(greedy)
	ctlEmptied(t, ctlFilePool(d, "default"))
	ctlFilled(t, "a volume of the full pool", f, 32*ctlMiB, ctlMiB, 1)
	ctlFill(t, f, 64*ctlMiB, ctlMiB, 3)
	ctlMust(t, f.Close())
	d.Release("keep", keep)
	d.Release("mounted", mounted)
	target = d.Use("mounted", mounted, nodeExt4.capability)
	dataMustHold(t, filepath.Join(target, "file"), 8*dataMiB, sum)
	dataFill(t, filepath.Join(target, "more"), 8*dataMiB)
	d.Release("mounted", mounted)
	for _, id := range []string{keep, mounted} {
		d.Delete(id)
	}
	ctlRoomSoon(t, d, "default", room)
	if health := nodeStorageHealth(t, d); len(health) != 0 {
		t.Errorf("the health of the emptied pool is %v", health)
	}
}

// dataFillUp writes to the end of a device, or until there is no more room.
func dataFillUp(f *os.File) error {
	data := make([]byte, dataMiB)
	for i := range data {
		data[i] = byte(i) | 1
	}
	for n := 1; ; n++ {
		_, err := f.Write(data)
		if err == nil && n%16 == 0 {
			err = f.Sync()
		}
		if err != nil {
			return errors.Join(err, f.Sync())
		}
	}
}

// The disk of a pool in a directory is full with what others have there. What
// needs room is refused and leaves nothing; what gives room back is done, and so
// is what lets users leave. Once there is room, all goes on.
func TestADirectoryWhoseDiskIsFullGivesRoomBack(t *testing.T) {
	for _, fsType := range []string{"xfs", "ext4"} {
		t.Run(fsType, func(t *testing.T) {
			disk := harness.Filesystem(t, fsType, 512*ctlMiB)
			dir := filepath.Join(disk, "pool")
			ctlMust(t, os.Mkdir(dir, 0o700))
			d := harness.Start(t, harness.DirectoryPool(dir))
			kind := nodeExt4.capability
			used := d.Create("used", 64*ctlMiB, kind).GetVolumeId()
			target := d.Use("used", used, kind)
			sum := dataFill(t, filepath.Join(target, "file"), 16*dataMiB)
			idle := d.Create("idle", 32*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
			fresh := d.Create("fresh", 64*ctlMiB, kind).GetVolumeId()
			s := d.Snapshot("s", idle).GetSnapshotId()

			fill, err := os.Create(filepath.Join(disk, "fill"))
			ctlMust(t, err)
			defer fill.Close()
			if err := dataFillUp(fill); !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("to fill the disk gave %v", err)
			}
			for n := 4096; n > 0; n /= 2 { // to the last byte
				for err = nil; err == nil; {
					_, err = fill.Write(make([]byte, n))
				}
			}
			_ = fill.Sync()
			before := ctlState(t, d)
			dataEventually(t, func() error { // the driver looks at a shared filesystem once a second
				_, err := ctlCreates(d, "new").call()
				if code := status.Code(err); code != codes.ResourceExhausted || !strings.Contains(err.Error(), "has no room") {
					return fmt.Errorf("CreateVolume gave %w", err)
				}
				return nil
			})
			for _, call := range []ctlCall{
				ctlCreates(d, "thick", harness.Parameters("provisioning", "thick")), ctlCreates(d, "clone", ctlRequired(0), harness.FromVolume(idle)),
				ctlCreates(d, "restored", ctlRequired(0), harness.FromSnapshot(s)), ctlExpands(d, idle, 64*ctlMiB),
			} {
				_, err := call.call()
				ctlWant(t, call.name, err, codes.ResourceExhausted)
			}
			if health := nodeStorageHealth(t, d); len(health) != 1 || health[0].GetReason() != "PoolNearlyFull" {
				t.Errorf("its health is %v", health)
			}
			// mkfs finds no room, and leaves a volume that can be staged later.
			_, err = d.NodeStageVolume(d.Context(), &csi.NodeStageVolumeRequest{VolumeId: fresh, StagingTargetPath: d.Staging("fresh"), VolumeCapability: kind})
			if err == nil {
				t.Error("a filesystem was made without room for it")
			}
			ctlSame(t, "after what was refused", before, ctlState(t, d))
			ctlEmptied(t, dir)
			d.Release("used", used)
			_, err = ctlDeletesSnapshot(d, s).call()
			ctlWant(t, "DeleteSnapshot on a full disk", err, codes.OK)
			d.Delete(idle)
			ctlEmptied(t, dir)

			ctlMust(t, fill.Close())
			ctlMust(t, os.Remove(fill.Name()))
			d.Use("fresh", fresh, kind)
			dataFill(t, filepath.Join(d.Target("fresh"), "file"), 8*dataMiB)
			d.Use("used", used, kind)
			dataMustHold(t, filepath.Join(d.Target("used"), "file"), 16*dataMiB, sum)
			dataEventually(t, func() error {
				if health := nodeStorageHealth(t, d); len(health) > 0 {
					return fmt.Errorf("once there is room, its health is %v", health)
				}
				_, err := ctlCreates(d, "new", ctlRequired(16*ctlMiB)).call()
				return err
			})
			d.Release("fresh", fresh)
			d.Release("used", used)
		})
	}
}

// Who cuts an image short under its device takes the bytes behind from its user,
// whose reads and writes there fail. The rest of the volume, and all others, go
// on; its user can leave; and it is not staged again until the image is whole.
func TestAnImageThatIsCutShortInUseFailsItsUserAlone(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	block := harness.Block(harness.Writer)
	v, other := d.Create("v", 64*ctlMiB, block).GetVolumeId(), d.Create("other", 64*ctlMiB, block).GetVolumeId()
	f, o := ctlUse(t, d, "v", v), ctlUse(t, d, "other", other)
	ctlFill(t, f, 64*ctlMiB, ctlMiB, 1)
	image := dataImage(dataPool(d), v)
	ctlMust(t, os.Truncate(image, 32*ctlMiB))
	ctlMust(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))

	data := make([]byte, ctlMiB)
	if _, err := f.ReadAt(data, 48*ctlMiB); !errors.Is(err, unix.EIO) && !ctlZero(data) {
		t.Errorf("a read behind the end of the image gave %v, and data", err)
	}
	ctlFilled(t, "what is left", io.NewSectionReader(f, 0, 32*ctlMiB), 32*ctlMiB, ctlMiB, 1)
	ctlMust(t, f.Close())
	ctlFill(t, o, 64*ctlMiB, ctlMiB, 2)
	ctlMust(t, o.Close())
	if got := nodeHealth(t, d, v); got != "DATA_LOSS ImageTruncated" {
		t.Errorf("its health is %q", got)
	}
	if got := nodeHealth(t, d, other); got != "" {
		t.Errorf("the other's health is %q", got)
	}
	d.Release("v", v)
	_, err := ctlStages(d, v).call()
	if status.Code(err) != codes.DataLoss && nodeHealth(t, d, v) != "" {
		t.Errorf("it is staged again: %v", err)
	}
	ctlMust(t, os.Truncate(image, 64*ctlMiB))
	f = ctlUse(t, d, "v", v)
	ctlFilled(t, "what is left", io.NewSectionReader(f, 0, 32*ctlMiB), 32*ctlMiB, ctlMiB, 1)
	ctlMust(t, f.Close())
	d.Release("v", v)
	d.Release("other", other)
}

func ctlZero(data []byte) bool {
	for _, b := range data {
		if b != 0 {
			return false
		}
	}
	return true
}

// The file that a pool is in is cut short under it, and its device with it, as by
// a disk that loses its second half. The pool fails, and is told of; others go
// on. Whole again, it has all that was synced.
func TestAPoolWhoseFileIsCutShortFailsAlone(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	block := harness.Block(harness.Writer)
	v := d.Create("v", 64*ctlMiB, block).GetVolumeId()
	f := ctlUse(t, d, "v", v)
	ctlFill(t, f, 32*ctlMiB, ctlMiB, 1)
	ctlMust(t, f.Close())
	d.Release("v", v)
	dataRun(t, "sync", "--file-system", dataPool(d))
	image, whole := filepath.Join(d.Dir, "default.img"), filepath.Join(d.Dir, "whole.img")
	dataRun(t, "cp", "--sparse=always", image, whole)
	before := ctlState(t, d)
	pool, err := os.Open(image)
	ctlMust(t, err)
	devices, err := loop.Find(pool)
	ctlMust(t, errors.Join(err, pool.Close()))
	ctlMust(t, os.Truncate(image, 8*ctlMiB))
	ctlMust(t, devices[0].Refresh())

	dataEventually(t, func() error {
		// Whatever is asked of it, the answer is an error or what is in memory.
		_, err := ctlCreates(d, "new").call()
		if err == nil {
			_, _ = ctlDeletes(d, strings.TrimSuffix(v, "v")+"new").call()
			return errors.New("a volume is made in a pool that has lost its disk")
		}
		if health := nodeStorageHealth(t, d); len(health) != 1 || health[0].GetReason() != "PoolFailed" {
			return fmt.Errorf("its health is %v", health)
		}
		return nil
	})
	other := d.Create("other", 16*ctlMiB, block, harness.Parameters("pool", "other")).GetVolumeId()
	o := ctlUse(t, d, "other", other)
	ctlFill(t, o, 16*ctlMiB, ctlMiB, 2)
	ctlMust(t, o.Close())
	d.Release("other", other)
	d.Delete(other)

	d.Stop()
	harness.Clean(t, d.Dir)
	dataRun(t, "cp", "--sparse=always", whole, image)
	d.Start()
	ctlSame(t, "once its file is whole", before, ctlState(t, d))
	f = ctlUse(t, d, "v", v)
	ctlFilled(t, "what was synced", f, 32*ctlMiB, ctlMiB, 1)
	ctlMust(t, f.Close())
	d.Release("v", v)
}

// A directory that cannot be written is not made a pool, and one that is a pool
// is not opened: the driver says which, and does not run half.
func TestAReadOnlyDirectoryStopsTheStart(t *testing.T) {
	disk := harness.Filesystem(t, "ext4", 256*ctlMiB)
	dir := filepath.Join(disk, "pool")
	ctlMust(t, os.Mkdir(dir, 0o700))
	d := harness.New(t, harness.DirectoryPool(dir))
	for _, rule := range []string{"a new pool", "a pool that there is"} {
		dataRun(t, "mount", "-o", "remount,ro", disk)
		before := ctlTree(t, disk)
		ctlStartFails(t, d, "pools[0]", dir, "read-only")
		ctlSame(t, rule, before, ctlTree(t, disk))
		dataRun(t, "mount", "-o", "remount,rw", disk)
		d.Start()
		d.Create("v-"+ctlName("/"+strings.ReplaceAll(rule, " ", "-")), 4*ctlMiB, harness.Block(harness.Writer))
		d.Stop()
	}
}
