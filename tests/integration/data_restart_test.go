//go:build integration

package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/tests/harness"
)

// Neither the end of the driver nor its crash is felt by who uses a volume, and
// the next driver does everything with such a volume that the last one could.
func TestDataVolumesInUseOutliveTheDriver(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	kinds := dataWriters[:4]
	ids, writers := map[string]string{}, map[string]*dataWriter{}
	for _, c := range kinds {
		name := c.kind.name
		ids[name] = d.Create(name, c.size, c.kind.capability).GetVolumeId()
		target := d.Use(name, ids[name], c.kind.capability)
		writers[name] = dataWrite(t, c.kind.file(target), c.kind.churnDir(target), c.how)
	}
	for round := range dataRounds(t, 20) {
		if round%2 == 0 {
			d.Stop()
		} else {
			d.Kill()
		}
		for _, w := range writers {
			w.progress(t, 2) // nobody serves now
		}
		d.Start()
		kind := kinds[round%len(kinds)].kind
		dataEveryCall(t, d, kind, ids[kind.name], fmt.Sprintf("%s-%d", kind.name, round), writers[kind.name])
	}
	for _, c := range kinds {
		n := writers[c.kind.name].mustEnd(t)
		d.Release(c.kind.name, ids[c.kind.name])
		dataCheckVolume(t, d, c.kind, c.kind.name, ids[c.kind.name], n, n)
	}
	dataMustBeIdle(t, d, dataPool(d))
}

// dataEveryCall makes every call that there is on a volume that is in use.
func dataEveryCall(t *testing.T, d *harness.Driver, kind dataKind, id, name string, w *dataWriter) {
	t.Helper()
	ctx, staging, target := d.Context(), d.Staging(kind.name), d.Target(kind.name)
	_, err := d.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: kind.capability})
	dataMust(t, err)
	dataPublish(t, d, kind.name, kind.name, id, kind.capability, false)
	dataPublish(t, d, name, kind.name, id, kind.capability, true)
	_, err = d.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: target})
	dataMust(t, err)
	health, err := d.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: id})
	if err != nil || len(health.GetVolumeHealth().GetHealthStatuses()) > 0 {
		t.Errorf("%s in use is not healthy: %v %v", name, health, err)
	}
	_, err = d.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id})
	dataMust(t, err)
	_, err = d.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target, StagingTargetPath: staging})
	dataMust(t, err)
	_, err = d.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	dataCode(t, err, codes.FailedPrecondition)
	_, err = d.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
	dataCode(t, err, codes.FailedPrecondition)
	dataUnpublish(t, d, name, id)

	atLeast := w.safe.Load()
	snapshot := d.Snapshot(name, id).GetSnapshotId()
	atMost := w.begun.Load()
	dataCheckCopy(t, d, kind, name, atLeast, atMost, harness.FromSnapshot(snapshot))
	_, err = d.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
	dataMust(t, err)
}

// A driver that is killed while it has a filesystem frozen leaves it so; the
// next one thaws it before anything else. Its user waits for that long and no
// longer.
func TestDataOfAVolumeStaysWritableWhenTheDriverIsKilledInASnapshot(t *testing.T) {
	for _, c := range dataWriters[:3] {
		t.Run(c.name, func(t *testing.T) {
			d := harness.Start(t, harness.FilePool("8Gi"))
			id := d.Create("volume", c.size, c.kind.capability).GetVolumeId()
			target := d.Use("volume", id, c.kind.capability)
			w := dataWrite(t, c.kind.file(target), c.kind.churnDir(target), c.how)
			began := time.Now()
			d.Snapshot("measured", id)
			whole := time.Since(began)
			for round := range dataRounds(t, 10) {
				name := fmt.Sprintf("snapshot-%d", round)
				atLeast := w.safe.Load()
				w.longest.Store(0)
				ended := make(chan error, 1)
				go func(controller csi.ControllerClient) {
					_, err := controller.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
					ended <- err
				}(d.ControllerClient)
				time.Sleep(rand.N(whole + 5*time.Millisecond))
				killed := time.Now()
				d.Kill()
				answer := <-ended
				d.Start()
				w.progress(t, 1)
				down := time.Since(killed)
				if longest := time.Duration(w.longest.Load()); longest > down+time.Second {
					t.Errorf("the writer hung for %s, the driver was away for %s", longest, down)
				}
				// The second is what this client says when it hangs up first.
				if code := status.Code(answer); answer != nil && code != codes.Unavailable && code != codes.Canceled {
					t.Errorf("CreateSnapshot that was cut off: %v", answer)
				}
				snapshot := d.Snapshot(name, id).GetSnapshotId()
				dataCheckCopy(t, d, c.kind, fmt.Sprintf("restored-%d", round), atLeast, w.begun.Load(), harness.FromSnapshot(snapshot))
				if left, err := os.ReadDir(filepath.Join(dataPool(d), ".staging")); err != nil || len(left) > 0 {
					t.Errorf("left in .staging: %v (%v)", left, err)
				}
			}
			n := w.mustEnd(t)
			d.Release("volume", id)
			dataCheckVolume(t, d, c.kind, "volume", id, n, n)
		})
	}
}

