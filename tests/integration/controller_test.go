//go:build integration

package integration

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlChange changes a request before it is sent.
type ctlChange = func(*csi.CreateVolumeRequest)

func ctlRequired(n int64) ctlChange {
	return func(r *csi.CreateVolumeRequest) {
		r.CapacityRange = &csi.CapacityRange{RequiredBytes: n, LimitBytes: r.GetCapacityRange().GetLimitBytes()}
	}
}

func ctlLimit(n int64) ctlChange {
	return func(r *csi.CreateVolumeRequest) {
		r.CapacityRange = &csi.CapacityRange{RequiredBytes: r.GetCapacityRange().GetRequiredBytes(), LimitBytes: n}
	}
}

func ctlCapabilities(list ...*csi.VolumeCapability) ctlChange {
	return func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = list }
}

func ctlMode(m harness.Mode) ctlChange { return ctlCapabilities(harness.Mount("", m)) }

func ctlOnNode(requisite, preferred string) ctlChange {
	return func(r *csi.CreateVolumeRequest) {
		r.AccessibilityRequirements = &csi.TopologyRequirement{}
		if requisite != "" {
			r.AccessibilityRequirements.Requisite = []*csi.Topology{ctlNode(requisite)}
		}
		if preferred != "" {
			r.AccessibilityRequirements.Preferred = []*csi.Topology{ctlNode(preferred)}
		}
	}
}

func ctlNode(name string) *csi.Topology {
	return &csi.Topology{Segments: map[string]string{request.TopologyKey: name}}
}

// ctlRequest asks for a block volume of 16 MiB.
func ctlRequest(name string, changes ...ctlChange) *csi.CreateVolumeRequest {
	r := &csi.CreateVolumeRequest{
		Name:               name,
		VolumeCapabilities: []*csi.VolumeCapability{harness.Block(harness.Writer)},
		CapacityRange:      &csi.CapacityRange{RequiredBytes: 16 * ctlMiB},
	}
	for _, change := range changes {
		change(r)
	}
	return r
}

