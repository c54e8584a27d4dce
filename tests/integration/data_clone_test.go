//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// The whole family of a volume is in use at once: the source, a clone, a clone
// of the clone, and what was restored of a snapshot of the clone. Each has what
// it had when it was made, and then what only it has written; and those that
// remain do not miss those that go.
func TestDataOfCopiesInUseBesideTheirSourceIsTheirOwn(t *testing.T) {
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := harness.Start(t, harness.FilePool("8Gi"))
			ids, sums := map[string]string{}, map[string]uint32{}
			begin := func(name string, more ...func(*csi.CreateVolumeRequest)) {
				t.Helper()
				ids[name] = d.Create(name, 0, kind.capability, more...).GetVolumeId()
				d.Use(name, ids[name], kind.capability)
			}
			file := func(name string) string { return kind.file(d.Target(name)) }
			const size = 4 * dataMiB

			ids["source"] = d.Create("source", kind.size, kind.capability).GetVolumeId()
			d.Use("source", ids["source"], kind.capability)
			inherited := dataFill(t, file("source"), size)
			begin("clone", harness.FromVolume(ids["source"]))
			begin("clone of clone", harness.FromVolume(ids["clone"]))
			snapshot := d.Snapshot("snapshot of clone", ids["clone"]).GetSnapshotId()
			begin("restored", harness.FromSnapshot(snapshot))
			family := []string{"source", "clone", "clone of clone", "restored"}
			for _, name := range family {
				dataMustHold(t, file(name), size, inherited)
			}
			for _, name := range family {
				sums[name] = dataFill(t, file(name), size)
			}
			begin("restored later", harness.FromSnapshot(snapshot))
			sums["restored later"] = inherited
			family = append(family, "restored later")
			for _, name := range family {
				dataMustHold(t, file(name), size, sums[name])
			}

			for _, gone := range []string{"source", "clone"} {
				d.Release(gone, ids[gone])
				d.Delete(ids[gone])
			}
			_, err := d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
			dataMust(t, err)
			for _, name := range family[2:] {
				dataMustHold(t, file(name), size, sums[name])
				d.Release(name, ids[name])
				dataMustBeClean(t, kind.name, dataImage(dataPool(d), ids[name]))
				d.Use(name, ids[name], kind.capability)
				dataMustHold(t, file(name), size, sums[name])
				d.Release(name, ids[name])
				d.Delete(ids[name])
			}
			dataMustHoldNothing(t, dataPool(d))
		})
	}
}

func TestDataCopiesLargerThanTheirSourceSpanTheirVolume(t *testing.T) {
	d := harness.Start(t, harness.FilePool("16Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			source := d.Create(kind.name, kind.size, kind.capability).GetVolumeId()
			sum := dataFill(t, kind.file(d.Use(kind.name, source, kind.capability)), 4*dataMiB)
			snapshot := d.Snapshot(kind.name, source).GetSnapshotId()
			for name, from := range map[string]func(*csi.CreateVolumeRequest){
				"clone": harness.FromVolume(source), "restored": harness.FromSnapshot(snapshot),
			} {
				name = kind.name + "-" + name
				v := d.Create(name, dataGiB, kind.capability, from)
				if v.GetCapacityBytes() != dataGiB {
					t.Errorf("%s has %d bytes", name, v.GetCapacityBytes())
				}
				target := d.Use(name, v.GetVolumeId(), kind.capability)
				dataMustSpan(t, kind, target, dataGiB)
				dataMustHold(t, kind.file(target), 4*dataMiB, sum)
				d.Release(name, v.GetVolumeId())
				dataMustBeClean(t, kind.name, dataImage(dataPool(d), v.GetVolumeId()))
			}
			d.Release(kind.name, source)
		})
	}
}

// A filesystem in a block volume is its user's. A copy of it can be handed out
// as a filesystem where it has the right one.
func TestDataOfABlockVolumeCanBeClonedIntoAFilesystemVolume(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	block, ext4 := harness.Block(harness.Writer), harness.Mount("ext4", harness.Writer)
	source := d.Create("source", 64*dataMiB, block).GetVolumeId()
	device := d.Use("source", source, block)
	dataRun(t, "mkfs.ext4", "-q", device)
	dataRun(t, "e2label", device, "theirs")
	d.Release("source", source)
	clone := d.Create("clone", 0, ext4, harness.FromVolume(source)).GetVolumeId()
	d.Use("clone", clone, ext4)
	d.Release("clone", clone)
	if label := strings.TrimSpace(dataRun(t, "e2label", dataImage(dataPool(d), clone))); label != "theirs" {
		t.Errorf("the clone was formatted: its label is %q", label)
	}
}

