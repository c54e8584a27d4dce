package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// leaseLimit bounds how long a router may take over a group. Writers are held
// for far less: an engine sees to that.
const leaseLimit = 2 * time.Minute

// Groups implements peerapi.GroupsServer: the part that this node has in groups
// whose volumes are on several nodes.
type Groups struct {
	peerapi.UnimplementedGroupsServer

	pools *pool.Set
}

// NewGroups makes the service.
func NewGroups(pools *pool.Set) *Groups { return &Groups{pools: pools} }

// Find implements peerapi.GroupsServer.
func (g *Groups) Find(_ context.Context, r *peerapi.FindRequest) (*peerapi.FindResponse, error) {
	if err := request.Required("group_snapshot_id", r.GetGroupSnapshotId()); err != nil {
		return nil, err
	}
	group, members, err := g.pools.Group(r.GetGroupSnapshotId())
	if err != nil {
		return nil, err
	}
	return &peerapi.FindResponse{Group: peerapi.FromGroup(group), Snapshots: peerapi.FromSnapshots(members)}, nil
}

// Cut implements peerapi.GroupsServer. The end of the stream is seen between two
// phases; none of them takes long.
func (g *Groups) Cut(stream peerapi.Groups_CutServer) (err error) {
	ctx, cancel := context.WithTimeout(stream.Context(), leaseLimit)
	defer cancel()
	begin, err := next(stream, peerapi.Phase_PHASE_BEGIN)
	if err != nil {
		return err
	}
	group := peerapi.ToGroup(begin.GetGroup())
	end, err := g.pools.BeginGroup(group.ID, pool.Create)
	if err != nil {
		return err
	}
	defer end()
	existing, members, err := g.pools.Group(group.ID)
	if err != nil && !errors.Is(err, pool.ErrNotFound) {
		return err
	}
	if err == nil && !existing.Same(group) {
		return pool.Errorf(pool.ErrExists, "group snapshot %s exists, of other volumes", group.ID)
	}
	if err := stream.Send(&peerapi.CutResponse{Snapshots: peerapi.FromSnapshots(members)}); err != nil {
		return err
	}
	prepare, err := next(stream, peerapi.Phase_PHASE_PREPARE)
	if errors.Is(err, io.EOF) {
		return nil // the group is whole
	}
	if err != nil {
		return err
	}
	if err := g.pools.ClearGroup(ctx, group.ID); err != nil {
		return err
	}
	c, err := g.pools.PrepareGroup(ctx, group, prepare.GetVolumeIds())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := stream.Send(&peerapi.CutResponse{}); err != nil {
		return err
	}
	return follow(ctx, stream, c)
}

// follow takes the node's part through the phases as the router asks for them.
func follow(ctx context.Context, stream peerapi.Groups_CutServer, c pool.Cutting) error {
	for _, step := range []struct {
		phase peerapi.Phase
		do    func(context.Context) error
	}{
		{peerapi.Phase_PHASE_HOLD, c.Hold},
		{peerapi.Phase_PHASE_CUT, c.Cut},
		{peerapi.Phase_PHASE_CHECK, c.Check},
		{peerapi.Phase_PHASE_RELEASE, c.Release},
		{peerapi.Phase_PHASE_PLACE, nil},
		{peerapi.Phase_PHASE_CONFIRM, c.Confirm},
	} {
		if _, err := next(stream, step.phase); err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("the router gave the group up before %s: %w", step.phase, context.Canceled)
			}
			return err
		}
		response := &peerapi.CutResponse{}
		if step.do == nil {
			snapshots, err := c.Place(ctx)
			if err != nil {
				return err
			}
			response.Snapshots = peerapi.FromSnapshots(snapshots)
		} else if err := step.do(ctx); err != nil {
			return err
		}
		if err := stream.Send(response); err != nil {
			return err
		}
	}
	_, err := stream.Recv() // until every node has confirmed
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// next waits for the router to ask for a phase, which must be this one.
func next(stream peerapi.Groups_CutServer, phase peerapi.Phase) (*peerapi.CutRequest, error) {
	r, err := stream.Recv()
	if err == nil && r.GetPhase() != phase {
		err = pool.Errorf(pool.ErrInvalid, "phase %s: it is the turn of %s", r.GetPhase(), phase)
	}
	return r, err
}