func TestCreateVolumeRefusesAndAltersNothing(t *testing.T) {
	const (
		multiWriter  = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
		multiReader  = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
		singleWriter = csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER
		unknown      = csi.VolumeCapability_AccessMode_UNKNOWN
	)
	d := harness.Start(t, ctlTwoPools)
	block := harness.Block(harness.Writer)
	source := d.Create("source", 32*ctlMiB, block).GetVolumeId()
	snapshot := d.Snapshot("snapshot", source).GetSnapshotId()
	d.Create("block", 16*ctlMiB, block)
	d.Create("files", 16*ctlMiB, harness.Mount("ext4", harness.Writer), harness.Parameters("mkfsOptions", "-i 8192"))
	d.Create("clone", 32*ctlMiB, block, harness.FromVolume(source))
	pool := source[:strings.LastIndexByte(source, '/')+1]
	mount := harness.Mount("", harness.Writer)
	files := ctlCapabilities(harness.Mount("ext4", harness.Writer))

	before := ctlState(t, d, "default", "other")
	for _, c := range []struct {
		rule    string
		request *csi.CreateVolumeRequest
		code    codes.Code
		words   []string
	}{
		// What can never succeed.
		{"no name", ctlRequest(""), codes.InvalidArgument, []string{"name"}},
		{"no capabilities", ctlRequest("v", ctlCapabilities()), codes.InvalidArgument, []string{"volume_capabilities"}},
		{"an empty capability", ctlRequest("v", ctlCapabilities(&csi.VolumeCapability{})), codes.InvalidArgument, nil},
		{"no access type", ctlRequest("v", ctlCapabilities(&csi.VolumeCapability{AccessMode: block.GetAccessMode()})), codes.InvalidArgument, nil},
		{"no access mode", ctlRequest("v", ctlMode(unknown)), codes.InvalidArgument, nil},
		{"ReadWriteMany", ctlRequest("v", ctlMode(multiWriter)), codes.InvalidArgument, []string{"MULTI_NODE_MULTI_WRITER", "ReadWriteOnce"}},
		{"ReadOnlyMany", ctlRequest("v", ctlMode(multiReader)), codes.InvalidArgument, []string{"MULTI_NODE_READER_ONLY", "ReadWriteOnce"}},
		{"one writer among nodes", ctlRequest("v", ctlMode(singleWriter)), codes.InvalidArgument, []string{"MULTI_NODE_SINGLE_WRITER"}},
		{"ReadWriteMany beside a good one", ctlRequest("v", ctlCapabilities(block, harness.Block(multiWriter))), codes.InvalidArgument, []string{"MULTI_NODE_MULTI_WRITER"}},
		{"block and filesystem", ctlRequest("v", ctlCapabilities(block, mount)), codes.InvalidArgument, nil},
		{"two filesystems", ctlRequest("v", ctlCapabilities(harness.Mount("ext4", harness.Writer), harness.Mount("xfs", harness.Writer))), codes.InvalidArgument, []string{"ext4", "xfs"}},
		{"an unknown filesystem", ctlRequest("v", ctlCapabilities(harness.Mount("zfs", harness.Writer))), codes.InvalidArgument, []string{"zfs", "ext4, xfs or btrfs"}},
		{"a filesystem other than the class's", ctlRequest("v", ctlCapabilities(harness.Mount("ext4", harness.Writer)), harness.Parameters("csi.storage.k8s.io/fstype", "xfs")), codes.InvalidArgument, []string{"ext4", "xfs"}},
		{"an unknown parameter", ctlRequest("v", harness.Parameters("type", "thin")), codes.InvalidArgument, []string{`"type"`, "pool", "provisioning", "csi.storage.k8s.io/fstype", "mkfsOptions"}},
		{"an unknown provisioning", ctlRequest("v", harness.Parameters("provisioning", "fat")), codes.InvalidArgument, []string{"provisioning", "fat", "thin", "thick"}},
		{"mkfsOptions with a path", ctlRequest("v", files, harness.Parameters("mkfsOptions", "/dev/sda")), codes.InvalidArgument, []string{"mkfsOptions", "/dev/sda"}},
		{"mkfsOptions with a path in a value", ctlRequest("v", files, harness.Parameters("mkfsOptions", "-L ../x")), codes.InvalidArgument, []string{"mkfsOptions"}},
		{"mkfsOptions with a device", ctlRequest("v", files, harness.Parameters("mkfsOptions", "-J device=LABEL=x")), codes.InvalidArgument, []string{"mkfsOptions", "device"}},
		{"mkfsOptions that no volume may have", ctlRequest("v", files, harness.Parameters("mkfsOptions", "-n")), codes.InvalidArgument, []string{"mkfsOptions", "-n"}},
		{"an unknown mutable parameter", ctlRequest("v", limParameters("iops", "100")), codes.InvalidArgument, []string{"iops", "readIOPS", "writeBandwidth"}},
		{"a limit of nothing", ctlRequest("v", limParameters("readIOPS", "0")), codes.InvalidArgument, []string{"readIOPS"}},
		{"a limit among the parameters of the class", ctlRequest("v", harness.Parameters("readIOPS", "100")), codes.InvalidArgument, []string{"readIOPS"}},
		{"a source that names nothing", ctlRequest("v", func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = &csi.VolumeContentSource{} }), codes.InvalidArgument, []string{"volume_content_source"}},

		// Sizes that cannot be.
		{"a negative size", ctlRequest("v", ctlRequired(-1)), codes.OutOfRange, []string{"negative"}},
		{"a negative limit", ctlRequest("v", ctlLimit(-1)), codes.OutOfRange, []string{"negative"}},
		{"a limit below the size", ctlRequest("v", ctlLimit(16*ctlMiB-1)), codes.OutOfRange, []string{"limit_bytes"}},
		{"the largest number", ctlRequest("v", ctlRequired(math.MaxInt64)), codes.OutOfRange, nil},
		{"a range with no multiple of a block", ctlRequest("v", ctlRequired(4097), ctlLimit(8191)), codes.OutOfRange, []string{"4096"}},
		{"one size that is no multiple of a block", ctlRequest("v", ctlRequired(10_000_000), ctlLimit(10_000_000)), codes.OutOfRange, []string{"4096"}},
		{"a limit too small for ext4", ctlRequest("v", ctlRequired(0), ctlLimit(8*ctlMiB-1), files), codes.OutOfRange, nil},
		{"a limit too small for XFS", ctlRequest("v", ctlLimit(300*ctlMiB-1), ctlCapabilities(harness.Mount("xfs", harness.Writer))), codes.OutOfRange, nil},
		{"a limit too small for btrfs", ctlRequest("v", ctlLimit(100*ctlMiB), ctlCapabilities(harness.Mount("btrfs", harness.Writer))), codes.OutOfRange, nil},
		{"a size below the snapshot's", ctlRequest("v", harness.FromSnapshot(snapshot)), codes.OutOfRange, []string{"33554432"}},
		{"a size below the source volume's", ctlRequest("v", harness.FromVolume(source)), codes.OutOfRange, []string{"33554432"}},
		{"a limit below the source's size", ctlRequest("v", ctlRequired(0), ctlLimit(16*ctlMiB), harness.FromVolume(source)), codes.OutOfRange, nil},

		// What is not here.
		{"a snapshot that is gone", ctlRequest("v", harness.FromSnapshot(pool+"gone")), codes.NotFound, []string{pool + "gone"}},
		{"a volume that is gone", ctlRequest("v", harness.FromVolume(pool+"gone")), codes.NotFound, []string{pool + "gone"}},
		{"a snapshot of another driver", ctlRequest("v", harness.FromSnapshot("snap-0123")), codes.NotFound, []string{"snap-0123"}},
		{"a volume of another driver", ctlRequest("v", harness.FromVolume("vol-0123")), codes.NotFound, []string{"vol-0123"}},
		{"a volume's ID as a snapshot's", ctlRequest("v", harness.FromSnapshot(source)), codes.NotFound, nil},
		{"a snapshot's ID as a volume's", ctlRequest("v", harness.FromVolume(snapshot)), codes.NotFound, nil},

		// What another node may have room for.
		{"another node only", ctlRequest("v", ctlOnNode("node-2", "")), codes.ResourceExhausted, []string{harness.NodeID}},
		{"another node, though this one is preferred", ctlRequest("v", ctlOnNode("node-2", harness.NodeID)), codes.ResourceExhausted, []string{harness.NodeID}},
		{"a pool that is not here", ctlRequest("v", harness.Parameters("pool", "fast")), codes.ResourceExhausted, []string{"fast", "default", "other"}},
		{"more than the pool has", ctlRequest("v", ctlRequired(3*ctlGiB)), codes.ResourceExhausted, []string{"default", "3221225472"}},
		{"more than the pool has, thick", ctlRequest("v", ctlRequired(3*ctlGiB), harness.Parameters("provisioning", "thick")), codes.ResourceExhausted, []string{"default"}},
		{"far more than any pool has", ctlRequest("v", ctlRequired(math.MaxInt64-4096)), codes.ResourceExhausted, nil},
		{"a copy larger than the pool", ctlRequest("v", ctlRequired(3*ctlGiB), harness.FromSnapshot(snapshot)), codes.ResourceExhausted, nil},

		// Names that are taken by something else.
		{"the same name, larger", ctlRequest("block", ctlRequired(17*ctlMiB)), codes.AlreadyExists, []string{"size"}},
		{"the same name, smaller", ctlRequest("block", ctlRequired(8*ctlMiB), ctlLimit(15*ctlMiB)), codes.AlreadyExists, []string{"size"}},
		{"the same name, a filesystem", ctlRequest("block", ctlCapabilities(mount)), codes.AlreadyExists, []string{"access type"}},
		{"the same name, block", ctlRequest("files"), codes.AlreadyExists, []string{"access type"}},
		{"the same name, another filesystem", ctlRequest("files", ctlRequired(0), ctlLimit(ctlGiB), ctlCapabilities(harness.Mount("btrfs", harness.Writer)), harness.Parameters("mkfsOptions", "")), codes.AlreadyExists, []string{"filesystem"}},
		{"the same name, other options", ctlRequest("files", files, harness.Parameters("mkfsOptions", "-i 4096")), codes.AlreadyExists, []string{"mkfsOptions"}},
		{"the same name, no options", ctlRequest("files", files), codes.AlreadyExists, []string{"mkfsOptions"}},
		{"the same name, thick", ctlRequest("block", harness.Parameters("provisioning", "thick")), codes.AlreadyExists, []string{"provisioning"}},
		{"the same name, in another pool", ctlRequest("block", harness.Parameters("pool", "other")), codes.AlreadyExists, []string{"default"}},
		{"the same name, a copy", ctlRequest("block", harness.FromVolume(source)), codes.AlreadyExists, []string{"source"}},
		{"the same name, no copy", ctlRequest("clone", ctlRequired(32*ctlMiB)), codes.AlreadyExists, []string{"source"}},
		{"the same name, a copy of the snapshot", ctlRequest("clone", ctlRequired(32*ctlMiB), harness.FromSnapshot(snapshot)), codes.AlreadyExists, []string{"source"}},
	} {
		got, err := d.CreateVolume(d.Context(), c.request)
		ctlWant(t, c.rule, err, c.code, c.words...)
		if err == nil {
			t.Fatalf("%s: made %v", c.rule, got.GetVolume())
		}
		ctlSame(t, c.rule, before, ctlState(t, d, "default", "other"))
		if t.Failed() && before != ctlState(t, d, "default", "other") {
			t.FailNow()
		}
	}
}