// Where blocks cannot be shared, a copy takes time, during which the volume
// must not change.
func TestDataPoolWithoutReflinkCopiesVolumesThatAreNotAttached(t *testing.T) {
	poolDir := filepath.Join(harness.Filesystem(t, "ext4", 12*dataGiB), "pool")
	dataMust(t, os.Mkdir(poolDir, 0o700))
	d := harness.Start(t, harness.DirectoryPool(poolDir))
	for _, kind := range []dataKind{dataKinds[0], dataKinds[3]} {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			const size, written = dataGiB, 8 * dataMiB
			name := func(s string) string { return kind.name + "-" + s }
			source := d.Create(name("source"), size, kind.capability).GetVolumeId()
			file := kind.file(d.Use(name("source"), source, kind.capability))
			sum := dataFill(t, file, written)
			marks := []int64{100 * dataMiB, 500 * dataMiB, 900 * dataMiB} // islands between holes
			dataMark(t, file, marks)

			remedy := []string{"attached", "reflink", "stop", "XFS", "btrfs"}
			_, err := d.CreateSnapshot(d.Context(), &csi.CreateSnapshotRequest{Name: name("snapshot"), SourceVolumeId: source})
			dataCode(t, err, codes.FailedPrecondition, remedy...)
			request := &csi.CreateVolumeRequest{Name: name("clone"), VolumeCapabilities: []*csi.VolumeCapability{kind.capability}}
			harness.FromVolume(source)(request)
			_, err = d.CreateVolume(d.Context(), request)
			dataCode(t, err, codes.FailedPrecondition, remedy...)
			if left, err := os.ReadDir(filepath.Join(poolDir, ".staging")); err != nil || len(left) > 0 {
				t.Errorf("what was refused has left %v (%v)", left, err)
			}

			d.Release(name("source"), source)
			used := dataBlocks(t, dataImage(poolDir, source))
			snapshot := d.Snapshot(name("snapshot"), source).GetSnapshotId()
			d.Use(name("source"), source, kind.capability) // from here on it may be in use
			ids := map[string]string{
				name("restored"): d.Create(name("restored"), 0, kind.capability, harness.FromSnapshot(snapshot)).GetVolumeId(),
			}
			d.Release(name("source"), source)
			ids[name("clone")] = d.Create(name("clone"), 0, kind.capability, harness.FromVolume(source)).GetVolumeId()
			for copied, id := range ids {
				if n := dataBlocks(t, dataImage(poolDir, id)); n > used+dataMiB {
					t.Errorf("%s takes %d bytes, its source %d: holes were filled", copied, n, used)
				}
				dataMustBeClean(t, kind.name, dataImage(poolDir, id))
				file := kind.file(d.Use(copied, id, kind.capability))
				dataMustHold(t, file, written, sum)
				dataMustBeMarked(t, file, marks)
				d.Release(copied, id)
			}
			dataMustBeIdle(t, d, poolDir)
		})
	}
}

// dataMark writes a word at each offset.
func dataMark(t *testing.T, name string, offsets []int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	dataMust(t, err)
	defer f.Close()
	for _, offset := range offsets {
		if _, err := f.WriteAt([]byte("land"), offset); err != nil {
			t.Fatal(err)
		}
	}
	dataMust(t, f.Sync())
}

func dataMustBeMarked(t *testing.T, name string, offsets []int64) {
	t.Helper()
	f, err := os.Open(name)
	dataMust(t, err)
	defer f.Close()
	word := make([]byte, 4)
	for _, offset := range offsets {
		if _, err := f.ReadAt(word, offset); err != nil || string(word) != "land" {
			t.Errorf("%s has %q at %d (%v)", name, word, offset, err)
		}
	}
}

// A copy of a volume in use takes next to no space, where the pool's filesystem
// can share blocks. On btrfs images are not copied on write at every write
// (attribute C): a volume that is written at random would fall to pieces.
func TestDataPoolInADirectoryOfXFSOrBtrfsSharesBlocks(t *testing.T) {
	for _, fsType := range []string{"xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			poolDir := harness.Filesystem(t, fsType, 4*dataGiB)
			d := harness.Start(t, harness.DirectoryPool(poolDir))
			kind := dataKinds[0]
			const written = 32 * dataMiB
			source := d.Create("source", kind.size, kind.capability).GetVolumeId()
			sum := dataFill(t, kind.file(d.Use("source", source, kind.capability)), written)
			dataRun(t, "sync", "--file-system", poolDir)
			before := dataFree(t, poolDir)

			snapshot := d.Snapshot("snapshot", source).GetSnapshotId()
			ids := map[string]string{
				"source":   source,
				"restored": d.Create("restored", 0, kind.capability, harness.FromSnapshot(snapshot)).GetVolumeId(),
				"clone":    d.Create("clone", 0, kind.capability, harness.FromVolume(source)).GetVolumeId(),
			}
			dataRun(t, "sync", "--file-system", poolDir)
			if took := before - dataFree(t, poolDir); took > written/2 {
				t.Errorf("a snapshot and two copies of %d bytes took %d", written, took)
			}
			images := []string{filepath.Join(poolDir, "snapshots", "snapshot", "data")}
			for name, id := range ids {
				if name != "source" {
					d.Use(name, id, kind.capability)
				}
				dataMustHold(t, kind.file(d.Target(name)), written, sum)
				d.Release(name, id)
				images = append(images, dataImage(poolDir, id))
			}
			if fsType != "btrfs" {
				return
			}
			for _, image := range images {
				if attributes, _, _ := strings.Cut(dataRun(t, "lsattr", image), " "); !strings.Contains(attributes, "C") {
					t.Errorf("%s has the attributes %s: it is copied on write", image, attributes)
				}
			}
		})
	}
}

func dataFree(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	dataMust(t, unix.Statfs(dir, &st))
	return int64(st.Bfree) * st.Frsize
}

// Several volumes of one source share its blocks; none of them can be told from
// a volume that has them alone when it is full.
func TestDataCopiesCanBeOverwrittenInFull(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	block := harness.Block(harness.Writer)
	const size = 128 * dataMiB
	source := d.Create("source", size, block).GetVolumeId()
	sums := map[string]uint32{"source": dataFill(t, d.Use("source", source, block), size)}
	ids := map[string]string{"source": source}
	for i := range 3 {
		name := fmt.Sprintf("clone-%d", i)
		ids[name] = d.Create(name, 0, block, harness.FromVolume(source)).GetVolumeId()
		d.Use(name, ids[name], block)
	}
	for name := range ids {
		sums[name] = dataFill(t, d.Target(name), size)
	}
	for name, id := range ids {
		d.Release(name, id)
		d.Use(name, id, block)
		dataMustHold(t, d.Target(name), size, sums[name])
		d.Release(name, id)
	}
}
