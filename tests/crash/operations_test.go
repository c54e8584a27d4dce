//go:build integration

package crash

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"syscall"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/tests/harness"
)

// operation is one call to the driver, and what there is to be done around it.
// Nil is nothing to be done.
type operation struct {
	name    string
	alone   bool                                      // no other volume is in use
	once    func(w *world)                            // makes what all points share
	prepare func(w *world)                            // makes what the call starts from
	call    func(ctx context.Context, w *world) error // nil is the start of the driver
	check   func(w *world)                            // looks at the data after the call, and may use the volume
	started func(w *world)                            // looks at what the start after a kill has left
	undo    func(w *world)                            // takes away what prepare and call made, however far the call got
	follow  func(w *world)                            // makes up for what a failure of the power brings forward
	revive  func(w *world)                            // does again what a failure of the power has undone of prepare and once
	ends    bool                                      // the call takes something away: to give it up is to repeat it
	most    int                                       // tries no points after this one; 0 is all

	shares   bool // blocks: not in a pool on a filesystem that cannot
	copies   bool // bytes: only in such a pool
	fleeting bool // it makes mounts and devices, which no failure of the power outlives
	sample   bool // the power fails in it also where not all is tried
	single   bool // the power fails in it while no other test's disk has failed
}

var (
	ext4  = harness.Mount("ext4", harness.Writer)
	xfs   = harness.Mount("xfs", harness.Writer)
	btrfs = harness.Mount("btrfs", harness.Writer)
	block = harness.Block(harness.Writer)
)