func TestCreateVolumeAnswersWhatItMade(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	source := d.Create("source", 32*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	snapshot := d.Snapshot("snapshot", source).GetSnapshotId()
	for i, c := range []struct {
		rule string
		size int64
		more []ctlChange
	}{
		{"a size is rounded up to a block", 4096, []ctlChange{ctlRequired(1)}},
		{"one byte more is a block more", 16*ctlMiB + 4096, []ctlChange{ctlRequired(16*ctlMiB + 1)}},
		{"a size that is asked for exactly", 12288, []ctlChange{ctlRequired(12288), ctlLimit(12288)}},
		{"a size with a limit", 16 * ctlMiB, []ctlChange{ctlLimit(ctlGiB)}},
		{"no size", ctlGiB, []ctlChange{ctlRequired(0)}},
		{"no size but a limit", 100_000 / 4096 * 4096, []ctlChange{ctlRequired(0), ctlLimit(100_000)}},
		{"at least what ext4 needs", 8 * ctlMiB, []ctlChange{ctlRequired(1), ctlMode(harness.Writer)}},
		{"at least what btrfs needs", 256 * ctlMiB, []ctlChange{ctlRequired(1), ctlCapabilities(harness.Mount("btrfs", harness.Writer))}},
		{"at least what XFS needs, by parameter", 300 * ctlMiB, []ctlChange{ctlRequired(1), ctlMode(harness.Writer), harness.Parameters("csi.storage.k8s.io/fstype", "xfs")}},
		{"a copy has its source's size", 32 * ctlMiB, []ctlChange{ctlRequired(0), harness.FromVolume(source)}},
		{"a restored snapshot has its size", 32 * ctlMiB, []ctlChange{ctlRequired(0), harness.FromSnapshot(snapshot)}},
		{"a copy may be larger", 48 * ctlMiB, []ctlChange{ctlRequired(48 * ctlMiB), harness.FromSnapshot(snapshot)}},
		{"this node is asked for", 16 * ctlMiB, []ctlChange{ctlOnNode(harness.NodeID, "")}},
		{"another node is only preferred", 16 * ctlMiB, []ctlChange{ctlOnNode("", "node-2")}},
		{"another pool is asked for", 16 * ctlMiB, []ctlChange{harness.Parameters("pool", "other")}},
		{"parameters of Kubernetes", 16 * ctlMiB, []ctlChange{harness.Parameters("csi.storage.k8s.io/pvc/name", "claim")}},
		{"every access mode of one node", 16 * ctlMiB, []ctlChange{ctlCapabilities(
			harness.Block(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER),
			harness.Block(csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY),
			harness.Block(csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER),
			harness.Block(csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER),
		)}},
	} {
		r := ctlRequest("v-"+string(rune('a'+i)), c.more...)
		made, err := d.CreateVolume(d.Context(), r)
		ctlWant(t, c.rule, err, codes.OK)
		v := made.GetVolume()
		want := &csi.Volume{
			VolumeId:           v.GetVolumeId(),
			CapacityBytes:      c.size,
			ContentSource:      r.GetVolumeContentSource(),
			AccessibleTopology: []*csi.Topology{ctlNode(harness.NodeID)},
		}
		if !proto.Equal(v, want) {
			t.Errorf("%s: %v; want %v", c.rule, v, want)
		}
		if id := v.GetVolumeId(); len(id) > 128 || ctlName(id) != r.GetName() {
			t.Errorf("%s: the ID is %q", c.rule, id)
		}
		found, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v.GetVolumeId()})
		ctlWant(t, c.rule, err, codes.OK)
		if !proto.Equal(found.GetVolume(), v) {
			t.Errorf("%s: ControllerGetVolume tells %v, CreateVolume %v", c.rule, found.GetVolume(), v)
		}
		pool := "default"
		if p := r.GetParameters()["pool"]; p != "" {
			pool = p
		}
		info, err := os.Stat(filepath.Join(ctlFilePool(d, pool), "volumes", r.GetName(), "data"))
		ctlMust(t, err)
		if info.Size() != c.size {
			t.Errorf("%s: the image has %d bytes, want %d", c.rule, info.Size(), c.size)
		}
	}
}