// A thaw of btrfs that is cut off by SIGKILL leaves it read-only. A read of the
// superblock is what it waits for, and here for long.
func TestDataOfABtrfsStaysWritableWhenTheDriverIsKilledAfterTheCut(t *testing.T) {
	d := harness.Start(t, harness.FilePool("2Gi"))
	kind := dataKinds[2]
	id := d.Create("volume", kind.size, kind.capability).GetVolumeId()
	target := d.Use("volume", id, kind.capability)
	mount, err := filesystem.MountAt(target)
	dataMust(t, err)
	pod := harness.NewPod(t, "", "")
	pod.SlowReads(pod.Container("driver"), d.Pid(), mount.Device)
	for round := range 3 {
		ended := make(chan error, 1)
		go func(controller csi.ControllerClient) {
			_, err := controller.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: fmt.Sprint("snapshot-", round), SourceVolumeId: id})
			ended <- err
		}(d.ControllerClient)
		select {
		case err := <-ended:
			dataMust(t, err)
		case <-time.After(300 * time.Millisecond):
			d.Kill()
			if code := status.Code(<-ended); code != codes.Unavailable && code != codes.Canceled && code != codes.OK {
				t.Errorf("CreateSnapshot that was cut off: %s", code)
			}
			d.Start()
		}
		dataMust(t, os.WriteFile(filepath.Join(target, fmt.Sprint("file-", round)), []byte("x"), 0o600))
	}
	d.Restart() // out of the cgroup
	d.Release("volume", id)
}

// The same at the worst instant: the filesystem is frozen, and the driver is
// gone.
func TestDataFrozenByADriverThatDiedIsThawedAtTheNextStart(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds[:3] {
		id := d.Create(kind.name, kind.size, kind.capability).GetVolumeId()
		target := d.Use(kind.name, id, kind.capability)
		d.Kill()
		mark := filepath.Join(dataPool(d), ".staging", "freeze-"+path.Base(id))
		dataMust(t, os.WriteFile(mark, nil, 0o600))
		dataRun(t, "fsfreeze", "--freeze", target)
		written := make(chan error, 1)
		go func() { written <- os.WriteFile(filepath.Join(target, "while frozen"), []byte("x"), 0o600) }()
		select {
		case err := <-written:
			t.Fatalf("%s is not frozen: %v", kind.name, err)
		case <-time.After(50 * time.Millisecond):
		}

		d.Start()
		select {
		case err := <-written:
			dataMust(t, err)
		case <-time.After(10 * time.Second):
			t.Fatalf("%s is still frozen", kind.name)
		}
		if _, err := os.Lstat(mark); !os.IsNotExist(err) {
			t.Errorf("the mark is still there (%v)", err)
		}
		d.Snapshot(kind.name, id)
		d.Release(kind.name, id)
	}
}

