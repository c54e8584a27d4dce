package router

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// Health asks all nodes at once which of their volumes have something wrong, and
// gives the answers by the nodes' segments. A node that does not answer is not
// in it: of its volumes nothing is known.
func (s *Server) Health(ctx context.Context) (map[string][]*csi.VolumeHealth, error) {
	members, err := s.fleet.list(ctx)
	if err != nil {
		return nil, err
	}
	told := map[string][]*csi.VolumeHealth{}
	for _, a := range ask(ctx, members, func(ctx context.Context, m member) ([]*csi.VolumeHealth, error) {
		response, err := m.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
		return response.GetEntries(), err
	}) {
		if a.err == nil {
			told[a.Segment] = a.value
		}
	}
	return told, nil
}