func TestDeleteVolumeOfWhatIsNotThereIsOK(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	id := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	d.Snapshot("s", id)
	before := ctlState(t, d, "default", "other")
	_, err := d.DeleteVolume(d.Context(), &csi.DeleteVolumeRequest{})
	ctlWant(t, "no volume ID", err, codes.InvalidArgument, "volume_id")
	_, err = d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{})
	ctlWant(t, "no snapshot ID", err, codes.InvalidArgument, "snapshot_id")
	for _, gone := range []string{id + "x", id[:len(id)-1] + "w", "node-2" + strings.TrimPrefix(id, "node-1"), "v", "vol-0123456789", "/", "../..", "nonsense \x01"} {
		_, err := d.DeleteVolume(d.Context(), &csi.DeleteVolumeRequest{VolumeId: gone})
		ctlWant(t, "DeleteVolume of "+gone, err, codes.OK)
		_, err = d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: gone})
		ctlWant(t, "DeleteSnapshot of "+gone, err, codes.OK)
	}
	_, err = d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
	ctlWant(t, "DeleteSnapshot of a volume's ID", err, codes.OK)
	ctlSame(t, "after all", before, ctlState(t, d, "default", "other"))
}

func TestDeleteVolumeInUseIsRefusedAndAltersNothing(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	block, mount := harness.Block(harness.Writer), harness.Mount("", harness.Writer)
	for _, c := range []struct {
		rule       string
		capability *csi.VolumeCapability
		use        func(name, id string) (undo func())
	}{
		{"a filesystem volume that is staged", mount, func(name, id string) func() {
			_, err := d.NodeStageVolume(d.Context(), &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: d.Staging(name), VolumeCapability: mount})
			ctlMust(t, err)
			return func() {
				_, err := d.NodeUnstageVolume(d.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: d.Staging(name)})
				ctlMust(t, err)
			}
		}},
		{"a filesystem volume that is published", mount, func(name, id string) func() {
			d.Use(name, id, mount)
			return func() { d.Release(name, id) }
		}},
		{"a block volume that is published", block, func(name, id string) func() {
			d.Use(name, id, block)
			return func() { d.Release(name, id) }
		}},
	} {
		name := strings.ReplaceAll(c.rule, " ", "-")
		id := d.Create(name, 16*ctlMiB, c.capability).GetVolumeId()
		undo := c.use(name, id)
		before := ctlState(t, d, "default")
		_, err := d.DeleteVolume(d.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
		ctlWant(t, c.rule, err, codes.FailedPrecondition, id[strings.LastIndexByte(id, '/')+1:], "in use")
		ctlSame(t, c.rule, before, ctlState(t, d, "default"))
		undo()
		d.Delete(id)
	}

	// Not by this driver: somebody looks into the image.
	id := d.Create("attached", 16*ctlMiB, block).GetVolumeId()
	t.Run("by hand", func(t *testing.T) {
		ctlLoop(t, filepath.Join(ctlFilePool(d, "default"), "volumes", "attached", "data"))
		before := ctlState(t, d, "default")
		_, err := d.DeleteVolume(d.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
		ctlWant(t, "a volume attached by hand", err, codes.FailedPrecondition, "attached", "in use")
		ctlSame(t, "a volume attached by hand", before, ctlState(t, d, "default"))
	})
	d.Delete(id)
	if ids := ctlIDs(t, d); len(ids) != 0 {
		t.Errorf("left: %v", ids)
	}
}

func TestCreateSnapshotRefusesAndAltersNothing(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	block := harness.Block(harness.Writer)
	one := d.Create("one", 16*ctlMiB, block).GetVolumeId()
	two := d.Create("two", 16*ctlMiB, block).GetVolumeId()
	far := d.Create("far", 16*ctlMiB, block, harness.Parameters("pool", "other")).GetVolumeId()
	d.Snapshot("taken", one)
	before := ctlState(t, d, "default", "other")
	for _, c := range []struct {
		rule    string
		request *csi.CreateSnapshotRequest
		code    codes.Code
		words   []string
	}{
		{"no name", &csi.CreateSnapshotRequest{SourceVolumeId: one}, codes.InvalidArgument, []string{"name"}},
		{"no source", &csi.CreateSnapshotRequest{Name: "s"}, codes.InvalidArgument, []string{"source_volume_id"}},
		{"a parameter", &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: one, Parameters: map[string]string{"pool": "other"}}, codes.InvalidArgument, []string{"pool"}},
		{"the same name, another volume", &csi.CreateSnapshotRequest{Name: "taken", SourceVolumeId: two}, codes.AlreadyExists, []string{one}},
		{"the same name, a volume of another pool", &csi.CreateSnapshotRequest{Name: "taken", SourceVolumeId: far}, codes.AlreadyExists, []string{one}},
		{"the same name, no volume", &csi.CreateSnapshotRequest{Name: "taken", SourceVolumeId: one + "x"}, codes.AlreadyExists, []string{one}},
		{"a volume that is gone", &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: one + "x"}, codes.NotFound, []string{one + "x"}},
		{"a volume of another driver", &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: "vol-1"}, codes.NotFound, []string{"vol-1"}},
		{"a snapshot of a snapshot", &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: one[:strings.LastIndexByte(one, '/')] + "/taken"}, codes.NotFound, nil},
		{"another node only", &csi.CreateSnapshotRequest{
			Name: "s", SourceVolumeId: one, AccessibilityRequirements: &csi.TopologyRequirement{Requisite: []*csi.Topology{ctlNode("node-2")}},
		}, codes.ResourceExhausted, []string{harness.NodeID}},
	} {
		_, err := d.CreateSnapshot(d.Context(), c.request)
		ctlWant(t, c.rule, err, c.code, c.words...)
		ctlSame(t, c.rule, before, ctlState(t, d, "default", "other"))
	}
}