// inlineID is an ID as the kubelet makes them for inline volumes.
const inlineID = "csi-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// The volume that is tried is "v", its source is "source", the snapshot is
// "cut".
var operations = []operation{
	{
		name:   "CreateVolume, empty",
		sample: true,
		call:   create(64*mib, ext4),
		check:  func(w *world) { w.blank("v", ext4) },
		undo:   goneV,
	},
	{
		name:  "CreateVolume, thick",
		call:  create(64*mib, ext4, harness.Parameters("provisioning", "thick")),
		check: func(w *world) { w.thick("v", 64*mib); w.blank("v", ext4) },
		undo:  goneV,
	},
	{
		name:   "CreateVolume, from a snapshot",
		shares: true,
		once:   func(w *world) { w.source("source", 64*mib, ext4); w.cut() },
		call:   copyOfSnapshot(64*mib, ext4),
		check:  func(w *world) { w.copied("v", ext4) },
		undo:   goneV,
	},
	{
		name:   "CreateVolume, from a snapshot, thick",
		shares: true,
		once:   func(w *world) { w.source("source", 64*mib, ext4); w.cut() },
		call:   copyOfSnapshot(64*mib, ext4, harness.Parameters("provisioning", "thick")),
		check:  func(w *world) { w.thick("v", 64*mib); w.copied("v", ext4) },
		undo:   goneV,
	},
	{
		name:    "CreateVolume, from a live volume",
		shares:  true,
		once:    func(w *world) { w.source("source", 64*mib, ext4) },
		prepare: func(w *world) { w.floor = w.live["source"].Safe.Load() },
		call: func(ctx context.Context, w *world) error {
			return create(64*mib, ext4, harness.FromVolume(w.id("source")))(ctx, w)
		},
		check: func(w *world) { w.copied("v", ext4) },
		undo:  goneV,
	},
	{
		name:   "CreateVolume, from a snapshot, by copying",
		copies: true,
		once:   func(w *world) { w.rest("source", 64*mib, ext4); w.must(snapshot(w.Context(), w)) },
		call:   copyOfSnapshot(64*mib, ext4),
		check:  func(w *world) { w.use("v", ext4); w.holds("v", "source") },
		undo:   goneV,
	},
	{
		name:   "CreateVolume, from a volume, thick, by copying",
		sample: true,
		copies: true,
		once:   func(w *world) { w.rest("source", 64*mib, ext4) },
		call: func(ctx context.Context, w *world) error {
			return create(64*mib, ext4, harness.FromVolume(w.id("source")), harness.Parameters("provisioning", "thick"))(ctx, w)
		},
		check: func(w *world) { w.thick("v", 64*mib); w.use("v", ext4); w.holds("v", "source") },
		undo:  goneV,
	},
	{
		name:   "CreateSnapshot, by copying",
		sample: true,
		copies: true,
		once:   func(w *world) { w.rest("source", 64*mib, ext4) },
		call:   snapshot,
		check: func(w *world) {
			w.must(copyOfSnapshot(64*mib, ext4)(w.Context(), w))
			w.use("v", ext4)
			w.holds("v", "source")
			goneV(w)
		},
		undo: func(w *world) { w.uncut("cut") },
	},
	{
		name:    "DeleteSnapshot, of a copy",
		copies:  true,
		once:    func(w *world) { w.rest("source", 64*mib, ext4) },
		prepare: func(w *world) { w.must(snapshot(w.Context(), w)) },
		call: func(ctx context.Context, w *world) error {
			_, err := w.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: w.id("cut")})
			return err
		},
		ends: true,
	},
	{
		name:    "DeleteVolume",
		prepare: func(w *world) { w.Create("v", 64*mib, ext4); w.use("v", ext4); w.note("v"); w.leave("v", w.id("v")) },
		call: func(ctx context.Context, w *world) error {
			_, err := w.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: w.id("v")})
			return err
		},
		ends: true,
	},
	{
		name:    "CreateSnapshot, of a live volume",
		sample:  true,
		shares:  true,
		once:    func(w *world) { w.source("source", 64*mib, ext4) },
		prepare: func(w *world) { w.floor = w.live["source"].Safe.Load() },
		call:    snapshot,
		check: func(w *world) {
			w.must(copyOfSnapshot(64*mib, ext4)(w.Context(), w))
			w.copied("v", ext4)
			goneV(w)
		},
		undo: func(w *world) { w.uncut("cut") },
	},
	{
		name:    "CreateSnapshot, of a live block volume",
		shares:  true,
		once:    func(w *world) { w.source("source", 64*mib, block) },
		prepare: func(w *world) { w.floor = w.live["source"].Safe.Load() },
		call:    snapshot,
		check: func(w *world) {
			w.must(copyOfSnapshot(64*mib, block)(w.Context(), w))
			w.copied("v", block)
			goneV(w)
		},
		undo: func(w *world) { w.uncut("cut") },
	},
	{
		name:    "DeleteSnapshot",
		shares:  true,
		once:    func(w *world) { w.source("source", 64*mib, ext4) },
		prepare: func(w *world) { w.cut() },
		call: func(ctx context.Context, w *world) error {
			_, err := w.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: w.id("cut")})
			return err
		},
		ends: true,
	},
	{
		name:    "CreateVolumeGroupSnapshot, of live volumes",
		shares:  true,
		once:    func(w *world) { w.source("source", 64*mib, ext4) },
		prepare: func(w *world) { w.floor = w.live["source"].Safe.Load() },
		call:    groupSnapshot,
		started: (*world).groupIsWhole,
		check: func(w *world) {
			w.must(create(64*mib, ext4, harness.FromSnapshot(w.member("source")))(w.Context(), w))
			w.copied("v", ext4)
			goneV(w)
		},
		undo: func(w *world) { w.end("DeleteVolumeGroupSnapshot", w.ungroup) },
	},
	{
		name:    "CreateVolumeGroupSnapshot, with a block volume of a pod",
		shares:  true,
		once:    func(w *world) { w.inPod("raw") },
		call:    groupSnapshot,
		started: (*world).groupIsWhole,
		undo:    func(w *world) { w.end("DeleteVolumeGroupSnapshot", w.ungroup) },
	},
	{
		name:    "DeleteVolumeGroupSnapshot",
		shares:  true,
		once:    func(w *world) { w.source("source", 64*mib, ext4) },
		prepare: func(w *world) { w.must(groupSnapshot(w.Context(), w)) },
		call:    func(ctx context.Context, w *world) error { return w.ungroup(ctx) },
		ends:    true,
	},
	{
		name:    "ControllerExpandVolume, thin, in use",
		follow:  func(w *world) { w.must(nodeExpand(w.Context(), w)) }, // to stage it does so
		revive:  func(w *world) { w.use("v", xfs) },
		prepare: func(w *world) { w.Create("v", 320*mib, xfs); w.use("v", xfs); w.note("v") },
		call:    expand(400 * mib),
		check:   func(w *world) { w.must(nodeExpand(w.Context(), w)); w.spans("v", 400*mib); w.holds("v", "v") },
		undo:    goneV,
	},
	{
		name: "ControllerExpandVolume, thick",
		prepare: func(w *world) {
			w.Create("v", 64*mib, block, harness.Parameters("provisioning", "thick"))
			w.use("v", block)
			w.note("v")
			w.leave("v", w.id("v"))
		},
		call:  expand(96 * mib),
		check: func(w *world) { w.thick("v", 96*mib); w.use("v", block); w.holds("v", "v") },
		undo:  goneV,
	},
	{
		name:   "ControllerModifyVolume, in use",
		revive: func(w *world) { w.use("v", ext4) },
		prepare: func(w *world) {
			w.Create("v", 64*mib, ext4, func(r *csi.CreateVolumeRequest) {
				r.MutableParameters = map[string]string{"readIOPS": "1k"}
			})
			w.use("v", ext4)
			w.note("v")
		},
		call: func(ctx context.Context, w *world) error {
			_, err := w.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{
				VolumeId: w.id("v"), MutableParameters: map[string]string{"writeIOPS": "2k"},
			})
			return err
		},
		check: func(w *world) {
			want := pool.Limits{ReadIOPS: 1000, WriteIOPS: 2000}
			if got := w.metadata("volumes/v").Limits; got != want {
				w.t.Errorf("the limits are %+v, want %+v", got, want)
			}
			w.holds("v", "v")
		},
		undo: goneV,
	},
	{
		name:     "NodeStageVolume, the first, ext4",
		fleeting: true,
		sample:   true,
		prepare:  func(w *world) { w.Create("v", 64*mib, ext4); w.Staging("v") },
		call:     stage(ext4),
		check:    func(w *world) { w.blank("v", ext4) },
		undo:     goneV,
	},
	{
		name:     "NodeStageVolume, the first, XFS",
		fleeting: true,
		prepare:  func(w *world) { w.Create("v", 320*mib, xfs); w.Staging("v") },
		call:     stage(xfs),
		check:    func(w *world) { w.blank("v", xfs) },
		undo:     goneV,
	},
	{
		name:     "NodeStageVolume, the first, ext4, thick",
		fleeting: true,
		prepare: func(w *world) {
			w.Create("v", 64*mib, ext4, harness.Parameters("provisioning", "thick"))
			w.Staging("v")
		},
		call:  stage(ext4),
		check: func(w *world) { w.thick("v", 64*mib); w.blank("v", ext4) },
		undo:  goneV,
	},
	{
		name:     "NodeStageVolume, again",
		fleeting: true,
		once:     func(w *world) { w.rest("v", 64*mib, ext4) },
		prepare:  func(w *world) { w.Staging("v") },
		call:     stage(ext4),
		check:    func(w *world) { w.must(publish(ext4, false)(w.Context(), w)); w.holds("v", "v") },
		undo:     func(w *world) { w.leave("v", w.id("v")) },
	},
	{
		name:     "NodeStageVolume, of a larger restore, XFS",
		fleeting: true,
		shares:   true,
		once:     func(w *world) { w.source("source", 320*mib, xfs); w.cut() },
		prepare: func(w *world) {
			w.must(copyOfSnapshot(400*mib, xfs)(w.Context(), w))
			w.Staging("v")
		},
		call:  stage(xfs),
		check: func(w *world) { w.copied("v", xfs); w.spans("v", 400*mib) },
		undo:  goneV,
	},
	{
		name:     "NodeStageVolume, of a larger restore, ext4",
		fleeting: true,
		shares:   true,
		once:     func(w *world) { w.source("source", 64*mib, ext4); w.cut() },
		prepare: func(w *world) {
			w.must(copyOfSnapshot(160*mib, ext4)(w.Context(), w))
			w.Staging("v")
		},
		call:  stage(ext4),
		check: func(w *world) { w.copied("v", ext4); w.spans("v", 160*mib) },
		undo:  goneV,
	},
	{
		name:     "NodeStageVolume, of a clone, btrfs",
		fleeting: true,
		shares:   true,
		single:   true, // mkfs.btrfs looks at all that is mounted on a loop device
		once:     func(w *world) { w.source("source", 256*mib, btrfs) },
		prepare: func(w *world) {
			w.floor = w.live["source"].Safe.Load()
			w.Create("v", 256*mib, btrfs, harness.FromVolume(w.id("source")))
			w.Staging("v")
		},
		call:  stage(btrfs),
		check: func(w *world) { w.copied("v", btrfs) },
		undo:  goneV,
	},
	{
		name:     "NodeStageVolume, block",
		fleeting: true,
		prepare:  func(w *world) { w.Create("v", 64*mib, block); w.Staging("v") },
		call:     stage(block),
		check:    func(w *world) { w.must(publish(block, false)(w.Context(), w)); w.note("v"); w.holds("v", "v") },
		undo:     goneV,
	},
	{
		name:     "NodePublishVolume, filesystem",
		revive:   func(w *world) { w.must(stage(ext4)(w.Context(), w)) },
		fleeting: true,
		once:     func(w *world) { w.rest("v", 64*mib, ext4); w.must(stage(ext4)(w.Context(), w)) },
		call:     publish(ext4, false),
		check:    func(w *world) { w.holds("v", "v") },
		undo:     unpublishV,
	},
	{
		name:     "NodePublishVolume, filesystem, read-only",
		revive:   func(w *world) { w.must(stage(ext4)(w.Context(), w)) },
		fleeting: true,
		once:     func(w *world) { w.rest("v", 64*mib, ext4); w.must(stage(ext4)(w.Context(), w)) },
		call:     publish(ext4, true),
		check: func(w *world) {
			w.holds("v", "v")
			if _, err := os.Create(filepath.Join(w.Target("v"), "new")); !errors.Is(err, unix.EROFS) {
				w.t.Fatalf("%s: creating a file gave %v", w.at, err)
			}
		},
		undo: unpublishV,
	},
	{
		name:     "NodePublishVolume, block",
		revive:   func(w *world) { w.must(stage(block)(w.Context(), w)) },
		fleeting: true,
		once:     func(w *world) { w.rest("v", 64*mib, block); w.must(stage(block)(w.Context(), w)) },
		call:     publish(block, false),
		check:    func(w *world) { w.holds("v", "v") },
		undo:     unpublishV,
	},
	{
		name:     "NodePublishVolume, block, read-only",
		revive:   func(w *world) { w.must(stage(block)(w.Context(), w)) },
		fleeting: true,
		once:     func(w *world) { w.rest("v", 64*mib, block); w.must(stage(block)(w.Context(), w)) },
		call:     publish(block, true),
		check:    func(w *world) { w.holds("v", "v"); w.refusesWrites("v") },
		undo:     unpublishV,
	},
	{
		name:     "NodeUnpublishVolume, filesystem",
		revive:   func(w *world) { w.must(stage(ext4)(w.Context(), w)) },
		fleeting: true,
		once:     func(w *world) { w.rest("v", 64*mib, ext4); w.must(stage(ext4)(w.Context(), w)) },
		prepare:  func(w *world) { w.must(publish(ext4, false)(w.Context(), w)) },
		call:     unpublish,
		ends:     true,
	},
	{
		name:     "NodeUnpublishVolume, block, read-only",
		revive:   func(w *world) { w.must(stage(block)(w.Context(), w)) },
		fleeting: true,
		once:     func(w *world) { w.rest("v", 64*mib, block); w.must(stage(block)(w.Context(), w)) },
		prepare:  func(w *world) { w.must(publish(block, true)(w.Context(), w)) },
		call:     unpublish,
		ends:     true,
	},
	{
		name:     "NodeUnstageVolume",
		fleeting: true,
		once:     func(w *world) { w.rest("v", 64*mib, ext4) },
		prepare: func(w *world) {
			w.use("v", ext4)
			w.note("v")
			w.must(unpublish(w.Context(), w))
		},
		call: func(ctx context.Context, w *world) error {
			_, err := w.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: w.id("v"), StagingTargetPath: w.Staging("v")})
			return err
		},
		check: func(w *world) { w.use("v", ext4); w.holds("v", "v") },
		undo:  func(w *world) { w.leave("v", w.id("v")) },
		ends:  true,
	},
	{
		// Only what is idle is detached. To find out, the driver marks the
		// device to go with its last user; the mark must not stay. It does
		// that over and over for a second, always with the same three calls.
		name:     "NodeUnstageVolume, of a device that is open",
		revive:   func(w *world) { w.must(stage(block)(w.Context(), w)); w.open("v") },
		fleeting: true,
		once: func(w *world) {
			w.rest("v", 64*mib, block)
			w.must(stage(block)(w.Context(), w))
			w.open("v")
		},
		call: func(ctx context.Context, w *world) error {
			_, err := w.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: w.id("v"), StagingTargetPath: w.Staging("v")})
			if err == nil {
				return errors.New("a device that is open was detached")
			}
			if status.Code(err) == codes.FailedPrecondition {
				return nil
			}
			return err
		},
		check: func(w *world) { w.must(publish(block, false)(w.Context(), w)); w.holds("v", "v"); unpublishV(w) },
		ends:  true,
		most:  9,
	},
	{
		name:     "NodePublishVolume, inline",
		fleeting: true,
		call:     publishInline,
		check:    func(w *world) { w.note("v"); w.holds("v", "v") },
		undo:     func(w *world) { w.unpublished("v", inlineID) },
	},
	{
		name:     "NodeUnpublishVolume, inline",
		fleeting: true,
		prepare:  func(w *world) { w.must(publishInline(w.Context(), w)); w.note("v") },
		call: func(ctx context.Context, w *world) error {
			_, err := w.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: inlineID, TargetPath: w.Target("v")})
			return err
		},
		ends: true,
	},
	{
		name:     "NodeExpandVolume, XFS",
		revive:   func(w *world) { w.use("v", xfs) },
		fleeting: true,
		prepare: func(w *world) {
			w.Create("v", 320*mib, xfs)
			w.use("v", xfs)
			w.note("v")
			w.must(expand(400*mib)(w.Context(), w))
		},
		call:  nodeExpand,
		check: func(w *world) { w.spans("v", 400*mib); w.holds("v", "v") },
		undo:  goneV,
	},
	{
		name:    "start, after a crash",
		revive:  func(w *world) { w.use("v", ext4); w.Staging("grown") },
		sample:  true,
		prepare: leftovers,
		check:   func(w *world) { w.holds("v", "v") },
		undo:    func(w *world) { goneV(w); w.gone("grown", w.id("grown")) },
		ends:    true,
	},
	{
		name:    "start, of a pool that is not mounted",
		shares:  true,
		alone:   true,
		once:    func(w *world) { w.rest("v", 64*mib, ext4) },
		prepare: func(w *world) { w.Stop() },
		check:   func(w *world) { w.use("v", ext4); w.holds("v", "v"); w.leave("v", w.id("v")) },
		ends:    true,
	},
	{
		name:   "start, the first",
		shares: true, // a pool in a file is made

		alone:   true,
		prepare: func(w *world) { w.Stop(); w.forget() },
		check:   func(w *world) { w.rest("v", 64*mib, ext4); goneV(w) },
		ends:    true,
	},
}

