package router

import (
	"context"
	"errors"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// DeleteVolume implements csi.ControllerServer. What was on a node that is gone
// for good is gone with it, and is deleted as soon as it is asked for.
func (s *Server) DeleteVolume(ctx context.Context, r *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	response, err := forward(ctx, s, r, "volume_id", r.GetVolumeId(), csi.ControllerClient.DeleteVolume)
	if errors.Is(err, pool.ErrNotFound) {
		return &csi.DeleteVolumeResponse{}, nil
	}
	return response, err
}

// DeleteSnapshot implements csi.ControllerServer, likewise.
func (s *Server) DeleteSnapshot(ctx context.Context, r *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	response, err := forward(ctx, s, r, "snapshot_id", r.GetSnapshotId(), csi.ControllerClient.DeleteSnapshot)
	if errors.Is(err, pool.ErrNotFound) {
		return &csi.DeleteSnapshotResponse{}, nil
	}
	return response, err
}