func TestASnapshotIsToldAlikeByAllCalls(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	volume := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	snapshot := d.Snapshot("s", volume)
	id := snapshot.GetSnapshotId()
	if snapshot.GetSourceVolumeId() != volume || snapshot.GetSizeBytes() != 16*ctlMiB || !snapshot.GetReadyToUse() ||
		!snapshot.GetCreationTime().IsValid() || len(snapshot.GetAccessibleTopology()) != 1 ||
		!proto.Equal(snapshot.GetAccessibleTopology()[0], ctlNode(harness.NodeID)) || snapshot.GetGroupSnapshotId() != "" {
		t.Errorf("CreateSnapshot tells %v", snapshot)
	}
	one, err := d.GetSnapshot(d.Context(), &csi.GetSnapshotRequest{SnapshotId: id})
	ctlMust(t, err)
	if !proto.Equal(one.GetSnapshot(), snapshot) {
		t.Errorf("GetSnapshot tells %v, CreateSnapshot %v", one.GetSnapshot(), snapshot)
	}
	list, err := d.ListSnapshots(d.Context(), &csi.ListSnapshotsRequest{})
	ctlMust(t, err)
	if len(list.GetEntries()) != 1 || !proto.Equal(list.GetEntries()[0].GetSnapshot(), snapshot) {
		t.Errorf("ListSnapshots tells %v, CreateSnapshot %v", list.GetEntries(), snapshot)
	}

	_, err = d.GetSnapshot(d.Context(), &csi.GetSnapshotRequest{})
	ctlWant(t, "GetSnapshot of no ID", err, codes.InvalidArgument, "snapshot_id")
	for _, gone := range []string{id + "x", "snap-1", volume} {
		_, err = d.GetSnapshot(d.Context(), &csi.GetSnapshotRequest{SnapshotId: gone})
		ctlWant(t, "GetSnapshot of "+gone, err, codes.NotFound)
	}
}

