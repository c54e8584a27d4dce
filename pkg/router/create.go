package router

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// CreateVolume implements csi.ControllerServer.
//
// If only one node is allowed, as by a scheduler that waits for the first
// consumer, it is that one, and no other is asked. Otherwise the nodes are asked
// first whether one has a volume of that name already, for a retry must find
// what the first try made. Should a node not answer that might have it, the
// answer is UNAVAILABLE: rather later than twice. Only then one is picked: in
// the order in which the orchestrator prefers them, and else the one with most
// room. That of the source, if there is one, comes before all others: there it
// takes no time. Elsewhere, the source is copied.
//
// A retry that allows only another node than the first try did makes the volume
// there. What the first try may have made has never been handed out, is where
// this volume must not be, and is left to be reported as an orphan: nothing is
// removed on a guess.
func (s *Server) CreateVolume(ctx context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if err := request.Required("name", r.GetName()); err != nil {
		return nil, err
	}
	end, err := s.names.Begin("volume "+pool.NameFor(r.GetName()), pool.Create)
	if err != nil {
		return nil, err
	}
	defer end()
	candidates, owner, err := s.candidates(ctx, r)
	if err != nil {
		return nil, err
	}
	create := func(ctx context.Context, m member) (*csi.CreateVolumeResponse, error) {
		if owner.Segment != "" && owner.Segment != m.Segment {
			return s.copyTo(ctx, m, owner, r)
		}
		response, err := m.CreateVolume(ctx, r)
		return response, at(ctx, m, err)
	}
	if len(candidates) == 1 {
		return create(ctx, candidates[0])
	}
	existing, err := find(ctx, candidates, "volume "+r.GetName(), func(ctx context.Context, m member) (*csi.CreateVolumeResponse, error) {
		return m.CreateVolume(request.WithExistingOnly(ctx), r)
	})
	if err != nil || existing != nil {
		return existing, err
	}
	return place(ctx, candidates, owner.Segment, r, create)
}

// candidates are the nodes where a volume can be made, those that the topology
// allows, and the one that has the source if there is a source.
func (s *Server) candidates(ctx context.Context, r *csi.CreateVolumeRequest) (members []member, owner member, err error) {
	members, err = s.fleet.list(ctx)
	if err != nil {
		return nil, member{}, err
	}
	if len(members) == 0 {
		return nil, member{}, pool.Errorf(pool.ErrUnavailable, "there is no node yet that could hold volume %s", r.GetName())
	}
	all := names(members)
	members = slices.DeleteFunc(members, func(m member) bool {
		return !request.Reachable(r.GetAccessibilityRequirements(), m.Segment)
	})
	if len(members) == 0 {
		return nil, member{}, pool.Errorf(pool.ErrNoSpace, "accessibility_requirements allow no node that there is; there are %s", all)
	}
	if source := r.GetVolumeContentSource(); source != nil {
		owner, err = s.sourceOwner(ctx, source)
	}
	return members, owner, err
}

// names lists the first nodes.
func names(members []member) string {
	const most = 5
	var list []string
	for i, m := range members {
		if i == most {
			list = append(list, fmt.Sprintf("and %d more", len(members)-most))
			break
		}
		list = append(list, m.Segment)
	}
	return strings.Join(list, ", ")
}

func (s *Server) sourceOwner(ctx context.Context, source *csi.VolumeContentSource) (member, error) {
	id := cmp.Or(source.GetSnapshot().GetSnapshotId(), source.GetVolume().GetVolumeId())
	if err := request.Required("volume_content_source", id); err != nil {
		return member{}, err
	}
	return s.owner(ctx, id)
}

