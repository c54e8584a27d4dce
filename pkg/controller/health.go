package controller

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/request"
)

// ControllerGetVolumeHealth implements csi.ControllerServer. A volume can be used
// on this node alone, so that what is wrong with it here is wrong everywhere.
func (s *Server) ControllerGetVolumeHealth(ctx context.Context, r *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	engine, name, err := s.pools.Locate(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	conditions, err := s.node.VolumesHealth(ctx, engine, []string{name})
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: request.Health(r.GetVolumeId(), conditions[name])}, nil
}

// ControllerListVolumeHealth implements csi.ControllerServer. It lists the
// volumes with something wrong.
func (s *Server) ControllerListVolumeHealth(ctx context.Context, r *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	most, err := pageSize(r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	page, next, err := s.pools.Unhealthy(ctx, s.node.VolumesHealth, r.GetStartingToken(), most)
	if err != nil {
		return nil, err
	}
	response := &csi.ControllerListVolumeHealthResponse{NextToken: next}
	for _, u := range page {
		response.Entries = append(response.Entries, request.Health(u.ID, u.Conditions))
	}
	return response, nil
}
