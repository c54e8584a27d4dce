//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/tests/harness"
)

func TestNodeMountFlagsAreApplied(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, c := range []struct {
		kind  dataKind
		flags []string
		want  []string // in the mount table
	}{
		{dataKinds[0], []string{"noatime", "errors=remount-ro"}, []string{"noatime", "errors=remount-ro"}},
		{dataKinds[0], []string{"nodev,nosuid,noexec,commit=17"}, []string{"nodev", "nosuid", "noexec", "commit=17"}},
		{dataKinds[1], []string{"nodiratime", "logbsize=64k"}, []string{"nodiratime", "logbsize=64k"}},
		{dataKinds[2], []string{"noatime", "compress=zstd:1"}, []string{"noatime", "compress=zstd:1"}},
		{dataKinds[0], []string{"defaults", "x-systemd.automount", "rw"}, []string{"rw", "relatime"}},
	} {
		name := c.kind.name + strings.Join(c.flags, "")
		capability := harness.Mount(c.kind.name, harness.Writer, c.flags...)
		id := d.Create(name, c.kind.size, capability).GetVolumeId()
		name = strings.NewReplacer("=", "-", ",", "-").Replace(name)
		d.Use(name, id, capability)
		for _, path := range []string{d.Staging(name), d.Target(name)} {
			has := nodeMountOptions(t, path)
			for _, want := range c.want {
				if !slices.Contains(has, want) {
					t.Errorf("%v: %s has %v, not %s", c.flags, path, has, want)
				}
			}
		}
		d.Release(name, id)
	}
}

// nodeMountOptions gives the options of the mount at a path and of its
// filesystem: proc_pid_mountinfo(5).
func nodeMountOptions(t *testing.T, path string) []string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	dataMust(t, err)
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); fields[4] == path {
			return append(strings.Split(fields[5], ","), strings.Split(fields[len(fields)-1], ",")...)
		}
	}
	t.Fatalf("nothing is mounted at %s", path)
	return nil
}

func TestNodeMkfsOptionsAreApplied(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, c := range []struct {
		kind    dataKind
		options string
		show    []string // a command to which the image is appended
		want    []string
	}{
		{dataKinds[0], "-I 512 -N 4096", []string{"dumpe2fs", "-h"}, []string{"Inode size:	          512", "Inode count:              4096"}},
		{dataKinds[0], "-O ^has_journal -E stride=4", []string{"dumpe2fs", "-h"}, []string{"RAID stride:              4"}},
		{dataKinds[1], "-m reflink=0 -i size=1024", []string{"xfs_db", "-r", "-f", "-c", "info"}, []string{"reflink=0", "isize=1024"}},
		{dataKinds[2], "--csum sha256 -n 32768", []string{"btrfs", "inspect-internal", "dump-super"}, []string{"sha256", "nodesize\t\t32768"}},
	} {
		id := d.Create(c.options, c.kind.size, c.kind.capability, harness.Parameters("mkfsOptions", c.options)).GetVolumeId()
		name := c.kind.name
		d.Use(name, id, c.kind.capability)
		d.Release(name, id)
		image := dataImage(dataPool(d), id)
		shown := strings.Join(strings.Fields(dataRun(t, c.show[0], append(c.show[1:], image)...)), " ")
		for _, want := range c.want {
			if want = strings.Join(strings.Fields(want), " "); !strings.Contains(shown, want) {
				t.Errorf("mkfsOptions %q of %s: it has no %q:\n%s", c.options, c.kind.name, want, shown)
			}
		}
		dataMustBeClean(t, c.kind.name, image)
	}
}

