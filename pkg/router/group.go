package router

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/orlop-csi/orlop/pkg/controller"
	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// farewell is how long a node has, at the end of a group, to undo its part.
const farewell = 15 * time.Second

// GroupControllerGetCapabilities implements csi.GroupControllerServer.
func (s *Server) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return controller.GroupCapabilities(), nil
}

// CreateVolumeGroupSnapshot implements csi.GroupControllerServer. The volumes may
// be on several nodes: all of them hold their writers, then all cut, then all
// let go. A node that fails, or does not answer, ends it for all.
func (s *Server) CreateVolumeGroupSnapshot(ctx context.Context, r *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	group, err := request.Group(r)
	if err != nil {
		return nil, err
	}
	end, err := s.names.Begin("group snapshot "+r.GetName(), pool.Create)
	if err != nil {
		return nil, err
	}
	defer end()
	volumes := map[string][]string{} // by segment
	owners := map[string]member{}
	nodes := map[string]member{} // by volume
	for _, id := range group.Volumes {
		m, err := s.owner(ctx, id)
		if err != nil {
			return nil, err
		}
		volumes[m.Segment] = append(volumes[m.Segment], id)
		owners[m.Segment], nodes[id] = m, m
	}
	if err := s.mustNotBeElsewhere(ctx, group, owners); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx) // ends the streams of those that are in it
	defer cancel()
	var leases []*lease
	for segment, m := range owners {
		leases = append(leases, &lease{ctx: ctx, member: m, group: group, volumes: volumes[segment]})
	}
	members, err := cutOn(ctx, group, leases)
	if err != nil {
		return nil, err
	}
	var snapshots []*csi.Snapshot
	for _, snapshot := range members {
		snapshots = append(snapshots, converted(group.ID, snapshot, nodes[snapshot.SourceID]))
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: controller.GroupSnapshot(group.ID, snapshots)}, nil
}

// mustNotBeElsewhere looks among the other nodes that answer for a group of that
// name, which is then of other volumes: it is no danger, but the wrong answer.
func (s *Server) mustNotBeElsewhere(ctx context.Context, group pool.Group, owners map[string]member) error {
	members, err := s.fleet.list(ctx)
	if err != nil {
		return err
	}
	others := slices.DeleteFunc(members, func(m member) bool { return owners[m.Segment].Segment != "" })
	for _, a := range ask(ctx, others, func(ctx context.Context, m member) (*peerapi.FindResponse, error) {
		return m.groups.Find(ctx, &peerapi.FindRequest{GroupSnapshotId: group.ID})
	}) {
		if a.err == nil {
			return pool.Errorf(pool.ErrExists, "group snapshot %s exists on node %s, of other volumes", group.ID, a.Segment)
		}
	}
	return nil
}

// cutOn makes the group on the nodes that have its volumes, or finds it there.
func cutOn(ctx context.Context, group pool.Group, leases []*lease) (_ []pool.Snapshot, err error) {
	all := make(pool.Together, len(leases))
	for i, l := range leases {
		all[i] = l
	}
	open := true
	defer func() {
		if open {
			err = pool.JoinErrors(err, all.Close())
		}
	}()
	// With the group held on all of them, what there is of it cannot change.
	if err := all.Each(ctx, func(_ context.Context, c pool.Cutting) error { return c.(*lease).begin() }); err != nil { //nolint:forcetypeassert // made above
		return nil, err
	}
	var existing []pool.Snapshot
	for _, l := range leases {
		existing = append(existing, l.existing...)
	}
	if len(group.Missing(existing)) == 0 {
		slices.SortFunc(existing, func(a, b pool.Snapshot) int { return cmp.Compare(a.ID, b.ID) })
		return existing, nil
	}
	if err := all.Each(ctx, func(_ context.Context, c pool.Cutting) error { return c.(*lease).prepare() }); err != nil { //nolint:forcetypeassert // made above
		return nil, err
	}
	open = false
	return pool.CutTogether(ctx, all)
}

// lease is the part that one node has in a group. It implements [pool.Cutting]
// with a stream to the node, at whose end the node undoes what is not confirmed.
type lease struct {
	member

	ctx      context.Context //nolint:containedctx // of the stream
	group    pool.Group
	volumes  []string // IDs of those on the node
	stream   grpc.BidiStreamingClient[peerapi.CutRequest, peerapi.CutResponse]
	existing []pool.Snapshot
	failed   bool
}

// begin opens the stream, and finds out what the node has of the group.
func (l *lease) begin() error {
	stream, err := l.groups.Cut(l.ctx)
	if err != nil {
		return told{at(l.ctx, l.member, err)}
	}
	l.stream = stream
	response, err := l.step(&peerapi.CutRequest{Phase: peerapi.Phase_PHASE_BEGIN, Group: peerapi.FromGroup(l.group)})
	l.existing = peerapi.ToSnapshots(response.GetSnapshots())
	return err
}