// A snapshot needs neither its volume nor what was made from it.
func TestSnapshotsAndCopiesOutliveTheirSources(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	block := harness.Block(harness.Writer)
	volume := d.Create("v", 16*ctlMiB, block).GetVolumeId()
	snapshot := d.Snapshot("s", volume).GetSnapshotId()
	restored := d.Create("restored", 0, block, harness.FromSnapshot(snapshot)).GetVolumeId()
	d.Delete(volume)
	again := d.Create("again", 0, block, harness.FromSnapshot(snapshot)).GetVolumeId()
	_, err := d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
	ctlMust(t, err)

	// Also to a retry, which comes when the source is gone.
	for name, id := range map[string]string{"restored": restored, "again": again} {
		r := ctlRequest(name, ctlRequired(0), harness.FromSnapshot(snapshot))
		got, err := d.CreateVolume(d.Context(), r)
		ctlWant(t, "CreateVolume again, without its source", err, codes.OK)
		if got.GetVolume().GetVolumeId() != id {
			t.Errorf("CreateVolume again found %s, want %s", got.GetVolume().GetVolumeId(), id)
		}
	}
	if ids := ctlIDs(t, d); !slices.Equal(ids, []string{again, restored}) {
		t.Errorf("volumes: %v", ids)
	}
}