// find asks all nodes for something that exists, and gives it, or nil if none
// has it. Unless one has it, an answer that is neither yes nor no is
// pool.ErrUnavailable.
func find[T any](ctx context.Context, members []member, what string, call func(context.Context, member) (*T, error)) (*T, error) {
	answers := ask(ctx, members, call)
	if err := ended(ctx); err != nil {
		return nil, err
	}
	var refused, unclear error
	for _, a := range answers {
		switch {
		case a.err == nil:
			return a.value, nil
		case is(a.err, codes.NotFound):
		case tells(a.err): // such as ALREADY_EXISTS, or ABORTED: it is being made
			refused = cmp.Or(refused, a.err)
		case unclear == nil:
			unclear = pool.Errorf(pool.ErrUnavailable, "whether %s exists already is unknown: %s", what, said(a.err))
		}
	}
	return nil, cmp.Or(refused, unclear)
}

// place makes a volume that does not exist yet on the best of several nodes that
// has room for it. That none has is RESOURCE_EXHAUSTED only if all say so.
func place(ctx context.Context, members []member, owner string, r *csi.CreateVolumeRequest, create func(context.Context, member) (*csi.CreateVolumeResponse, error)) (*csi.CreateVolumeResponse, error) {
	answers := ask(ctx, members, func(ctx context.Context, m member) (*csi.GetCapacityResponse, error) {
		return m.GetCapacity(ctx, &csi.GetCapacityRequest{
			VolumeCapabilities: r.GetVolumeCapabilities(),
			Parameters:         r.GetParameters(),
		})
	})
	if err := ended(ctx); err != nil {
		return nil, err
	}
	var unclear error
	for _, a := range answers {
		if is(a.err, codes.InvalidArgument) { // and would be on any node
			return nil, a.err
		}
		unclear = cmp.Or(unclear, a.err)
	}
	answers = slices.DeleteFunc(answers, func(a answer[*csi.GetCapacityResponse]) bool { return a.err != nil })
	fits := func(a answer[*csi.GetCapacityResponse]) bool {
		return a.value.GetMaximumVolumeSize().GetValue() >= r.GetCapacityRange().GetRequiredBytes()
	}
	slices.SortStableFunc(answers, func(a, b answer[*csi.GetCapacityResponse]) int {
		return cmp.Or(
			-compareBools(fits(a), fits(b)),
			-compareBools(a.Segment == owner, b.Segment == owner),
			cmp.Compare(preference(r, a.Segment), preference(r, b.Segment)),
			-cmp.Compare(a.value.GetAvailableCapacity(), b.value.GetAvailableCapacity()),
		)
	})
	var full error
	for _, a := range answers { // also those without room: they may just be getting some
		response, err := create(ctx, a.member)
		if !is(err, codes.ResourceExhausted) {
			return response, err
		}
		full = cmp.Or(full, err)
	}
	if unclear != nil {
		return nil, pool.Errorf(pool.ErrUnavailable, "no node that answers has room for volume %s; %s", r.GetName(), said(unclear))
	}
	return nil, full
}

// preference is where a node stands among those that the orchestrator would like
// best; those that it does not name come after (CSI spec v1.13.0,
// TopologyRequirement.preferred).
func preference(r *csi.CreateVolumeRequest, segment string) int {
	preferred := r.GetAccessibilityRequirements().GetPreferred()
	if i := slices.IndexFunc(preferred, func(t *csi.Topology) bool { return request.Matches(t, segment) }); i >= 0 {
		return i
	}
	return len(preferred)
}

func compareBools(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	default:
		return -1
	}
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
	end, err := s.names.Begin("snapshot "+pool.NameFor(r.GetName()), pool.Create)
	if err != nil {
		return nil, err
	}
	defer end()
	owner, err := s.owner(ctx, r.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	members, err := s.fleet.list(ctx)
	if err != nil {
		return nil, err
	}
	others := slices.DeleteFunc(members, func(m member) bool { return m.Segment == owner.Segment })
	anywhere := proto.CloneOf(r) // the others are not where it is to be
	anywhere.AccessibilityRequirements = nil
	for _, a := range ask(ctx, others, func(ctx context.Context, m member) (*csi.CreateSnapshotResponse, error) {
		return m.CreateSnapshot(request.WithExistingOnly(ctx), anywhere)
	}) {
		if is(a.err, codes.AlreadyExists) {
			return nil, a.err
		}
	}
	response, err := owner.CreateSnapshot(ctx, r)
	return response, at(ctx, owner, err)
}