func goneV(w *world) { w.gone("v", w.id("v")) }

func unpublishV(w *world) { w.unpublished("v", w.id("v")) }

func create(size int64, c *csi.VolumeCapability, more ...func(*csi.CreateVolumeRequest)) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		r := &csi.CreateVolumeRequest{
			Name:               "v",
			CapacityRange:      &csi.CapacityRange{RequiredBytes: size},
			VolumeCapabilities: []*csi.VolumeCapability{c},
		}
		for _, change := range more {
			change(r)
		}
		_, err := w.CreateVolume(ctx, r)
		return err
	}
}

func copyOfSnapshot(size int64, c *csi.VolumeCapability, more ...func(*csi.CreateVolumeRequest)) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		return create(size, c, append(more, harness.FromSnapshot(w.id("cut")))...)(ctx, w)
	}
}

func snapshot(ctx context.Context, w *world) error {
	_, err := w.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "cut", SourceVolumeId: w.id("source")})
	return err
}

// grouped is the volumes that are cut together: the bystander's and the one
// beside it.
func (w *world) grouped() []string {
	if w.pod != "" {
		return []string{w.id("bystander"), w.id("raw")}
	}
	return []string{w.id("bystander"), w.id("source")}
}

// member is the ID of the group's snapshot of a volume.
func (w *world) member(name string) string {
	return w.id(pool.NameFor(pool.NewGroup("cut", nil).SnapshotName(w.id(name))))
}

