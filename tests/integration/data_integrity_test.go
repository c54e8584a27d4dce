//go:build integration

package integration

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/tests/harness"
)

// dataWriters are the ways in which a volume is written while it is cut, cloned
// and grown.
var dataWriters = []struct {
	name string
	kind dataKind
	size int64 // of the volume, bytes
	how  dataSync
}{
	{"ext4", dataKinds[0], 256 * dataMiB, dataFsync},
	{"xfs", dataKinds[1], 320 * dataMiB, dataFsync},
	{"btrfs", dataKinds[2], 256 * dataMiB, dataFsync},
	{"block with fsync", dataKinds[3], 64 * dataMiB, dataFsync},
	{"block with O_DIRECT", dataKinds[3], 64 * dataMiB, dataDirect},
}

// A copy has every record that was on stable storage before it was asked for,
// nothing that was written after it was given, and no gap between. Its
// filesystem needs no repair. The writer never notices.
func TestDataCopiesOfAVolumeInUseAreConsistent(t *testing.T) {
	for _, c := range dataWriters {
		t.Run(c.name, func(t *testing.T) {
			d := harness.Start(t, harness.FilePool("8Gi"))
			id := d.Create("source", c.size, c.kind.capability).GetVolumeId()
			target := d.Use("source", id, c.kind.capability)
			w := dataWrite(t, c.kind.file(target), c.kind.churnDir(target), c.how)
			w.progress(t, 20)

			for round := range dataRounds(t, 3) {
				name := fmt.Sprintf("snapshot-%d", round)
				atLeast := w.safe.Load()
				snapshot := d.Snapshot(name, id)
				atMost := w.begun.Load()
				dataMustBeCleanAsCut(t, c.kind.name, filepath.Join(dataPool(d), "snapshots", name, "data"))
				if c.kind.growsInUse(t) {
					size := dataGrow(t, d, id, target, "source", c.size+int64(round+1)*32*dataMiB)
					dataMustSpan(t, c.kind, target, size)
				}
				w.progress(t, 20)
				dataCheckCopy(t, d, c.kind, fmt.Sprintf("restored-%d", round), atLeast, atMost, harness.FromSnapshot(snapshot.GetSnapshotId()))

				atLeast = w.safe.Load()
				clone := d.Create(fmt.Sprintf("clone-%d", round), 0, c.kind.capability, harness.FromVolume(id))
				atMost = w.begun.Load()
				w.progress(t, 20)
				dataMustBeCleanAsCut(t, c.kind.name, dataImage(dataPool(d), clone.GetVolumeId()))
				dataCheckVolume(t, d, c.kind, fmt.Sprintf("clone-%d", round), clone.GetVolumeId(), atLeast, atMost)

				// Restored once more, after the source has moved on.
				dataCheckCopy(t, d, c.kind, fmt.Sprintf("again-%d", round), 0, atMost, harness.FromSnapshot(snapshot.GetSnapshotId()))
			}

			n := w.mustEnd(t)
			d.Release("source", id)
			dataMustBeClean(t, c.kind.name, dataImage(dataPool(d), id))
			dataCheckVolume(t, d, c.kind, "source", id, n, n)
			dataMustBeIdle(t, d, dataPool(d))
		})
	}
}

// churnDir is where a writer makes files beside its records; a device has none.
func (k dataKind) churnDir(target string) string {
	if k.isBlock() {
		return ""
	}
	return filepath.Join(target, "churn")
}

// dataCheckCopy makes a volume from a source, checks it, and deletes it.
func dataCheckCopy(t *testing.T, d *harness.Driver, kind dataKind, name string, atLeast, atMost int64, source func(*csi.CreateVolumeRequest)) {
	t.Helper()
	id := d.Create(name, 0, kind.capability, source).GetVolumeId()
	dataCheckVolume(t, d, kind, name, id, atLeast, atMost)
	d.Delete(id)
}

// dataCheckVolume uses a volume, counts its records, and checks its filesystem
// after that.
func dataCheckVolume(t *testing.T, d *harness.Driver, kind dataKind, name, id string, atLeast, atMost int64) {
	t.Helper()
	file := kind.file(d.Use(name, id, kind.capability))
	if n := dataRecords(t, file); n < atLeast || n > atMost {
		t.Errorf("%s has %d records; there must be %d to %d", name, n, atLeast, atMost)
	}
	d.Release(name, id)
	dataMustBeClean(t, kind.name, dataImage(dataPool(d), id))
}

// dataGrow makes a volume that is in use larger, as an orchestrator does, and
// gives its new size.
func dataGrow(t *testing.T, d *harness.Driver, id, volumePath, staging string, size int64) int64 {
	t.Helper()
	expanded, err := d.ControllerExpandVolume(d.Context(), &csi.ControllerExpandVolumeRequest{
		VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
	})
	dataMust(t, err)
	if !expanded.GetNodeExpansionRequired() || expanded.GetCapacityBytes() != size {
		t.Fatalf("ControllerExpandVolume to %d: %v", size, expanded)
	}
	request := &csi.NodeExpandVolumeRequest{
		VolumeId: id, VolumePath: volumePath, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
	}
	if staging != "" {
		request.StagingTargetPath = d.Staging(staging)
	}
	for range 2 { // the second time it is so already
		response, err := d.NodeExpandVolume(d.Context(), request)
		dataMust(t, err)
		if response.GetCapacityBytes() != size {
			t.Fatalf("NodeExpandVolume to %d gives %d bytes", size, response.GetCapacityBytes())
		}
	}
	return size
}
