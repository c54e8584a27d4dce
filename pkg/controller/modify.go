package controller

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// ControllerModifyVolume implements csi.ControllerServer: it changes the limits
// that the parameters name, on disk first and then for the pods that use the
// volume. A call that fails in between is completed by its retry. That no
// parameter changes nothing, and is no error, is what csi-sanity wants.
func (s *Server) ControllerModifyVolume(ctx context.Context, r *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	end, err := s.pools.Begin(r.GetVolumeId(), pool.Modify)
	if err != nil {
		return nil, err
	}
	defer end()
	engine, v, err := s.pools.Volume(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	limits, err := request.ChangeLimits(v.Limits, r.GetMutableParameters())
	if err != nil {
		return nil, err
	}
	if v, err = engine.SetLimits(ctx, v.Name, limits); err != nil {
		return nil, err
	}
	if err := s.node.EnforceLimits(engine, v); err != nil {
		return nil, fmt.Errorf("the new limits of volume %s are recorded, and do not hold yet: %w", v.ID, err)
	}
	return &csi.ControllerModifyVolumeResponse{}, nil
}