func groupSnapshot(ctx context.Context, w *world) error {
	_, err := w.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "cut", SourceVolumeIds: w.grouped()})
	return err
}

// groupIsWhole checks that there is all of the group or nothing, before anybody
// has asked for it again.
func (w *world) groupIsWhole() {
	w.t.Helper()
	list, err := w.ListSnapshots(w.Context(), &csi.ListSnapshotsRequest{})
	w.must(err)
	members := 0
	for _, entry := range list.GetEntries() {
		if entry.GetSnapshot().GetGroupSnapshotId() != "" {
			members++
		}
	}
	if want := len(w.grouped()); members != 0 && members != want {
		w.t.Errorf("%s: after the start there are %d snapshots of a group of %d", w.at, members, want)
	}
}

func (w *world) ungroup(ctx context.Context) error {
	r := &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: pool.NewGroup("cut", nil).ID}
	for _, id := range w.grouped() {
		r.SnapshotIds = append(r.SnapshotIds, w.member(path.Base(id)))
	}
	_, err := w.DeleteVolumeGroupSnapshot(ctx, r)
	return err
}

func expand(size int64) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		_, err := w.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
			VolumeId: w.id("v"), CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		})
		return err
	}
}

func nodeExpand(ctx context.Context, w *world) error {
	_, err := w.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
		VolumeId: w.id("v"), VolumePath: w.Target("v"), StagingTargetPath: w.Staging("v"),
	})
	return err
}