func (l *lease) prepare() error {
	_, err := l.step(&peerapi.CutRequest{Phase: peerapi.Phase_PHASE_PREPARE, VolumeIds: l.volumes})
	return err
}

// Hold implements [pool.Cutting].
func (l *lease) Hold(context.Context) error { return l.phase(peerapi.Phase_PHASE_HOLD) }

// Cut implements [pool.Cutting].
func (l *lease) Cut(context.Context) error { return l.phase(peerapi.Phase_PHASE_CUT) }

// Check implements [pool.Cutting].
func (l *lease) Check(context.Context) error { return l.phase(peerapi.Phase_PHASE_CHECK) }

// Release implements [pool.Cutting].
func (l *lease) Release(context.Context) error { return l.phase(peerapi.Phase_PHASE_RELEASE) }

// Place implements [pool.Cutting].
func (l *lease) Place(context.Context) ([]pool.Snapshot, error) {
	response, err := l.step(&peerapi.CutRequest{Phase: peerapi.Phase_PHASE_PLACE})
	return peerapi.ToSnapshots(response.GetSnapshots()), err
}

// Confirm implements [pool.Cutting].
func (l *lease) Confirm(context.Context) error { return l.phase(peerapi.Phase_PHASE_CONFIRM) }

func (l *lease) phase(p peerapi.Phase) error {
	_, err := l.step(&peerapi.CutRequest{Phase: p})
	return err
}

// step has the node take one step and waits until it has.
func (l *lease) step(r *peerapi.CutRequest) (*peerapi.CutResponse, error) {
	err := l.stream.Send(r)
	var response *peerapi.CutResponse
	if err == nil || errors.Is(err, io.EOF) { // why it has ended, the answer tells
		response, err = l.stream.Recv()
	}
	if err != nil {
		l.failed = true
		return nil, told{at(l.ctx, l.member, err)}
	}
	return response, nil
}

// told is what a node said, without the words with which the library prints a
// status: several may be joined.
type told struct{ status error }

func (t told) Error() string { return status.Convert(t.status).Message() }
func (t told) Unwrap() error { return t.status }

// Close implements [pool.Cutting]. It waits until the node has undone its part,
// so that nothing is left of a group that failed; one that is cut off from us
// does so by itself.
func (l *lease) Close() error {
	if l.stream == nil || l.failed {
		return nil
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = l.stream.CloseSend()
		_, _ = l.stream.Recv()
	}()
	select {
	case <-ended:
	case <-time.After(farewell):
	}
	return nil
}

// converted is the CSI form of a snapshot on a node.
func converted(groupID string, snapshot pool.Snapshot, m member) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId:         snapshot.ID,
		SourceVolumeId:     snapshot.SourceID,
		SizeBytes:          snapshot.Size,
		CreationTime:       timestamppb.New(snapshot.Created),
		ReadyToUse:         true,
		GroupSnapshotId:    groupID,
		AccessibleTopology: []*csi.Topology{{Segments: map[string]string{request.TopologyKey: m.Segment}}},
	}
}

// part is what one node has of a group.
type part struct {
	member

	snapshots []pool.Snapshot
}

// parts finds a group on the nodes that may have some of it: those of the
// snapshots that the orchestrator knows, and of the volumes that are in it. It
// is pool.ErrInvalid if the orchestrator knows another group than there is, and
// pool.ErrNotFound if there is nothing of it. What was on a node that is gone is
// gone with it.
func (s *Server) parts(ctx context.Context, id string, known []string) (pool.Group, []part, error) {
	owners := map[string]member{}
	if err := s.ownersOf(ctx, owners, known); err != nil {
		return pool.Group{}, nil, err
	}
	if len(known) == 0 { // then it may be anywhere
		members, err := s.fleet.list(ctx)
		if err != nil {
			return pool.Group{}, nil, err
		}
		for _, m := range members {
			owners[m.Segment] = m
		}
	}
	group, found, err := findOn(ctx, id, owners)
	if err != nil {
		return pool.Group{}, nil, err
	}
	more := map[string]member{}
	if err := s.ownersOf(ctx, more, group.Volumes); err != nil {
		return pool.Group{}, nil, err
	}
	for segment := range owners {
		delete(more, segment)
	}
	_, rest, err := findOn(ctx, id, more)
	if err != nil {
		return pool.Group{}, nil, err
	}
	found = append(found, rest...)
	if err := s.mustBeKnown(ctx, id, found, known); err != nil {
		return pool.Group{}, nil, err
	}
	if len(found) == 0 {
		return pool.Group{}, nil, pool.Errorf(pool.ErrNotFound, "group snapshot %.130q does not exist", id)
	}
	return group, found, nil
}

