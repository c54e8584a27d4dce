//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlDamages are ways in which a metadata file can be damaged.
func ctlDamages(t *testing.T, foreign string) map[string]func(file string) {
	rewrite := func(change func(data []byte) []byte) func(file string) {
		return func(file string) {
			data, err := os.ReadFile(file)
			ctlMust(t, err)
			ctlMust(t, os.WriteFile(file, change(data), 0o600))
		}
	}
	return map[string]func(file string){
		"emptied":   rewrite(func([]byte) []byte { return nil }),
		"truncated": rewrite(func(data []byte) []byte { return data[:len(data)/2] }),
		"zeroed":    rewrite(func(data []byte) []byte { return make([]byte, len(data)) }),
		"torn":      rewrite(func(data []byte) []byte { clear(data[len(data)/2:]); return data }),
		"flipped":   rewrite(func(data []byte) []byte { data[bytes.Index(data, []byte(`"size"`))+9] ^= 1; return data }),
		"future": rewrite(func(data []byte) []byte {
			return bytes.Replace(data, []byte(`"version": 1`), []byte(`"version": 99`), 1)
		}),
		"text":    rewrite(func([]byte) []byte { return []byte("not JSON") }),
		"huge":    rewrite(func([]byte) []byte { return bytes.Repeat([]byte(" "), 4<<20) }),
		"missing": func(file string) { ctlMust(t, os.Remove(file)) },
		"foreign": func(file string) {
			data, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(file)), foreign, filepath.Base(file)))
			ctlMust(t, err)
			ctlMust(t, os.WriteFile(file, data, 0o600))
		},
		"directory": func(file string) {
			ctlMust(t, os.Remove(file))
			ctlMust(t, os.Mkdir(file, 0o700))
		},
		"pipe": func(file string) { // to open one waits for somebody who writes
			ctlMust(t, os.Remove(file))
			ctlMust(t, unix.Mkfifo(file, 0o600))
		},
	}
}

