package router

import (
	"cmp"
	"context"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// CreateVolume implements csi.ControllerServer.
//
// If one node is named, as by a scheduler that waits for the first consumer, it
// is that one. Otherwise the nodes are asked first whether one has a volume of
// that name already, for a retry must find what the first try made, and only
// then the one with most room is taken. Should a node not answer that might
// have it, the answer is UNAVAILABLE: rather later than twice.
func (s *Server) CreateVolume(ctx context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if err := request.Required("name", r.GetName()); err != nil {
		return nil, err
	}
	candidates, err := s.candidates(ctx, r)
	if err != nil {
		return nil, err
	}
	if len(candidates) == 1 {
		response, err := candidates[0].CreateVolume(ctx, r)
		return response, at(candidates[0], err)
	}
	existing, err := find(ctx, candidates, "volume "+r.GetName(), func(ctx context.Context, m member) (*csi.CreateVolumeResponse, error) {
		return m.CreateVolume(request.WithExistingOnly(ctx), r)
	})
	if err != nil || existing != nil {
		return existing, err
	}
	roomiest, err := rank(ctx, candidates, r)
	if err != nil {
		return nil, err
	}
	response, err := roomiest.CreateVolume(ctx, r)
	return response, at(roomiest, err)
}

// candidates are the nodes where a volume can be made: those that the topology
// allows, and of these the one that has the source if there is one.
func (s *Server) candidates(ctx context.Context, r *csi.CreateVolumeRequest) ([]member, error) {
	members, err := s.fleet.list(ctx)
	if err != nil {
		return nil, err
	}
	members = slices.DeleteFunc(members, func(m member) bool {
		return !request.Reachable(r.GetAccessibilityRequirements(), m.Segment)
	})
	if source := r.GetVolumeContentSource(); source != nil && len(members) > 0 {
		owner, err := s.sourceOwner(ctx, source)
		if err != nil {
			return nil, err
		}
		members = slices.DeleteFunc(members, func(m member) bool { return m.Segment != owner.Segment })
		if len(members) == 0 {
			return nil, pool.Errorf(pool.ErrNoSpace, "the source is on node %s, which accessibility_requirements do not allow", owner.Segment)
		}
	}
	if len(members) == 0 {
		return nil, pool.Errorf(pool.ErrNoSpace, "accessibility_requirements allow no node that there is")
	}
	return members, nil
}

func (s *Server) sourceOwner(ctx context.Context, source *csi.VolumeContentSource) (member, error) {
	if id := source.GetSnapshot().GetSnapshotId(); id != "" {
		return s.snapshotOwner(ctx, id)
	}
	id := source.GetVolume().GetVolumeId()
	if err := request.Required("volume_content_source", id); err != nil {
		return member{}, err
	}
	return s.volumeOwner(ctx, id)
}

// find asks all nodes for something that exists, and gives it, or nil if none
// has it. An answer that is neither yes nor no is an error.
func find[T any](ctx context.Context, members []member, what string, call func(context.Context, member) (*T, error)) (*T, error) {
	var unclear error
	for _, a := range ask(ctx, members, call) {
		switch {
		case a.err == nil:
			return a.value, nil
		case is(a.err, codes.NotFound):
		case is(a.err, codes.Unavailable), is(a.err, codes.DeadlineExceeded):
			unclear = cmp.Or(unclear, pool.Errorf(pool.ErrUnavailable, "whether %s exists already is unknown: %w", what, a.err))
		default: // such as ALREADY_EXISTS, or ABORTED: it is there, or is being made
			return nil, a.err
		}
	}
	return nil, unclear
}

// rank finds the node that has most room for a volume.
func rank(ctx context.Context, members []member, r *csi.CreateVolumeRequest) (member, error) {
	answers := ask(ctx, members, func(ctx context.Context, m member) (*csi.GetCapacityResponse, error) {
		return m.GetCapacity(ctx, &csi.GetCapacityRequest{
			VolumeCapabilities: r.GetVolumeCapabilities(),
			Parameters:         r.GetParameters(),
		})
	})
	answered := slices.DeleteFunc(slices.Clone(answers), func(a answer[*csi.GetCapacityResponse]) bool { return a.err != nil })
	if len(answered) == 0 {
		return member{}, answers[0].err
	}
	best := slices.MaxFunc(answered, func(a, b answer[*csi.GetCapacityResponse]) int {
		return cmp.Compare(a.value.GetAvailableCapacity(), b.value.GetAvailableCapacity())
	})
	return best.member, nil
}

// CreateSnapshot implements csi.ControllerServer. A snapshot is where its volume
// is. That another node has one of that name, of another volume, is looked for
// among those that answer: it is no danger, but the wrong answer.
func (s *Server) CreateSnapshot(ctx context.Context, r *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if err := request.Required("name", r.GetName()); err != nil {
		return nil, err
	}
	if err := request.Required("source_volume_id", r.GetSourceVolumeId()); err != nil {
		return nil, err
	}
	owner, err := s.volumeOwner(ctx, r.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	members, err := s.fleet.list(ctx)
	if err != nil {
		return nil, err
	}
	others := slices.DeleteFunc(members, func(m member) bool { return m.Segment == owner.Segment })
	for _, a := range ask(ctx, others, func(ctx context.Context, m member) (*csi.CreateSnapshotResponse, error) {
		return m.CreateSnapshot(request.WithExistingOnly(ctx), r)
	}) {
		if is(a.err, codes.AlreadyExists) {
			return nil, a.err
		}
	}
	response, err := owner.CreateSnapshot(ctx, r)
	return response, at(owner, err)
}