func stage(c *csi.VolumeCapability) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		_, err := w.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: w.id("v"), StagingTargetPath: w.Staging("v"), VolumeCapability: c,
		})
		return err
	}
}

func publish(c *csi.VolumeCapability, readOnly bool) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		_, err := w.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
			VolumeId: w.id("v"), StagingTargetPath: w.Staging("v"), TargetPath: w.Target("v"), VolumeCapability: c, Readonly: readOnly,
		})
		return err
	}
}

func unpublish(ctx context.Context, w *world) error {
	_, err := w.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: w.id("v"), TargetPath: w.Target("v")})
	return err
}

func publishInline(ctx context.Context, w *world) error {
	_, err := w.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: inlineID, TargetPath: w.Target("v"), VolumeCapability: ext4,
		VolumeContext: map[string]string{"csi.storage.k8s.io/ephemeral": "true", "size": "64Mi"},
	})
	return err
}

// cut makes the snapshot, and notes what it must have.
func (w *world) cut() {
	w.t.Helper()
	w.floor = w.live["source"].Safe.Load()
	w.must(snapshot(w.Context(), w))
}

// use stages and publishes a volume that may be staged and published already.
func (w *world) use(name string, c *csi.VolumeCapability) {
	w.t.Helper()
	w.kinds[name] = c
	w.Use(name, w.id(name), c)
}

