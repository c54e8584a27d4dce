//go:build integration

package integration

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlCall is one call and its name.
type ctlCall struct {
	name string
	call func() (proto.Message, error)
}

func ctlCreates(d *harness.Driver, name string, changes ...ctlChange) ctlCall {
	return ctlCall{"CreateVolume " + name, func() (proto.Message, error) {
		return d.CreateVolume(d.Context(), ctlRequest(name, changes...))
	}}
}

func ctlSnaps(d *harness.Driver, name, volume string) ctlCall {
	return ctlCall{"CreateSnapshot " + name, func() (proto.Message, error) {
		return d.CreateSnapshot(d.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume})
	}}
}

func ctlExpands(d *harness.Driver, id string, size int64) ctlCall {
	return ctlCall{"ControllerExpandVolume " + id, func() (proto.Message, error) {
		return d.ControllerExpandVolume(d.Context(), ctlExpand(id, size, 0))
	}}
}

func ctlModifies(d *harness.Driver, id string, pairs ...string) ctlCall {
	return ctlCall{"ControllerModifyVolume " + id, func() (proto.Message, error) {
		return d.ControllerModifyVolume(d.Context(), &csi.ControllerModifyVolumeRequest{VolumeId: id, MutableParameters: limMap(pairs...)})
	}}
}

func ctlDeletes(d *harness.Driver, id string) ctlCall {
	return ctlCall{"DeleteVolume " + id, func() (proto.Message, error) {
		return d.DeleteVolume(d.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	}}
}

func ctlDeletesSnapshot(d *harness.Driver, id string) ctlCall {
	return ctlCall{"DeleteSnapshot " + id, func() (proto.Message, error) {
		return d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
	}}
}

// ctlEveryWay runs check at once, once more, after the driver was restarted,
// and after it was killed.
func ctlEveryWay(d *harness.Driver, check func(when string)) {
	check("the first time")
	check("again")
	d.Restart()
	check("after a restart")
	d.Kill()
	d.Start()
	check("after a crash")
}

func TestEveryCallAnswersTheSameWhenItIsRepeated(t *testing.T) {
	for kind, config := range map[string]func(*testing.T) string{
		"file":      func(*testing.T) string { return harness.FilePool("2Gi") },
		"directory": func(t *testing.T) string { return harness.DirectoryPool(ctlExt4(t, 2*ctlGiB)) },
	} {
		t.Run(kind, func(t *testing.T) {
			d := harness.Start(t, config(t))
			files := ctlCapabilities(harness.Mount("xfs", harness.Writer))
			source := d.Create("source", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
			grown := d.Create("grown", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
			snapshot := d.Snapshot("snapshot", source).GetSnapshotId()
			calls := []ctlCall{
				ctlCreates(d, "block"),
				ctlCreates(d, "no-size", ctlRequired(0)),
				ctlCreates(d, "limited", ctlRequired(0), ctlLimit(100_000)),
				ctlCreates(d, "files", ctlRequired(1), files, harness.Parameters("mkfsOptions", "-i  size=1024 ")),
				ctlCreates(d, "thick", harness.Parameters("provisioning", "thick")),
				ctlCreates(d, "A name that is hashed"),
				ctlCreates(d, "copy", ctlRequired(0), harness.FromVolume(source)),
				ctlCreates(d, "restored", ctlRequired(32*ctlMiB), harness.FromSnapshot(snapshot)),
				ctlSnaps(d, "s", source),
				ctlSnaps(d, "A snapshot's name that is hashed", source),
				ctlExpands(d, grown, 32*ctlMiB),
				ctlCreates(d, "limited-io", limParameters("writeIOPS", "2k")),
				ctlModifies(d, source, "readBandwidth", "10Mi"),
				{"ValidateVolumeCapabilities", func() (proto.Message, error) {
					return d.ValidateVolumeCapabilities(d.Context(), &csi.ValidateVolumeCapabilitiesRequest{VolumeId: source, VolumeCapabilities: []*csi.VolumeCapability{harness.Block(harness.Writer)}})
				}},
				{"ControllerGetVolume", func() (proto.Message, error) {
					return d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: grown})
				}},
				{"GetSnapshot", func() (proto.Message, error) {
					return d.GetSnapshot(d.Context(), &csi.GetSnapshotRequest{SnapshotId: snapshot})
				}},
				{"ListVolumes", func() (proto.Message, error) { return d.ListVolumes(d.Context(), &csi.ListVolumesRequest{}) }},
				{"ListSnapshots", func() (proto.Message, error) { return d.ListSnapshots(d.Context(), &csi.ListSnapshotsRequest{}) }},
				{"ControllerGetVolumeHealth", func() (proto.Message, error) {
					return d.ControllerGetVolumeHealth(d.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: source})
				}},
				{"ControllerListVolumeHealth", func() (proto.Message, error) {
					return d.ControllerListVolumeHealth(d.Context(), &csi.ControllerListVolumeHealthRequest{})
				}},
				{"ControllerGetCapabilities", func() (proto.Message, error) {
					return d.ControllerGetCapabilities(d.Context(), &csi.ControllerGetCapabilitiesRequest{})
				}},
			}
			if kind == "file" { // others write on the directory's filesystem
				calls = append(calls, ctlCall{"GetCapacity", func() (proto.Message, error) { return d.GetCapacity(d.Context(), &csi.GetCapacityRequest{}) }})
			}
			first := map[string]proto.Message{}
			ctlEveryWay(d, func(when string) {
				for _, c := range calls {
					got, err := c.call()
					ctlWant(t, c.name+" "+when, err, codes.OK)
					if want, asked := first[c.name]; asked && !proto.Equal(got, want) {
						t.Errorf("%s %s: %v; at first %v", c.name, when, got, want)
					} else if !asked {
						first[c.name] = got
					}
				}
			})

			var deletions []ctlCall
			for _, id := range ctlIDs(t, d) {
				deletions = append(deletions, ctlDeletes(d, id))
			}
			list, err := d.ListSnapshots(d.Context(), &csi.ListSnapshotsRequest{})
			ctlMust(t, err)
			for _, e := range list.GetEntries() {
				deletions = append(deletions, ctlDeletesSnapshot(d, e.GetSnapshot().GetSnapshotId()))
			}
			if len(deletions) != 14 {
				t.Errorf("%d things to delete, want 11 volumes and 3 snapshots", len(deletions))
			}
			ctlEveryWay(d, func(when string) {
				for _, c := range deletions {
					_, err := c.call()
					ctlWant(t, c.name+" "+when, err, codes.OK)
				}
				if ids := ctlIDs(t, d); len(ids) > 0 {
					t.Errorf("left %s: %v", when, ids)
				}
			})
		})
	}
}

