//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlHostile are texts that would do harm as a part of a path, of a command
// line or of a log.
var ctlHostile = []string{
	".", "..", "../..", "../../../../etc/passwd", "/etc/passwd", "a/../../b", "./a", "a/b", "a/", "/", "//", "-", "-rf", "--help",
	".staging", ".trash", "volumes", "volumes/victim", "../victim", "../volumes/victim", "../../canary", "../canary/file",
	"orlop.json", "victim/data", "victim/../victim", "~", "~root", "$HOME", "$(reboot)", "`reboot`", "a;reboot", "a|b", "a&b", "*", "?", "[a]",
	"a b", " a", "a ", "a\nb", "\n", "a\r", "a\tb", "A", "É", "größe", "ａ", "a\u0301", "\u202egnp.exe", "\u2028", "🦀", "a\\b", `"quoted"`, "'", "%s%n%d", "%2e%2e%2f", "a:b", "a,b", "a=b",
	strings.Repeat("a", 64), strings.Repeat("a", 65), strings.Repeat("a", 127), strings.Repeat("a", 128), strings.Repeat("é", 64),
	strings.Repeat("../", 42), strings.Repeat(".", 128),
}

// ctlBanned are names that the specification bans: longer than 128 bytes, or
// with control characters other than tab and line break.
var ctlBanned = []string{
	"a\x00b", "\x00", "../\x00", "\x1b[31mred", "\x7f", "\u0085", strings.Repeat("a", 129), strings.Repeat("é", 65), strings.Repeat("a", 10_000), strings.Repeat("../", 4000),
}

// ctlSurrounded starts a driver on a directory pool beside which there is what
// must not be touched, and in which there is a volume called victim. The second
// result describes all that is not the pool.
func ctlSurrounded(t *testing.T) (d *harness.Driver, around func() string) {
	t.Helper()
	d = harness.New(t, harness.DirectoryPool("$DIR/around/pool"))
	outside := filepath.Join(d.Dir, "around")
	for _, dir := range []string{"pool", "canary", "victim", "volumes/victim"} {
		ctlMust(t, os.MkdirAll(filepath.Join(outside, dir), 0o700))
	}
	for _, file := range []string{"data", "file", "canary/file", "canary/data", "canary/volume.json", "victim/data", "victim/volume.json", "volumes/victim/data", "orlop.json"} {
		ctlMust(t, os.WriteFile(filepath.Join(outside, file), []byte("canary"), 0o600))
	}
	d.Start()
	return d, func() string {
		t.Helper()
		return ctlTree(t, outside, filepath.Join(outside, "pool")) // in which the driver is at work
	}
}

func TestAHostileNameIsOnlyAName(t *testing.T) {
	d, around := ctlSurrounded(t)
	before := around()
	ids := map[string]string{}
	for _, name := range ctlHostile {
		first, err := d.CreateVolume(d.Context(), ctlRequest(name))
		ctlWant(t, fmt.Sprintf("CreateVolume %.40q", name), err, codes.OK)
		id := first.GetVolume().GetVolumeId()
		parsed, err := pool.ParseID(id)
		if err != nil || !pool.ValidName(parsed.Name) {
			t.Errorf("CreateVolume %.40q gives the ID %q: %v", name, id, err)
		}
		if other, taken := ids[id]; taken {
			t.Errorf("%.40q and %.40q are both %s", name, other, id)
		}
		ids[id] = name
		again, err := d.CreateVolume(d.Context(), ctlRequest(name))
		ctlWant(t, fmt.Sprintf("CreateVolume %.40q again", name), err, codes.OK)
		if again.GetVolume().GetVolumeId() != id {
			t.Errorf("CreateVolume %.40q again gives %s, was %s", name, again.GetVolume().GetVolumeId(), id)
		}
		snapshot, err := d.CreateSnapshot(d.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
		ctlWant(t, fmt.Sprintf("CreateSnapshot %.40q", name), err, codes.OK)
		if got := snapshot.GetSnapshot().GetSnapshotId(); got != id {
			t.Errorf("snapshot %.40q has the ID %q, the volume of that name %q", name, got, id)
		}
	}
	for _, name := range ctlBanned {
		_, err := d.CreateVolume(d.Context(), ctlRequest(name))
		ctlWant(t, fmt.Sprintf("CreateVolume %.40q", name), err, codes.InvalidArgument, "name")
		_, err = d.CreateSnapshot(d.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: ctlIDs(t, d)[0]})
		ctlWant(t, fmt.Sprintf("CreateSnapshot %.40q", name), err, codes.InvalidArgument, "name")
	}
	ctlSame(t, "beside the pool", before, around())
	if got := ctlIDs(t, d); len(got) != len(ids) {
		t.Errorf("%d volumes are listed, %d were made", len(got), len(ids))
	}
	d.Restart()
	if got := ctlIDs(t, d); len(got) != len(ids) {
		t.Errorf("after a restart, %d volumes are listed, %d were made", len(got), len(ids))
	}
	for id := range ids {
		d.Delete(id)
		break // they are all alike
	}
	ctlSame(t, "beside the pool, at the end", before, around())
}

