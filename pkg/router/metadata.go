package router

import (
	"context"
	"errors"
	"io"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// GetMetadataAllocated implements csi.SnapshotMetadataServer: the stream of the
// node that has the snapshot.
func (s *Server) GetMetadataAllocated(r *csi.GetMetadataAllocatedRequest, out csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	ctx := out.Context()
	if err := request.Required("snapshot_id", r.GetSnapshotId()); err != nil {
		return err
	}
	m, err := s.owner(ctx, r.GetSnapshotId())
	if err != nil {
		return err
	}
	in, err := m.GetMetadataAllocated(ctx, r)
	if err != nil {
		return at(ctx, m, err)
	}
	return relay(ctx, m, in, out)
}

// GetMetadataDelta implements csi.SnapshotMetadataServer, likewise. Snapshots of
// one volume are on one node.
func (s *Server) GetMetadataDelta(r *csi.GetMetadataDeltaRequest, out csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	ctx := out.Context()
	if err := request.Required("base_snapshot_id", r.GetBaseSnapshotId()); err != nil {
		return err
	}
	if err := request.Required("target_snapshot_id", r.GetTargetSnapshotId()); err != nil {
		return err
	}
	base, err := s.owner(ctx, r.GetBaseSnapshotId())
	if err != nil {
		return err
	}
	target, err := s.owner(ctx, r.GetTargetSnapshotId())
	if err != nil {
		return err
	}
	if base.Segment != target.Segment {
		// That one does not exist is the better answer.
		if _, err := base.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: r.GetBaseSnapshotId()}); err != nil {
			return at(ctx, base, err)
		}
		if _, err := target.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: r.GetTargetSnapshotId()}); err != nil {
			return at(ctx, target, err)
		}
		return pool.Errorf(pool.ErrPrecondition, "snapshot %s is on node %s and snapshot %s on node %s: only of one volume can be told what changed", r.GetBaseSnapshotId(), base.Segment, r.GetTargetSnapshotId(), target.Segment)
	}
	in, err := target.GetMetadataDelta(ctx, r)
	if err != nil {
		return at(ctx, target, err)
	}
	return relay(ctx, target, in, out)
}

// relay passes a node's stream on, message by message, so that a slow reader
// slows the node down and not the router's memory. It ends as the node's ends;
// one whose reader has gone ends the node's, by its context.
func relay[Response any](ctx context.Context, m member, in interface{ Recv() (Response, error) }, out interface{ Send(message Response) error }) error {
	for {
		response, err := in.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return at(ctx, m, err)
		}
		if err := out.Send(response); err != nil {
			return err
		}
	}
}
