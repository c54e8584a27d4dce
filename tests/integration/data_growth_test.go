//go:build integration

package integration

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

func TestDataVolumesGrowWhileTheyAreWritten(t *testing.T) {
	for _, c := range dataWriters {
		t.Run(c.name, func(t *testing.T) {
			d := harness.Start(t, harness.FilePool("8Gi"))
			id := d.Create("grown", c.kind.size, c.kind.capability).GetVolumeId()
			target := d.Use("grown", id, c.kind.capability)
			w := dataWrite(t, c.kind.file(target), c.kind.churnDir(target), c.how)
			size := c.kind.size
			if !c.kind.growsInUse(t) {
				size = dataGrowsLater(t, d, id, target, size*2)
			}
			for range 6 {
				w.progress(t, 10)
				if !c.kind.growsInUse(t) {
					break
				}
				size = dataGrow(t, d, id, target, "grown", size+size/2/dataMiB*dataMiB)
				dataMustSpan(t, c.kind, target, size)
			}
			w.progress(t, 10)
			n := w.mustEnd(t)
			d.Release("grown", id)
			dataMustBeClean(t, c.kind.name, dataImage(dataPool(d), id))
			dataMustSpan(t, c.kind, d.Use("grown", id, c.kind.capability), size)
			d.Release("grown", id)
			dataCheckVolume(t, d, c.kind, "grown", id, n, n)
		})
	}
}

// dataGrowsLater asks for what the kernel does not allow here: a clear refusal,
// and nothing worse.
func dataGrowsLater(t *testing.T, d *harness.Driver, id, target string, size int64) int64 {
	t.Helper()
	t.Log("NOT TESTED here: ext4 grows in use only with CAP_SYS_RESOURCE, which this machine denies even to root")
	_, err := d.ControllerExpandVolume(d.Context(), &csi.ControllerExpandVolumeRequest{
		VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
	})
	dataMust(t, err)
	_, err = d.NodeExpandVolume(d.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target})
	dataCode(t, err, codes.FailedPrecondition, "CAP_SYS_RESOURCE", "staged again")
	return size
}

// Whatever is too small for a filesystem is not made; what is just large enough
// can be used like any other.
func TestDataVolumesOfTheSmallestSizeWork(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			v := d.Create(kind.name, 1, kind.capability)
			size := v.GetCapacityBytes()
			_, err := d.CreateVolume(d.Context(), &csi.CreateVolumeRequest{
				Name: kind.name + "-less", VolumeCapabilities: []*csi.VolumeCapability{kind.capability},
				CapacityRange: &csi.CapacityRange{RequiredBytes: 1, LimitBytes: size - 1},
			})
			dataCode(t, err, codes.OutOfRange)
			target := d.Use(kind.name, v.GetVolumeId(), kind.capability)
			sum := dataFill(t, kind.file(target), 4096)
			d.Release(kind.name, v.GetVolumeId())
			dataMustBeClean(t, kind.name, dataImage(dataPool(d), v.GetVolumeId()))
			d.Use(kind.name, v.GetVolumeId(), kind.capability)
			if kind.growsInUse(t) {
				for range 3 { // also by less than a filesystem can make use of
					size += 4096
					dataGrow(t, d, v.GetVolumeId(), target, kind.name, size)
				}
				dataGrow(t, d, v.GetVolumeId(), target, kind.name, 2*size)
			}
			dataMustHold(t, kind.file(target), 4096, sum)
			d.Release(kind.name, v.GetVolumeId())
			dataMustBeClean(t, kind.name, dataImage(dataPool(d), v.GetVolumeId()))
		})
	}
}

// A volume that nobody uses has no path for NodeExpandVolume: it grows with its
// next stage.
func TestDataGrowthOfAnUnusedVolumeShowsAtItsNextStage(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			id := d.Create(kind.name, kind.size, kind.capability).GetVolumeId()
			sum := dataFill(t, kind.file(d.Use(kind.name, id, kind.capability)), dataMiB)
			d.Release(kind.name, id)
			_, err := d.ControllerExpandVolume(d.Context(), &csi.ControllerExpandVolumeRequest{
				VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: dataGiB},
			})
			dataMust(t, err)
			_, err = d.NodeExpandVolume(d.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: d.Target(kind.name)})
			dataCode(t, err, codes.NotFound)

			target := d.Use(kind.name, id, kind.capability)
			dataMustSpan(t, kind, target, dataGiB)
			dataMustHold(t, kind.file(target), dataMiB, sum)
			d.Release(kind.name, id)
		})
	}
}

// The filesystem is grown where it is staged, which is writable, whether the
// orchestrator names that path or not; a read-only device grows with the other.
func TestDataGrowthReachesAReadOnlyPublication(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			id := d.Create(kind.name, kind.size, kind.capability).GetVolumeId()
			d.Use(kind.name, id, kind.capability)
			if !kind.growsInUse(t) {
				dataGrowsLater(t, d, id, d.Target(kind.name), 2*kind.size)
				d.Release(kind.name, id)
				return
			}
			reader := kind.name + "-reader"
			dataPublish(t, d, reader, kind.name, id, kind.capability, true)
			for i, staging := range []string{kind.name, ""} {
				size := dataGrow(t, d, id, d.Target(reader), staging, kind.size+int64(i+1)*64*dataMiB)
				dataMustSpan(t, kind, d.Target(reader), size)
				dataMustSpan(t, kind, d.Target(kind.name), size)
			}
			dataUnpublish(t, d, reader, id)
			d.Release(kind.name, id)
		})
	}
}

// dataPublish publishes a staged volume at one more target.
func dataPublish(t *testing.T, d *harness.Driver, name, staging, id string, c *csi.VolumeCapability, readOnly bool) (target string) {
	t.Helper()
	_, err := d.NodePublishVolume(d.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: id, StagingTargetPath: d.Staging(staging), TargetPath: d.Target(name), VolumeCapability: c, Readonly: readOnly,
	})
	dataMust(t, err)
	return d.Target(name)
}

func dataUnpublish(t *testing.T, d *harness.Driver, name, id string) {
	t.Helper()
	_, err := d.NodeUnpublishVolume(d.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: d.Target(name)})
	dataMust(t, err)
}