// What mkfs says about options that do not go together is for the one who chose
// them. It fails as often as it is tried, and leaves a volume that can be
// deleted.
func TestNodeMkfsThatFailsIsToldAndLeavesNothing(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, c := range []struct {
		kind    dataKind
		options string
		says    string
	}{
		{dataKinds[0], "-I 300", "invalid inode size"},
		{dataKinds[1], "-b size=4095", "4095"},
		{dataKinds[2], "-n 5000", "5000"},
	} {
		t.Run(c.kind.name, func(t *testing.T) {
			d := d.In(t)
			v := nodeVolume{d, d.Create(c.kind.name, c.kind.size, c.kind.capability, harness.Parameters("mkfsOptions", c.options)).GetVolumeId(), c.kind.name, c.kind}
			for range 3 {
				err := v.stage()
				if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "mkfs."+c.kind.name) {
					t.Fatalf("got %v; it should have what mkfs says: %s", err, c.says)
				}
				if code := status.Code(err); code == codes.Unknown || code == codes.DeadlineExceeded {
					t.Errorf("code %s", code)
				}
				dataMustBeIdle(t, d, dataPool(d))
			}
			dataMust(t, v.remove())
		})
	}
	dataMustHoldNothing(t, dataPool(d))
}

// What the driver has not written, it does not write over: an image that was
// filled behind its back is somebody's data.
func TestNodeNeverFormatsWhatIsNotBlank(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds[:3] {
		t.Run(kind.name, func(t *testing.T) {
			v := nodeCreate(d.In(t), kind.name, kind)
			image := dataImage(dataPool(d), v.id)
			f, err := os.OpenFile(image, os.O_WRONLY, 0)
			dataMust(t, err)
			_, err = f.WriteAt([]byte("precious"), kind.size/2)
			dataMust(t, err)
			dataMust(t, f.Close())
			sum := dataSum(t, image, kind.size)
			for range 2 {
				dataCode(t, v.stage(), codes.FailedPrecondition, "not formatted")
				dataMustBeIdle(t, d, dataPool(d))
			}
			dataMustHold(t, image, kind.size, sum)
		})
	}
}

// Nor what was written through a device and is in its page cache alone, because
// whoever wrote it still has it open.
func TestNodeNeverFormatsWhatIsOnItsWayToTheVolume(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	id := d.Create("volume", 64<<20, nodeExt4.capability).GetVolumeId()
	image, err := os.OpenFile(dataImage(dataPool(d), id), os.O_RDWR, 0)
	dataMust(t, err)
	defer image.Close()
	device, err := loop.Attach(image, loop.Options{BlockSize: 4096})
	dataMust(t, err)
	node, err := os.OpenFile(device.Path, os.O_RDWR, 0)
	dataMust(t, err)
	_, err = node.WriteAt([]byte("somebody's"), 32<<20)
	dataMust(t, err)
	_, err = d.NodeStageVolume(d.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: id, StagingTargetPath: d.Staging("volume"), VolumeCapability: nodeExt4.capability,
	})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "not formatted") {
		t.Errorf("%v; want FailedPrecondition, not formatted", err)
	}
	got := make([]byte, 10)
	if _, err := node.ReadAt(got, 32<<20); err != nil || string(got) != "somebody's" {
		t.Errorf("%q, %v", got, err)
	}
	node.Close()
}

// A copy of a block volume is never formatted, whether it is asked for as what
// it is or as a filesystem.
func TestNodeNeverFormatsACopy(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	const size = 320 * dataMiB
	source := d.Create("source", size, nodeBlock.capability).GetVolumeId()
	sum := dataFill(t, d.Use("source", source, nodeBlock.capability), 4*dataMiB)
	snapshot := d.Snapshot("snapshot", source).GetSnapshotId()
	for from, change := range map[string]func(*csi.CreateVolumeRequest){
		"clone": harness.FromVolume(source), "restored": harness.FromSnapshot(snapshot),
	} {
		for _, kind := range dataKinds {
			t.Run(from+"/"+kind.name, func(t *testing.T) {
				d := d.In(t)
				name := from + "-" + kind.name
				v := nodeVolume{d, d.Create(name, 0, kind.capability, change).GetVolumeId(), name, kind}
				if kind.isBlock() {
					dataMust(t, v.stage())
					dataMust(t, v.publish())
					dataMustHold(t, d.Target(name), 4*dataMiB, sum)
					d.Release(name, v.id)
				} else {
					dataCode(t, v.stage(), codes.FailedPrecondition, "not formatted")
				}
				dataMustHold(t, dataImage(dataPool(d), v.id), 4*dataMiB, sum)
			})
		}
	}
	d.Release("source", source)
}

