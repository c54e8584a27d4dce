//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlPlant writes files below a directory of a pool, with the directories that
// they are in.
func ctlPlant(t *testing.T, pool string, files map[string]int64) {
	t.Helper()
	for name, size := range files {
		path := filepath.Join(pool, name)
		ctlMust(t, os.MkdirAll(filepath.Dir(path), 0o700))
		ctlMust(t, os.WriteFile(path, bytes.Repeat([]byte("x"), int(size)), 0o600))
	}
}

// What a crash may leave at any instruction of a call is gone after the start,
// and its space is free.
func TestWhatACrashLeftIsGoneAfterTheStart(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	dir := ctlFilePool(d, "default")
	v := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	d.Snapshot("s", v)
	volume, err := os.ReadFile(filepath.Join(dir, "volumes", "v", "volume.json"))
	ctlMust(t, err)
	before := ctlState(t, d, "default")
	d.Kill()

	ctlPlant(t, dir, map[string]int64{
		".staging/volumes-empty-data/data":           0,
		".staging/volumes-half-made/data":            32 * ctlMiB,
		".staging/volumes-made/data":                 8 * ctlMiB,
		".staging/snapshots-made/data":               8 * ctlMiB,
		".staging/snapshots-made/snapshot.json":      300,
		".staging/metadata-v":                        100, // of a growth
		".staging/freeze-v":                          0,
		".staging/freeze-gone":                       0,
		".staging/reflink-from":                      4096,
		".staging/reflink-to":                        4096,
		".staging/orlop.json":                        100,
		".trash/v.abcdefgh/data":                     32 * ctlMiB,
		".trash/v.abcdefgh/volume.json":              300,
		".trash/half-freed.abcdefgh/volume.json":     300,
		".trash/s.12345678/data":                     8 * ctlMiB,
		".trash/s.12345678/snapshot.json":            300,
		".trash/what-was-given-an-odd-name/data":     8 * ctlMiB,
		".trash/damaged.abcdefgh/volume.json":        0,
		".trash/with-foreign-metadata.x/volume.json": 0,
	})
	ctlMust(t, os.Mkdir(filepath.Join(dir, ".staging/volumes-empty"), 0o700))
	ctlMust(t, os.WriteFile(filepath.Join(dir, ".staging/volumes-made/volume.json"), volume, 0o600))
	ctlMust(t, os.Mkdir(filepath.Join(dir, ".trash/freed.abcdefgh"), 0o700))
	d.Start()
	ctlEmptied(t, dir)
	ctlSame(t, "after the start", before, ctlState(t, d, "default"))
	health, err := d.NodeGetStorageHealth(d.Context(), &csi.NodeGetStorageHealthRequest{})
	ctlMust(t, err)
	if len(health.GetBackendHealth()) != 0 {
		t.Errorf("the pool is not well: %v", health)
	}
	d.Delete(v)
}

// What the driver did not make it does not remove, wherever it lies.
func TestWhatIsNotTheDriversIsLeftAndToldOf(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	dir := ctlFilePool(d, "default")
	d.Create("v", 16*ctlMiB, harness.Block(harness.Writer))
	d.Kill()
	strange := map[string]int64{
		".staging/volumes-x/notes.txt":      10,
		".staging/volumes-y/data/deep/file": 10,
		".trash/z.abcdefgh/data":            10,
		".trash/z.abcdefgh/notes.txt":       10,
	}
	ctlPlant(t, dir, strange)
	d.Start()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		health, err := d.NodeGetStorageHealth(d.Context(), &csi.NodeGetStorageHealthRequest{})
		ctlMust(t, err)
		if strings.Contains(health.String(), "LeftOver") && strings.Contains(health.String(), dir) {
			break
		}
		if time.Now().After(end) {
			t.Errorf("the storage health does not tell: %v", health)
			break
		}
	}
	for _, file := range []string{".staging/volumes-x/notes.txt", ".staging/volumes-y/data/deep/file", ".trash/z.abcdefgh/notes.txt"} {
		if _, err := os.Lstat(filepath.Join(dir, file)); err != nil {
			t.Errorf("somebody's file is gone: %v", err)
		}
	}
	// Even that is no reason to refuse work.
	d.Delete(d.Create("w", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId())
}

