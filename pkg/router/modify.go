package router

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// ControllerModifyVolume implements csi.ControllerServer.
func (s *Server) ControllerModifyVolume(ctx context.Context, r *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	return forward(ctx, s, r, "volume_id", r.GetVolumeId(), csi.ControllerClient.ControllerModifyVolume)
}