// A copy of a volume that never had a filesystem gets one of its own.
func TestNodeFormatsACopyOfAnEmptyVolume(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds[:3] {
		source := d.Create(kind.name, kind.size, kind.capability).GetVolumeId()
		snapshot := d.Snapshot(kind.name, source).GetSnapshotId()
		for name, change := range map[string]func(*csi.CreateVolumeRequest){
			kind.name + "-clone": harness.FromVolume(source), kind.name + "-restored": harness.FromSnapshot(snapshot),
		} {
			id := d.Create(name, 0, kind.capability, change).GetVolumeId()
			dataFill(t, kind.file(d.Use(name, id, kind.capability)), dataMiB)
			d.Release(name, id)
			dataMustBeClean(t, kind.name, dataImage(dataPool(d), id))
		}
	}
}

func TestNodeVolumeStats(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			v := nodeCreate(d, kind.name, kind)
			stats := func(id, path string) (map[csi.VolumeUsage_Unit]*csi.VolumeUsage, error) {
				response, err := d.NodeGetVolumeStats(d.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: path, StagingTargetPath: d.Staging(v.name)})
				usage := map[csi.VolumeUsage_Unit]*csi.VolumeUsage{}
				for _, u := range response.GetUsage() {
					usage[u.GetUnit()] = u
				}
				return usage, err
			}
			_, err := stats(v.id, d.Target(v.name))
			dataCode(t, err, codes.NotFound)
			d.Use(v.name, v.id, kind.capability)
			for _, wrong := range []struct {
				id, path string
				code     codes.Code
			}{
				{v.id, "", codes.InvalidArgument},
				{"", d.Target(v.name), codes.InvalidArgument},
				{v.id, filepath.Join(d.Dir, "targets"), codes.NotFound},
				{v.id, d.Target("not there"), codes.NotFound},
				{v.id, d.Target("not/there/either"), codes.NotFound},
				{v.id, "/", codes.NotFound},
				{v.id + "-not", d.Target(v.name), codes.NotFound},
				{"../..", d.Target(v.name), codes.NotFound},
			} {
				if _, err := stats(wrong.id, wrong.path); status.Code(err) != wrong.code {
					t.Errorf("ID %q, path %q: %v, want %s", wrong.id, wrong.path, err, wrong.code)
				}
			}

			dataFill(t, kind.file(d.Target(v.name)), 8*dataMiB)
			dataRun(t, "sync", "--file-system", d.Target(v.name)) // btrfs counts at the next commit
			usage, err := stats(v.id, d.Target(v.name))
			dataMust(t, err)
			if kind.isBlock() {
				if total := usage[csi.VolumeUsage_BYTES].GetTotal(); total != kind.size || len(usage) != 1 {
					t.Errorf("a device of %d bytes: %v", kind.size, usage)
				}
				d.Release(v.name, v.id)
				return
			}
			var st unix.Statfs_t
			dataMust(t, unix.Statfs(d.Target(v.name), &st))
			bytes, inodes := usage[csi.VolumeUsage_BYTES], usage[csi.VolumeUsage_INODES]
			if bytes.GetTotal() != int64(st.Blocks)*st.Frsize || bytes.GetUsed() != int64(st.Blocks-st.Bfree)*st.Frsize || bytes.GetAvailable() != int64(st.Bavail)*st.Frsize {
				t.Errorf("bytes are %v, statfs says %+v", bytes, st)
			}
			if bytes.GetUsed() < 8*dataMiB {
				t.Errorf("8 MiB were written, %d bytes are used", bytes.GetUsed())
			}
			if inodes.GetTotal() != int64(st.Files) || inodes.GetUsed() != int64(st.Files-st.Ffree) || inodes.GetAvailable() != int64(st.Ffree) {
				t.Errorf("inodes are %v, statfs says %+v", inodes, st)
			}
			if st.Files == 0 && inodes != nil {
				t.Errorf("%s has no number of inodes, and reports %v", kind.name, inodes)
			}
			if _, err := stats(v.id, d.Staging(v.name)); err != nil {
				t.Errorf("at the staging path: %v", err)
			}
			d.Release(v.name, v.id)
		})
	}
}
