//go:build integration

package integration

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// groupBlocks makes block volumes that are not in use.
func groupBlocks(t *testing.T, d *harness.Driver, names ...string) (ids []string) {
	t.Helper()
	for _, name := range names {
		ids = append(ids, d.Create(name, 16<<20, harness.Block(harness.Writer)).GetVolumeId())
	}
	return ids
}

func groupCreate(d *harness.Driver, name string, volumes ...string) (*csi.VolumeGroupSnapshot, error) {
	r, err := d.CreateVolumeGroupSnapshot(d.Context(), &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: volumes})
	return r.GetGroupSnapshot(), err
}

func groupGet(d *harness.Driver, id string, snapshots []string) (*csi.VolumeGroupSnapshot, error) {
	r, err := d.GetVolumeGroupSnapshot(d.Context(), &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: snapshots})
	return r.GetGroupSnapshot(), err
}

// groupSnapshots lists the IDs of all snapshots that there are.
func groupSnapshots(t *testing.T, d *harness.Driver) (ids []string) {
	t.Helper()
	r, err := d.ListSnapshots(d.Context(), &csi.ListSnapshotsRequest{})
	ctlMust(t, err)
	for _, e := range r.GetEntries() {
		ids = append(ids, e.GetSnapshot().GetSnapshotId())
	}
	slices.Sort(ids)
	return ids
}

// groupDrivers are a driver for one machine, and a router with its nodes: they
// keep the same rules. The volumes of the second are on different nodes.
func groupDrivers(t *testing.T, rule func(t *testing.T, d *harness.Driver, nodes []*harness.Driver)) {
	t.Helper()
	t.Run("standalone", func(t *testing.T) {
		d := harness.Start(t, harness.FilePool("2Gi"))
		rule(t, d, []*harness.Driver{d, d, d})
	})
	t.Run("router", func(t *testing.T) {
		f := harness.StartFleet(t, harness.FilePool("2Gi"), harness.FilePool("2Gi"), harness.FilePool("2Gi"))
		rule(t, f.Driver, f.Nodes)
	})
}

// groupSpread makes a block volume on each node.
func groupSpread(t *testing.T, d *harness.Driver, nodes []*harness.Driver, size int64) (ids []string) {
	t.Helper()
	for i, n := range nodes {
		more := []func(*csi.CreateVolumeRequest){harness.Parameters("provisioning", "thick")}
		if n != d {
			more = append(more, onNode(n.Node))
		}
		ids = append(ids, d.Create("v-"+string(rune('a'+i)), size, harness.Block(harness.Writer), more...).GetVolumeId())
	}
	return ids
}

func TestGroupIsMadeOnceAndHasASnapshotOfEachVolume(t *testing.T) {
	groupDrivers(t, func(t *testing.T, d *harness.Driver, nodes []*harness.Driver) {
		ids := groupSpread(t, d, nodes, 16<<20)
		g, err := groupCreate(d, "g", ids...)
		ctlMust(t, err)
		if len(g.GetSnapshots()) != 3 || !g.GetReadyToUse() || g.GetCreationTime() == nil || len(g.GetGroupSnapshotId()) > 128 {
			t.Fatalf("the group is %v", g)
		}
		again, err := groupCreate(d, "g", ids[2], ids[0], ids[1])
		ctlMust(t, err)
		if again.String() != g.String() {
			t.Errorf("a retry gave %v\nafter %v", again, g)
		}
		for _, others := range [][]string{ids[:2], ids[:1], ids[2:]} {
			_, err = groupCreate(d, "g", others...)
			ctlWant(t, "the same name, other volumes", err, codes.AlreadyExists)
		}
		got, err := groupGet(d, g.GetGroupSnapshotId(), groupIDs(g))
		ctlMust(t, err)
		if got.String() != g.String() {
			t.Errorf("it is told as %v\nand was made as %v", got, g)
		}
		listed := groupSnapshots(t, d)
		for _, s := range g.GetSnapshots() {
			one, err := d.GetSnapshot(d.Context(), &csi.GetSnapshotRequest{SnapshotId: s.GetSnapshotId()})
			ctlMust(t, err)
			if one.GetSnapshot().GetGroupSnapshotId() != g.GetGroupSnapshotId() || s.GetGroupSnapshotId() != g.GetGroupSnapshotId() || !slices.Contains(listed, s.GetSnapshotId()) {
				t.Errorf("snapshot %v, %v of group %s; all are %v", s, one, g.GetGroupSnapshotId(), listed)
			}
		}
		for _, n := range nodes {
			n.Restart()
		}
		dataEventually(t, func() error { _, err := groupGet(d, g.GetGroupSnapshotId(), groupIDs(g)); return err })
		groupDelete(t, d, g)
		groupDelete(t, d, g) // again
		if left := groupSnapshots(t, d); len(left) > 0 {
			t.Errorf("after its deletion there is %v", left)
		}
		_, err = groupGet(d, g.GetGroupSnapshotId(), groupIDs(g))
		ctlWant(t, "a group that was deleted", err, codes.NotFound)
	})
}