// What somebody else has frozen (a backup tool) is theirs to thaw. It is at
// rest, which is all that a snapshot needs.
func TestDataFrozenBySomebodyElseStaysFrozen(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds[:3] {
		id := d.Create(kind.name, kind.size, kind.capability).GetVolumeId()
		target := d.Use(kind.name, id, kind.capability)
		sum := dataFill(t, kind.file(target), dataMiB)
		dataRun(t, "fsfreeze", "--freeze", target)
		d.Snapshot(kind.name, id)
		dataMustBeFrozen(t, target)
		d.Restart()
		dataMustBeFrozen(t, target)
		d.Kill()
		d.Start()
		dataMustBeFrozen(t, target)
		dataRun(t, "fsfreeze", "--unfreeze", target)

		snapshot := d.Snapshot(kind.name, id).GetSnapshotId()
		restored := d.Create(kind.name+"-restored", 0, kind.capability, harness.FromSnapshot(snapshot)).GetVolumeId()
		dataMustHold(t, kind.file(d.Use(kind.name+"-restored", restored, kind.capability)), dataMiB, sum)
		d.Release(kind.name+"-restored", restored)
		dataMustBeClean(t, kind.name, dataImage(dataPool(d), restored))
		d.Release(kind.name, id)
	}
}

// dataMustBeFrozen fails the test unless a filesystem is frozen: to freeze it
// again is then EBUSY.
func dataMustBeFrozen(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command("fsfreeze", "--freeze", path).CombinedOutput(); err == nil {
		t.Errorf("%s was thawed", path)
	} else if len(out) == 0 {
		t.Errorf("fsfreeze %s: %v", path, err)
	}
}

// A driver that is killed while it makes a filesystem leaves one that may be
// half made. Nobody has ever seen it: it is made again, from zeros.
func TestDataVolumeWhoseFirstStageWasKilledCanBeStaged(t *testing.T) {
	for _, kind := range dataKinds[:3] {
		t.Run(kind.name, func(t *testing.T) {
			d := harness.Start(t, harness.FilePool("16Gi"))
			for round := range dataRounds(t, 8) {
				name := fmt.Sprintf("volume-%d", round)
				id := d.Create(name, kind.size, kind.capability).GetVolumeId()
				request := &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: d.Staging(name), VolumeCapability: kind.capability}
				ended := make(chan struct{})
				go func(node csi.NodeClient) {
					defer close(ended)
					_, _ = node.NodeStageVolume(t.Context(), request)
				}(d.NodeClient)
				time.Sleep(rand.N(60 * time.Millisecond))
				d.Kill()
				<-ended
				d.Start()
				dataEventually(t, func() error { // its mkfs may have outlived it for a moment
					_, err := d.NodeStageVolume(d.Context(), request)
					return err
				})
				file := kind.file(dataPublish(t, d, name, name, id, kind.capability, false))
				sum := dataFill(t, file, dataMiB)
				d.Release(name, id)
				dataMustBeClean(t, kind.name, dataImage(dataPool(d), id))
				d.Use(name, id, kind.capability)
				dataMustHold(t, file, dataMiB, sum)
				d.Release(name, id)
				d.Delete(id)
			}
			dataMustBeIdle(t, d, dataPool(d))
			dataMustHoldNothing(t, dataPool(d))
		})
	}
}

// A volume that has data has it after whatever was cut off, and can be used and
// left at once.
func TestDataIsThereWhateverNodeCallWasKilled(t *testing.T) {
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := harness.Start(t, harness.FilePool("8Gi"))
			v := nodeCreate(d, "volume", kind)
			file := kind.file(d.Use(v.name, v.id, kind.capability))
			sum := dataFill(t, file, dataMiB)
			began := time.Now()
			d.Release(v.name, v.id)
			d.Use(v.name, v.id, kind.capability)
			d.Release(v.name, v.id)
			whole := time.Since(began)
			for range dataRounds(t, 8) {
				ended, cut := make(chan struct{}), v
				cut.Driver = d.In(t)
				go func() {
					defer close(ended)
					for cut.stage() == nil && cut.publish() == nil && cut.unpublish(d.Target(v.name)) == nil && cut.unstage() == nil {
						continue
					}
				}()
				time.Sleep(rand.N(2 * whole))
				d.Kill()
				<-ended
				d.Start()
				d.Use(v.name, v.id, kind.capability)
				dataMustHold(t, file, dataMiB, sum)
				sum = dataFill(t, file, dataMiB)
				d.Release(v.name, v.id)
				dataMustBeIdle(t, d, dataPool(d))
				dataMustBeClean(t, kind.name, dataImage(dataPool(d), v.id))
			}
		})
	}
}
