//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/tests/harness"
)

func TestDataIsThereWhenAVolumeIsStagedAgain(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			const size = 16 * dataMiB
			id := d.Create(kind.name, kind.size, kind.capability).GetVolumeId()
			file := kind.file(d.Use(kind.name, id, kind.capability))
			sum := dataFill(t, file, size)
			for _, device := range dataLoops(t, dataPool(d)) {
				if dio, err := os.ReadFile(filepath.Join("/sys/block", device, "loop/dio")); strings.TrimSpace(string(dio)) != "1" {
					t.Errorf("%s has no direct I/O: %q (%v)", device, dio, err)
				}
			}
			d.Release(kind.name, id)
			dataMustBeIdle(t, d, dataPool(d))

			d.Use(kind.name, id, kind.capability)
			dataMustHold(t, file, size, sum)
			d.Release(kind.name, id)
			dataMustBeIdle(t, d, dataPool(d))
			d.Delete(id)
		})
	}
	dataMustHoldNothing(t, dataPool(d))
}

// What is not synced by the application is the kernel's to bring to the disk;
// to unstage is to wait for that.
func TestDataThatWasNeverSyncedIsThereAfterUnstage(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			id := d.Create(kind.name, kind.size, kind.capability).GetVolumeId()
			file := kind.file(d.Use(kind.name, id, kind.capability))
			f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE, 0o600)
			dataMust(t, err)
			record := make([]byte, dataRecordSize)
			for n := range int64(2000) {
				dataRecord(record, n)
				if _, err := f.WriteAt(record, n*dataRecordSize); err != nil {
					t.Fatal(err)
				}
			}
			dataMust(t, f.Close())
			d.Release(kind.name, id)
			d.Use(kind.name, id, kind.capability)
			if n := dataRecords(t, file); n != 2000 {
				t.Errorf("%d records of 2000 are there", n)
			}
			d.Release(kind.name, id)
		})
	}
}

func TestDataPathLeaksNothing(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	dataCycles(t, d, "warm-up", 8) // what the process opens once and keeps
	fds := dataOpenFiles(t, d)
	loops, mounts := len(dataLoops(t, d.Dir)), len(dataMounts(t, d.Dir))

	dataCycles(t, d, "cycle", dataRounds(t, 200))

	dataMustHoldNothing(t, dataPool(d))
	if n := len(dataLoops(t, d.Dir)); n != loops {
		t.Errorf("%d loop devices, %d before", n, loops)
	}
	if n := len(dataMounts(t, d.Dir)); n != mounts {
		t.Errorf("%d mounts, %d before", n, mounts)
	}
	dataEventually(t, func() error {
		if n := dataOpenFiles(t, d); n > fds {
			return fmt.Errorf("the driver has %d files open, %d before", n, fds)
		}
		return nil
	})
}

// dataCycles takes n volumes through their whole life, four at a time.
func dataCycles(t *testing.T, d *harness.Driver, prefix string, n int) {
	t.Helper()
	numbers := make(chan int)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for number := range numbers {
				kind := dataKinds[number%2*3] // ext4 and block
				if err := dataCycle(d, fmt.Sprintf("%s-%d", prefix, number), kind); err != nil {
					t.Errorf("%s %d: %v", prefix, number, err)
				}
			}
		})
	}
	for number := range n {
		numbers <- number
	}
	close(numbers)
	workers.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

func dataCycle(d *harness.Driver, name string, kind dataKind) error {
	ctx, staging, target := d.Context(), filepath.Join(d.Dir, "staging", name), d.Target(name)
	if err := os.Mkdir(staging, 0o750); err != nil {
		return err
	}
	created, err := d.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, VolumeCapabilities: []*csi.VolumeCapability{kind.capability},
		CapacityRange: &csi.CapacityRange{RequiredBytes: kind.size},
	})
	if err != nil {
		return err
	}
	id := created.GetVolume().GetVolumeId()
	if _, err := d.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: kind.capability}); err != nil {
		return err
	}
	if _, err := d.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: kind.capability}); err != nil {
		return err
	}
	if err := os.WriteFile(kind.file(target), []byte(name), 0o600); err != nil {
		return err
	}
	if _, err := d.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target}); err != nil {
		return err
	}
	if _, err := d.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging}); err != nil {
		return err
	}
	_, err = d.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

// dataOpenFiles is how many files the driver has open.
func dataOpenFiles(t *testing.T, d *harness.Driver) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.Pid()))
	dataMust(t, err)
	return len(entries)
}
