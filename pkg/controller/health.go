package controller

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/request"
)

// ControllerGetVolumeHealth implements csi.ControllerServer.
func (s *Server) ControllerGetVolumeHealth(ctx context.Context, r *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	conditions, err := s.pools.VolumeHealth(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: request.Health(r.GetVolumeId(), conditions)}, nil
}

// ControllerListVolumeHealth implements csi.ControllerServer. It lists the
// volumes with something wrong.
func (s *Server) ControllerListVolumeHealth(ctx context.Context, r *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	most, err := pageSize(r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	page, next, err := s.pools.Unhealthy(ctx, r.GetStartingToken(), most)
	if err != nil {
		return nil, err
	}
	response := &csi.ControllerListVolumeHealthResponse{NextToken: next}
	for _, u := range page {
		response.Entries = append(response.Entries, request.Health(u.ID, u.Conditions))
	}
	return response, nil
}