func TestGroupIsDeletedAsAWholeOnly(t *testing.T) {
	groupDrivers(t, func(t *testing.T, d *harness.Driver, nodes []*harness.Driver) {
		ids := groupSpread(t, d, nodes, 16<<20)
		g, err := groupCreate(d, "g", ids...)
		ctlMust(t, err)
		alone := d.Snapshot("alone", ids[0]).GetSnapshotId()
		members := groupIDs(g)
		_, err = d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: members[0]})
		ctlWant(t, "a snapshot of a group", err, codes.InvalidArgument, g.GetGroupSnapshotId())
		for rule, given := range map[string][]string{
			"too few": members[:2], "none": nil, "one that is not of it": append(slices.Clone(members), alone),
		} {
			_, err = d.DeleteVolumeGroupSnapshot(d.Context(), &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: given})
			ctlWant(t, "delete with "+rule, err, codes.InvalidArgument)
			_, err = groupGet(d, g.GetGroupSnapshotId(), given)
			ctlWant(t, "get with "+rule, err, codes.InvalidArgument)
		}
		if got := groupSnapshots(t, d); len(got) != 4 {
			t.Errorf("what was refused has left %v", got)
		}
		// A volume made of one is its own.
		restored := d.Create("restored", 0, harness.Block(harness.Writer), harness.FromSnapshot(members[1]))
		groupDelete(t, d, g)
		for _, id := range append(ids, restored.GetVolumeId()) {
			d.Delete(id)
		}
		if got := groupSnapshots(t, d); !slices.Equal(got, []string{alone}) {
			t.Errorf("left is %v", got)
		}
		_, err = d.DeleteVolumeGroupSnapshot(d.Context(), &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: "no group", SnapshotIds: []string{"nothing"}})
		ctlMust(t, err)
	})
}

func TestGroupThatCannotBeWholeIsNotMade(t *testing.T) {
	groupDrivers(t, func(t *testing.T, d *harness.Driver, nodes []*harness.Driver) {
		ids := groupSpread(t, d, nodes, 16<<20)
		missing := ids[1] + "-other"
		for _, c := range []struct {
			rule    string
			name    string
			volumes []string
			code    codes.Code
		}{
			{"no name", "", ids, codes.InvalidArgument},
			{"no volumes", "g", nil, codes.InvalidArgument},
			{"a volume twice", "g", []string{ids[0], ids[0]}, codes.InvalidArgument},
			{"a volume without ID", "g", []string{ids[0], ""}, codes.InvalidArgument},
			{"a volume that does not exist", "g", []string{ids[0], missing, ids[2]}, codes.NotFound},
			{"what is no ID", "g", []string{ids[0], "nothing"}, codes.NotFound},
		} {
			_, err := groupCreate(d, c.name, c.volumes...)
			ctlWant(t, c.rule, err, c.code)
		}
		_, err := d.CreateVolumeGroupSnapshot(d.Context(), &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: ids, Parameters: map[string]string{"unknown": "x"}})
		ctlWant(t, "a parameter that there is not", err, codes.InvalidArgument, "unknown")
		if got := groupSnapshots(t, d); len(got) > 0 {
			t.Errorf("there is %v", got)
		}
		for _, n := range nodes {
			ctlEmptied(t, dataPool(n))
		}
		_, err = groupCreate(d, "g", ids...)
		ctlMust(t, err)
	})
}

func TestGroupThatHasNoRoomIsNotMade(t *testing.T) {
	groupDrivers(t, func(t *testing.T, d *harness.Driver, nodes []*harness.Driver) {
		// Snapshots of them all need more than there is; of each, they do not.
		ids := groupSpread(t, d, nodes, 300<<20)
		filler := int64(700 << 20)
		if nodes[0] != d {
			filler = 1500 << 20
		}
		v := nodes[2].Create("filler", filler, harness.Block(harness.Writer))
		before := ctlRoom(t, nodes[2], "")
		_, err := groupCreate(d, "g", ids...)
		ctlWant(t, "no room", err, codes.ResourceExhausted)
		if got := groupSnapshots(t, d); len(got) > 0 {
			t.Errorf("there is %v", got)
		}
		ctlRoomSoon(t, nodes[2], "", before)
		nodes[2].Delete(v.GetVolumeId())
		_, err = groupCreate(d, "g", ids...)
		ctlMust(t, err)
	})
}