// Whenever the driver dies, each call that it was at can be repeated, and
// nothing is left of the first try.
func TestACallThatACrashCutOffCanBeRepeated(t *testing.T) {
	d := harness.Start(t, harness.FilePool("2Gi"))
	empty := ctlRoom(t, d, "default")
	block := harness.Block(harness.Writer)
	source := d.Create("source", 16*ctlMiB, block).GetVolumeId()
	pool := source[:len(source)-len("source")]
	snapshot := d.Snapshot("snapshot", source).GetSnapshotId()
	for round := range 15 {
		name := func(kind string) string { return fmt.Sprintf("%s-%d", kind, round) }
		grown := d.Create(name("grown"), 16*ctlMiB, block).GetVolumeId()
		deleted := d.Create(name("deleted"), 16*ctlMiB, block, harness.Parameters("provisioning", "thick")).GetVolumeId()
		unsnapped := d.Snapshot(name("unsnapped"), source).GetSnapshotId()
		calls := []ctlCall{
			ctlCreates(d, name("thin")),
			ctlCreates(d, name("thick"), harness.Parameters("provisioning", "thick")),
			ctlCreates(d, name("restored"), harness.FromSnapshot(snapshot)),
			ctlSnaps(d, name("snapped"), source),
			ctlExpands(d, grown, 32*ctlMiB),
			ctlDeletes(d, deleted),
			ctlDeletesSnapshot(d, unsnapped),
		}
		var inFlight sync.WaitGroup
		for _, c := range calls {
			inFlight.Go(func() {
				_, err := c.call()
				switch status.Code(err) {
				case codes.OK, codes.Unavailable, codes.Canceled: // or its connection was
				default:
					t.Errorf("%s, cut off: %v", c.name, err)
				}
			})
		}
		time.Sleep(rand.N(40 * time.Millisecond))
		d.Kill()
		inFlight.Wait()
		d.Start()
		for _, c := range calls {
			_, err := c.call()
			ctlWant(t, c.name+" after a crash", err, codes.OK)
		}
		ctlEmptied(t, ctlFilePool(d, "default"))
		var want []string
		for _, kind := range []string{"grown", "restored", "source", "thick", "thin"} {
			if kind != "source" {
				kind = name(kind)
			}
			want = append(want, pool+kind)
		}
		if ids := ctlIDs(t, d); !slices.Equal(ids, want) {
			t.Errorf("volumes: %v, want %v", ids, want)
		}
		// Nothing was counted twice, or forgotten.
		ctlRoomSoon(t, d, "default", empty-(16+32+16+16+16)*ctlMiB)
		for _, id := range want {
			if id != source {
				d.Delete(id)
			}
		}
		_, err := d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: pool + name("snapped")})
		ctlMust(t, err)
	}
	ctlEmptied(t, ctlFilePool(d, "default"))
	left, err := filepath.Glob(filepath.Join(ctlFilePool(d, "default"), "*", "*"))
	ctlMust(t, err)
	if len(left) != 2 {
		t.Errorf("the pool holds %v, want a volume and a snapshot", left)
	}
}