// An image grows before its metadata tells: between the two, a crash leaves an
// image that is longer, and what it is longer by was promised.
func TestAGrowthThatACrashCutOffIsCompleted(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	empty := ctlRoom(t, d, "default")
	block := harness.Block(harness.Writer)
	ids := map[string]string{}
	for _, provisioning := range []string{"thin", "thick"} {
		ids[provisioning] = d.Create(provisioning, 16*ctlMiB, block, harness.Parameters("provisioning", provisioning)).GetVolumeId()
	}
	odd := d.Create("odd", 16*ctlMiB, block).GetVolumeId()
	d.Kill()
	image := func(name string) string {
		return filepath.Join(ctlFilePool(d, "default"), "volumes", name, "data")
	}
	for name := range ids {
		ctlMust(t, os.Truncate(image(name), 48*ctlMiB))
	}
	ctlMust(t, os.Truncate(image("odd"), 16*ctlMiB+100)) // no growth of ours ends there
	for _, when := range []string{"after the start", "after another"} {
		d.Start()
		for _, id := range ids {
			got, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
			ctlMust(t, err)
			if got.GetVolume().GetCapacityBytes() != 48*ctlMiB {
				t.Errorf("%s, %s: the volume has %d bytes, want 48 MiB", id, when, got.GetVolume().GetCapacityBytes())
			}
		}
		got, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: odd})
		ctlMust(t, err)
		if got.GetVolume().GetCapacityBytes() != 16*ctlMiB {
			t.Errorf("%s: the volume has %d bytes, want 16 MiB", when, got.GetVolume().GetCapacityBytes())
		}
		if room := ctlRoom(t, d, "default"); room != empty-(48+48+16)*ctlMiB {
			t.Errorf("%s: room for %d bytes, want %d", when, room, empty-(48+48+16)*ctlMiB)
		}
		d.Kill()
	}
	d.Start()
	for name, id := range ids { // all of it can be used
		f := ctlUse(t, d, name, id)
		ctlFill(t, f, 48*ctlMiB, ctlMiB, 1)
		ctlMust(t, f.Close())
		d.Release(name, id)
	}
}

// A pool has one driver. The second is refused before it has touched anything.
func TestAPoolBelongsToOneDriver(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	ctlMust(t, err)
	t.Cleanup(func() { harness.Clean(t, dir) })
	ctlMust(t, os.Mkdir(filepath.Join(dir, "pool"), 0o700))
	for kind, config := range map[string]string{
		"directory": harness.DirectoryPool(filepath.Join(dir, "pool")),
		"file":      strings.ReplaceAll(harness.FilePool("1Gi"), "$DIR", dir),
	} {
		first := harness.Start(t, config)
		v := first.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
		second := harness.New(t, config)
		ctlStartFails(t, second, "pools[0]", "in use by another process")
		f := ctlUse(t, first, "v", v)
		ctlFill(t, f, 16*ctlMiB, ctlMiB, 1)
		ctlMust(t, f.Close())
		first.Release("v", v)
		first.Stop()

		second.Start() // now it is free; the first node's volumes keep their IDs
		if got := ctlIDs(t, second); len(got) != 1 || got[0] != v {
			t.Errorf("%s: the second driver has %v, want %s", kind, got, v)
		}
		second.Delete(v)
		ctlStartFails(t, first, "pools[0]", "in use by another process")
	}
}

// An empty directory where a pool was is a disk that is not mounted, not a new
// pool: what is made there would vanish below the mount.
func TestAPoolThatHasGoneIsNotBegunAnew(t *testing.T) {
	d := harness.New(t, harness.DirectoryPool("$DIR/pool"))
	pool, away := filepath.Join(d.Dir, "pool"), filepath.Join(d.Dir, "away")
	record := filepath.Join(d.Dir, "state", "pools", "default.json")
	ctlMust(t, os.Mkdir(pool, 0o700))
	d.Start()
	v := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	d.Stop()

	ctlMust(t, os.Rename(pool, away))
	ctlStartFails(t, d, "pools[0]: source.directory", pool, "no such file or directory")
	ctlMust(t, os.Mkdir(pool, 0o700))
	ctlStartFails(t, d, "pools[0]: source", pool, "is its disk mounted?", record)
	if left := ctlTree(t, pool); strings.Count(left, "\n") != 1 {
		t.Errorf("the start that failed wrote into the directory: %s", left)
	}

	// Another pool in its place is not it either.
	other := harness.New(t, harness.DirectoryPool(pool))
	other.Start()
	other.Stop()
	before := ctlTree(t, pool)
	ctlStartFails(t, d, "pools[0]: source", pool, "is the right disk mounted?", record)
	ctlSame(t, "the other pool", before, ctlTree(t, pool))

	ctlMust(t, os.RemoveAll(pool))
	ctlMust(t, os.Rename(away, pool))
	d.Start()
	if got := ctlIDs(t, d); len(got) != 1 || got[0] != v {
		t.Errorf("the pool that came back has %v, want %s", got, v)
	}
	d.Stop()

	// Only who removes the record means a new one.
	ctlMust(t, os.RemoveAll(pool))
	ctlMust(t, os.Mkdir(pool, 0o700))
	ctlMust(t, os.Remove(record))
	d.Start()
	if got := ctlIDs(t, d); len(got) != 0 {
		t.Errorf("the new pool has %v", got)
	}
}