// A name that looks like the hash of another is another volume's all the same.
func TestANameIsNeverTakenForAnother(t *testing.T) {
	d, _ := ctlSurrounded(t)
	hashed := d.Create("Größe", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	_, err := d.CreateVolume(d.Context(), ctlRequest(ctlName(hashed)))
	ctlWant(t, "CreateVolume under the hash of another name", err, codes.AlreadyExists, "name")
	d.Snapshot("Größe", hashed)
	_, err = d.CreateSnapshot(d.Context(), &csi.CreateSnapshotRequest{Name: ctlName(hashed), SourceVolumeId: hashed})
	ctlWant(t, "CreateSnapshot under the hash of another name", err, codes.AlreadyExists)
	if got := ctlIDs(t, d); !slices.Equal(got, []string{hashed}) {
		t.Errorf("volumes: %v, want %s", got, hashed)
	}
}

func TestAHostileIDReachesNothing(t *testing.T) {
	d, around := ctlSurrounded(t)
	victim := d.Create("victim", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	d.Snapshot("victim", victim)
	parts := strings.Split(victim, "/")
	ids := []string{
		victim + "/", victim + "/.", victim + "/data", victim + "/..", "/" + victim, victim + "\x00", victim + "\n", " " + victim, strings.ToUpper(victim),
		parts[0] + "//" + parts[2], parts[0] + "/" + parts[1] + "/", "//" + parts[2], parts[0] + "/" + parts[1], parts[0] + "/" + parts[1] + "//victim",
		parts[0] + "/" + parts[1] + "/../victim", parts[0] + "/" + parts[1] + "/./victim", parts[0] + "/../" + parts[1] + "/victim", "../" + victim,
		parts[0] + "/" + parts[1] + "/.staging", parts[0] + "/" + parts[1] + "/.trash", parts[0] + "/" + parts[1] + "/..",
	}
	for _, text := range slices.Concat(ctlHostile, ctlBanned) {
		ids = append(ids, text, parts[0]+"/"+parts[1]+"/"+text, parts[0]+"/"+text+"/victim", text+"/"+parts[1]+"/victim")
	}
	before, list := around(), ctlTree(t, filepath.Join(d.Dir, "around"))
	block := harness.Block(harness.Writer)
	for _, id := range ids {
		for name, c := range map[string]struct {
			code codes.Code
			call func(ctx context.Context) error
		}{
			"DeleteVolume": {codes.OK, func(ctx context.Context) error {
				_, err := d.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
				return err
			}},
			"DeleteSnapshot": {codes.OK, func(ctx context.Context) error {
				_, err := d.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
				return err
			}},
			"ListSnapshots": {codes.OK, func(ctx context.Context) error {
				got, err := d.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SnapshotId: id})
				if len(got.GetEntries()) > 0 {
					t.Errorf("ListSnapshots of %.60q gives %v", id, got)
				}
				return err
			}},
			"CreateSnapshot": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
				return err
			}},
			"CreateVolume from a snapshot": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.CreateVolume(ctx, ctlRequest("v", harness.FromSnapshot(id)))
				return err
			}},
			"CreateVolume from a volume": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.CreateVolume(ctx, ctlRequest("v", harness.FromVolume(id)))
				return err
			}},
			"ControllerExpandVolume": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.ControllerExpandVolume(ctx, ctlExpand(id, ctlGiB, 0))
				return err
			}},
			"ControllerGetVolume": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id})
				return err
			}},
			"ControllerGetVolumeHealth": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
				return err
			}},
			"GetSnapshot": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: id})
				return err
			}},
			"ValidateVolumeCapabilities": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: id, VolumeCapabilities: []*csi.VolumeCapability{block}})
				return err
			}},
			"NodeStageVolume": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: d.Staging("s"), VolumeCapability: block})
				return err
			}},
			"NodePublishVolume": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: d.Staging("s"), TargetPath: d.Target("t"), VolumeCapability: block})
				return err
			}},
			"NodeGetVolumeStats": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: d.Target("t")})
				return err
			}},
			"NodeExpandVolume": {codes.NotFound, func(ctx context.Context) error {
				_, err := d.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: d.Target("t")})
				return err
			}},
		} {
			err := c.call(d.Context())
			if id == "" {
				continue
			}
			if status.Code(err) != c.code {
				t.Errorf("%s of %.60q: %v; want %s", name, id, err, c.code)
			}
			if message := status.Convert(err).Message(); strings.ContainsAny(message, "\n\x00\x1b") || len(message) > 1024 {
				t.Errorf("%s of %.60q: a message of %d bytes or with control characters", name, id, len(message))
			}
		}
	}
	ctlSame(t, "beside the pool", before, around())
	ctlSame(t, "all", list, ctlTree(t, filepath.Join(d.Dir, "around")))
}