// rest makes a volume with data in it that is not in use.
func (w *world) rest(name string, size int64, c *csi.VolumeCapability) {
	w.t.Helper()
	w.Create(name, size, c)
	w.use(name, c)
	w.note(name)
	w.leave(name, w.id(name))
}

// blank fails the test unless a volume has an empty filesystem that can be
// written to.
func (w *world) blank(name string, c *csi.VolumeCapability) {
	w.t.Helper()
	w.use(name, c)
	entries, err := os.ReadDir(w.Target(name))
	w.must(err)
	for _, entry := range entries {
		if entry.Name() != "lost+found" {
			w.t.Fatalf("%s: a new volume has %s", w.at, entry.Name())
		}
	}
	w.note(name)
	w.holds(name, name)
}

// copied fails the test unless a volume has what its source had at one instant
// after the call began.
func (w *world) copied(name string, c *csi.VolumeCapability) {
	w.t.Helper()
	w.use(name, c)
	w.holds(name, "source")
	last, err := records(w.log(name))
	w.must(err)
	if last < w.floor {
		w.t.Fatalf("%s: the copy ends with record %d, %d were on stable storage before", w.at, last, w.floor)
	}
}

// thick fails the test unless a volume has all its blocks.
func (w *world) thick(name string, size int64) {
	w.t.Helper()
	var stat unix.Stat_t
	w.must(unix.Stat(filepath.Join(w.pool, "volumes", name, "data"), &stat))
	if stat.Blocks*512 < size {
		w.t.Fatalf("%s: a thick volume of %d bytes has %d in blocks", w.at, size, stat.Blocks*512)
	}
}