// Who configures another place for a pool means another pool.
func TestAPoolIsBegunWhereTheConfigurationSaysAnotherPlace(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	v := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	d.Stop()
	first, err := os.ReadFile(d.Config)
	ctlMust(t, err)
	d.Configure("pools: [{name: default, source: {file: {path: $DIR/other.img, size: 1Gi, sparse: true}}}]\n")
	d.Start()
	if got := ctlIDs(t, d); len(got) != 0 {
		t.Errorf("the new pool has %v", got)
	}
	d.Stop()
	d.Configure(string(first))
	d.Start()
	if got := ctlIDs(t, d); len(got) != 1 || got[0] != v {
		t.Errorf("the first pool has %v, want %s", got, v)
	}
}

// A growth whose record cannot be written is an error, and neither loses data
// nor leaves a size that is not true, whether it is repeated or the driver is
// killed.
func TestAGrowthThatCannotBeRecordedLosesNothing(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	v := d.Create("v", 64*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	room := ctlRoom(t, d, "")
	obstacle := filepath.Join(d.Dir, "state", "mounts", "default", ".staging", "metadata-v")
	ctlMust(t, os.Mkdir(obstacle, 0o700))
	grow := func() error {
		_, err := d.ControllerExpandVolume(d.Context(), &csi.ControllerExpandVolumeRequest{
			VolumeId: v, CapacityRange: &csi.CapacityRange{RequiredBytes: 128 * ctlMiB},
		})
		return err
	}
	ctlWant(t, "the growth", grow(), codes.Internal, "recording the growth of volume v")
	ctlMust(t, os.Remove(obstacle))
	ctlWant(t, "its retry", grow(), codes.OK)
	for _, end := range []func(){d.Kill, d.Stop} {
		end()
		d.Start()
		found, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v})
		ctlWant(t, "after a start", err, codes.OK)
		if got := found.GetVolume().GetCapacityBytes(); got != 128*ctlMiB {
			t.Errorf("it has %d bytes", got)
		}
		if got := ctlRoom(t, d, ""); got != room-64*ctlMiB {
			t.Errorf("there is room for %d bytes, want %d", got, room-64*ctlMiB)
		}
	}
	target := d.Use("v", v, harness.Block(harness.Writer))
	ctlMust(t, os.WriteFile(target, make([]byte, ctlMiB), 0))
	d.Release("v", v)
}

func TestAFileThatHasGoneIsNotBegunAnew(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	v := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	d.Stop()
	image, away := filepath.Join(d.Dir, "default.img"), filepath.Join(d.Dir, "away.img")
	ctlMust(t, os.Rename(image, away))
	ctlStartFails(t, d, "pools[0]: source.file.path", image, "is its disk mounted?")
	if _, err := os.Lstat(image); err == nil {
		t.Error("the start that failed made a file")
	}
	ctlMust(t, os.Rename(away, image))
	d.Start()
	if got := ctlIDs(t, d); len(got) != 1 || got[0] != v {
		t.Errorf("the pool that came back has %v, want %s", got, v)
	}
}

// Two pools with one ID are one pool twice, and a copy of all its volumes.
func TestACopyOfAPoolIsNotUsedBesideIt(t *testing.T) {
	d := harness.New(t, harness.DirectoryPool("$DIR/pool"))
	ctlMust(t, os.Mkdir(filepath.Join(d.Dir, "pool"), 0o700))
	d.Start()
	d.Create("v", ctlMiB, harness.Block(harness.Writer))
	d.Stop()
	ctlMust(t, os.CopyFS(filepath.Join(d.Dir, "copy"), os.DirFS(filepath.Join(d.Dir, "pool"))))
	d.Configure("pools:\n- name: default\n  source: {directory: $DIR/pool}\n- name: copy\n  source: {directory: $DIR/copy}\n")
	ctlStartFails(t, d, "default", "copy", "same ID")
}