// A volume whose metadata cannot be trusted is told of, refused and left alone.
// The others do not notice, and it works again once its file is restored.
func TestAVolumeWithDamagedMetadataIsLeftAlone(t *testing.T) {
	d := harness.New(t, harness.FilePool("2Gi"))
	address := ctlServesMetrics(t, d)
	d.Start()
	block := harness.Block(harness.Writer)
	good := d.Create("good", 16*ctlMiB, block).GetVolumeId()
	prefix := strings.TrimSuffix(good, "good")
	d.Snapshot("good", good)
	damages := ctlDamages(t, "good")
	type saved struct{ volume, snapshot []byte }
	files := map[string]saved{}
	dir := ctlFilePool(d, "default")
	volumeFile := func(name string) string { return filepath.Join(dir, "volumes", name, "volume.json") }
	snapshotFile := func(name string) string { return filepath.Join(dir, "snapshots", name, "snapshot.json") }
	for name := range damages {
		id := d.Create(name, 16*ctlMiB, block).GetVolumeId()
		f := ctlUse(t, d, name, id)
		ctlFill(t, f, ctlMiB, ctlMiB, byte(len(name)))
		ctlMust(t, f.Close())
		d.Release(name, id)
		d.Snapshot(name, id)
		volume, err := os.ReadFile(volumeFile(name))
		ctlMust(t, err)
		snapshot, err := os.ReadFile(snapshotFile(name))
		ctlMust(t, err)
		files[name] = saved{volume, snapshot}
	}
	room := ctlRoom(t, d, "default")
	listed := ctlState(t, d)
	ctlOffline(t, d, func(pool string) {
		for name, damage := range damages {
			damage(filepath.Join(pool, "volumes", name, "volume.json"))
			damage(filepath.Join(pool, "snapshots", name, "snapshot.json"))
		}
	})
	d.Start()

	var want []string
	for name := range damages {
		want = append(want, prefix+name)
	}
	slices.Sort(want)
	for _, most := range []int32{0, 1, 5} {
		if got := ctlLists(d)[2].all(t, most, nil); !slices.Equal(got, want) {
			t.Errorf("unwell, in pages of %d: %v, want %v", most, got, want)
		}
	}
	if got := ctlIDs(t, d); !slices.Equal(got, []string{good}) {
		t.Errorf("listed: %v, want %s", got, good)
	}
	if got := ctlLists(d)[1].all(t, 0, nil); !slices.Equal(got, []string{good}) {
		t.Errorf("snapshots listed: %v, want %s", got, good)
	}
	if got := ctlRoom(t, d, "default"); got > room {
		t.Errorf("the room that damaged volumes take is given away: %d bytes are left, were %d", got, room)
	}
	metrics := ctlMetrics(t, address)
	if metrics[`orlop_pool_damaged_volumes{pool="default"}`] != float64(2*len(damages)) || metrics[`orlop_pool_healthy{pool="default"}`] != 0 {
		t.Errorf("the metrics tell of %v damaged ones, healthy %v", metrics[`orlop_pool_damaged_volumes{pool="default"}`], metrics[`orlop_pool_healthy{pool="default"}`])
	}
	storage, err := d.NodeGetStorageHealth(d.Context(), &csi.NodeGetStorageHealthRequest{})
	ctlMust(t, err)
	if !strings.Contains(storage.String(), "MetadataDamaged") {
		t.Errorf("the node's storage health does not tell: %v", storage)
	}

	ctlEmptied(t, dir)
	before := ctlTree(t, dir)
	for name := range damages {
		id := prefix + name
		health, err := d.ControllerGetVolumeHealth(d.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
		ctlWant(t, name+": its health", err, codes.OK)
		if statuses := health.GetVolumeHealth().GetHealthStatuses(); len(statuses) != 1 || statuses[0].GetReason() != "MetadataDamaged" ||
			statuses[0].GetStatus() != csi.VolumeHealthErrorType_INACCESSIBLE || !strings.Contains(statuses[0].GetMessage(), "restore its volume.json") {
			t.Errorf("%s: its health is %v", name, health)
		}
		for _, c := range []ctlCall{
			ctlCreates(d, name), ctlDeletes(d, id), ctlExpands(d, id, 32*ctlMiB), ctlSnaps(d, "of-"+name, id), ctlCreates(d, "copy", harness.FromVolume(id)),
			ctlStages(d, id), ctlPublishes(d, id), ctlSnaps(d, name, good), ctlDeletesSnapshot(d, id), ctlCreates(d, "restored", harness.FromSnapshot(id)),
		} {
			_, err := c.call()
			ctlWant(t, name+": "+c.name, err, codes.DataLoss, filepath.Join(dir), name, "damaged", "left alone")
		}
		_, err = d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
		ctlWant(t, name+": ControllerGetVolume", err, codes.DataLoss)
		_, err = d.GetSnapshot(d.Context(), &csi.GetSnapshotRequest{SnapshotId: id})
		ctlWant(t, name+": GetSnapshot", err, codes.DataLoss)
	}
	ctlEmptied(t, dir)
	ctlSame(t, "after all these calls", before, ctlTree(t, dir))

	// Nothing of this concerns the others.
	f := ctlUse(t, d, "good", good)
	ctlFill(t, f, ctlMiB, ctlMiB, 7)
	ctlMust(t, f.Close())
	d.Release("good", good)
	d.Delete(d.Create("new", 16*ctlMiB, block).GetVolumeId())

	ctlOffline(t, d, func(pool string) {
		for name, file := range files {
			for at, data := range map[string][]byte{"volumes/" + name + "/volume.json": file.volume, "snapshots/" + name + "/snapshot.json": file.snapshot} {
				ctlMust(t, os.RemoveAll(filepath.Join(pool, at)))
				ctlMust(t, os.WriteFile(filepath.Join(pool, at), data, 0o600))
			}
		}
	})
	d.Start()
	if got := ctlLists(d)[2].all(t, 0, nil); len(got) != 0 {
		t.Errorf("unwell when all is restored: %v", got)
	}
	ctlSame(t, "when all is restored", listed, ctlState(t, d))
	for name := range damages {
		f := ctlUse(t, d, name, prefix+name)
		ctlFilled(t, name, f, ctlMiB, ctlMiB, byte(len(name)))
		ctlMust(t, f.Close())
		d.Release(name, prefix+name)
		restored := d.Create("restored-"+name, 0, block, harness.FromSnapshot(prefix+name)).GetVolumeId()
		for _, c := range []ctlCall{ctlDeletes(d, restored), ctlDeletes(d, prefix+name), ctlDeletesSnapshot(d, prefix+name)} {
			_, err := c.call()
			ctlWant(t, name+": "+c.name+" when all is restored", err, codes.OK)
		}
	}
}

// ctlOffline stops the driver and does something to its file pool, which is
// mounted for that alone. The driver is not started again.
func ctlOffline(t *testing.T, d *harness.Driver, do func(pool string)) {
	t.Helper()
	d.Kill() // the pool stays mounted
	do(ctlFilePool(d, "default"))
	d.Start() // and is unmounted in good order
	d.Stop()
}

// What is missing of a volume is told as soon as it is, and is no reason to
// lose the rest.
func TestAVolumeWhoseImageIsDamagedIsToldOf(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	dir := ctlFilePool(d, "default")
	block := harness.Block(harness.Writer)
	for _, c := range []struct {
		rule, reason string
		damage       func(data string)
	}{
		{"missing", "ImageMissing", func(data string) { ctlMust(t, os.Remove(data)) }},
		{"truncated", "ImageTruncated", func(data string) { ctlMust(t, os.Truncate(data, 4096)) }},
		{"replaced", "ImageReplaced", func(data string) { ctlMust(t, os.Remove(data)); ctlMust(t, os.Mkdir(data, 0o700)) }},
	} {
		id := d.Create(c.rule, 16*ctlMiB, block).GetVolumeId()
		c.damage(filepath.Join(dir, "volumes", c.rule, "data"))
		check := func(when string) {
			t.Helper()
			health, err := d.ControllerGetVolumeHealth(d.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
			ctlWant(t, c.rule+", "+when, err, codes.OK)
			if statuses := health.GetVolumeHealth().GetHealthStatuses(); len(statuses) != 1 || statuses[0].GetReason() != c.reason || statuses[0].GetStatus() != csi.VolumeHealthErrorType_DATA_LOSS {
				t.Errorf("%s, %s: %v; want %s", c.rule, when, health, c.reason)
			}
			for _, call := range []ctlCall{ctlStages(d, id), ctlExpands(d, id, 32*ctlMiB), ctlSnaps(d, "of-"+c.rule, id), ctlCreates(d, "copy", harness.FromVolume(id))} {
				if _, err := call.call(); status.Code(err) != codes.DataLoss {
					t.Errorf("%s, %s: %s: %v; want DataLoss", c.rule, when, call.name, err)
				}
			}
			if got := ctlLists(d)[2].all(t, 1, nil); !slices.Equal(got, []string{id}) {
				t.Errorf("%s, %s: unwell are %v", c.rule, when, got)
			}
		}
		check("while the driver runs")
		d.Kill()
		d.Start()
		check("after a crash")
		if c.rule == "replaced" {
			ctlMust(t, os.Remove(filepath.Join(dir, "volumes", c.rule, "data")))
		}
		d.Delete(id) // there is nothing left to lose
	}
	ctlEmptied(t, dir)
}

// Metadata that is damaged while the driver runs is told of at once; what is in
// memory is still right.
func TestMetadataDamagedWhileTheDriverRunsIsToldOf(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	id := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	file := filepath.Join(ctlFilePool(d, "default"), "volumes", "v", "volume.json")
	ctlMust(t, os.WriteFile(file, []byte("damaged"), 0o600))
	health, err := d.ControllerGetVolumeHealth(d.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
	ctlMust(t, err)
	if statuses := health.GetVolumeHealth().GetHealthStatuses(); len(statuses) != 1 || statuses[0].GetReason() != "MetadataDamaged" || statuses[0].GetStatus() != csi.VolumeHealthErrorType_DEGRADED {
		t.Errorf("its health is %v", health)
	}
	_, err = ctlExpands(d, id, 32*ctlMiB).call() // writes it anew
	ctlMust(t, err)
	d.Kill()
	d.Start()
	got, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
	ctlMust(t, err)
	if got.GetVolume().GetCapacityBytes() != 32*ctlMiB {
		t.Errorf("the volume has %d bytes", got.GetVolume().GetCapacityBytes())
	}
}

// Without its identity a directory is not known to be a pool: the driver does
// not start, and changes nothing.
func TestAPoolWhoseIdentityIsDamagedIsNotOpened(t *testing.T) {
	d := harness.New(t, harness.DirectoryPool("$DIR/pool"))
	pool := filepath.Join(d.Dir, "pool")
	ctlMust(t, os.Mkdir(pool, 0o700))
	d.Start()
	v := d.Create("v", ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	d.Stop()
	for _, file := range []string{filepath.Join(pool, "orlop.json"), filepath.Join(d.Dir, "state", "pools", "default.json")} {
		whole, err := os.ReadFile(file)
		ctlMust(t, err)
		for rule, damaged := range map[string][]byte{
			"emptied":   nil,
			"truncated": whole[:len(whole)/2],
			"zeroed":    make([]byte, len(whole)),
			"flipped":   bytes.Replace(whole, []byte(`"id": "`), []byte(`"id": "z`), 1),
			"future":    bytes.Replace(whole, []byte(`"version": 1`), []byte(`"version": 99`), 1),
		} {
			ctlMust(t, os.WriteFile(file, damaged, 0o600))
			before := ctlTree(t, d.Dir)
			line := ctlStartFails(t, d, "pools[0]", filepath.Base(file))
			if rule == "future" && !strings.Contains(line, "99") {
				t.Errorf("a pool of a version to come: %s", line)
			}
			ctlSame(t, filepath.Base(file)+", "+rule, before, ctlTree(t, d.Dir))
		}
		// Nor if it is gone, which the record beside it tells.
		if filepath.Base(file) == "orlop.json" {
			ctlMust(t, os.Remove(file))
			before := ctlTree(t, d.Dir)
			ctlStartFails(t, d, "pools[0]", pool)
			ctlSame(t, "a pool without identity", before, ctlTree(t, d.Dir))
		}
		ctlMust(t, os.WriteFile(file, whole, 0o600))
	}
	d.Start()
	if got := ctlIDs(t, d); len(got) != 1 || got[0] != v {
		t.Errorf("when all is restored: %v, want %s", got, v)
	}
}

// A filesystem that was damaged before it is to grow is left to a human, however
// often it is tried: only what the growth itself has left is repaired unasked.
func TestADamagedFilesystemIsNotRepairedForAGrowth(t *testing.T) {
	d := harness.New(t, harness.DirectoryPool("$DIR/pool"))
	ctlMust(t, os.Mkdir(filepath.Join(d.Dir, "pool"), 0o700))
	d.Start()
	mount := harness.Mount("ext4", harness.Writer)
	id := d.Create("v", 64*ctlMiB, mount).GetVolumeId()
	d.Use("v", id, mount)
	d.Release("v", id)
	image := filepath.Join(d.Dir, "pool", "volumes", "v", "data")
	if said, err := exec.Command("debugfs", "-w", "-R", "clri <2>", image).CombinedOutput(); err != nil { // the root directory
		t.Fatalf("debugfs: %v: %s", err, said)
	}
	_, err := d.ControllerExpandVolume(d.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 160 * ctlMiB}})
	ctlMust(t, err)
	for try := range 3 {
		_, err := d.NodeStageVolume(d.Context(), &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: d.Staging("v"), VolumeCapability: mount})
		ctlWant(t, fmt.Sprintf("NodeStageVolume, try %d", try), err, codes.DataLoss, "repair")
	}
	d.Delete(id)
}