// spans fails the test unless a filesystem has most of that many bytes.
func (w *world) spans(name string, size int64) {
	w.t.Helper()
	var stat unix.Statfs_t
	w.must(unix.Statfs(w.Target(name), &stat))
	if got := int64(stat.Blocks) * stat.Frsize; got < size*8/10+1 {
		w.t.Fatalf("%s: the filesystem has %d bytes of %d", w.at, got, size)
	}
}

// refusesWrites fails the test unless a device that is published read-only
// takes no write.
func (w *world) refusesWrites(name string) {
	w.t.Helper()
	f, err := os.OpenFile(w.Target(name), os.O_WRONLY|syscall.O_SYNC, 0)
	if err == nil {
		_, err = f.Write(make([]byte, 4096))
		f.Close()
	}
	if !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		w.t.Fatalf("%s: a write to a read-only device gave %v", w.at, err)
	}
}

// open keeps the device of a volume open, until all is taken away.
func (w *world) open(name string) {
	w.t.Helper()
	data, err := os.Open(filepath.Join(w.pool, "volumes", name, "data"))
	w.must(err)
	defer data.Close()
	devices, err := loop.Find(data)
	w.must(err)
	f, err := os.Open(devices[0].Path)
	w.must(err)
	w.user = f
	w.t.Cleanup(func() { f.Close() })
}

// leftovers kills the driver and leaves what crashes leave: volumes that were
// being made and deleted, metadata that was not renamed, a growth that was cut
// off, and a filesystem that was frozen for a snapshot.
func leftovers(w *world) {
	w.t.Helper()
	w.Create("v", 64*mib, ext4)
	w.use("v", ext4)
	w.note("v")
	w.Create("grown", 64*mib, ext4)
	w.Staging("grown")
	w.Kill()
	for _, dir := range []string{".staging/volumes-made", ".staging/snapshots-made", ".trash/deleted.abcdefgh", ".trash/other.abcdefgh"} {
		w.must(os.Mkdir(filepath.Join(w.pool, dir), 0o700))
		w.must(os.WriteFile(filepath.Join(w.pool, dir, "data"), make([]byte, mib), 0o600))
	}
	w.must(os.WriteFile(filepath.Join(w.pool, ".trash/deleted.abcdefgh/volume.json"), []byte("{}"), 0o600))
	w.must(os.WriteFile(filepath.Join(w.pool, ".staging/metadata-v"), []byte("{"), 0o600))
	w.must(os.Truncate(filepath.Join(w.pool, "volumes/grown/data"), 96*mib))
	w.must(os.WriteFile(filepath.Join(w.pool, ".staging/freeze-v"), nil, 0o600))
	w.sync()
	freeze(w, w.Staging("v"))
}

// freeze freezes a filesystem, for others to thaw.
func freeze(w *world, dir string) {
	w.t.Helper()
	f, err := os.Open(dir)
	w.must(err)
	defer f.Close()
	w.must(unix.IoctlSetInt(int(f.Fd()), 0xc0045877, 0)) // FIFREEZE of linux/fs.h
}

// forget takes the pool away, with all that the node knows of it. The room of
// the next one may differ by some blocks: what a new filesystem takes is
// measured once, after the directories are made and what a crash has left.
func (w *world) forget() {
	w.t.Helper()
	w.fresh = true
	for _, name := range []string{"default.img", "state/pools/default.json", "state/pools", "state/mounts/default", "state/mounts"} {
		w.must(os.Remove(filepath.Join(w.Dir, name)))
	}
	w.sync()
}