func TestGroupThatLostASnapshotSaysSo(t *testing.T) {
	groupDrivers(t, func(t *testing.T, d *harness.Driver, nodes []*harness.Driver) {
		ids := groupSpread(t, d, nodes, 16<<20)
		g, err := groupCreate(d, "g", ids...)
		ctlMust(t, err)
		lost := g.GetSnapshots()[slices.IndexFunc(g.GetSnapshots(), func(s *csi.Snapshot) bool { return s.GetSourceVolumeId() == ids[1] })]
		ctlMust(t, os.RemoveAll(filepath.Join(dataPool(nodes[1]), "snapshots", ctlName(lost.GetSnapshotId()))))
		nodes[1].Restart()
		dataEventually(t, func() error {
			_, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: ids[1]})
			return err
		})
		_, err = groupGet(d, g.GetGroupSnapshotId(), groupIDs(g))
		ctlWant(t, "a group that is not whole", err, codes.DataLoss, ids[1])
		groupDelete(t, d, g)
		if got := groupSnapshots(t, d); len(got) > 0 {
			t.Errorf("there is %v", got)
		}
	})
}

func TestGroupOfABlockVolumeThatIsWrittenOutsideOfPodsIsRefused(t *testing.T) {
	groupDrivers(t, func(t *testing.T, d *harness.Driver, nodes []*harness.Driver) {
		uid, container := groupPod(t)
		members := []*groupMember{
			groupUse(t, d, nodes[0], "fs", "ext4", uid),
			groupUse(t, d, nodes[1], "raw", "block", uid),
		}
		groupCount(t, container, members[0].file)     // a good citizen
		outside := groupCount(t, "", members[1].file) // nobody can stop this one
		_, err := groupCreate(d, "g", members[0].id, members[1].id)
		ctlWant(t, "a device that is written to", err, codes.FailedPrecondition, "volume raw", "cannot be stopped")
		if got := groupSnapshots(t, d); len(got) > 0 {
			t.Errorf("there is %v", got)
		}
		outside.progress(t, 1)
		if groupFrozen(t, container) {
			t.Error("the pod is still stopped")
		}
		// Alone, a device is cut as a power failure would leave it.
		g, err := groupCreate(d, "alone", members[1].id)
		ctlMust(t, err)
		groupDelete(t, d, g)
		for _, n := range nodes[:2] {
			ctlEmptied(t, dataPool(n))
		}
	})
}

func TestGroupOfVolumesOfSeveralPoolsOfANode(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	uid, container := groupPod(t)
	a := groupUse(t, d, d, "a", "block", uid)
	b := d.Create("b", 64<<20, harness.Block(harness.Writer), harness.Parameters("pool", "other"))
	target := filepath.Join(d.Dir, "kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/b", uid)
	ctlMust(t, os.MkdirAll(filepath.Dir(target), 0o700))
	capability := harness.Block(harness.Writer)
	_, err := d.NodeStageVolume(d.Context(), &csi.NodeStageVolumeRequest{VolumeId: b.GetVolumeId(), StagingTargetPath: d.Staging("b"), VolumeCapability: capability})
	ctlMust(t, err)
	_, err = d.NodePublishVolume(d.Context(), &csi.NodePublishVolumeRequest{VolumeId: b.GetVolumeId(), StagingTargetPath: d.Staging("b"), TargetPath: target, VolumeCapability: capability})
	ctlMust(t, err)
	counter := groupCount(t, container, a.file, target)
	for range dataRounds(t, 10) {
		counter.progress(t, 2)
		g, err := groupCreate(d, "g", a.id, b.GetVolumeId())
		ctlMust(t, err)
		groupDelete(t, d, g)
	}
}

func TestGroupOfVolumesThatAreInFlightIsAborted(t *testing.T) {
	d := harness.Start(t, harness.FilePool("2Gi"))
	ids := groupBlocks(t, d, "a", "b")
	thaw := ctlFrozen(t, dataPool(d)) // nothing can be made in the pool
	grow := &csi.ControllerExpandVolumeRequest{VolumeId: ids[1], CapacityRange: &csi.CapacityRange{RequiredBytes: 32 << 20}}
	ended := make(chan error, 1)
	go func() {
		_, err := d.ControllerExpandVolume(d.Context(), grow)
		ended <- err
	}()
	// Of two, one is in flight, whoever waits for it.
	short, cancel := context.WithTimeout(d.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := d.ControllerExpandVolume(short, grow); err == nil {
		t.Fatal("it grew in a frozen pool")
	}
	_, err := groupCreate(d, "g", ids...)
	ctlWant(t, "a volume that is grown just now", err, codes.Aborted)
	thaw()
	if err := <-ended; err != nil { // the other one was in flight
		ctlWant(t, "one of two", err, codes.Aborted)
	}
	dataEventually(t, func() error { _, err := groupCreate(d, "g", ids...); return err })
}