// ownersOf adds the nodes that have what the IDs name. What is nowhere has none.
func (s *Server) ownersOf(ctx context.Context, owners map[string]member, ids []string) error {
	for _, id := range ids {
		m, err := s.owner(ctx, id)
		if errors.Is(err, pool.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		owners[m.Segment] = m
	}
	return nil
}

func findOn(ctx context.Context, id string, owners map[string]member) (group pool.Group, found []part, err error) {
	var members []member
	for _, m := range owners {
		members = append(members, m)
	}
	for _, a := range ask(ctx, members, func(ctx context.Context, m member) (*peerapi.FindResponse, error) {
		return m.groups.Find(ctx, &peerapi.FindRequest{GroupSnapshotId: id})
	}) {
		switch {
		case is(a.err, codes.NotFound):
		case a.err != nil:
			return pool.Group{}, nil, a.err
		default:
			group = peerapi.ToGroup(a.value.GetGroup())
			found = append(found, part{a.member, peerapi.ToSnapshots(a.value.GetSnapshots())})
		}
	}
	return group, found, nil
}

// mustBeKnown compares a group with the snapshots that the orchestrator takes
// for it.
func (s *Server) mustBeKnown(ctx context.Context, id string, found []part, known []string) error {
	members := map[string]bool{}
	for _, p := range found {
		for _, snapshot := range p.snapshots {
			members[snapshot.ID] = true
			if !slices.Contains(known, snapshot.ID) {
				return pool.Errorf(pool.ErrInvalid, "snapshot_ids: group snapshot %s has snapshot %s too", id, snapshot.ID)
			}
		}
	}
	for _, other := range known {
		if members[other] {
			continue
		}
		m, err := s.owner(ctx, other)
		if errors.Is(err, pool.ErrNotFound) {
			continue
		}
		if err == nil {
			_, err = m.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: other})
			if is(err, codes.NotFound) {
				continue
			}
		}
		if err != nil {
			return err
		}
		return pool.Errorf(pool.ErrInvalid, "snapshot_ids: snapshot %s is not of group snapshot %s", other, id)
	}
	return nil
}

// DeleteVolumeGroupSnapshot implements csi.GroupControllerServer.
func (s *Server) DeleteVolumeGroupSnapshot(ctx context.Context, r *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	if err := request.Required("group_snapshot_id", r.GetGroupSnapshotId()); err != nil {
		return nil, err
	}
	_, found, err := s.parts(ctx, r.GetGroupSnapshotId(), r.GetSnapshotIds())
	if err != nil && !errors.Is(err, pool.ErrNotFound) {
		return nil, err
	}
	if err := deleteParts(ctx, r.GetGroupSnapshotId(), found, r.GetSecrets()); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
}

// deleteParts removes a group from the nodes that have some of it.
func deleteParts(ctx context.Context, id string, found []part, secrets map[string]string) error {
	for _, p := range found {
		var ids []string
		for _, snapshot := range p.snapshots {
			ids = append(ids, snapshot.ID)
		}
		if _, err := p.groupController.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{
			GroupSnapshotId: id, SnapshotIds: ids, Secrets: secrets,
		}); err != nil {
			return at(ctx, p.member, err)
		}
	}
	return nil
}

// removeGroup removes the group of an orphan, which cannot go alone. All of its
// snapshots, on whatever nodes, must be orphans.
func (o *Orphans) removeGroup(ctx context.Context, members []member, claims Claims, id string) error {
	owners := map[string]member{}
	for _, m := range members {
		owners[m.Segment] = m
	}
	group, found, err := findOn(ctx, id, owners)
	if err != nil {
		return err
	}
	end, err := o.server.names.Begin("group snapshot "+group.Name, pool.Delete)
	if err != nil {
		return err
	}
	defer end()
	for _, p := range found {
		for _, snapshot := range p.snapshots {
			t := thing{KindSnapshot, snapshot.ID}
			h, known := o.known[t]
			if known {
				h.judge(claims, o.grace)
				o.known[t] = h
			}
			if !h.Orphan {
				return pool.Errorf(pool.ErrPrecondition, "group snapshot %s, which can only be removed as a whole, has snapshot %s, which is no orphan", id, snapshot.ID)
			}
		}
	}
	// What is known of the others stays until the next scan: to remove them,
	// too, is no error.
	return deleteParts(ctx, id, found, nil)
}

// GetVolumeGroupSnapshot implements csi.GroupControllerServer.
func (s *Server) GetVolumeGroupSnapshot(ctx context.Context, r *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	if err := request.Required("group_snapshot_id", r.GetGroupSnapshotId()); err != nil {
		return nil, err
	}
	group, found, err := s.parts(ctx, r.GetGroupSnapshotId(), r.GetSnapshotIds())
	if err != nil {
		return nil, err
	}
	var members []pool.Snapshot
	var snapshots []*csi.Snapshot
	for _, p := range found {
		members = append(members, p.snapshots...)
		for _, snapshot := range p.snapshots {
			snapshots = append(snapshots, converted(group.ID, snapshot, p.member))
		}
	}
	if err := group.MustBeWhole(members); err != nil {
		return nil, err
	}
	slices.SortFunc(snapshots, func(a, b *csi.Snapshot) int { return cmp.Compare(a.GetSnapshotId(), b.GetSnapshotId()) })
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: controller.GroupSnapshot(group.ID, snapshots)}, nil
}