func TestControllerExpandVolume(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	block := harness.Block(harness.Writer)
	id := d.Create("v", 16*ctlMiB, block).GetVolumeId()
	files := d.Create("files", 16*ctlMiB, harness.Mount("xfs", harness.Writer)).GetVolumeId()
	for _, c := range []struct {
		rule    string
		request *csi.ControllerExpandVolumeRequest
		code    codes.Code
		size    int64 // afterwards
		words   []string
	}{
		{"no ID", &csi.ControllerExpandVolumeRequest{CapacityRange: &csi.CapacityRange{RequiredBytes: 1}}, codes.InvalidArgument, 0, []string{"volume_id"}},
		{"no range", &csi.ControllerExpandVolumeRequest{VolumeId: id}, codes.InvalidArgument, 0, []string{"capacity_range"}},
		{"a volume that is gone", &csi.ControllerExpandVolumeRequest{VolumeId: id + "x", CapacityRange: &csi.CapacityRange{RequiredBytes: 1}}, codes.NotFound, 0, []string{id + "x"}},
		{"a volume of another driver", &csi.ControllerExpandVolumeRequest{VolumeId: "vol-1", CapacityRange: &csi.CapacityRange{RequiredBytes: 1}}, codes.NotFound, 0, nil},
		{"already that large", ctlExpand(id, 16*ctlMiB, 0), codes.OK, 16 * ctlMiB, nil},
		{"larger than that", ctlExpand(id, 1, 0), codes.OK, 16 * ctlMiB, nil},
		{"larger than that, within the limit", ctlExpand(id, 1, 16*ctlMiB), codes.OK, 16 * ctlMiB, nil},
		{"no size", ctlExpand(id, 0, 0), codes.OK, 16 * ctlMiB, nil},
		{"a limit below the size it has", ctlExpand(id, 1, 16*ctlMiB-1), codes.OutOfRange, 0, nil},
		{"only a limit below the size it has", ctlExpand(id, 0, 4096), codes.OutOfRange, 0, nil},
		{"a limit below what is asked for", ctlExpand(id, 32*ctlMiB, 31*ctlMiB), codes.OutOfRange, 0, []string{"limit_bytes"}},
		{"a negative size", ctlExpand(id, -1, 0), codes.OutOfRange, 0, nil},
		{"the largest number", ctlExpand(id, math.MaxInt64, 0), codes.OutOfRange, 0, nil},
		{"a range with no multiple of a block", ctlExpand(id, 16*ctlMiB+1, 16*ctlMiB+4095), codes.OutOfRange, 0, []string{"4096"}},
		{"more than the pool has", ctlExpand(id, 3*ctlGiB, 0), codes.ResourceExhausted, 0, []string{"default"}},
		{"far more than any pool has", ctlExpand(id, math.MaxInt64-4096, 0), codes.ResourceExhausted, 0, nil},
		{"a capability it was not made for", &csi.ControllerExpandVolumeRequest{
			VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 32 * ctlMiB}, VolumeCapability: harness.Mount("", harness.Writer),
		}, codes.InvalidArgument, 0, []string{"block"}},
		{"a filesystem it was not made with", &csi.ControllerExpandVolumeRequest{
			VolumeId: files, CapacityRange: &csi.CapacityRange{RequiredBytes: ctlGiB}, VolumeCapability: harness.Mount("ext4", harness.Writer),
		}, codes.InvalidArgument, 0, []string{"xfs"}},
		{"larger, rounded up to a block", ctlExpand(id, 32*ctlMiB+1, 0), codes.OK, 32*ctlMiB + 4096, nil},
		{"larger, exactly", ctlExpand(id, 48*ctlMiB, 48*ctlMiB), codes.OK, 48 * ctlMiB, nil},
		{"larger, with its capability", &csi.ControllerExpandVolumeRequest{
			VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 64 * ctlMiB}, VolumeCapability: block,
		}, codes.OK, 64 * ctlMiB, nil},
		{"never smaller", ctlExpand(id, 16*ctlMiB, 0), codes.OK, 64 * ctlMiB, nil},
	} {
		before := ctlState(t, d, "default")
		got, err := d.ControllerExpandVolume(d.Context(), c.request)
		ctlWant(t, c.rule, err, c.code, c.words...)
		if c.code != codes.OK {
			ctlSame(t, c.rule, before, ctlState(t, d, "default"))
			continue
		}
		if got.GetCapacityBytes() != c.size || !got.GetNodeExpansionRequired() {
			t.Errorf("%s: %v; want %d bytes and the node to follow", c.rule, got, c.size)
		}
		found, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
		ctlMust(t, err)
		if found.GetVolume().GetCapacityBytes() != c.size {
			t.Errorf("%s: the volume has %d bytes, want %d", c.rule, found.GetVolume().GetCapacityBytes(), c.size)
		}
	}
}

func ctlExpand(id string, required, limit int64) *csi.ControllerExpandVolumeRequest {
	return &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit}}
}

func TestValidateVolumeCapabilities(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	block, xfs := harness.Block(harness.Writer), harness.Mount("xfs", harness.Writer)
	blockID := d.Create("block", 16*ctlMiB, block).GetVolumeId()
	xfsID := d.Create("files", 300*ctlMiB, xfs).GetVolumeId()
	before := ctlState(t, d, "default")
	validate := func(id string, parameters map[string]string, list ...*csi.VolumeCapability) (*csi.ValidateVolumeCapabilitiesResponse, error) {
		return d.ValidateVolumeCapabilities(d.Context(), &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: id, VolumeCapabilities: list, Parameters: parameters, VolumeContext: map[string]string{"a": "b"},
		})
	}
	_, err := validate("", nil, block)
	ctlWant(t, "no ID", err, codes.InvalidArgument, "volume_id")
	_, err = validate(blockID, nil)
	ctlWant(t, "no capabilities", err, codes.InvalidArgument, "volume_capabilities")
	_, err = validate(blockID+"x", nil, block)
	ctlWant(t, "a volume that is gone", err, codes.NotFound, blockID+"x")
	_, err = validate("vol-1", nil, block)
	ctlWant(t, "a volume of another driver", err, codes.NotFound)

	for _, c := range []struct {
		rule       string
		id         string
		parameters map[string]string
		list       []*csi.VolumeCapability
		confirmed  bool
	}{
		{"what it was made for", blockID, nil, []*csi.VolumeCapability{block}, true},
		{"another mode of one node", blockID, nil, []*csi.VolumeCapability{harness.Block(csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY)}, true},
		{"a filesystem on a block volume", blockID, nil, []*csi.VolumeCapability{harness.Mount("", harness.Writer)}, false},
		{"ReadWriteMany", blockID, nil, []*csi.VolumeCapability{block, harness.Block(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)}, false},
		{"its filesystem", xfsID, nil, []*csi.VolumeCapability{xfs}, true},
		{"any filesystem", xfsID, nil, []*csi.VolumeCapability{harness.Mount("", harness.Writer)}, true},
		{"another filesystem", xfsID, nil, []*csi.VolumeCapability{harness.Mount("ext4", harness.Writer)}, false},
		{"no such filesystem", xfsID, nil, []*csi.VolumeCapability{harness.Mount("ntfs", harness.Writer)}, false},
		{"block on a filesystem volume", xfsID, nil, []*csi.VolumeCapability{block}, false},
		{"known parameters", xfsID, map[string]string{"provisioning": "thin"}, []*csi.VolumeCapability{xfs}, true},
		{"unknown parameters", xfsID, map[string]string{"colour": "red"}, []*csi.VolumeCapability{xfs}, false},
	} {
		got, err := validate(c.id, c.parameters, c.list...)
		ctlWant(t, c.rule, err, codes.OK)
		if !c.confirmed {
			if got.GetConfirmed() != nil || got.GetMessage() == "" {
				t.Errorf("%s: %v; want a message and nothing confirmed", c.rule, got)
			}
			continue
		}
		want := &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
			VolumeContext: map[string]string{"a": "b"}, VolumeCapabilities: c.list, Parameters: c.parameters,
		}}
		if !proto.Equal(got, want) {
			t.Errorf("%s: %v; want %v", c.rule, got, want)
		}
	}
	ctlSame(t, "after all", before, ctlState(t, d, "default"))
}