// The links of this test lead out of the pool, or to another volume in it. Only
// root can plant them; the driver follows none all the same.
func TestALinkPlantedInThePoolIsNotFollowed(t *testing.T) {
	d, around := ctlSurrounded(t)
	dir := filepath.Join(d.Dir, "around", "pool")
	canary := filepath.Join(d.Dir, "around", "canary")
	block := harness.Block(harness.Writer)
	victim := d.Create("victim", 16*ctlMiB, block).GetVolumeId()
	d.Snapshot("victim", victim)
	prefix := strings.TrimSuffix(victim, "victim")

	// What a link takes the place of, in each volume and snapshot.
	plants := map[string]struct{ place, target string }{
		"data-out":          {"data", filepath.Join(canary, "data")},
		"data-up":           {"data", "../../../canary/data"},
		"data-in":           {"data", "../victim/data"},
		"metadata-out":      {"volume.json", filepath.Join(canary, "volume.json")},
		"metadata-in":       {"volume.json", "../victim/volume.json"},
		"directory-out":     {"", canary},
		"directory-up":      {"", "../../canary"},
		"directory-in":      {"", "victim"},
		"directory-through": {"", "../volumes/victim"},
	}
	for name := range plants {
		id := d.Create(name, 16*ctlMiB, block).GetVolumeId()
		d.Snapshot(name, id)
	}
	plant := func() {
		for name, p := range plants {
			for kind, metadata := range map[string]string{"volumes": "volume.json", "snapshots": "snapshot.json"} {
				place := filepath.Join(dir, kind, name)
				switch p.place {
				case "":
					ctlMust(t, os.RemoveAll(place))
				case "volume.json":
					place = filepath.Join(place, metadata)
					ctlMust(t, os.Remove(place))
				default:
					place = filepath.Join(place, p.place)
					ctlMust(t, os.Remove(place))
				}
				ctlMust(t, os.Symlink(p.target, place))
			}
		}
	}
	plant()
	before := around()
	ofVictim := func() string {
		return ctlTree(t, filepath.Join(dir, "volumes", "victim")) + ctlTree(t, filepath.Join(dir, "snapshots", "victim"))
	}
	whole := ofVictim()
	try := func(when string) {
		t.Helper()
		for name, p := range plants {
			id := prefix + name
			for _, c := range []ctlCall{
				ctlStages(d, id), ctlExpands(d, id, 32*ctlMiB), ctlSnaps(d, "of-"+name, id), ctlCreates(d, "copy-"+name, ctlRequired(0), harness.FromVolume(id)),
				ctlCreates(d, "restored-"+name, ctlRequired(0), harness.FromSnapshot(id)), ctlDeletes(d, id), ctlDeletesSnapshot(d, id),
			} {
				_, err := c.call()
				// With its image in place and its metadata in memory, a volume
				// still works.
				if p.place != "volume.json" && !strings.HasPrefix(c.name, "Delete") && err == nil {
					t.Errorf("%s, %s: %s is done", name, when, c.name)
				}
				if code := status.Code(err); code != codes.OK && code != codes.DataLoss && code != codes.NotFound && code != codes.FailedPrecondition {
					t.Errorf("%s, %s: %s: %v", name, when, c.name, err)
				}
				if strings.HasPrefix(c.name, "NodeStage") && err == nil {
					d.Release("s", id)
				}
			}
			health, err := d.ControllerGetVolumeHealth(d.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
			if status.Code(err) != codes.NotFound && len(health.GetVolumeHealth().GetHealthStatuses()) == 0 {
				t.Errorf("%s, %s: its health tells nothing: %v", name, when, err)
			}
		}
		ctlSame(t, "beside the pool, "+when, before, around())
		ctlSame(t, "another volume, "+when, whole, ofVictim())
	}
	try("while the driver runs")

	// Those that were not deleted, and links where nothing of the kind should
	// be, are there when it starts.
	d.Stop()
	for _, link := range []string{".staging/volumes-a", ".staging/link", ".trash/a.b", ".trash/victim.12345678", "volumes/zz-planted", "snapshots/zz-planted"} {
		for i, target := range []string{"../volumes/victim", "../snapshots/victim", "../../canary", canary} {
			ctlMust(t, os.Symlink(target, fmt.Sprintf("%s%d", filepath.Join(dir, link), i)))
		}
	}
	d.Start()
	try("when it was planted before the start")
	d.Restart()
	ctlSame(t, "beside the pool, after another restart", before, around())
	ctlSame(t, "another volume, after another restart", whole, ofVictim())
	ctlMust(t, ctlUse(t, d, "victim", victim).Close())
	d.Release("victim", victim)
	for kind, name := range map[string]string{"volumes": "volumes", "staging": ".staging", "trash": ".trash", "snapshots": "snapshots"} {
		t.Run("a pool whose "+kind+" is a link", func(t *testing.T) {
			d.Stop()
			place := filepath.Join(dir, name)
			ctlMust(t, os.Rename(place, place+"-moved"))
			ctlMust(t, os.Symlink(canary, place))
			ctlStartFails(t, d, place)
			ctlSame(t, "beside the pool", before, around())
			ctlMust(t, os.Remove(place))
			ctlMust(t, os.Rename(place+"-moved", place))
			d.Start()
		})
	}
}