// The pool can move, and the host can be renamed: what exists keeps its ID.
func TestAPoolMovesWithItsVolumes(t *testing.T) {
	d := harness.New(t, harness.DirectoryPool("$DIR/pool"))
	ctlMust(t, os.Mkdir(filepath.Join(d.Dir, "pool"), 0o700))
	d.Start()
	v := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	s := d.Snapshot("s", v).GetSnapshotId()
	d.Stop()
	ctlMust(t, os.Rename(filepath.Join(d.Dir, "pool"), filepath.Join(d.Dir, "moved")))

	n := harness.New(t, "pools:\n- name: renamed\n  source: {directory: "+filepath.Join(d.Dir, "moved")+"}\n")
	n.Args = []string{"--node-id", "node-2"}
	n.Start()
	for rule, c := range map[string]ctlCall{
		"a volume":           ctlCreates(n, "v"),
		"growth of a volume": ctlExpands(n, v, 32*ctlMiB),
		"a restored volume":  ctlCreates(n, "restored", harness.FromSnapshot(s)),
		"a copy":             ctlCreates(n, "copy", ctlRequired(0), harness.FromVolume(v)),
		"a snapshot":         ctlSnaps(n, "s", v),
	} {
		_, err := c.call()
		ctlWant(t, rule, err, codes.OK)
	}
	got, err := n.ControllerGetVolume(n.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v})
	ctlMust(t, err)
	if got.GetVolume().GetVolumeId() != v || got.GetVolume().GetAccessibleTopology()[0].GetSegments()["topology.csi.orlop.dev/node"] != "node-2" {
		t.Errorf("the volume is now %v", got)
	}
	f := ctlUse(t, n, "v", v)
	ctlMust(t, f.Close())
	n.Release("v", v)
	n.Delete(v)
}

func TestAFilePoolGrowsWithItsConfigurationAndNeverShrinks(t *testing.T) {
	for _, sparse := range []bool{true, false} {
		t.Run(fmt.Sprintf("sparse %v", sparse), func(t *testing.T) {
			config := func(size string) string {
				return fmt.Sprintf("pools:\n- name: default\n  source: {file: {path: $DIR/default.img, size: %s, sparse: %v}}\n", size, sparse)
			}
			d := harness.Start(t, config("512Mi"))
			image := filepath.Join(d.Dir, "default.img")
			check := func(size int64) {
				t.Helper()
				info, err := os.Stat(image)
				ctlMust(t, err)
				if info.Size() != size {
					t.Errorf("the image has %d bytes, want %d", info.Size(), size)
				}
				switch blocks := ctlBlocks(t, image); {
				case sparse && blocks > 100*ctlMiB:
					t.Errorf("the sparse image takes %d bytes", blocks)
				case !sparse && blocks < size:
					t.Errorf("the image of %d bytes has only %d allocated", size, blocks)
				}
			}
			check(512 * ctlMiB)
			small := ctlRoom(t, d, "default")
			v := d.Create("v", 64*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
			f := ctlUse(t, d, "v", v)
			ctlFill(t, f, 16*ctlMiB, ctlMiB, 5)
			ctlMust(t, f.Close())

			d.Configure(config("1Gi"))
			d.Restart() // with the volume in use
			check(ctlGiB)
			large := ctlRoom(t, d, "default") + 64*ctlMiB
			if large < small+440*ctlMiB || large > small+512*ctlMiB {
				t.Errorf("growing by 512 MiB gave room for %d bytes more", large-small)
			}
			d.Restart()
			if again := ctlRoom(t, d, "default") + 64*ctlMiB; again != large {
				t.Errorf("after a restart there is room for %d bytes, was %d", again, large)
			}
			f, err := os.Open(d.Target("v"))
			ctlMust(t, err)
			ctlFilled(t, "the volume in use", f, 16*ctlMiB, ctlMiB, 5)
			ctlMust(t, f.Close())
			d.Release("v", v)
			rest := d.Create("rest", ctlRoom(t, d, "default"), harness.Block(harness.Writer)).GetVolumeId()
			d.Stop()

			d.Configure(config("768Mi"))
			ctlStartFails(t, d, "pools[0]: source.file.size", "shrink")
			check(ctlGiB)
			d.Configure(config("1Gi"))
			d.Start()
			d.Delete(rest)
			d.Delete(v)
		})
	}
}