func TestAVolumeThatIsNotThereIsNotFound(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	id := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	for _, gone := range []string{id + "x", "node-2" + strings.TrimPrefix(id, "node-1"), "vol-1", "../../etc", "/"} {
		_, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: gone})
		ctlWant(t, "ControllerGetVolume of "+gone, err, codes.NotFound)
		_, err = d.ControllerGetVolumeHealth(d.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: gone})
		ctlWant(t, "ControllerGetVolumeHealth of "+gone, err, codes.NotFound)
	}
	_, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{})
	ctlWant(t, "ControllerGetVolume of no ID", err, codes.InvalidArgument, "volume_id")
	_, err = d.ControllerGetVolumeHealth(d.Context(), &csi.ControllerGetVolumeHealthRequest{})
	ctlWant(t, "ControllerGetVolumeHealth of no ID", err, codes.InvalidArgument, "volume_id")
	health, err := d.ControllerGetVolumeHealth(d.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
	ctlMust(t, err)
	if health.GetVolumeHealth().GetVolumeId() != id || len(health.GetVolumeHealth().GetHealthStatuses()) != 0 {
		t.Errorf("the health of a good volume: %v", health)
	}
}

// A capability that is claimed is one that works; a call that is not claimed is
// not there.
func TestTheCapabilitiesClaimedAreThoseThatAre(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	claimed, err := d.ControllerGetCapabilities(d.Context(), &csi.ControllerGetCapabilitiesRequest{})
	ctlMust(t, err)
	var got []string
	for _, c := range claimed.GetCapabilities() {
		got = append(got, c.GetRpc().GetType().String())
	}
	slices.Sort(got)
	want := []string{
		"CLONE_VOLUME", "CREATE_DELETE_SNAPSHOT", "CREATE_DELETE_VOLUME", "EXPAND_VOLUME", "GET_CAPACITY", "GET_SNAPSHOT", "GET_VOLUME",
		"GET_VOLUME_HEALTH", "LIST_SNAPSHOTS", "LIST_VOLUMES", "LIST_VOLUME_HEALTH", "MODIFY_VOLUME", "SINGLE_NODE_MULTI_WRITER",
	}
	if !slices.Equal(got, want) {
		t.Errorf("claimed: %v, want %v", got, want)
	}

	plugin, err := d.GetPluginCapabilities(d.Context(), &csi.GetPluginCapabilitiesRequest{})
	ctlMust(t, err)
	got = nil
	for _, c := range plugin.GetCapabilities() {
		if s := c.GetService(); s != nil {
			got = append(got, s.GetType().String())
		}
		if e := c.GetVolumeExpansion(); e != nil {
			got = append(got, "expansion "+e.GetType().String())
		}
	}
	slices.Sort(got)
	want = []string{"CONTROLLER_SERVICE", "GROUP_CONTROLLER_SERVICE", "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS", "SNAPSHOT_METADATA_SERVICE", "VOLUME_ACCESSIBILITY_CONSTRAINTS", "expansion ONLINE"}
	if !slices.Equal(got, want) {
		t.Errorf("the plugin claims %v, want %v", got, want)
	}

	_, err = d.ControllerPublishVolume(d.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: "v", NodeId: harness.NodeID, VolumeCapability: harness.Block(harness.Writer)})
	ctlWant(t, "ControllerPublishVolume", err, codes.Unimplemented)
	_, err = d.ControllerUnpublishVolume(d.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: "v"})
	ctlWant(t, "ControllerUnpublishVolume", err, codes.Unimplemented)
}
